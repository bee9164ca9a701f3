"""What is inferred of models that take more than numbers is true of them: encoders, own steps, texts in columns."""

import copy
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import multiclass
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import TransformedTargetRegressor, make_column_selector, make_column_transformer
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.ensemble import (
    BaggingClassifier,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.frozen import FrozenEstimator
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV, TunedThresholdClassifierCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline, make_union
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    OrdinalEncoder,
    StandardScaler,
    TargetEncoder,
)
from test_signature import (
    NB,
    NUMBERS,
    TABLE,
    N,
    NeedsOnes,
    OwnEncoder,
    RefusesAll,
    Y,
    described,
    hgb,
    inferred,
)
from test_signature import one_thread as one_thread  # a fixture

from model.formats import ModelLoadError
from model.infer_signature import infer_signature
from model.signature import BadRows, Signature


class Pick(TransformerMixin, BaseEstimator):
    """Takes number columns from a data frame by their names."""

    def __init__(self, columns: Any = ("size",)) -> None:
        self.columns = columns

    def fit(self, x: pd.DataFrame, y: Any = None) -> "Pick":
        self.feature_names_in_, self.n_features_in_ = np.asarray(x.columns, dtype=object), x.shape[1]
        return self

    def transform(self, x: pd.DataFrame) -> Any:
        return x[list(self.columns)].to_numpy(dtype=float)


class StringLength(Pick):
    """Takes columns of strings."""

    def transform(self, x: pd.DataFrame) -> Any:
        return x[list(self.columns)].apply(lambda column: column.str.len()).to_numpy(dtype=float)


def on(*parts: Any, final: Any = None, **options: Any) -> Any:
    """Return a column transformer with a logistic regression, or another estimator, behind it."""
    return make_pipeline(make_column_transformer(*parts, **options), final or LogisticRegression(max_iter=1000))


def filled(strategy: str, **options: Any) -> Any:
    """Return an imputer and an encoder."""
    return make_pipeline(SimpleImputer(strategy=strategy, **options), OneHotEncoder())


def search(model: Any) -> Any:
    """Return a grid search around a pipeline that ends in a logistic regression."""
    return GridSearchCV(model, {"logisticregression__C": [1, 2]}, cv=2)


CITY = (OneHotEncoder(sparse_output=False), ["city"])


NOTE = (TfidfVectorizer(), "note")


SIZE = (StandardScaler(), ["size", "age"])


OWN_STRINGS = make_pipeline(StringLength(["note"]), LogisticRegression())


