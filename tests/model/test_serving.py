"""A version proved as it is loaded, the model in memory, and what becomes of a model's results."""

import dataclasses
import datetime
import hashlib
import json
import os
import pickle
import re
import shutil
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import orjson
import pandas as pd
import pytest
import scipy.sparse
from conftest import records
from sklearn.datasets import load_iris
from sklearn.ensemble import HistGradientBoostingClassifier, IsolationForest, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from model import demo
from model.formats import ModelLoadError
from model.loaded import ModelFailed, RowsRefused, as_json, load_version, same_predictions
from model.serving import ModelNotReady, Serving
from model.versions import publishing
from model.versions.store import Manifest, Routing, Store, write_json
from model.versions.worker_status import Roster

IRIS = load_iris(as_frame=True)
SAMPLE = [[5.1, 3.5, 1.4, 0.2], [7.0, 3.2, 4.7, 1.4], [6.3, 3.3, 6.0, 2.5]]


@pytest.fixture(scope="module")
def model() -> Any:
    """A small classifier."""
    return KNeighborsClassifier().fit(IRIS.data, IRIS.target)


@pytest.fixture
def artifact(tmp_path: Path, model: Any) -> Path:
    """The classifier in a file."""
    joblib.dump(model, tmp_path / "iris.joblib")
    return tmp_path / "iris.joblib"


@pytest.fixture
def store(tmp_path: Path, artifact: Path) -> Path:
    """A version store that serves the classifier as version 1."""
    put(tmp_path / "store", artifact, SAMPLE, [0, 1, 2])
    return tmp_path / "store"


def put(store: Path, artifact: Path, sample: list[Any], predictions: list[Any]) -> None:
    """Make a file the stable version 1, without the proof in fresh processes."""
    with Store(store).prepare(artifact, "1") as (manifest, beside):
        about = manifest.about | {"sample": sample, "predictions": predictions}
        Store(store).publish(dataclasses.replace(manifest, about=about), beside)
    Store(store).promote("1")


def stable(store: Path) -> Manifest:
    """Read the manifest of the stable version."""
    return Manifest.read(store, Routing.read(store).stable)


def edit(store: Path, **changes: Any) -> None:
    """Change version 1's manifest; `...` removes a key."""
    path = store / "1" / "manifest.json"
    known = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in known.items() if value is not ...}))


def served(**where: Any) -> Serving:
    """Start serving and wait for the first load."""
    serving = Serving(**where)
    serving.start()
    assert serving.finished.wait(60)
    return serving


