"""A version validated as it is loaded, the model in memory, and what becomes of its exceptions."""

import dataclasses
import hashlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import orjson
import pandas as pd
import pytest
from conftest import records
from sklearn.datasets import load_iris
from sklearn.ensemble import IsolationForest, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC

from model import infer_signature
from model.answers import ModelFailed
from model.formats import ModelLoadError
from model.loaded import RowsRefused, load_model
from model.serving import ModelNotReady, Serving, SingleFile, short_turns

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


class Partial(Ridge):
    """A model with methods that do not answer row by row, or not what JSON holds."""

    def predict_proba(self, x: Any) -> Any:
        return np.zeros(3 * len(x))

    def score_samples(self, x: Any) -> Any:
        return [2**70] * len(x)

    def decision_function(self, x: Any) -> Any:
        return np.asarray(x)[:, 0]


@pytest.mark.frames
def test_methods_that_do_not_answer_are_not_served_and_warned_of(tmp_path: Path) -> None:
    joblib.dump(Partial().fit(IRIS.data, IRIS.target), tmp_path / "model.joblib")
    model = load_model(tmp_path / "model.joblib")
    assert model.methods == model.about["methods"] == ("predict", "decision_function")
    first, second = model.about["warnings"]
    why = "predict_proba did not return one prediction per row: the model returned 3 for 1 rows"
    assert first == f"predict_proba is not served: {why}"
    assert second.startswith("score_samples is not served: ")


class Slow(Ridge):
    """A model that takes a while for each call, and no missing values."""

    def predict(self, x: Any) -> Any:
        time.sleep(0.05)
        return super().predict(x)


@pytest.mark.frames
def test_slow_model_is_not_tried_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infer_signature, "TRIAL_SECONDS", 0.3)
    joblib.dump(Slow().fit(np.eye(60), range(60)), tmp_path / "model.joblib")
    began = time.monotonic()
    model = load_model(tmp_path / "model.joblib")
    assert time.monotonic() - began < 3  # it would be tried 120 times
    assert not any(column.nullable for column in model.signature.columns or ())


# --- a sample beside the file


def test_callers_who_share_slow_calls_are_admitted_from_the_first_moment(tmp_path: Path) -> None:
    joblib.dump(Slow(alpha=1e-9).fit([[0.0], [1.0]], [0.0, 1.0]), tmp_path / "slow.joblib")
    serving = Serving(SingleFile(tmp_path / "slow.joblib"), max_wait=0.2, merge_requests="always")
    serving.start()
    assert serving.finished.wait(60)
    model, _ = serving.choose()
    with ThreadPoolExecutor(16) as callers:
        answers = list(callers.map(lambda at: model.predict([[float(at)]]), range(16)))
    assert np.concatenate(answers).tolist() == pytest.approx(list(range(16)), abs=1e-6)


class Named:
    """A model of the user's own: only a sample shows that it takes a frame."""

    def predict(self, x: pd.DataFrame) -> Any:
        return (x["income"] / x["debt"]).to_numpy()


ROWS = [{"income": 50.0, "debt": 5.0}, {"income": 30.0, "debt": 10.0}]


def answered(serving: Serving) -> Any:
    """Return the prediction for the two rows."""
    assert serving.routes, serving.describe()["error"]
    model, _ = serving.choose()
    return model.predict(model.signature.validate(ROWS)).tolist()


@pytest.mark.frames
def test_sample_beside_the_file_shows_what_the_model_takes(tmp_path: Path) -> None:
    joblib.dump(Named(), tmp_path / "ratio.joblib")
    assert "a recorded sample would show what it takes" in str(served(tmp_path / "ratio.joblib").describe()["error"])
    (tmp_path / "ratio.sample.json").write_text(json.dumps(ROWS))
    serving = served(tmp_path / "ratio.joblib")
    assert answered(serving) == [10.0, 3.0]
    assert serving.describe()["stable"]["validated_with"] == "the sample ratio.sample.json"
    (tmp_path / "other.sample.json").write_text("[]")
    assert answered(served(tmp_path / "ratio.joblib")) == [10.0, 3.0]  # that is another model's


