"""Inferred signatures are true of the model; rows become what it was fitted on, or an error says what to fix."""

import copy
import doctest
import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import cluster, ensemble, mixture, multiclass, neighbors
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_transformer
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import (
    BaggingClassifier,
    HistGradientBoostingClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.feature_selection import RFE
from sklearn.impute import SimpleImputer
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, SGDClassifier
from sklearn.model_selection import GridSearchCV, TunedThresholdClassifierCV
from sklearn.multioutput import ClassifierChain, MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    PolynomialFeatures,
    StandardScaler,
)
from sklearn.svm import SVC, OneClassSVM
from threadpoolctl import threadpool_limits

from model import formats
from model import infer_signature as model_inference
from model.formats import ModelLoadError
from model.infer_signature import infer_signature
from model.signature import MAX_ERRORS, BadRows, Column, Signature

N = 120


@pytest.mark.parametrize("documented", [Signature, infer_signature])
def test_example_in_the_docstring_runs(documented: Any) -> None:
    scope = {"Signature": Signature, "Column": Column, "infer_signature": infer_signature}
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, globs=scope)
    assert doctest.DocTestRunner(verbose=False).run(example) == (0, len(example.examples))


def table() -> pd.DataFrame:
    """Make a table with a column of each kind."""
    draw = np.random.default_rng(3)
    return pd.DataFrame(
        {
            "city": draw.choice(["Oslo", "Rome", "Lima"], N),
            "town": draw.choice(["Oslo", "Rome", None], N),  # pandas makes it strings with NaN
            "nick": pd.Series(draw.choice(["Bo", "Al", None], N), dtype=object),  # as from a database: None stays
            "note": draw.choice(["good day", "bad night", "so so"], N),
            "size": draw.normal(10, 3, N),
            "weight": np.where(draw.random(N) < 0.2, np.nan, draw.normal(70, 9, N)),
            "age": draw.integers(18, 90, N),
            "grade": draw.integers(1, 4, N),
            "member": draw.random(N) < 0.5,
            "sort": pd.Series(draw.choice(["red", "blue"], N), dtype="category"),
        }
    )