def tree(directory: Path) -> list[str]:
    """List what is in a store, but the lock."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.name != ".lock")


def stop(*_: Any, **__: Any) -> None:
    """Stop the process, as Ctrl-C does."""
    raise KeyboardInterrupt


# --- what cannot be read


def test_empty_store_says_how_to_fill_it(tmp_path: Path) -> None:
    error = served(model_dir=tmp_path).describe()["error"]
    assert re.search(r"python -m model\.demo .*MODEL_PATH=", error)


ROUTINGS = ["", "{", "[]", "null", '"1"', "{}", '{"stable": null}', '{"stable": []}', '{"stable": {"a": 1}}', "\xff"]


@pytest.mark.parametrize("text", ROUTINGS, ids=ascii)
def test_broken_routing_is_named_and_nothing_is_served(store: Path, text: str) -> None:
    (store / "routing.json").write_text(text, "latin-1")
    assert "routing.json cannot be used" in served(model_dir=store).describe()["error"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '"x"', "\xff"], ids=ascii)
def test_broken_manifest_is_a_load_error_that_names_the_file(store: Path, text: str) -> None:
    (store / "1/manifest.json").write_text(text, "latin-1")
    with pytest.raises(ModelLoadError, match=r"1/manifest\.json cannot be used"):
        stable(store)


@pytest.mark.parametrize("key", ["version", "artifact", "sha256", "sample", "predictions"])
def test_manifest_without_a_key_is_a_load_error_that_names_it(store: Path, key: str) -> None:
    edit(store, **{key: ...})
    with pytest.raises(ModelLoadError, match=key):
        stable(store)


def test_directory_without_manifest_is_no_version(store: Path) -> None:
    (store / "1/manifest.json").unlink()
    with pytest.raises(ModelLoadError, match=r"1/manifest\.json cannot be used: FileNotFoundError"):
        stable(store)


# --- loading proves a version


class Marks:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def refusal(store: Path) -> str:
    """Return why the stable version is not served."""
    with pytest.raises(ModelLoadError) as error:
        load_version(stable(store))
    return str(error.value)


def test_changed_artifact_is_refused_before_it_is_unpickled(store: Path, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", store / "1/model.joblib"
    path.unlink()
    path.write_bytes(pickle.dumps(Marks(marker)))
    why = refusal(store)
    assert f"{path} is not the file that was published" in why
    assert hashlib.sha256(path.read_bytes()).hexdigest() in why
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # it does write where it is unpickled


@pytest.mark.parametrize("sha256", ["", None, "0" * 64, 0, [], "SHA256"], ids=str)
def test_manifest_without_the_artifacts_hash_is_refused(store: Path, tmp_path: Path, sha256: Any) -> None:
    marker, path = tmp_path / "marker", store / "1/model.joblib"
    path.unlink()
    path.write_bytes(pickle.dumps(Marks(marker)))
    edit(store, sha256=sha256)
    refusal(store)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../secret.joblib", "/secret.joblib", "../1/../../secret.joblib"])
def test_artifact_outside_its_version_is_not_read(store: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    for place in (store.parent, store):
        (place / "secret.joblib").write_bytes(pickle.dumps(Marks(marker)))
    sha256 = hashlib.sha256((store / "secret.joblib").read_bytes()).hexdigest()
    edit(store, artifact=name, sha256=sha256)
    refusal(store)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["gone.joblib", "", ".", "..", "manifest.json", "a\0b", 5, None], ids=ascii)
def test_artifact_that_is_not_there_is_a_load_error(store: Path, name: Any) -> None:
    edit(store, artifact=name)
    assert "version 1" in refusal(store) or "manifest.json" in refusal(store)


def test_bare_file_that_is_not_there_is_a_load_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"gone\.joblib"):
        load_version(Manifest(tmp_path / "gone.joblib"))


@pytest.mark.parametrize(
    "predictions",
    [
        [0, 1, 1],
        [0, 1],
        [0, 1, 2, 2],
        [],
        [[0], [1], [2]],
        ["0", "1", "2"],
        [0.5, 1, 2],
        [None, 1, 2],
        [[0], 1, 2],
        "012",
        0,
        {},
    ],
    ids=str,
)
def test_version_that_answers_its_sample_otherwise_is_refused(store: Path, predictions: Any) -> None:
    edit(store, predictions=predictions)
    assert "version 1 answers its recorded sample otherwise than when it was published" in refusal(store)


@pytest.mark.parametrize(
    "sample",
    [[[1.0]], [["a", 1, 2, 3]], [[None, 1, 2, 3]], [1.0], [{"a": 1}], "rows", {"a": 1}, 5],
    ids=str,
)
def test_sample_that_the_model_refuses_is_a_load_error(store: Path, sample: Any) -> None:
    edit(store, sample=sample, predictions=[0])
    assert "sample" in refusal(store)


def test_sample_with_objects_and_missing_values_is_replayed(tmp_path: Path) -> None:
    model = HistGradientBoostingClassifier(max_iter=3).fit(IRIS.data, IRIS.target)
    joblib.dump(model, tmp_path / "model.joblib")
    row = dict(zip(IRIS.feature_names, [None, 3.5, 1.4, 0.2], strict=True))
    put(tmp_path / "store", tmp_path / "model.joblib", [row], [0])
    loaded = load_version(stable(tmp_path / "store"))
    assert loaded.about["proved_with"] == "its recorded sample"


@pytest.mark.parametrize(
    ("now", "recorded", "same"),
    [
        (np.array([1.0, 2.0]), [1.0, 2.0], True),
        (np.array([1.0]), [1.0 + 1e-10], True),
        (np.array([1.0]), [1.0 + 1e-8], False),
        (np.array([1e-300, 1e300]), [1e-300, 1e300], True),
        (np.array([1e-10]), [2e-10], False),
        (np.array([np.nan, 1.0]), [np.nan, 1.0], True),
        (np.array([np.nan, np.inf]), [None, None], True),  # recorded as our own answers write them
        (np.array([1.0]), [None], False),
        (["a", "b"], ["a", "b"], True),
        (["a", "b"], ["a", "c"], False),
        (np.array([True]), [True], True),
        (np.array([True]), [False], False),
        (np.array([2**60 + 1]), [2**60], False),
        (np.array([1.5]), ["1.5"], False),
        (np.array([1.5]), ["a"], False),
        (["1"], [1], False),
        (np.array([1, 2]), [[1], [2]], False),
        (np.array([1, 2]), [[1], 2], False),
        (np.array([[1.0, 2.0]]), [[1.0, 2.0]], True),
        ([None, "a"], [None, "a"], True),
    ],
    ids=str,
)
def test_predictions_are_compared_labels_exactly_floats_closely(now: Any, recorded: Any, same: bool) -> None:
    assert same_predictions(now, recorded) is same


class Sums:
    """Answers all rows with one number."""

    def predict(self, x: Any) -> Any:
        return x.sum()


def test_model_that_does_not_answer_row_by_row_is_not_served(tmp_path: Path) -> None:
    joblib.dump(Sums(), tmp_path / "model.joblib")
    assert "single value" in str(served(model_path=tmp_path / "model.joblib").describe()["error"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stable": "2"'])
def test_start_with_a_routing_that_cannot_be_read_serves_what_was_served_last(
    store: Path, tmp_path: Path, text: str
) -> None:
    first = served(model_dir=store, roster=Roster(tmp_path / "state"))
    assert first.describe()["error"] is None
    (store / "routing.json").write_text(text)
    again = served(model_dir=store, roster=Roster(tmp_path / "state"))
    assert again.choose()[0].version == "1"
    assert "routing.json cannot be used" in again.describe()["error"]
    alone = served(model_dir=store, roster=Roster(tmp_path / "other"))
    with pytest.raises(ModelNotReady):
        alone.choose()
    write_json(store / "routing.json", {"stable": "1"})
    deadline = time.monotonic() + 20
    while again.describe()["error"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert again.describe()["error"] is None


def test_what_was_preloaded_is_served_only_where_the_routing_still_asks_for_it(
    store: Path, artifact: Path, monkeypatch: Any
) -> None:
    with Store(store).prepare(artifact, "2") as (manifest, beside):
        about = manifest.about | {"sample": SAMPLE, "predictions": [0, 1, 2]}
        Store(store).publish(dataclasses.replace(manifest, about=about), beside)
    Store(store).canary("2", 100)
    serving = Serving(model_dir=store)
    serving.preload()
    with pytest.raises(ModelNotReady):
        serving.choose()  # a fork that starts later has to look for itself
    Store(store).rollback()
    loads: list[Any] = []
    monkeypatch.setattr("model.serving.load_version", loads.append)  # what was preloaded is not loaded again
    serving.start()
    assert serving.finished.wait(60)
    assert [serving.choose()[0].version for _ in range(20)] == ["1"] * 20
    assert loads == []


def test_routing_that_was_removed_does_not_stop_a_start(store: Path, tmp_path: Path) -> None:
    served(model_dir=store, roster=Roster(tmp_path / "state"))
    (store / "routing.json").unlink()
    again = served(model_dir=store, roster=Roster(tmp_path / "state"))
    assert again.choose()[0].version == "1"
    assert "holds no version" in again.describe()["error"]


def test_about_says_what_is_served(store: Path) -> None:
    about = load_version(stable(store)).about
    sha256 = hashlib.sha256((store / "1/model.joblib").read_bytes()).hexdigest()
    assert about | {"made_with": None} == {
        "version": "1",
        "file": "model.joblib",
        "sha256": sha256,
        "estimator": "KNeighborsClassifier",
        "methods": ("predict", "predict_proba"),
        "classes": [0, 1, 2],
        "signature": {
            "layout": "array",
            "columns": [{"name": name, "type": "number", "nullable": False} for name in IRIS.feature_names],
            "form": "[[0.5, 0.5, 0.5, 0.5]]",
        },
        "example": {"data": SAMPLE[:1]},
        "proved_with": "its recorded sample",
        "made_with": None,
        "published": stable(store).about["published"],
        "metrics": None,
        "note": None,
    }


def test_bare_file_is_named_by_its_hash_and_says_that_its_row_is_made_up(artifact: Path) -> None:
    loaded = load_version(Manifest(artifact))
    assert loaded.version == hashlib.sha256(artifact.read_bytes()).hexdigest()[:12]
    assert loaded.about["proved_with"] == "a synthetic row (no sample was recorded)"


@pytest.mark.parametrize(
    ("model", "methods"),
    [
        (LogisticRegression(max_iter=1000), "predict predict_proba predict_log_proba decision_function"),
        (SVC(), "predict decision_function"),
        (Ridge(), "predict"),
        (IsolationForest(n_estimators=3), "predict decision_function score_samples"),
        (make_pipeline(StandardScaler(), SVC()), "predict decision_function"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_methods_are_those_that_the_model_has(tmp_path: Path, model: Any, methods: str) -> None:
    joblib.dump(model.fit(IRIS.data, IRIS.target), tmp_path / "model.joblib")
    assert load_version(Manifest(tmp_path / "model.joblib")).methods == tuple(methods.split())


# --- the model in memory


def test_serving_is_not_ready_before_it_is_started(artifact: Path) -> None:
    serving = Serving(model_path=artifact)
    with pytest.raises(ModelNotReady, match="still loading"):
        serving.choose()
    assert serving.describe() == {
        "ready": False,
        "error": None,
        "stable": None,
        "canary": None,
        "routing": None,
    }


def test_serving_is_not_ready_while_it_loads_and_ready_then(artifact: Path) -> None:
    may_load = threading.Event()

    def native(function: Callable[..., Any], *arguments: Any) -> Any:
        assert may_load.wait(60)
        return function(*arguments)

    serving = Serving(model_path=artifact, native=native)
    serving.start()
    with pytest.raises(ModelNotReady, match="the model is still loading"):
        serving.choose()
    assert not serving.finished.is_set()
    may_load.set()
    assert serving.finished.wait(60)
    model, variant = serving.choose()
    assert variant == "stable"
    assert model.predict(model.signature.parse(SAMPLE)).tolist() == [0, 1, 2]
    assert serving.describe()["ready"] is True
    assert serving.describe()["stable"].items() >= model.about.items()


def test_failed_load_says_no_more_than_where_to_look(tmp_path: Path) -> None:
    (tmp_path / "model.joblib").write_bytes(b"secret")
    serving = served(model_path=tmp_path / "model.joblib")
    with pytest.raises(ModelNotReady) as reason:
        serving.choose()
    assert str(reason.value) == "the model did not load; the server's log says why"
    assert serving.describe()["ready"] is False
    assert "model.joblib does not load" in serving.describe()["error"]


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (lambda: KNeighborsClassifier(), IRIS.target),
        (lambda: KNeighborsClassifier(), IRIS.target == 1),
        (lambda: KNeighborsClassifier(), IRIS.target.map({0: "a", 1: "b", 2: "c"})),
        (lambda: KNeighborsClassifier(), IRIS.target.map({0: "a", 1: "b", 2: "c"}).astype("category")),
        (lambda: KNeighborsClassifier(), IRIS.target.astype(np.float32)),
        (lambda: RandomForestClassifier(3), np.c_[IRIS.target, IRIS.target == 1]),
        (lambda: Ridge(), IRIS.target),
    ],
    ids=["numbers", "booleans", "texts", "categories", "floats", "outputs", "regressor"],
)
def test_what_is_said_of_a_model_is_json(tmp_path: Path, make: Any, target: Any) -> None:
    joblib.dump(make().fit(IRIS.data, target), tmp_path / "model.joblib")
    described = served(model_path=tmp_path / "model.joblib").describe()
    assert described["ready"], described["error"]
    assert json.loads(json.dumps(described)) == orjson.loads(orjson.dumps(described))


# --- what becomes of results


def encoded(result: Any, n_rows: int) -> Any:
    """Return a result as the caller gets it."""
    return orjson.loads(orjson.dumps(as_json(result, n_rows), option=orjson.OPT_SERIALIZE_NUMPY))


DAY = datetime.datetime(2024, 5, 1, 12, 30)
RESULTS = {
    "whole numbers": (np.array([1, 2]), [1, 2]),
    "small whole numbers": (np.array([1, 2], np.int8), [1, 2]),
    "unsigned": (np.array([1, 2**64 - 1], np.uint64), [1, 2**64 - 1]),
    "booleans": (np.array([True, False]), [True, False]),
    "floats": (np.array([0.5, 1e-300]), [0.5, 1e-300]),
    "half precision": (np.array([0.5, 2.0], np.float16), [0.5, 2.0]),
    "single precision": (np.array([0.5, 0.1], np.float32), [0.5, 0.1]),
    "long precision": (np.array([0.5, 2.0], np.longdouble), [0.5, 2.0]),
    "other byte order": (np.array([1, 2], ">i4"), [1, 2]),
    "other byte order of floats": (np.array([0.5, 2.0], ">f8"), [0.5, 2.0]),
    "not finite": (np.array([np.nan, np.inf]), [None, None]),
    "every other": (np.arange(4.0)[::2], [0.0, 2.0]),
    "columns first": (np.asfortranarray([[1.0, 2.0], [3.0, 4.0]]), [[1.0, 2.0], [3.0, 4.0]]),
    "three dimensions": (np.zeros((2, 1, 1)), [[[0.0]], [[0.0]]]),
    "read-only": (np.broadcast_to(np.array([1]), (2,)), [1, 1]),
    "no columns": (np.zeros((2, 0)), [[], []]),
    "texts": (np.array(["a", "bü"]), ["a", "bü"]),
    "texts of numpy 2": (np.array(["a", "b"], dtype=np.dtypes.StringDType()), ["a", "b"]),
    "objects": (np.array(["a", None], dtype=object), ["a", None]),
    "objects with NaN": (np.array([np.nan, float("inf")], dtype=object), [None, None]),
    "objects of numpy": (np.array([np.int64(1), np.float64(0.5)], dtype=object), [1, 0.5]),
    "texts of numpy as objects": (np.array([np.str_("a"), np.bool_(True)], dtype=object), ["a", True]),
    "lists as objects": (pd.Series([["a"], ["b", "c"]]).to_numpy(), [["a"], ["b", "c"]]),
    "sets of labels": ([("a",), ("a", "b")], [["a"], ["a", "b"]]),
    "list": ([1, 2], [1, 2]),
    "list of floats": ([0.5, None], [0.5, None]),
    "list of texts": (["a", "b"], ["a", "b"]),
    "list of this and that": (["a", 1], ["a", 1]),
    "list of lists": ([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
    "list of rows": ([np.array([1, 2]), np.array([3, 4])], [[1, 2], [3, 4]]),
    "list of rows with gaps": (list(np.array([[1, 3], [2, 4]]).T), [[1, 2], [3, 4]]),
    "list of rows in other byte order": ([np.array([1, 2], ">i8"), np.array([3, 4], ">i8")], [[1, 2], [3, 4]]),
    "tuple": ((1, 2), [1, 2]),
    "sparse matrix": (scipy.sparse.csr_matrix([[0, 1], [2, 0]]), [[0, 1], [2, 0]]),
    "sparse array": (scipy.sparse.csr_array([[0.0, 1.0], [2.0, 0.0]]), [[0.0, 1.0], [2.0, 0.0]]),
    "matrix": (np.ones((2, 1)).view(np.matrix), [[1.0], [1.0]]),
    "frame": (pd.DataFrame({"a": [1, 2], "b": [3.5, 4]}), [[1.0, 3.5], [2.0, 4.0]]),
    "frame of this and that": (pd.DataFrame({"a": [1, 2], "b": ["x", None]}), [[1, "x"], [2, None]]),
    "series": (pd.Series([1, 2], index=[7, 8]), [1, 2]),
    "series of texts": (pd.Series(["a", None], dtype="str"), ["a", None]),
    "series with missing numbers": (pd.Series([1, None], dtype="Int64"), [1.0, None]),
    "series of categories": (pd.Series(["a", "b"], dtype="category"), ["a", "b"]),
    "categories": (pd.Categorical(["a", "b"]), ["a", "b"]),
    "dates": (np.array([DAY, "NaT"], "datetime64[s]"), ["2024-05-01T12:30:00", None]),
    "dates of pandas": (pd.Series([DAY, None]), ["2024-05-01T12:30:00", None]),
    "dates of nanoseconds": (np.array([DAY, "NaT"], "datetime64[ns]"), ["2024-05-01T12:30:00", None]),
    "dates as objects": (np.array([DAY, DAY.date()], dtype=object), ["2024-05-01T12:30:00", "2024-05-01"]),
    "one list for each of three outputs": ([np.zeros((2, 1))] * 3, [[[0.0], [0.0]]] * 3),
    "as many outputs as rows": ([np.zeros((2, 1))] * 2, [[[0.0], [0.0]]] * 2),
    "outputs with NaN": ([np.array([[np.nan], [1.0]])] * 3, [[[None], [1.0]]] * 3),
}


@pytest.mark.parametrize("name", RESULTS)
def test_result_becomes_json_with_one_entry_a_row(name: str) -> None:
    result, expected = RESULTS[name]
    got = encoded(result, 2)
    assert got == expected
    assert json.dumps(got) == json.dumps(expected)  # 1, 1.0 and true are equal, but not the same JSON


NO_RESULTS = {
    "None": None,
    "number": 1.0,
    "0-d": np.array(1.0),
    "text": "ab",
    "object": object(),
    "dict": {"a": 1, "b": 2},
    "too few": np.array([1]),
    "too many": np.array([1, 2, 3]),
    "none": np.array([]),
    "no list": [],
    "frame of the wrong length": pd.DataFrame({"a": [1]}),
    "sparse of the wrong length": scipy.sparse.csr_matrix([[1, 2]]),
    "outputs of the wrong length": [np.zeros((3, 1))] * 3,
    "outputs of different lengths": [np.zeros((2, 1)), np.zeros((3, 1)), np.zeros((2, 1))],
}


@pytest.mark.parametrize("name", NO_RESULTS)
def test_result_without_one_entry_a_row_is_the_models_fault(name: str) -> None:
    with pytest.raises(ModelFailed):
        as_json(NO_RESULTS[name], 2)


class Raises:
    """Raises an exception at predict."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def predict(self, x: Any) -> Any:
        raise self.error("secret")


