"""A version is compared with its manifest as it is loaded: its bytes, its sample, its signature."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder

from model.formats import ModelLoadError
from model.serving import ModelNotReady, Serving
from model.versions.loading import SIGNATURE_FORM, load_version, model_facts, same_predictions
from model.versions.routing import Routing
from model.versions.store import Manifest, Store, read_manifest
from model.versions.watcher import StoreWatcher

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
    with Store(store).new_version(artifact, "1") as manifest:
        manifest.about.update(sample=sample, predictions=predictions)
    Store(store).promote("1")


def stable(store: Path) -> Manifest:
    """Read the manifest of the stable version."""
    return read_manifest(store, Routing.read(store).stable)


def edit(store: Path, **changes: Any) -> None:
    """Change version 1's manifest; `...` removes a key."""
    path = store / "1" / "manifest.json"
    known = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in known.items() if value is not ...}))


def served(store: Path) -> Serving:
    """Start serving a store and wait for the first load."""
    serving = Serving(StoreWatcher(store, store))
    serving.start()
    assert serving.finished.wait(60)
    return serving


class Marks:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


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
    assert "version 1 answers its recorded sample differently than when it was published" in refusal(store)


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
    assert loaded.about["validated_with"] == "its recorded sample"


def older(signature: dict[str, Any]) -> dict[str, Any]:
    """Return a signature as manifests had it before categories, dates and most booleans were known."""
    names = {"category": "text", "date": "text", "boolean": "number"}
    columns = [
        {"name": c["name"], "type": names.get(c["type"], c["type"]), "nullable": c["nullable"]}
        for c in signature["columns"]
    ]
    return signature | {"columns": columns}


def published_before(tmp_path: Path) -> Path:
    """Publish a model with a boolean column, as an older server did."""
    frame = pd.DataFrame({"paid": [0, 1, 1, 0] * 5, "size": np.arange(20.0)})
    steps = make_column_transformer((OneHotEncoder(), ["paid"]), remainder="passthrough")
    joblib.dump(make_pipeline(steps, LogisticRegression()).fit(frame, frame.paid), tmp_path / "model.joblib")
    store = tmp_path / "store"
    put(store, tmp_path / "model.joblib", [[1, 0.5]], [1])
    signature = load_version(stable(store)).signature.describe()
    assert [column["type"] for column in signature["columns"]] == ["boolean", "number"]
    edit(store, signature=older(signature))
    return store


def test_version_published_before_a_kind_was_known_is_served(tmp_path: Path) -> None:
    loaded = load_version(stable(published_before(tmp_path)))
    assert loaded.call(loaded.signature.parse([[True, 0.5]])).tolist() == [1]


def test_signature_of_the_same_form_that_differs_is_refused(tmp_path: Path) -> None:
    store = published_before(tmp_path)
    edit(store, signature_form=SIGNATURE_FORM)
    assert "another signature than its manifest records" in refusal(store)


def test_what_may_be_missing_is_kept_in_the_manifest_and_not_tried_again(store: Path) -> None:
    signature = model_facts(load_version(stable(store)))["signature"]
    first, *others = signature["columns"]
    edit(store, signature=signature | {"columns": [first | {"nullable": True}, *others]}, signature_form=SIGNATURE_FORM)
    found = load_version(stable(store)).signature.columns or ()
    assert [column.nullable for column in found] == [True, False, False, False]


def test_changed_file_or_other_columns_of_an_older_version_are_refused(tmp_path: Path) -> None:
    store = published_before(tmp_path)
    signature = dict(stable(store).about["signature"])
    edit(store, signature=signature | {"columns": signature["columns"][::-1]})
    assert "another signature than its manifest records" in refusal(store)
    edit(store, signature=signature)
    (store / "1/model.joblib").chmod(0o644)
    (store / "1/model.joblib").write_bytes((store / "1/model.joblib").read_bytes() + b" ")
    assert "is not the file that was published" in refusal(store)


def test_what_was_preloaded_is_served_only_where_the_routing_still_asks_for_it(
    store: Path, artifact: Path, monkeypatch: Any
) -> None:
    with Store(store).new_version(artifact, "2") as manifest:
        manifest.about.update(sample=SAMPLE, predictions=[0, 1, 2])
    Store(store).canary("2", 100)
    serving = Serving(StoreWatcher(store, store))
    serving.preload()
    with pytest.raises(ModelNotReady):
        serving.choose()  # a fork that starts later has to look for itself
    Store(store).rollback()
    loads: list[Any] = []
    monkeypatch.setattr("model.versions.watcher.load_version", loads.append)  # what was preloaded is not loaded again
    serving.start()
    assert serving.finished.wait(60)
    assert [serving.choose()[0].version for _ in range(20)] == ["1"] * 20
    assert loads == []


def as_strings(frame: Any) -> Any:
    """Count the letters of strings, or of numbers as strings."""
    return frame.apply(lambda column: column.astype(str).str.len())


def test_made_up_row_does_not_decide_what_columns_hold(tmp_path: Path) -> None:
    frame = pd.DataFrame({"code": ["a", "bcd", "e", "fgh"]})
    model = make_pipeline(FunctionTransformer(as_strings), LogisticRegression()).fit(frame, [0, 1, 0, 1])
    joblib.dump(model, tmp_path / "model.joblib")
    put(tmp_path / "store", tmp_path / "model.joblib", [[0.0]], [1])
    edit(tmp_path / "store", sample_from="synthetic")
    loaded = load_version(stable(tmp_path / "store"))
    assert loaded.signature.describe()["columns"][0]["type"] == "any"
    assert loaded.about["validated_with"].startswith("a synthetic row")


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
        "validated_with": "its recorded sample",
        "merges_requests": "yes",
        "warnings": [],
        "made_with": None,
        "published": stable(store).about["published"],
        "metrics": None,
        "note": None,
        "error_bound": None,
        "reference": None,
    }


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