TABLE = table()
Y = (TABLE["size"] + TABLE["age"] / 30 + 3 * (TABLE["city"] == "Rome") > 12.5).astype(int).to_numpy()
NUMBERS = TABLE[["size", "age"]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Limit OpenMP and BLAS to one thread: on busy cores a pool mostly waits."""
    with threadpool_limits(1):
        yield


def rows_of(x: Any) -> list[Any]:
    """Return what a caller would send as `data`."""
    if np.ndim(x) == 1:
        return np.asarray(x).tolist()
    values = np.asarray(x, dtype=object)
    return [[None if pd.isna(v) else getattr(v, "item", lambda v=v: v)() for v in row] for row in values]


def objects_of(x: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as objects, with the columns in reverse order."""
    return [dict(reversed(list(zip(x.columns, row, strict=True)))) for row in rows_of(x)]


def inferred(model: Any, x: Any, y: Any = None) -> Signature:
    """Fit a model, infer its signature, and compare with the model: predictions, and what may be missing."""
    model = copy.deepcopy(model).fit(x, Y if y is None else y)
    served = copy.deepcopy(model)  # column names may be removed from it
    signature, validated_with = infer_signature(served)
    assert len(served.predict(signature.parse(validated_with))) == len(validated_with)
    assert_same(served.predict(signature.parse(rows_of(x))), model.predict(x))
    for row in rows_of(x)[:3]:  # what a column becomes must not depend on the other rows of the request
        assert_same(served.predict(signature.parse([row])), model.predict(x)[[rows_of(x).index(row)]])
    if isinstance(x, pd.DataFrame):
        assert_same(served.predict(signature.parse(objects_of(x))), model.predict(x))
    if signature.columns:
        nullable = [c.nullable for c in signature.columns]
        assert nullable == [answers_without(model, x, at) for at in range(len(nullable))]
    orjson.dumps(signature.describe())
    return signature


def answers_without(model: Any, x: Any, at: int) -> bool:
    """Return whether the model answers its own kind of input if the value of one column is missing."""
    frame = pd.DataFrame(x)
    row, name, kind = frame.iloc[:1].copy(), frame.columns[at], frame.dtypes.iloc[at]
    missing = None if any(value is None for value in frame[name]) else np.nan
    held = {"b": object, "i": float}.get(kind.kind, kind)  # numpy's own types have no missing value
    row[name] = pd.Series([missing], index=row.index, dtype=held)
    try:
        model.predict(row if isinstance(x, pd.DataFrame) else row.to_numpy(dtype=x.dtype))
    except Exception:  # any refusal
        return False
    return True


def described(signature: Signature) -> str:
    """Write a signature in one line, numbers without their kind: `frame city:text size age?`."""
    kinds = {
        "number": "",
        "text": ":text",
        "boolean": ":boolean",
        "any": ":any",
        "category": ":category",
        "date": ":date",
    }
    columns = [f"{c.name or '-'}{kinds[c.kind]}{'?' * c.nullable}" for c in signature.columns or ()]
    return " ".join([signature.layout, *columns])


def assert_same(got: Any, expected: Any) -> None:
    """Compare predictions: labels exactly, floats within 1e-12 relative."""
    got, expected = np.asarray(got), np.asarray(expected)
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    else:
        assert got.tolist() == expected.tolist()


# --- steps of the user's own


class NoWidth(RegressorMixin, BaseEstimator):
    """Does not record how many columns it takes."""

    def fit(self, x: Any, y: Any) -> "NoWidth":
        self.fitted_ = True
        return self

    def predict(self, x: Any) -> Any:
        return x @ np.arange(1.0, x.shape[1] + 1)


class Widens(NoWidth):
    """Makes a column of its own for the estimator within it."""

    def fit(self, x: Any, y: Any) -> "Widens":
        self.estimator_ = LinearRegression().fit(self.widened(x), y)
        return self

    def widened(self, x: Any) -> Any:
        return np.column_stack([x, x[:, 0] * x[:, 1]])

    def predict(self, x: Any) -> Any:
        return self.estimator_.predict(self.widened(x))


class OnlyPredict:
    """Has a predict and nothing else: no base class, no parameters."""

    def predict(self, x: Any) -> Any:
        return x.sum(axis=1)


class NeedsOnes(NoWidth):
    """Takes no zeros, as a logarithm does."""

    def fit(self, x: Any, y: Any) -> "NeedsOnes":
        self.n_features_in_ = x.shape[1]
        return self

    def predict(self, x: Any) -> Any:
        if not np.all(x):
            raise ZeroDivisionError("a zero")
        return 1 / x[:, 0]


class RefusesAll(NeedsOnes):
    """Answers no synthetic row."""

    def predict(self, x: Any) -> Any:
        if not (x > 100).all():
            raise KeyError("station 17")
        return x[:, 0]


# --- tables


def hgb(categorical: Any = None) -> Any:
    """Return a small gradient boosting."""
    return HistGradientBoostingClassifier(max_iter=3, categorical_features=categorical)


NB = GaussianNB()


# --- numbers

NUMBER_MODELS = [
    LogisticRegression(max_iter=1000),
    LinearRegression(),
    SGDClassifier(random_state=0),
    SVC(),
    OneClassSVM(),
    ensemble.RandomForestClassifier(5),
    ensemble.ExtraTreesClassifier(5),
    ensemble.GradientBoostingClassifier(n_estimators=3),
    ensemble.AdaBoostClassifier(n_estimators=3),
    ensemble.IsolationForest(n_estimators=5),
    hgb(),
    KNeighborsClassifier(),
    neighbors.NearestCentroid(),
    NB,
    LinearDiscriminantAnalysis(),
    MLPRegressor(hidden_layer_sizes=(3,), solver="lbfgs", max_iter=20000, alpha=10),
    cluster.KMeans(2, n_init=1),
    cluster.MiniBatchKMeans(2, n_init=1),
    cluster.Birch(n_clusters=2),
    mixture.GaussianMixture(2),
    multiclass.OneVsRestClassifier(NB),
    multiclass.OneVsOneClassifier(LogisticRegression(max_iter=1000)),
    CalibratedClassifierCV(NB, cv=2),
    VotingClassifier([("a", NB), ("b", KNeighborsClassifier())]),
    StackingClassifier([("a", NB), ("b", KNeighborsClassifier())], cv=2),
    BaggingClassifier(KNeighborsClassifier(), 3),
    TunedThresholdClassifierCV(NB, cv=2),
    GridSearchCV(KNeighborsClassifier(), {"n_neighbors": [3, 5]}, cv=2),
    RFE(LinearRegression(), n_features_to_select=1),
    make_pipeline(make_union(StandardScaler(), PCA(1)), NB),
    make_pipeline(PolynomialFeatures(2), StandardScaler(), NB),
    make_pipeline(SimpleImputer(), KNeighborsClassifier()),
]


def named(model: Any) -> str:
    """Name a model in a test's id."""
    return " ".join(str(model).split())[:70]


@pytest.mark.parametrize("model", NUMBER_MODELS, ids=named)
@pytest.mark.parametrize("names", [True, False], ids=["frame", "array"])
def test_model_of_numbers_gets_arrays_even_if_it_was_fitted_on_a_frame(model: Any, names: bool) -> None:
    signature = inferred(model, NUMBERS if names else NUMBERS.to_numpy())
    assert (signature.layout, [c.kind for c in signature.columns]) == ("array", ["number", "number"])
    assert [c.name for c in signature.columns] == (["size", "age"] if names else [None, None])


@pytest.mark.parametrize(
    ("model", "takes"),
    [
        (ensemble.RandomForestClassifier(5), "size? age?"),
        (ensemble.GradientBoostingClassifier(n_estimators=3), "size age"),
        (GridSearchCV(make_pipeline(SimpleImputer(), KNeighborsClassifier()), {}, cv=2), "size? age?"),
    ],
    ids=named,
)
def test_columns_are_nullable_if_the_model_answers_missing_values(model: Any, takes: str) -> None:
    assert described(inferred(model, NUMBERS)) == f"array {takes}"


@pytest.mark.parametrize("model", [MultiOutputClassifier(NB), ClassifierChain(NB), Ridge()], ids=named)
def test_several_outputs_make_no_difference(model: Any) -> None:
    assert described(inferred(model, NUMBERS, np.c_[Y, 1 - Y])) == "array size age"


@pytest.mark.parametrize(
    "model",
    [cluster.KMeans(2, n_init=1), cluster.MiniBatchKMeans(2, n_init=1), KNeighborsClassifier(), SVC(), NB, hgb()],
    ids=named,
)
@pytest.mark.parametrize("form", ["frame", "array"])
def test_model_fitted_on_single_precision_is_served(model: Any, form: str) -> None:
    x = NUMBERS.astype(np.float32)  # as embeddings and pictures are
    inferred(model, x if form == "frame" else x.to_numpy())


def test_booleans_that_the_model_takes_as_numbers_are_sent_as_numbers() -> None:
    x = TABLE[["member", "size"]]
    model = KNeighborsClassifier().fit(x, Y)
    signature, _ = infer_signature(served := copy.deepcopy(model))
    assert described(signature) == "array member size"
    assert_same(served.predict(signature.parse([[int(a), b] for a, b in rows_of(x)])), model.predict(x))
    with pytest.raises(BadRows, match="true or false; expected a number"):
        signature.parse(rows_of(x))


# --- one-dimensional data, and models that record little


def test_pipeline_that_begins_with_a_vectorizer_takes_a_list_of_strings() -> None:
    model = make_pipeline(TfidfVectorizer(), LogisticRegression())
    assert described(inferred(model, TABLE["note"].tolist())) == "texts"


def test_isotonic_regression_takes_a_list_of_numbers() -> None:
    signature = inferred(IsotonicRegression(out_of_bounds="clip"), TABLE["size"].to_numpy(), TABLE["age"].to_numpy())
    assert signature == Signature("numbers", ())


@pytest.mark.parametrize("model", [NoWidth(), OnlyPredict()], ids=["no n_features_in_", "no base class"])
def test_model_that_does_not_record_its_width_takes_rows_of_any_one_width(model: Any) -> None:
    signature, _ = infer_signature(model)
    assert signature == Signature("array", None)
    for rows in ([[1.0]], [[1.0, 2.0], [3.0, 4.0]], [[1, 2, 3.5]]):
        assert_same(model.predict(signature.parse(rows)), model.predict(np.array(rows, dtype=float)))
    for rows in ([[1.0], [1.0, 2.0]], [[]], [[1.0, None]], [["a"]], [[True]], [{"a": 1.0}], [1.0]):
        with pytest.raises(BadRows):
            signature.parse(rows)


def test_width_is_not_that_of_an_estimator_within_a_class_of_ones_own() -> None:
    model = Widens().fit(NUMBERS.to_numpy(), Y)
    signature, _ = infer_signature(model, [[50.0, 30.0]])
    assert_same(model.predict(signature.parse([[60.0, 20.0]])), model.predict(np.array([[60.0, 20.0]])))
    with pytest.raises(ModelLoadError, match="with size 1"):
        infer_signature(model, [[50.0]])


# --- samples


@pytest.mark.parametrize("sample", [[[None, 30.0]], [{"age": 3, "size": None}], [[1.0, 2.0], [None, None]]], ids=str)
def test_sample_may_hold_missing_values_if_the_model_takes_them(sample: list[Any]) -> None:
    signature, _ = infer_signature(hgb().fit(NUMBERS, Y), sample)
    assert described(signature) == "array size? age?"


class OwnEncoder:
    """A step that scikit-learn takes in a pipeline although it is no estimator of its own."""

    def fit(self, x: Any, y: Any = None) -> "OwnEncoder":
        self.n_features_in_ = x.shape[1]
        self.categories_ = [np.unique(column.astype(str)) for column in x.T]
        return self

    def transform(self, x: Any) -> Any:
        pairs = zip(np.asarray(x, dtype=object).astype(str).T, self.categories_, strict=True)
        return np.column_stack([column == value for column, known in pairs for value in known])


ENCODED = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression())