NO_JSON = [[1j, 2.0], [b"a", b"\xff"], [{1}, {2}], [Decimal(1), Decimal(2)], [object(), object()], ["\ud800", "a"]]


@pytest.mark.parametrize("answer", NO_JSON, ids=["complex", "bytes", "set", "decimal", "object", "surrogate"])
def test_result_that_json_cannot_say_is_the_models_fault_over_http(
    serve: Any, artifact: Path, answer: Any, monkeypatch: Any
) -> None:
    client = serve(artifact)
    monkeypatch.setattr(KNeighborsClassifier, "predict", lambda self, x: answer)
    got = client.post({"data": SAMPLE[:2]})
    assert got.status_code == 500
    assert got.json["detail"] == "the model failed on this request; the server's log says why"
    assert [r["error_type"] for r in records(client.journal_dir)] == ["model"]


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (ValueError, RowsRefused),
        (TypeError, RowsRefused),
        (np.linalg.LinAlgError, RowsRefused),
        (KeyError, ModelFailed),
        (ZeroDivisionError, ModelFailed),
        (MemoryError, ModelFailed),
        (RuntimeError, ModelFailed),
        (RecursionError, ModelFailed),
    ],
)
def test_what_a_model_raises_is_told_apart_without_its_words(
    artifact: Path, error: type[Exception], becomes: type[Exception]
) -> None:
    model = dataclasses.replace(load_version(Manifest(artifact)), estimator=Raises(error))
    with pytest.raises(becomes) as raised:
        model.predict(np.zeros((1, 1)))
    assert error.__name__ in str(raised.value)
    assert "secret" not in str(raised.value)
    assert isinstance(raised.value.__cause__, error)


