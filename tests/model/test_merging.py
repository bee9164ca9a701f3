"""Callers share a call of the model only if it treats each row by itself."""

import functools
import threading
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import basic
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from model.loaded import LoadedModel, load_model
from model.timings import MAX_BATCH_ROWS

X = pd.DataFrame(np.random.default_rng(0).normal(10, 2, (60, 2)), columns=["a", "b"])
Y = X["a"] + 2 * X["b"]
WORDS = pd.DataFrame({"city": ["Oslo", "Rome"] * 30, "a": X["a"]})


def ranked(x: Any) -> Any:
    """Replace each value by its rank among the rows of the call."""
    return x.rank(pct=True)


def centred(x: Any) -> Any:
    """Subtract the mean of the rows of the call."""
    return x - x.mean()


def filled(x: Any) -> Any:
    """Fill what is missing with the mean of the rows of the call."""
    return x.fillna(x.mean()).fillna(0.0)


def doubled(x: Any) -> Any:
    """Treat each row by itself, which the server cannot know."""
    return 2 * x


class Centred(BaseEstimator, TransformerMixin):
    """A transformer of the user's own."""

    def fit(self, x: Any, y: Any = None) -> "Centred":
        self.fitted_ = True
        return self

    def transform(self, x: Any) -> Any:
        return x - x.mean()


class Recorded(LinearRegression):
    """A model of the user's own that keeps how many rows each of its calls had."""

    sizes: list[int] = []  # noqa: RUF012  # of all, since the server loads a copy

    def predict(self, x: Any) -> Any:
        self.sizes.append(len(x))
        return super().predict(x)


def loaded(place: Path, model: Any, **options: Any) -> LoadedModel:
    """Load a model as the server does."""
    joblib.dump(model, place / "model.joblib")
    return load_model(place / "model.joblib", **options)


def piped(step: Any) -> Any:
    """Fit a pipeline of a step and a linear regression."""
    return make_pipeline(step, LinearRegression()).fit(X, Y)


BY_THEMSELVES = {
    "a linear model": lambda: LinearRegression().fit(X, Y),
    "a pipeline": lambda: piped(StandardScaler()),
    "a forest": lambda: RandomForestClassifier(3).fit(X, Y > 30),
    "a search": lambda: GridSearchCV(LogisticRegression(), {"C": [0.1, 1]}, cv=2).fit(X, Y > 30),
    "a table": lambda: make_pipeline(
        make_column_transformer((OneHotEncoder(), ["city"]), (StandardScaler(), ["a"])), LinearRegression()
    ).fit(WORDS, Y),
    "a ufunc": lambda: piped(FunctionTransformer(np.log1p)),
    "a part of a ufunc": lambda: piped(FunctionTransformer(functools.partial(np.power, 2.0))),
    "no function": lambda: piped(FunctionTransformer()),
}


@pytest.mark.frames
@pytest.mark.parametrize("name", BY_THEMSELVES)
def test_calls_of_what_treats_each_row_by_itself_are_merged(tmp_path: Path, name: str) -> None:
    model = loaded(tmp_path, BY_THEMSELVES[name]())
    assert model.about["merges_requests"] == "yes"
    assert model.merges


TOGETHER: dict[str, tuple[Any, str]] = {
    "ranks": (lambda: FunctionTransformer(ranked), "func=ranked of FunctionTransformer"),
    "means": (lambda: FunctionTransformer(centred), "func=centred of FunctionTransformer"),
    "filled": (lambda: FunctionTransformer(filled), "func=filled of FunctionTransformer"),
    "a partial": (lambda: FunctionTransformer(functools.partial(centred)), "FunctionTransformer"),
    "a class": (lambda: Centred(), "the class Centred"),
    "a class in a table": (lambda: make_column_transformer((Centred(), ["a", "b"])), "the class Centred"),
    "harmless, but not known": (lambda: FunctionTransformer(doubled), "func=doubled of FunctionTransformer"),
}


@pytest.mark.frames
@pytest.mark.parametrize("name", TOGETHER)
def test_calls_of_what_may_look_at_several_rows_are_not_merged_and_the_reason_is_shown(
    tmp_path: Path, name: str
) -> None:
    make, reason = TOGETHER[name]
    model = loaded(tmp_path, piped(make()), sample=[{"a": 10.0, "b": 9.0}])  # a step of one's own records no names
    assert not model.merges
    assert model.about["merges_requests"].startswith("no: ")
    assert reason in model.about["merges_requests"]


class Outlier(LogisticRegression):
    """A class that claims to be scikit-learn's."""

    __module__ = "sklearn.linear_model"

    def predict(self, x: Any) -> Any:
        return (np.asarray(x)[:, 0] > np.asarray(x)[:, 0].mean()).astype(int)