@pytest.mark.parametrize(
    "model",
    [
        ENCODED,
        make_pipeline(make_column_transformer((StandardScaler(), [0]), remainder="drop"), LogisticRegression()),
        make_pipeline(FunctionTransformer(np.log1p), LogisticRegression()),
        VotingClassifier([("encoded", ENCODED), ("plain", LogisticRegression())]),
        HistGradientBoostingClassifier(categorical_features=[0], max_iter=3),
        make_pipeline(OwnEncoder(), LogisticRegression()),
    ],
    ids=["encoder", "columns", "function", "vote", "boosting", "no estimator"],
)
def test_model_that_may_take_more_than_numbers_is_refused_without_the_room_that_knows(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.fit(np.abs(NUMBERS.to_numpy()).round(), Y)
    for module in (formats, model_inference):
        monkeypatch.setattr(module, "has_frames", lambda: False)
    with pytest.raises(ModelLoadError, match="without which this server was installed"):
        infer_signature(model)


# --- rows that do not fit

PAIR = Signature("array", (Column("a"), Column("b", nullable=True)))
UNNAMED = Signature("array", (Column(None), Column(None)))
MIXED = Signature(
    "array", (Column("a", "text"), Column("b", "boolean", nullable=True), Column("c", "any"), Column("d"))
)
SIGNATURES = {
    "numbers by name": PAIR,
    "numbers": UNNAMED,
    "single precision": Signature("array", (Column("a"), Column("b", nullable=True)), precision="float32"),
    "unknown width": Signature("array", None),
    "texts": Signature("texts", ()),
    "scalars": Signature("numbers", ()),
}


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (None, "data is null; expected a list of rows, [[0.5, 0.5]]"),
        ({"a": 1}, "data is an object; expected a list of rows, [[0.5, 0.5]]"),
        ("rows", "data is a string; expected a list of rows, [[0.5, 0.5]]"),
        ([], "data has no rows"),
        (
            [1.0, 2.0],
            "data[0] is a number; this model takes a list of rows, so one row is written with two brackets: "
            "[[0.5, 0.5]]",
        ),
    ],
    ids=str,
)
def test_error_for_anything_but_a_list_of_rows_shows_the_form(data: Any, detail: str) -> None:
    with pytest.raises(BadRows) as refusal:
        PAIR.parse(data)
    assert (refusal.value.detail, refusal.value.errors) == (detail, [])