# What each takes: column, its kind unless it is a number, and ? if a value may be missing.
CASES = {
    "encoded text": (on(CITY, SIZE), "city:text size age"),
    "ordinal text": (on((OrdinalEncoder(), ["city"]), SIZE), "city:text size age"),
    "target-encoded text": (on((TargetEncoder(), ["city"]), SIZE), "size city:text? age"),
    "NaN among the categories": (on((OneHotEncoder(), ["town"]), SIZE), "town:text? size age"),
    "None among the categories": (on((OneHotEncoder(), ["nick"]), SIZE), "nick:text? size age"),
    "None encoded": (on((OrdinalEncoder(encoded_missing_value=-1), ["nick"])), "nick:text?"),
    "most frequent text": (on((filled("most_frequent"), ["town"]), SIZE), "size town:text? age"),
    "constant text": (on((filled("constant", fill_value="?"), ["town"])), "town:text?"),
    "most frequent for None": (on((filled("most_frequent", missing_values=None), ["nick"])), "nick:text?"),
    "constant for None": (on((filled("constant", missing_values=None, fill_value="?"), ["nick"])), "nick:text?"),
    "imputed without a transformer": (
        make_pipeline(filled("most_frequent"), LogisticRegression()),
        "town:text? city:text?",
    ),
    "median": (on((SimpleImputer(strategy="median"), ["weight"]), SIZE), "weight? size age"),
    "median with a flag": (
        on((SimpleImputer(strategy="median", add_indicator=True), ["weight"]), SIZE),
        "weight? size age",
    ),
    "neighbours' mean": (on((KNNImputer(), ["weight", "size"])), "weight? size?"),
    "passed through": (on(CITY, ("passthrough", ["size", "age"])), "city:text size age"),
    "passed through to trees": (
        on((OrdinalEncoder(), ["city"]), remainder="passthrough", final=hgb()),
        "size? city:text weight?",
    ),
    "dropped as the rest": (on(SIZE), "note:any? size age member:any?"),
    "dropped by name": (on(("drop", ["note"]), SIZE), "note:any? size age"),
    "by index": (on((OneHotEncoder(), [1]), (StandardScaler(), [0, -1])), "size city:text age"),
    "by mask": (on((OneHotEncoder(), [False, True]), (StandardScaler(), [True, False])), "size city:text"),
    "by slice": (on((OneHotEncoder(), slice(0, 1)), (StandardScaler(), slice("size", "age"))), "city:text size age"),
    "by pattern": (
        on((OneHotEncoder(), make_column_selector("^c")), (StandardScaler(), make_column_selector("^s"))),
        "city:text size",
    ),
    "by type": (
        on(
            (OneHotEncoder(), make_column_selector(dtype_include="str")),
            (StandardScaler(), make_column_selector(dtype_exclude="str")),
        ),
        "size city:text note:text",
    ),
    "vectorized text": (on(NOTE, SIZE), "size note:text age"),
    "text reduced": (on((make_pipeline(TfidfVectorizer(), TruncatedSVD(2)), "note"), CITY), "city:text note:text"),
    "categories by index": (hgb([1]), "size? grade?"),
    "categories of pandas": (hgb("from_dtype"), "size? sort:category?"),
    "encoded categories of pandas": (on((OneHotEncoder(), ["sort"])), "sort:text"),
    "booleans": (on((OneHotEncoder(), ["member"]), SIZE), "member:boolean size age"),
    "whole numbers as categories": (on((OneHotEncoder(), ["grade"]), SIZE), "grade size age"),
    "one column used twice": (on((OneHotEncoder(), ["grade"]), (StandardScaler(), ["grade", "age"])), "age grade"),
    "transformer in a transformer": (
        on((make_column_transformer(CITY, SIZE), ["city", "size", "age"])),
        "note:any? age city:text size",
    ),
    "numbers by name": (on(SIZE), "age size"),
    "one column": (on(CITY), "city:text"),
    "pandas between the steps": (on(CITY, SIZE).set_output(transform="pandas"), "city:text size age"),
    "pandas between steps of numbers": (
        make_pipeline(StandardScaler(), PCA(1), NB).set_output(transform="pandas"),
        "size age",
    ),
    "grid search": (search(on(CITY, SIZE)), "city:text size age"),
    "votes on different columns": (
        VotingClassifier([("a", on(CITY, SIZE)), ("b", on(NOTE))]),
        "note:text city:text size age",
    ),
    "stack on different columns": (
        StackingClassifier([("a", on(NOTE)), ("b", on(CITY, SIZE))], cv=2),
        "city:text note:text size age",
    ),
    "union on different columns": (
        make_pipeline(
            make_union(make_column_transformer(CITY, SIZE), make_column_transformer(NOTE)), LogisticRegression()
        ),
        "note:text city:text size age",
    ),
    "calibrated": (CalibratedClassifierCV(on(CITY, SIZE), cv=2), "city:text size age"),
    "tuned threshold": (TunedThresholdClassifierCV(on(CITY, SIZE), cv=2), "city:text size age"),
    "fixed threshold": (FixedThresholdClassifier(on(CITY, SIZE), threshold=0.4), "city:text size age"),
    "one against the rest": (multiclass.OneVsRestClassifier(on(CITY, SIZE)), "city:text size age"),
    "frozen": (FrozenEstimator(on(CITY, SIZE).fit(TABLE[["city", "size", "age"]], Y)), "city:text size age"),
    "transformed target": (
        TransformedTargetRegressor(on(CITY, SIZE, final=Ridge()), func=np.log1p, inverse_func=np.expm1),
        "city:text size age",
    ),
    "transformed target of numbers": (
        TransformedTargetRegressor(Ridge(), func=np.log1p, inverse_func=np.expm1),
        "size age",
    ),
    "bags of text": (BaggingClassifier(make_pipeline(OneHotEncoder(), LogisticRegression()), 3), "city:text note:text"),
    "function": (make_pipeline(FunctionTransformer(np.log1p), LogisticRegression(max_iter=1000)), "size age"),
    "function that takes no zero": (on((FunctionTransformer(np.log), ["age"]), CITY), "age city:text"),
    "own step": (make_pipeline(Pick(), LogisticRegression()), "age:any? size"),
    "own step that takes strings": (OWN_STRINGS, "size:any? note:text"),
    "own step among others": (on((StringLength(["note"]), ["note"]), CITY, SIZE), "city:text note:text size age"),
    "own step in a search": (search(OWN_STRINGS), "note:text size:any?"),
    "own step, many columns after it": (
        OWN_STRINGS,
        "note:text size:any? age:any? grade:any? weight:any? a:any? b:any? c:any? d:any? e:any? f:any?",
    ),
    "own step, many columns before it": (
        OWN_STRINGS,
        "size:any? age:any? grade:any? weight:any? a:any? b:any? c:any? d:any? e:any? f:any? note:text",
    ),
    "own step that takes many columns of strings": (
        make_pipeline(StringLength(["city", "note", "kind"]), LogisticRegression()),
        "city:text size:any? age:any? grade:any? weight:any? a:any? b:any? c:any? kind:text d:any? e:any? note:text",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_signature_of_a_table_gives_the_predictions_of_the_model(case: str) -> None:
    model, takes = CASES[case]
    names = [column.rstrip("?").partition(":")[0] for column in takes.split()]
    x = TABLE.assign(**dict.fromkeys("abcdef", 1.0), kind=TABLE["city"])[names]
    assert described(inferred(model, x)) == f"frame {takes}"


# scikit-learn still warns of what the encoder is set to ignore.
@pytest.mark.filterwarnings("ignore:Found unknown categories:UserWarning")
@pytest.mark.parametrize("unknown", ["ignore", "infrequent_if_exist"])
def test_encoder_that_ignores_the_unknown_takes_missing_values(unknown: str) -> None:
    model = on((OneHotEncoder(handle_unknown=unknown), ["city"]), SIZE)
    assert described(inferred(model, TABLE[["city", "size", "age"]])) == "frame city:text? size age"


ENCODERS = [OneHotEncoder, OrdinalEncoder, TargetEncoder]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    ("values", "kind"),
    [([1, 2, 3], ""), (["a", "b", "c"], ":text"), ([True, False, True], ":boolean"), ([0.5, 1.5, 2.5], "")],
    ids=str,
)
def test_encoder_on_an_array_of_objects_gets_each_value_as_it_was(encoder: Any, values: list[Any], kind: str) -> None:
    x = np.array(list(zip(values * 40, ["x", "y"] * 60, strict=True)), dtype=object)
    signature = inferred(make_pipeline(encoder(), LogisticRegression()), x)
    assert described(signature).replace("?", "") == f"array -{kind} -:text"


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("form", ["frame", "array"])
def test_whole_numbers_held_as_objects_are_numbers(encoder: Any, form: str) -> None:
    x = TABLE[["grade"]].astype(object)  # as columns come from a database
    signature = inferred(make_pipeline(encoder(), LogisticRegression()), x if form == "frame" else x.to_numpy())
    assert [c.kind for c in signature.columns] == ["number"]


@pytest.mark.parametrize("encoder", [OneHotEncoder, OrdinalEncoder])
def test_long_whole_numbers_as_categories_stay_apart(encoder: Any) -> None:
    x = pd.DataFrame({"id": [2**60 + at % 4 for at in range(N)]})  # ids of users or posts: a float rounds them
    inferred(make_pipeline(encoder(), RandomForestClassifier(5, random_state=0)), x, np.arange(N) % 4)


@pytest.mark.filterwarnings("ignore:Found unknown categories:UserWarning")
@pytest.mark.parametrize("beside", [None, 1.5, 2**64 - 1], ids=str)
def test_long_whole_number_is_not_rounded_because_of_another_row(beside: Any) -> None:
    x = pd.DataFrame({"id": [2**60 + at % 4 for at in range(N)]})
    model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()).fit(x, np.arange(N) % 4)
    signature, _ = infer_signature(model)
    assert model.predict(signature.parse([[2**60 + 1], [2**60]])).tolist() == [1, 0]
    with pytest.raises(BadRows, match="request of their own"):
        signature.parse([[2**60 + 1], [beside]])


