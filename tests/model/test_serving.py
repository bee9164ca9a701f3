"""A version proved as it is loaded, the model in memory, and what becomes of a model's results."""

import dataclasses
import datetime
import hashlib
import json
import threading
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
from sklearn.ensemble import IsolationForest, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from model.formats import ModelLoadError
from model.loaded import ModelFailed, RowsRefused, load_model, to_json
from model.serving import ModelNotReady, Serving, SingleFile

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


def served(path: Path) -> Serving:
    """Start serving a file and wait for the first load."""
    serving = Serving(SingleFile(path))
    serving.start()
    assert serving.finished.wait(60)
    return serving


# --- what cannot be read


def test_server_without_a_model_says_how_to_name_one() -> None:
    serving = Serving(SingleFile(None))
    serving.start()
    assert serving.finished.wait(60)
    assert "set MODEL_PATH=" in serving.describe()["error"]


# --- loading proves a version


def test_bare_file_that_is_not_there_is_a_load_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"gone\.joblib"):
        load_model(tmp_path / "gone.joblib")


class Sums:
    """Answers all rows with one number."""

    def predict(self, x: Any) -> Any:
        return x.sum()


def test_model_that_does_not_answer_row_by_row_is_not_served(tmp_path: Path) -> None:
    joblib.dump(Sums(), tmp_path / "model.joblib")
    assert "single value" in str(served(tmp_path / "model.joblib").describe()["error"])


def test_bare_file_is_named_by_its_hash_and_says_that_its_row_is_made_up(artifact: Path) -> None:
    loaded = load_model(artifact)
    assert loaded.version == hashlib.sha256(artifact.read_bytes()).hexdigest()[:12]
    assert loaded.about["validated_with"] == "a synthetic row (no sample was recorded)"


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
    assert load_model(tmp_path / "model.joblib").methods == tuple(methods.split())


# --- the model in memory


def test_serving_is_not_ready_before_it_is_started(artifact: Path) -> None:
    serving = Serving(SingleFile(artifact))
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

    serving = Serving(SingleFile(artifact), native)
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
    serving = served(tmp_path / "model.joblib")
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
    described = served(tmp_path / "model.joblib").describe()
    assert described["ready"], described["error"]
    assert json.loads(json.dumps(described)) == orjson.loads(orjson.dumps(described))


# --- what becomes of results


def encoded(result: Any, n_rows: int) -> Any:
    """Return a result as the caller gets it."""
    return orjson.loads(orjson.dumps(to_json(result, n_rows), option=orjson.OPT_SERIALIZE_NUMPY))


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
        to_json(NO_RESULTS[name], 2)


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
    model = dataclasses.replace(load_model(artifact), estimator=Raises(error))
    with pytest.raises(becomes) as raised:
        model.call(np.zeros((1, 1)))
    assert error.__name__ in str(raised.value)
    assert "secret" not in str(raised.value)
    assert isinstance(raised.value.__cause__, error)
