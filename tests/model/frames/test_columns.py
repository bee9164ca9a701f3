"""What a column takes, and what the model gets for it: what the encoder learned, whatever JSON makes of it."""

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

from model.columns import BadRows, json_form
from model.formats import ModelLoadError
from model.frames.columns import FrameColumn
from model.loaded import LoadedModel, load_model

N = 40
IGNORING = OneHotEncoder(handle_unknown="ignore")  # a value that is read wrongly is ignored, and the answer another


def fitted(frame: pd.DataFrame, encoder: Any = IGNORING) -> Any:
    """Fit a pipeline with an encoder of all columns on a target that depends on each of them."""
    codes = sum(pd.factorize(frame[name])[0] for name in frame)
    model = make_pipeline(
        make_column_transformer((encoder, list(frame)), sparse_threshold=0), LogisticRegression(C=100)
    )
    return model.fit(frame, codes > np.median(codes))


def loaded(place: Path, model: Any, **options: Any) -> LoadedModel:
    """Load a model as the server does."""
    joblib.dump(model, place / "model.joblib")
    return load_model(place / "model.joblib", **options)


def answers(model: LoadedModel, data: list[Any]) -> list[Any]:
    """Return the probabilities for rows as JSON."""
    return list(np.round(model.predict(model.signature.validate(data), "predict_proba")[:, 1], 12))


def refused(model: LoadedModel, data: list[Any]) -> str:
    """Return why rows are refused."""
    with pytest.raises(BadRows) as error:
        model.predict(model.signature.validate(data))
    return error.value.detail


def own(model: Any, frame: pd.DataFrame) -> list[Any]:
    """Return the model's own probabilities."""
    return list(np.round(model.predict_proba(frame)[:, 1], 12))