# The imputer warns at each call that it drops the column.
@pytest.mark.filterwarnings("ignore:Skipping features without any observed values:UserWarning")
def test_column_without_any_value_does_not_shift_the_others() -> None:
    x = TABLE.assign(town=pd.Series(np.nan, index=TABLE.index, dtype=object))[["town", "city", "size"]]
    signature = inferred(on((filled("most_frequent"), ["town", "city"]), (StandardScaler(), ["size"])), x)
    assert [c.kind for c in signature.columns[1:]] == ["text", "number"]


def test_one_column_with_and_without_a_name() -> None:
    assert described(inferred(NB, NUMBERS[["size"]])) == "array size"
    assert described(inferred(NB, NUMBERS[["size"]].to_numpy())) == "array -"
    assert described(inferred(make_pipeline(Pick(), NB), NUMBERS[["size"]])) == "frame size"


BY_PLACE = on((OneHotEncoder(), [1]), (StandardScaler(), [0]))


NAMES = ["", " ", "data", "method", "温度", "a.b", "petal width (cm)", "0", "x" * 500, "tab\there", '"', "🌡"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("model", [NB, BY_PLACE], ids=["array", "frame"])
def test_odd_column_names_work(name: str, model: Any) -> None:
    signature = inferred(model, TABLE[["size", "grade"]].set_axis([name, name + "2"], axis=1))
    assert [c.name for c in signature.columns] == [name, name + "2"]
    with pytest.raises(BadRows, match="missing"):
        signature.parse([{name: 1.0}])


STRINGS = TABLE["note"].tolist()


VECTORIZED = make_pipeline(TfidfVectorizer(), LogisticRegression())


STRING_MODELS = {
    "pipeline": VECTORIZED,
    "hashed": make_pipeline(HashingVectorizer(n_features=64), LogisticRegression()),
    "search around": search(VECTORIZED),
    "search inside": make_pipeline(CountVectorizer(), GridSearchCV(LogisticRegression(), {"C": [1, 2]}, cv=2)),
    "union": make_pipeline(FeatureUnion([("a", TfidfVectorizer()), ("b", CountVectorizer())]), LogisticRegression()),
    "votes": VotingClassifier([("a", VECTORIZED), ("b", VECTORIZED)]),
    "calibrated": CalibratedClassifierCV(VECTORIZED, cv=2),
    "cased": make_pipeline(CountVectorizer(lowercase=False), LogisticRegression()),
    "cleaned": make_pipeline(FunctionTransformer(lambda texts: [text.strip() for text in texts]), VECTORIZED),
}


@pytest.mark.parametrize("name", STRING_MODELS)
def test_model_of_strings_takes_a_list_of_them(name: str) -> None:
    signature = inferred(STRING_MODELS[name], STRINGS)
    assert signature == Signature("texts", ())
    for wrong in (["a", None], ["a", 1], [["a"]], [{"a": "b"}]):
        with pytest.raises(BadRows, match=r'expected a string: data is \["some text"\]'):
            signature.parse(wrong)


def test_model_that_refuses_zeros_is_validated_with_ones() -> None:
    signature, validated_with = infer_signature(NeedsOnes().fit(NUMBERS.to_numpy(), Y))
    assert described(signature) == "array -? -?"
    assert validated_with == [[1.0, 1.0]]


def test_error_for_a_model_that_answers_no_synthetic_row_names_the_way_out() -> None:
    model = RefusesAll().fit(NUMBERS.to_numpy(), Y)
    with pytest.raises(ModelLoadError, match=r"answers none of the synthetic rows.*KeyError.*station 17") as refusal:
        infer_signature(model)
    assert isinstance(refusal.value.__cause__, KeyError)
    signature, validated_with = infer_signature(model, [[101.0, 102.0]])
    assert (validated_with, len(signature.columns)) == ([[101.0, 102.0]], 2)
    assert "sample" in str(refusal.value)  # the way out, which was just taken


FITTED_STRINGS = copy.deepcopy(OWN_STRINGS).fit(TABLE[["size", "note"]], Y)


@pytest.mark.parametrize(
    "sample",
    [
        [[1.0, "a"]],
        [{"note": "a", "size": 1.0}],
        [[1.0, "a"], [2.0, "b"]],
        [[None, "a"], [1, "b"], [1.5, "c"]],
    ],
    ids=str,
)
def test_sample_shows_what_a_step_of_the_users_own_takes(sample: list[Any]) -> None:
    signature, validated_with = infer_signature(copy.deepcopy(FITTED_STRINGS), sample)
    assert described(signature) == "frame size? note:text"
    assert validated_with is sample


def test_step_that_is_no_estimator_is_asked_for_its_categories() -> None:
    strings = TABLE[["city", "note"]].to_numpy(dtype=object)
    signature, _ = infer_signature(make_pipeline(OwnEncoder(), LogisticRegression()).fit(strings, Y))
    assert [column.kind for column in signature.columns or ()] == ["text", "text"]


def test_model_that_takes_dicts_asks_for_no_sample() -> None:
    model = make_pipeline(DictVectorizer(), LogisticRegression()).fit([{"a": 1}, {"a": 2}] * 3, [0, 1] * 3)
    for sample in (None, [{"a": 1}]):
        with pytest.raises(ModelLoadError, match=r"^the model begins with a DictVectorizer.*OneHotEncoder"):
            infer_signature(copy.deepcopy(model), sample)


@pytest.mark.parametrize("make", [pd.Timedelta, lambda days: pd.Period(f"2026-01-{days:02}")])
def test_categories_that_json_cannot_write_are_named(make: Any) -> None:
    frame = pd.DataFrame({"c": [make(1), make(2)] * 3})
    model = make_pipeline(OneHotEncoder(), LogisticRegression()).fit(frame, [0, 1] * 3)
    with pytest.raises(ModelLoadError, match=r"values of the type (timedelta64|Period), which have no form in JSON"):
        infer_signature(model)


NOT_ROWS = [[[1.0]], [[1.0, "a", 2.0]], [{"size": 1.0}], [{}], ["a"], [1.0], [None], [[1.0, "a"], None], [[[], "a"]]]


@pytest.mark.parametrize("sample", [*NOT_ROWS, {"a": 1}, "text", 5], ids=str)
@pytest.mark.parametrize("model", [FITTED_STRINGS, copy.deepcopy(NB).fit(NUMBERS, Y)], ids=["frame", "array"])
def test_sample_that_the_model_does_not_take_is_a_load_error(model: Any, sample: Any) -> None:
    with pytest.raises(ModelLoadError, match="sample"):
        infer_signature(copy.deepcopy(model), sample)


# --- wide models

WIDE = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 1000)), columns=[f"column {at}" for at in range(1000)])
# Seconds of CPU for 1,000 columns: a server that takes minutes to be ready would be restarted before that.
LIMIT = 60.0