@pytest.mark.frames
def test_named_sample_goes_before_the_one_beside_the_file(tmp_path: Path) -> None:
    joblib.dump(Named(), tmp_path / "ratio.joblib")
    (tmp_path / "ratio.sample.json").write_text("[[1, 2]]")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    serving = Serving(SingleFile(tmp_path / "ratio.joblib", tmp_path / "rows.json"))
    serving.start()
    assert serving.finished.wait(60)
    assert answered(serving) == [10.0, 3.0]
    assert serving.describe()["stable"]["validated_with"] == "the sample rows.json"


@pytest.mark.frames
def test_settings_name_the_sample(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert serve(Named(), model_sample=tmp_path / "rows.json").predict(ROWS)["prediction"] == [10.0, 3.0]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "the sample "),
        (b"", "the sample "),
        (b"[]", "is not a list of rows"),
        (b'{"data": 1}', "is not a list of rows"),
        (b"[[1, 2, 3, 4, 5]]", "refuses its recorded sample"),
        (b'[["a", "b", "c", "d"]]', "refuses its recorded sample"),
    ],
)
def test_sample_that_is_none_or_does_not_fit_is_an_error(artifact: Path, content: bytes, why: str) -> None:
    artifact.with_name("iris.sample.json").write_bytes(content)
    assert why in str(served(artifact).describe()["error"])


def test_named_sample_that_is_not_there_is_an_error(artifact: Path, tmp_path: Path) -> None:
    serving = Serving(SingleFile(artifact, tmp_path / "gone.json"))
    serving.start()
    assert serving.finished.wait(60)
    assert "gone.json" in str(serving.describe()["error"])


# --- what is loaded can be answered


class Unanswerable:
    """Returns what has no form in JSON."""

    def predict(self, x: Any) -> Any:
        return [1j] * len(x)


def test_model_whose_answers_have_no_form_in_json_is_never_ready(tmp_path: Path) -> None:
    joblib.dump(Unanswerable(), tmp_path / "model.joblib")
    serving = served(tmp_path / "model.joblib")
    assert not serving.describe()["ready"]
    assert "complex has no form in JSON" in str(serving.describe()["error"])


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


def test_start_names_the_file_and_the_estimator(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        served(artifact)
    assert f"(KNeighborsClassifier of {artifact}, validated with a synthetic row" in caplog.text


def first_letters(frame: Any) -> Any:
    """Take the first digit of strings, or of numbers as strings."""
    return frame.apply(lambda column: column.astype(str).str[0].map(ord))


@pytest.mark.frames
def test_start_says_why_callers_share_no_calls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_pipeline(FunctionTransformer(first_letters), LogisticRegression())
    joblib.dump(model.fit(pd.DataFrame({"code": [11, 22]}), [0, 1]), tmp_path / "model.joblib")
    with caplog.at_level(logging.INFO):
        served(tmp_path / "model.joblib")
    assert "callers share no calls: func=first_letters of FunctionTransformer may look at several rows" in caplog.text


@pytest.mark.frames
def test_columns_that_may_hold_either_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frame = pd.DataFrame({"code": ["a1", "b2", "a3", "b4"]})
    model = make_pipeline(FunctionTransformer(first_letters), LogisticRegression()).fit(frame, [0, 1, 0, 1])
    joblib.dump(model, tmp_path / "model.joblib")
    with caplog.at_level(logging.WARNING):
        about = served(tmp_path / "model.joblib").choose()[0].about
    (warning,) = about["warnings"]
    assert warning.startswith("the model takes numbers as well as strings in code, and does not show which")
    assert f"model.joblib: {warning}" in caplog.text
    for sample in ('[{"code": "a1"}]', '{"data": [["a1"]]}'):
        (tmp_path / "model.sample.json").write_text(sample)
        assert served(tmp_path / "model.joblib").choose()[0].about["warnings"] == []


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


class Raises:
    """Raises an exception at predict."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def predict(self, x: Any) -> Any:
        raise self.error("secret")


NO_JSON = [[1j, 2.0], [object(), object()], ["\ud800", "a"]]


@pytest.mark.parametrize("answer", NO_JSON, ids=["complex", "object", "surrogate"])
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


def test_turns_are_as_long_as_before_when_two_threads_have_shortened_them() -> None:
    before, (load, page) = sys.getswitchinterval(), (short_turns(), short_turns())
    load.__enter__()
    page.__enter__()
    assert sys.getswitchinterval() == pytest.approx(before / 10)
    load.__exit__(None, None, None)
    page.__exit__(None, None, None)
    assert sys.getswitchinterval() == before
