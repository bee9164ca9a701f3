"""The predictions over HTTP are the model's own: each row, each method, each way to write a row."""

import functools
import json
import random
import warnings
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import Client, basic, gunicorn
from sklearn import datasets
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multioutput import MultiOutputClassifier, MultiOutputRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier
from threadpoolctl import threadpool_limits

from model.loaded import METHODS
from monitor import segments

DATASETS = {"iris": "iris", "cancer": "breast_cancer", "digits": "digits", "wine": "wine", "diabetes": "diabetes"}
# Small forests and few rounds: what is compared does not hang on how well they predict.
CLASSIFIERS = {
    "logistic regression": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    "random forest": lambda: RandomForestClassifier(12, n_jobs=-1, random_state=0),
    "gradient boosting": lambda: HistGradientBoostingClassifier(max_iter=2, max_leaf_nodes=5, random_state=0),
    "neighbours": KNeighborsClassifier,
    "support vectors": SVC,
    "isolation forest": lambda: IsolationForest(n_estimators=20, random_state=0),
    "k-means": lambda: KMeans(4, n_init=1, random_state=0),
}
REGRESSORS = {
    "ridge": Ridge,
    "random forest": lambda: RandomForestRegressor(12, random_state=0),
    "gradient boosting": lambda: HistGradientBoostingRegressor(max_iter=4, max_leaf_nodes=5, random_state=0),
    "neighbours": KNeighborsRegressor,
    "support vectors": SVR,
}
PAIRS = [
    *((name, kind) for name in DATASETS if name != "diabetes" for kind in CLASSIFIERS),
    ("digits", "ridge"),
    *(("diabetes", kind) for kind in REGRESSORS),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Keep OpenMP and BLAS to one thread: on cores that others use too, a pool mostly waits."""
    with threadpool_limits(1):
        yield


@functools.cache
def data_of(name: str) -> tuple[pd.DataFrame, pd.Series]:
    """Return a data set of scikit-learn's as a data frame and its target."""
    bunch = getattr(datasets, f"load_{DATASETS[name]}")(as_frame=True)
    return bunch.data, bunch.target


@functools.cache
def fitted(name: str, kind: str) -> Any:
    """Return a model fitted on a data set's frame, trained once."""
    x, y = data_of(name)
    return (REGRESSORS if name == "diabetes" or kind == "ridge" else CLASSIFIERS)[kind]().fit(x, y)


def rows_of(x: Any) -> list[list[Any]]:
    """Return a frame's or array's rows as JSON values: a missing value is null."""
    return [[None if value != value else value for value in row] for row in np.asarray(x, dtype=object).tolist()]


def objects_of(x: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a frame's rows as objects, with their keys in several orders."""
    orders = [random.Random(seed).sample(range(x.shape[1]), x.shape[1]) for seed in range(7)]
    names = [[x.columns[at] for at in order] for order in orders]
    picks = [itemgetter(*order) for order in orders]
    return [dict(zip(names[at % 7], picks[at % 7](row), strict=True)) for at, row in enumerate(rows_of(x))]


def assert_same(got: Any, expected: Any) -> None:
    """Compare an answer's JSON with what the model returned: labels exactly, floats within 1e-12."""
    if isinstance(expected, list):  # one array for each output
        assert len(got) == len(expected)
        for mine, own in zip(got, expected, strict=True):
            assert_same(mine, own)
        return
    expected = np.asarray(expected)
    if expected.dtype.kind != "f":
        assert got == expected.tolist()
        assert {type(value) for value in np.ravel(np.array(got, dtype=object))} <= {int, str, bool}
        return
    values = np.array(got, dtype=object)
    assert values.shape == expected.shape
    assert ((values == None) == ~np.isfinite(expected)).all()  # noqa: E711  # element by element
    there = np.isfinite(expected)
    # Relative to the largest value: one that is nearly nought by cancellation has no digits of its own to compare.
    largest = np.abs(expected[there]).max(initial=0)
    np.testing.assert_allclose(values[there].astype(float), expected[there], rtol=1e-12, atol=1e-12 * largest)


def assert_all_methods_same(client: Client, model: Any, data: list[Any], x: Any) -> None:
    """Compare each method over HTTP with the model's own, and see that the model's lacks are refused."""
    for method in METHODS:
        if not hasattr(model, method):
            assert client.post({"data": data[:1], "method": method}).status_code == 422
            continue
        with warnings.catch_warnings():
            # scikit-learn's own: the logarithm of a probability of nought.
            warnings.filterwarnings("ignore", "divide by zero", RuntimeWarning)
            expected = getattr(model, method)(x)
        answer = client.predict(data, method)
        assert_same(answer.pop("prediction"), expected)
        if method in ("predict", "score_samples") or not hasattr(model, "classes_"):
            assert answer == {}
        else:
            lists = isinstance(model.classes_, list)
            assert answer == {"classes": [c.tolist() for c in model.classes_] if lists else model.classes_.tolist()}


# --- the five data sets


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # predict_log_proba of a probability of nought
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_row_gets_the_models_own_prediction(serve: Any, name: str, kind: str) -> None:
    x, _ = data_of(name)
    model, rows = fitted(name, kind), rows_of(x)
    client = serve(model)
    assert_all_methods_same(client, model, rows, x)
    assert_same(client.predict(objects_of(x))["prediction"], model.predict(x))
    assert_same(client.predict(rows[:1])["prediction"], model.predict(x[:1]))


@pytest.mark.parametrize("name", DATASETS)
def test_model_fitted_without_names_takes_lists_only(serve: Any, name: str) -> None:
    x, y = data_of(name)
    model = (KNeighborsRegressor if name == "diabetes" else KNeighborsClassifier)().fit(x.to_numpy(), y.to_numpy())
    client = serve(model)
    assert_same(client.predict(rows_of(x))["prediction"], model.predict(x.to_numpy()))
    refusal = client.post({"data": objects_of(x)[:1]})
    assert refusal.status_code == 422
    assert "without column names" in refusal.json["detail"]


def test_the_articles_body_is_answered_unchanged(serve: Any, iris_file: Path) -> None:
    answer = serve(iris_file).post(b'{"data": [[5.1, 3.5, 1.4, 0.2]]}')
    assert (answer.status_code, answer.data) == (200, b'{"prediction":[0]}\n')


# --- tables with text, numbers and missing values


@functools.cache
def passengers() -> tuple[pd.DataFrame, np.ndarray]:
    """Make a table of text, whole numbers, fractions and missing values, with a target that hangs on them."""
    draw, n = np.random.default_rng(7), 300
    x = pd.DataFrame(
        {
            "port": draw.choice(["Oslo", "Genoa", "Lima"], n),
            "fare (£)": draw.gamma(2.0, 15.0, n).round(2),
            "cabin": draw.choice(["A", "B", None], n),
            "siblings": draw.integers(0, 5, n),
            "age": np.where(draw.random(n) < 0.2, np.nan, draw.integers(1, 80, n)),
        }
    )
    return x, np.where(x["fare (£)"] + 10 * x["siblings"] + 20 * (x["port"] == "Lima") > 50, "saved", "lost")


def prepared(final: Any) -> Any:
    """Return a pipeline for `passengers` that ends in an estimator."""
    return make_pipeline(
        make_column_transformer(
            (OneHotEncoder(), ["port"]),
            (make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder()), ["cabin"]),
            (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), ["age", "fare (£)", "siblings"]),
        ),
        final,
    )