@pytest.fixture
def in_time(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes a class's predict fail the test if it is called after `LIMIT`."""

    def limit(kind: type) -> None:
        predict, deadline = kind.predict, time.process_time() + LIMIT

        def predict_in_time(self: Any, x: Any) -> Any:
            if time.process_time() > deadline:
                pytest.fail(f"not inferred within {LIMIT} s")  # not an Exception, so it is not caught
            return predict(self, x)

        monkeypatch.setattr(kind, "predict", predict_in_time)

    return limit


def test_wide_model_that_answers_nothing_gives_up_in_reasonable_time(in_time: Any) -> None:
    model = RefusesAll().fit(WIDE.to_numpy(), None)
    model.feature_names_in_ = WIDE.columns.to_numpy(dtype=object)
    in_time(RefusesAll)
    with pytest.raises(ModelLoadError):
        infer_signature(model)


def test_column_of_strings_is_found_among_very_many_in_reasonable_time(in_time: Any) -> None:
    model = make_pipeline(StringLength(["note"]), LogisticRegression())
    model.fit(WIDE.assign(note=TABLE["note"]), np.arange(60) % 2)
    in_time(type(model))
    signature, _ = infer_signature(model)
    assert [c.name for c in signature.columns if c.kind == "text"] == ["note"]


@pytest.mark.parametrize(
    ("model", "names", "nullable"),
    [
        (LogisticRegression(), False, 0),
        (RandomForestClassifier(5), True, 1000),
        (make_pipeline(SimpleImputer(), KNeighborsClassifier()), True, 1000),
        pytest.param(on((StandardScaler(), slice(0, None))), True, 0, marks=pytest.mark.long),
        (on((SimpleImputer(), slice(0, 496)), ("passthrough", slice(496, None))), False, 496),
    ],
    ids=["regression", "forest", "imputer", "scaler by name", "half imputed"],
)
def test_signature_of_a_wide_model_is_inferred_in_reasonable_time(
    in_time: Any, model: Any, names: bool, nullable: int
) -> None:
    model.fit(WIDE if names else WIDE.to_numpy(), np.arange(60) % 2)
    in_time(type(model))
    signature, _ = infer_signature(model)
    assert sum(c.nullable for c in signature.columns) == nullable