# --- the demo


def test_demo_is_published_promoted_and_served(tmp_path: Path, capsys: Any) -> None:
    demo.main(tmp_path / "models")
    assert "published it as" in capsys.readouterr().out
    serving = served(model_dir=tmp_path / "models")
    model, _ = serving.choose()
    assert (model.version, model.about["proved_with"]) == ("1", "its recorded sample")
    row = dict(zip(IRIS.feature_names, SAMPLE[0], strict=True))
    for rows in ([SAMPLE[0]], [row]):
        assert model.predict(model.signature.parse(rows)).tolist() == [0]


def test_demo_does_nothing_where_a_version_is_served(store: Path, capsys: Any) -> None:
    before = tree(store)
    demo.main(store)
    assert (capsys.readouterr().out, tree(store)) == ("", before)


def prove_here(manifest: Manifest, _: bool) -> Any:
    """Prove a version in this process, where the fresh one that it takes is not the point."""
    asked = {"artifact": manifest.artifact, "version": manifest.version, "about": manifest.about}
    found = publishing._prove_here(asked | {"allow_version_mismatch": False})
    return orjson.loads(orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY))


def test_demo_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("model.versions.publishing.prove", prove_here)
    with monkeypatch.context() as patch:
        patch.setattr("model.versions.store.Store.promote", stop)
        with pytest.raises(KeyboardInterrupt):
            demo.main(tmp_path)
    assert tree(tmp_path) == ["1", "1/manifest.json", "1/model.joblib"]
    published = (tmp_path / "1/manifest.json").read_bytes()
    demo.main(tmp_path)
    assert (tmp_path / "1/manifest.json").read_bytes() == published
    assert load_version(stable(tmp_path)).version == "1"


def test_demo_goes_on_after_a_stop_at_any_write(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("model.versions.publishing.prove", prove_here)
    for step in ("shutil.copyfile", "json.dump", "os.rename", "os.fsync"):
        place = tmp_path / step
        with monkeypatch.context() as patch:
            patch.setattr(step, stop)
            with pytest.raises(KeyboardInterrupt):
                demo.main(place)
        demo.main(place)
        assert load_version(stable(place)).version == "1"
        shutil.rmtree(place)
    assert os.listdir(tmp_path) == []