ZONED = pd.Series(pd.to_datetime(["2026-03-01T08:30:00+00:00", "2026-07-01T12:00:00+00:00"] * (N // 2)))
DAYS = pd.Series(pd.to_datetime(["2026-03-01", "2026-07-01"] * (N // 2)))
# name → the column, and some rows of it as a caller may write them
LEARNED: dict[str, tuple[pd.Series, list[list[Any]]]] = {
    "float32": (pd.Series([0.1, 0.7] * (N // 2), dtype="float32"), [[0.1, 0.7], [float(np.float32(0.1)), 0.7]]),
    "float16": (pd.Series([0.1, 2.0] * (N // 2), dtype="float16"), [[0.1, 2], [float(np.float16(0.1)), 2.0]]),
    "Float32 of pandas": (pd.Series([0.1, 0.7] * (N // 2), dtype="Float32"), [[0.1, 0.7]]),
    "Decimals": (pd.Series([Decimal("0.1"), Decimal("0.70")] * (N // 2)), [[0.1, 0.7]]),
    "days": (DAYS, [["2026-03-01", "2026-07-01T00:00:00"], ["2026-03-01 00:00", "2026-07-01T00:00:00.000"]]),
    "days as dates of Python": (DAYS.dt.date, [["2026-03-01", "2026-07-01"]]),
    "instants": (
        ZONED,
        [
            ["2026-03-01T08:30:00Z", "2026-07-01T12:00:00+00:00"],
            ["2026-03-01T09:30:00+01:00", "2026-07-01T14:00:00+0200"],  # encoders compare instants
        ],
    ),
    "instants of a zone": (ZONED.dt.tz_convert("Europe/Oslo"), [["2026-03-01T09:30:00+01:00", "2026-07-01T12:00:00Z"]]),
    "seconds": (DAYS.astype("datetime64[s]"), [["2026-03-01", "2026-07-01"]]),
    "booleans": (pd.Series([True, False] * (N // 2)), [[True, False], [1, 0], [1.0, 0.0]]),
    "booleans as objects": (pd.Series([True, False] * (N // 2), dtype=object), [[True, False], [1, 0], [1.0, 0.0]]),
    "nullable booleans": (pd.Series([True, False] * (N // 2), dtype="boolean"), [[True, False], [1, 0]]),
    "ones and noughts": (pd.Series([1, 0] * (N // 2)), [[1, 0], [True, False], [1.0, 0.0]]),
    "whole numbers": (pd.Series([3, 5] * (N // 2), dtype="uint8"), [[3, 5], [3.0, 5.0]]),
    "categories of strings": (pd.Series(["Zürich", "東京"] * (N // 2), dtype="category"), [["Zürich", "東京"]]),
    "categories of numbers": (pd.Series([3, 5] * (N // 2), dtype="category"), [[3, 5], [3.0, 5.0]]),
}


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize(
    ("encoder", "with_sample"),
    [(IGNORING, False), (IGNORING, True), (OrdinalEncoder(), False)],
    ids=["one-hot", "with a sample", "ordinal"],
)
def test_value_is_the_category_that_it_denotes(tmp_path: Path, name: str, encoder: Any, with_sample: bool) -> None:
    column, written = LEARNED[name]
    frame = pd.DataFrame({"x": column, "n": ["a", "a", "b", "b"] * (N // 4)})
    model = fitted(frame, encoder)
    expected = own(model, frame.iloc[:2])
    assert expected[0] != expected[1]
    sample = [{"x": written[0][0], "n": "a"}] if with_sample else None
    served = loaded(tmp_path, model, sample=sample)
    for first, second in written:
        assert answers(served, [{"x": first, "n": "a"}, {"n": "a", "x": second}]) == expected
        assert answers(served, [[first, "a"]]) + answers(served, [[second, "a"]]) == expected


@pytest.mark.parametrize("value", [2, -1, 0.5, 1e300])
def test_boolean_column_takes_true_false_one_and_nought_only(tmp_path: Path, value: Any) -> None:
    served = loaded(tmp_path, fitted(pd.DataFrame({"x": [True, False] * (N // 2)})))
    assert "row 0, column 'x': a number; expected true or false, or 1 or 0" in refused(served, [{"x": value}])
    assert "a string; expected true or false" in refused(served, [{"x": "true"}])
    assert served.signature.describe()["columns"][0]["type"] == "boolean"


def test_true_is_no_number_unless_the_sample_has_it(tmp_path: Path) -> None:
    frame = pd.DataFrame({"flag": [True, False] * (N // 2), "x": np.arange(N, dtype=float)})
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(frame, frame.x > 20)
    assert "column 'flag': true or false; expected a number" in refused(loaded(tmp_path, model), [[True, 3.0]])
    served = loaded(tmp_path, model, sample=[{"flag": True, "x": 3.0}])
    assert answers(served, [[True, 3.0], [1, 3.0], [1.0, 3.0]]) == own(model, frame.iloc[[0] * 3].assign(x=3.0))
    assert "column 'x': true or false; expected a number" in refused(served, [[True, True]])


WRONG_DATES = [
    (DAYS, "2026-03-01T00:00:00Z", "a date with an offset; expected a date as ISO 8601 without an offset"),
    (ZONED, "2026-03-01T08:30:00", "a date without an offset; expected a date as ISO 8601 with an offset"),
    (ZONED, "2026-03-01", "a date without an offset"),
    (DAYS, "yesterday", "not a valid date; expected a date as ISO 8601"),
    (DAYS, "1/2/2026", "not a valid date"),
    (DAYS, "now", "not a valid date"),
    (DAYS, "2026-02-30", "not a valid date"),
    (DAYS, "", "not a valid date"),
    (DAYS, 1772323200, "a number; expected a date"),
    (DAYS.astype("datetime64[s]"), "2026-03-01T00:00:00.5", "a time finer than the model's"),
]


@pytest.mark.parametrize(("column", "value", "why"), WRONG_DATES, ids=lambda value: str(value)[:30])
def test_error_for_a_date_shows_the_form(tmp_path: Path, column: pd.Series, value: Any, why: str) -> None:
    detail = refused(loaded(tmp_path, fitted(pd.DataFrame({"x": column}))), [{"x": value}])
    assert detail.startswith(f"row 0, column 'x': {why}")


class Hour:
    """A model of the user's own that takes a frame with dates, and answers the hour as the caller wrote it."""

    def predict(self, x: pd.DataFrame) -> Any:
        return x["at"].dt.hour.to_numpy()


def test_date_that_no_encoder_learned_keeps_its_offset(tmp_path: Path) -> None:
    served = loaded(tmp_path, Hour(), sample=[{"at": "2026-03-01T08:30:00+05:30"}])
    assert served.predict(served.signature.validate([{"at": "2026-03-01T08:30:00+05:30"}] * 2)).tolist() == [8, 8]
    assert served.predict(served.signature.validate([{"at": "2026-03-01T09:30:00Z"}])).tolist() == [9]
    different = [{"at": "2026-03-01T08:30:00+01:00"}, {"at": "2026-03-01T08:30:00+02:00"}]
    assert "column 'at': dates with different offsets in one request" in refused(served, different)
    mixed = [{"at": "2026-03-01T08:30:00+01:00"}, {"at": "2026-03-01T08:30:00"}]
    assert "row 1, column 'at': a date without an offset; expected" in refused(served, mixed)


def test_callers_with_different_offsets_do_not_share_a_call(tmp_path: Path) -> None:
    signature = loaded(tmp_path, Hour(), sample=[{"at": "2026-03-01T08:30:00+05:30"}]).signature
    keys = [signature.batch_key(signature.validate([{"at": f"2026-03-01T08:30:00{zone}"}])) for zone in ("Z", "+01:00")]
    assert keys[0] != keys[1]


def test_categories_that_json_does_not_bring_back_are_refused_at_load(tmp_path: Path) -> None:
    alike = pd.Series([Decimal("0.1"), Decimal("0.1000000000000000000001")] * (N // 2))  # one number in JSON
    with pytest.raises(ModelLoadError, match="the encoder of the columns x was fitted on values that JSON does not"):
        loaded(tmp_path, fitted(pd.DataFrame({"x": alike}), OrdinalEncoder()))
    spans = pd.Series(pd.to_timedelta([1, 2] * (N // 2), unit="D")).astype(object)
    with pytest.raises(ModelLoadError, match="which have no form in JSON"):
        loaded(tmp_path, fitted(pd.DataFrame({"x": spans})))


def test_categories_of_pandas_are_listed_and_named_in_errors(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": pd.Categorical(["a", "b", "c", "a"] * (N // 4)), "n": np.arange(N, dtype=float)})
    model = HistGradientBoostingClassifier(max_iter=5, categorical_features="from_dtype", min_samples_leaf=2)
    model.fit(frame, frame.x == "a")
    served = loaded(tmp_path, model)
    described = served.signature.describe()["columns"][0]
    assert (described["type"], described["categories"]) == ("category", ["a", "b", "c"])
    assert answers(served, [["a", 1.0], ["b", 1.0]]) == own(model, frame.iloc[:2].assign(n=1.0))
    assert 'column \'x\': a number; expected a category: "a", "b", "c"' in refused(served, [[3, 1.0]])


def test_column_that_the_pipeline_drops_may_be_left_out_or_hold_anything(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": np.arange(N), "x": ["a", "b"] * (N // 2)})
    model = make_pipeline(make_column_transformer(("drop", ["id"]), (IGNORING, ["x"])), LogisticRegression())
    model.fit(frame, frame.x == "a")
    served = loaded(tmp_path, model)
    expected = own(model, frame.iloc[:1])
    rows: list[Any] = [{"x": "a"}, {"id": 7, "x": "a"}, {"id": "seven", "x": "a"}, {"x": "a", "id": None}, [7, "a"]]
    for row in rows:
        assert answers(served, [row]) == expected, row
    assert answers(served, [{"x": "a"}, {"x": "a", "id": 7}]) == expected * 2
    assert "column 'x': missing" in refused(served, [{"id": 7}])


def test_dropped_column_of_an_array_leaves_float32_categories_as_they_are(tmp_path: Path) -> None:
    x = np.array([[0.1, 5], [0.7, 6]] * (N // 2), dtype=np.float32)
    steps = make_column_transformer((OneHotEncoder(), [0]), ("drop", [1]))
    model = make_pipeline(steps, LogisticRegression()).fit(x, x[:, 0] > 0.5)
    served = loaded(tmp_path, model)
    assert answers(served, [[0.1, 5], [0.7, "six"]]) == list(np.round(model.predict_proba(x[:2])[:, 1], 12))


def test_columns_that_the_model_does_not_have_are_ignored_on_demand(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": ["a", "b"] * (N // 2)})
    model = fitted(frame)
    assert "column 'y': not a column of this model" in refused(loaded(tmp_path, model), [{"x": "a", "y": 1}])
    served = loaded(tmp_path, model, extra_columns="ignore")
    assert answers(served, [{"y": 1, "x": "a"}, {"x": "b"}]) == own(model, frame.iloc[:2])
    assert "column 'x': missing" in refused(served, [{"y": 1}])


def test_nullable_column_that_is_left_out_is_an_error_that_suggests_null(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": [1.0, np.nan] * (N // 2), "n": np.arange(N, dtype=float)})
    served = loaded(tmp_path, HistGradientBoostingClassifier(max_iter=3).fit(frame, frame.n > 20))
    assert "column 'x': missing; write null for a value that is not known" in refused(served, [{"n": 1.0}])


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (np.float32(0.1), 0.1),
        (np.float16(0.1), 0.1),
        (Decimal("0.10"), 0.1),
        (np.int8(3), 3),
        (np.bool_(True), True),
        (np.str_("é"), "é"),
        (np.datetime64("2026-03-01"), "2026-03-01"),
        (datetime.date(2026, 3, 1), "2026-03-01"),
        (pd.Timestamp("2026-03-01T08:30", tz="UTC"), "2026-03-01T08:30:00+00:00"),
        (np.nan, None),
        (pd.NaT, None),
        (None, None),
    ],
)
def test_learned_value_is_written_as_callers_write_it(value: Any, form: Any) -> None:
    found = json_form(value)
    assert (found, type(found)) == (form, type(form))


def test_learned_value_without_a_form_in_json_is_named() -> None:
    with pytest.raises(TypeError, match="tuple has no form in JSON"):
        json_form((1, 2))


@pytest.mark.parametrize(
    ("learned", "accepted"),
    [
        (("a", "b"), {str}),
        ((3, 5), {int, float}),
        ((0.5,), {int, float}),
        ((True, False), {int, float, bool}),
        ((0.0, 1.0), {int, float, bool}),  # as scikit-learn keeps booleans
        ((), {int, float, bool, str}),
    ],
)
def test_category_takes_the_types_of_what_was_learned(learned: Any, accepted: Any) -> None:
    assert FrameColumn("x", "category", learned=learned).accepted == accepted


@pytest.mark.parametrize(("value", "found"), [(True, 1), (False, 0), (3.0, 3), (3, 3), ("True", "True"), ("4", "4")])
def test_category_that_no_library_keeps_is_a_string_or_a_whole_number(value: Any, found: Any) -> None:
    convert = FrameColumn("x", "category").convert
    assert convert is not None
    assert (convert(value), type(convert(value))) == (found, type(found))
    with pytest.raises(BadRows, match="a fraction; expected a category"):
        convert(0.5)