@pytest.mark.parametrize(
    ("signature", "data", "errors"),
    [
        (PAIR, [[1.0]], [(0, None, "1 values; expected 2")]),
        (PAIR, [[1, 2], [1, 2, 3], []], [(1, None, "3 values; expected 2"), (2, None, "0 values; expected 2")]),
        (PAIR, [[1, "2"]], [(0, "b", "a string; expected a number")]),
        (PAIR, [[1, 2], [True, 2]], [(1, "a", "true or false; expected a number")]),
        (PAIR, [[None, None]], [(0, "a", "null; this model does not take a missing value here")]),
        (UNNAMED, [[1, []]], [(0, 1, "a list; expected a number")]),
        (PAIR, [{"a": 1}], [(0, "b", "missing; write null for a value that is not known")]),
        (PAIR, [{"b": 1}], [(0, "a", "missing")]),
        (PAIR, [{"a": 1, "b": 2, "c": 3}], [(0, "c", "not a column of this model")]),
        (PAIR, [{"a": 1, "b": 2}, [1, 2]], [(1, None, "a list; expected an object, as row 0")]),
        (
            MIXED,
            [[1, "1", [], "d"]],
            [
                (0, "a", "a number; expected a string"),
                (0, "b", "a string; expected true or false"),
                (0, "c", "a list; expected a number, a string, or true or false"),
                (0, "d", "a string; expected a number"),
            ],
        ),
    ],
    ids=str,
)
def test_error_for_wrong_rows_names_the_place_and_the_fault(signature: Signature, data: Any, errors: list[Any]) -> None:
    with pytest.raises(BadRows) as refusal:
        signature.parse(data)
    assert [(e["row"], e.get("column"), e["detail"]) for e in refusal.value.errors] == errors
    row, column, detail = errors[0]
    where = f"row {row}" if column is None else f"row {row}, column {column!r}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    assert refusal.value.detail == f"{where}: {detail}{more}"