def test_known_class_that_answers_rows_together_otherwise_is_found_out_with_rows(
    tmp_path: Path, monkeypatch: Any
) -> None:
    import sklearn.linear_model

    monkeypatch.setattr(sklearn.linear_model, "Outlier", Outlier, raising=False)  # so that it can be loaded
    model = loaded(tmp_path, Outlier().fit(X, Y > 30))
    assert model.about["merges_requests"] == "no: it answers rows differently together than one by one"


@pytest.mark.frames
@pytest.mark.parametrize(("setting", "merges"), [("always", True), ("never", False), ("auto", False)])
def test_setting_decides_before_the_server_does(tmp_path: Path, setting: str, merges: bool) -> None:
    model = loaded(tmp_path, piped(FunctionTransformer(doubled)), merge_requests=setting)
    assert model.merges is merges
    assert (model.about["merges_requests"] == "yes") is merges


def test_never_merges_what_could_be(tmp_path: Path) -> None:
    model = loaded(tmp_path, LinearRegression().fit(X, Y), merge_requests="never")
    assert model.about["merges_requests"] == "no: MERGE_REQUESTS=never"


def at_once(model: LoadedModel, asked: list[Any]) -> list[Any]:
    """Let callers ask at the same time, and return their answers."""
    answers: list[Any] = [None] * len(asked)
    start = threading.Barrier(len(asked))

    def ask(at: int) -> None:
        start.wait(60)
        answers[at] = model.predict(model.signature.validate(asked[at])).tolist()

    threads = [threading.Thread(target=ask, args=[at]) for at in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.frames
@pytest.mark.parametrize("step", [ranked, centred, filled])
def test_no_caller_is_answered_from_the_rows_of_another(tmp_path: Path, step: Any) -> None:
    own = piped(FunctionTransformer(step))
    model = loaded(tmp_path, own)
    asked = [[[None if step is filled and at % 2 else 1.0 * at, 10.0 * at], [5.0, 7.0]] for at in range(8)]
    expected = [own.predict(pd.DataFrame(rows, columns=["a", "b"], dtype=float)).tolist() for rows in asked]
    for _ in range(5):
        assert at_once(model, asked) == expected


@pytest.mark.frames
@pytest.mark.parametrize(("setting", "sizes"), [("always", [MAX_BATCH_ROWS, 904]), ("auto", [5000])])
def test_large_request_is_cut_into_pieces_only_if_its_calls_may_be_merged(
    tmp_path: Path, setting: str, sizes: list[int]
) -> None:
    model = loaded(tmp_path, Recorded().fit(X, Y), merge_requests=setting)
    rows = np.random.default_rng(1).normal(size=(5000, 2))
    Recorded.sizes.clear()
    answer = model.predict(model.signature.validate(rows.tolist()))
    assert Recorded.sizes == sizes
    assert np.allclose(answer, LinearRegression().fit(X, Y).predict(pd.DataFrame(rows, columns=["a", "b"])))


@pytest.mark.frames
def test_pieces_of_a_request_grow_as_the_model_proves_faster_than_it_was_known_to_be(tmp_path: Path) -> None:
    model = loaded(tmp_path, Recorded().fit(X, Y), merge_requests="always")
    model.batcher.timings.note("predict", 1, 0.01)  # so five rows at first
    rows = np.random.default_rng(1).normal(size=(1000, 2))
    Recorded.sizes.clear()
    answer = model.predict(model.signature.validate(rows.tolist()))
    assert Recorded.sizes[0] == 5 < Recorded.sizes[-2]
    assert sum(Recorded.sizes) == 1000
    assert np.allclose(answer, LinearRegression().fit(X, Y).predict(pd.DataFrame(rows, columns=["a", "b"])))


@pytest.mark.frames
def test_caller_that_left_is_noticed_between_the_pieces_of_its_request(tmp_path: Path) -> None:
    def check() -> None:
        raise ConnectionResetError

    model = loaded(tmp_path, Recorded().fit(X, Y), merge_requests="always")
    Recorded.sizes.clear()
    with pytest.raises(ConnectionResetError):
        model.predict(model.signature.validate(np.zeros((5000, 2)).tolist()), check=check)
    assert len(Recorded.sizes) == 1


@pytest.mark.frames
def test_ranks_of_a_large_request_are_those_of_all_its_rows(tmp_path: Path) -> None:
    own = piped(FunctionTransformer(ranked))
    frame = pd.DataFrame(np.random.default_rng(1).normal(size=(5000, 2)), columns=["a", "b"])
    model = loaded(tmp_path, own)
    answer = model.predict(model.signature.validate(frame.to_numpy().tolist()))
    assert answer.tolist() == own.predict(frame).tolist()


@pytest.mark.frames
def test_reason_is_shown_by_the_model_endpoint(serve: Any) -> None:
    client = serve(piped(FunctionTransformer(centred)))
    client.headers = client.headers | {"Authorization": basic("admin")}
    shown = client.get("/model").json["stable"]["merges_requests"]
    assert shown == "no: func=centred of FunctionTransformer may look at several rows at once"