@pytest.mark.frames
@pytest.mark.parametrize(
    "final",
    [
        LogisticRegression(max_iter=1000),
        RandomForestClassifier(10, random_state=0),
        IsolationForest(n_estimators=10, random_state=0),
        KMeans(3, n_init=1, random_state=0),
    ],
    ids=lambda final: type(final).__name__,
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # predict_log_proba of a probability of nought
def test_table_with_text_and_missing_values_is_served_by_column_name(serve: Any, final: Any) -> None:
    x, y = passengers()
    model = prepared(final).fit(x, y)
    client = serve(model)
    assert_all_methods_same(client, model, rows_of(x), x)
    assert_all_methods_same(client, model, objects_of(x), x)


@pytest.mark.frames
def test_table_with_text_is_served_to_a_regressor(serve: Any) -> None:
    x, _ = passengers()
    x, y = x.drop(columns="fare (£)").assign(**{"fare (£)": 1.0}), x["fare (£)"].to_numpy()
    model = prepared(Ridge()).fit(x, y)
    answer = serve(model).predict(objects_of(x))
    assert list(answer) == ["prediction"]
    assert_same(answer["prediction"], model.predict(x))


# --- labels, outputs and odd values

IRIS, SPECIES = data_of("iris")
LABELS = {
    "texts": np.array(["setosa", "versicolor", "virginica"])[SPECIES],
    "objects": np.array(["setosa", "versicolor", "virginica"], dtype=object)[SPECIES],
    "texts of pandas": pd.Series(np.array(["setosa", "versicolor", "virginica"])[SPECIES], dtype="str"),
    "categories": pd.Series(np.array(["setosa", "versicolor", "virginica"])[SPECIES], dtype="category"),
    "whole numbers": SPECIES.to_numpy() * 10 - 7,
    "bytes": SPECIES.to_numpy().astype(np.uint8),
    "booleans": SPECIES.to_numpy() == 1,
    "whole numbers as floats": SPECIES.to_numpy().astype(float),
    # As read from FITS, HDF5 or network data: orjson takes native byte order only.
    "big-endian numbers": SPECIES.to_numpy().astype(">i8"),
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(
    "make", [DecisionTreeClassifier, GaussianNB, lambda: make_pipeline(StandardScaler(), LogisticRegression())]
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # predict_log_proba of a probability of nought
def test_labels_of_any_type_come_back_as_they_are(serve: Any, labels: str, make: Any) -> None:
    model = make().fit(IRIS, LABELS[labels])
    assert_all_methods_same(serve(model), model, rows_of(IRIS), IRIS)


def test_log_of_a_probability_of_nought_is_null(serve: Any) -> None:
    model = DecisionTreeClassifier(random_state=0).fit(IRIS, SPECIES)
    with pytest.warns(RuntimeWarning, match="divide by zero"):
        answer = serve(model).predict([[5.1, 3.5, 1.4, 0.2]], "predict_log_proba")
    assert answer == {"prediction": [[0.0, None, None]], "classes": [0, 1, 2]}


def test_nan_and_infinity_in_a_prediction_are_null(serve: Any) -> None:
    model = Ridge().fit(IRIS, np.c_[SPECIES, SPECIES, SPECIES])
    model.intercept_ = np.array([np.nan, np.inf, 0.0])
    model.coef_ = np.zeros((3, 4))
    assert serve(model).predict(rows_of(IRIS[:2])) == {"prediction": [[None, None, 0.0]] * 2}


TWO = np.c_[SPECIES, SPECIES == 1]
TEXTS = np.c_[np.array(["a", "b", "c"])[SPECIES], np.array(["no", "yes"])[TWO[:, 1]]]
OUTPUTS = {
    "ridge": (Ridge(), data_of("diabetes")[0], data_of("diabetes")[0].to_numpy()[:, :2] * 100),
    "forest regressor": (RandomForestRegressor(5, random_state=0), IRIS, TWO.astype(float)),
    "a regressor each": (
        MultiOutputRegressor(HistGradientBoostingRegressor(max_iter=2, max_leaf_nodes=5)),
        IRIS,
        TWO.astype(float),
    ),
    "forest": (RandomForestClassifier(5, random_state=0), IRIS, TWO),
    "forest of texts": (RandomForestClassifier(5, random_state=0), IRIS, TEXTS),
    "a classifier each": (MultiOutputClassifier(LogisticRegression(max_iter=1000)), IRIS, TWO),
    "several labels at once": (KNeighborsClassifier(), IRIS, np.c_[SPECIES == 0, SPECIES > 0].astype(int)),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # predict_log_proba of a probability of nought
def test_several_outputs_give_one_list_each(serve: Any, name: str) -> None:
    model, x, y = OUTPUTS[name]
    model.fit(x, y)
    client = serve(model)
    assert_all_methods_same(client, model, rows_of(x), x)
    # With as many rows as outputs, a list of outputs must not be taken for a list of rows.
    assert_all_methods_same(client, model, rows_of(x)[:2], x[:2])


def test_classes_are_left_out_where_the_columns_are_pairs_of_classes(serve: Any) -> None:
    x, y = data_of("digits")
    model = SVC(decision_function_shape="ovo").fit(x[:300], y[:300])
    answer = serve(model).predict(rows_of(x[:5]), "decision_function")
    assert_same(answer["prediction"], model.decision_function(x[:5]))  # 45 columns, one for each pair
    assert "classes" not in answer  # ten of them would name columns that they do not stand for


# --- the same through sockets and two processes


@pytest.mark.frames
def test_both_workers_of_a_real_gunicorn_answer_as_the_model_does(tmp_path: Path) -> None:
    x, y = passengers()
    model = prepared(LogisticRegression(max_iter=1000)).fit(x, y)
    joblib.dump(model, tmp_path / "model.joblib")
    expected = model.predict(x).tolist()
    rows, objects = rows_of(x), objects_of(x)
    probabilities = json.dumps({"data": objects, "method": "predict_proba"}).encode()
    with gunicorn(tmp_path, model_path=tmp_path / "model.joblib", web_concurrency=2) as server:

        def both_answered_alike() -> bool:
            assert server.predict(rows) == (200, {"prediction": expected})
            assert server.predict(objects[::-1]) == (200, {"prediction": expected[::-1]})
            status, _, body = server.ask(
                "POST", "/predict", probabilities, Content_Type="application/json", Authorization=basic("predict")
            )
            assert status == 200
            assert_same(json.loads(body)["prediction"], model.predict_proba(x))
            return sum(path.stat().st_size > 0 for path in segments(server.journal_dir)) == 2  # one for each worker

        server.wait_until(both_answered_alike)