@pytest.mark.parametrize(("signature", "first", "second"), [(PAIR, "a", "b"), (UNNAMED, 0, 1)], ids=["named", "not"])
def test_error_for_an_array_names_infinities_and_missing_values(signature: Signature, first: Any, second: Any) -> None:
    with pytest.raises(BadRows) as refusal:
        signature.parse(np.array([[1, 2], [np.nan, 2], [np.inf, -np.inf]]))
    assert refusal.value.errors == [
        {"row": 1, "column": first, "detail": "NaN, a missing value; expected a finite number"},
        {"row": 2, "column": first, "detail": "an infinity; expected a finite number"},
        {"row": 2, "column": second, "detail": "an infinity; expected a finite number"},
    ]
    if signature is PAIR:
        assert np.isnan(signature.parse(np.array([[1, np.nan]]))[0, 1])


@pytest.mark.parametrize(("count", "more"), [(20, " (and 19 more)"), (21, " (and more; the first 20 are listed)")])
def test_at_most_twenty_places_are_listed(count: int, more: str) -> None:
    with pytest.raises(BadRows) as refusal:
        PAIR.parse([["x", 1.0]] * count)
    assert refusal.value.detail == f"row 0, column 'a': a string; expected a number{more}"
    assert len(refusal.value.errors) == 20


def assert_rows_or_reasons(signature: Signature, data: Any) -> None:
    """Parse anything: the result has as many rows, or the error is short and can be sent."""
    try:
        parsed = signature.parse(data)
    except BadRows as error:
        bad = error
    else:
        assert len(parsed) == len(data)
        return
    assert 0 < len(bad.detail) <= 300
    assert len(bad.errors) <= MAX_ERRORS
    assert len(orjson.dumps([bad.detail, bad.errors])) < 20_000


# Whole numbers as the server's decoder makes them: beyond 64 bits it makes floats.
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=90))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=200), inner, max_size=5),
    max_leaves=20,
)
# Rows that are nearly right reach more of the code than arbitrary ones.
NEARLY = st.lists(
    st.one_of(
        st.lists(SCALARS, min_size=1, max_size=4),
        st.fixed_dictionaries({"a": SCALARS, "b": SCALARS}, optional={"c": SCALARS, "d": SCALARS}),
        VALUES,
    ),
    max_size=30,
)


@pytest.mark.parametrize("name", SIGNATURES)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=VALUES | NEARLY)
def test_any_json_gives_rows_or_reasons(name: str, data: Any) -> None:
    assert_rows_or_reasons(SIGNATURES[name], data)


LONG = "x" * 2**20
HUGE = json.loads("1" + "0" * 400)  # beyond any float; from a recorded sample, which Python's own decoder reads
HOSTILE = {
    "huge numbers": [[HUGE, HUGE]],
    "huge number": [HUGE],
    "huge numbers by name": [{"a": HUGE, "b": HUGE}],
    "huge numbers beside others": [["x", None, HUGE, HUGE]],
    "long key": [{LONG: 1.0}],
    "long key beside": [{"a": 1.0, "b": 1.0, LONG: 1.0}],
    "long keys": [{LONG + str(at): at for at in range(30)}],
    "long value": [[LONG, LONG]],
    "long string": LONG,
    "long strings": [LONG, 1],
    "long row": [[0.0] * 2**20],
    "long nested": [[[LONG] * 9, {LONG: LONG}]],
    "unprintable key": [{"a": 1.0, "b": 1.0, "\U000e0001" * 100: 1.0}],  # repr writes ten characters for each
    "quotes": [{"a": 1.0, "b": 1.0, "'\"\\" * 100: 1.0}],
    "nulls": [None] * 10**5,
    "deep": functools.reduce(lambda inner, _: [inner], range(900), 1.0),
}


@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize("case", HOSTILE)
def test_error_stays_small_for_any_data(name: str, case: str) -> None:
    assert_rows_or_reasons(SIGNATURES[name], HOSTILE[case])
