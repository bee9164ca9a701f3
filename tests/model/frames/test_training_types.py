"""A model gets its columns in the types it was fitted on, and answers as it does in-process."""

from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.decomposition import NMF
from sklearn.ensemble import BaggingClassifier, HistGradientBoostingClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    StandardScaler,
    TargetEncoder,
    scale,
)

from model.formats import ModelLoadError
from model.frames.columns import FrameColumn
from model.frames.signature import FrameSignature
from model.infer_signature import infer_signature
from model.merging import why_not
from model.signature import BadRows

N_ROWS = 120
RNG = np.random.default_rng(0)


def probabilities(model: Any, rows: list[Any], sample: list[Any] | None = None) -> Any:
    signature, _ = infer_signature(model, sample)
    return model.predict_proba(signature.parse(rows))


@pytest.fixture
def of_strings() -> Any:
    """A model that makes strings of its columns, of which one holds whole numbers."""
    frame = pd.DataFrame({"city": RNG.choice(["Oslo", "Bern"], N_ROWS), "code": RNG.choice([3, 5, 8], N_ROWS)})
    strings = FunctionTransformer(pd.DataFrame.astype, kw_args={"dtype": str})
    model = make_pipeline(strings, OneHotEncoder(handle_unknown="ignore"), LogisticRegression())
    return model.fit(frame, frame["code"] == 5), frame


@pytest.mark.parametrize("five", [5, 5.0])
def test_whole_numbers_of_a_sample_stay_whole(of_strings: Any, five: float) -> None:
    model, _ = of_strings
    rows = [{"city": "Oslo", "code": five}, {"city": "Bern", "code": 8}]
    expected = model.predict_proba(pd.DataFrame({"city": ["Oslo", "Bern"], "code": [5, 8]}))
    sample = [{"city": "Oslo", "code": 3}]
    assert probabilities(model, rows, sample) == pytest.approx(expected)


def test_whole_numbers_stay_whole_where_strings_are_taken_as_well(of_strings: Any) -> None:
    model, _ = of_strings
    expected = model.predict_proba(pd.DataFrame({"city": ["Oslo", "Bern"], "code": [5, 8]}))
    assert probabilities(model, [["Oslo", 5], ["Bern", 8]]) == pytest.approx(expected)


def test_numbers_with_a_fraction_in_a_sample_stay_floats(of_strings: Any) -> None:
    model, frame = of_strings
    frame = frame.assign(code=frame["code"] / 2)
    model.fit(frame, frame["code"] == 2.5)
    expected = model.predict_proba(pd.DataFrame({"city": ["Oslo", "Bern"], "code": [2.5, 4.0]}))
    sample = [{"city": "Oslo", "code": 1.5}]
    assert probabilities(model, [["Oslo", 2.5], ["Bern", 4]], sample) == pytest.approx(expected)


def test_catboost_gets_booleans_as_it_learned_them() -> None:
    catboost = pytest.importorskip("catboost")
    frame = pd.DataFrame({"flag": RNG.random(N_ROWS) < 0.5, "x": RNG.normal(size=N_ROWS)})
    model = catboost.CatBoostClassifier(iterations=3, verbose=0, allow_writing_files=False, cat_features=["flag"])
    model.fit(frame, frame["flag"])
    expected = model.predict_proba(pd.DataFrame({"flag": [True, False], "x": [0.5, 0.5]}))
    assert probabilities(model, [[True, 0.5], [False, 0.5]]) == pytest.approx(expected)


@pytest.mark.parametrize("unit", ["s", "us", "ns"])
def test_a_step_that_depends_on_the_unit_of_times_is_not_served(unit: str) -> None:
    frame = pd.DataFrame({"when": pd.to_datetime(RNG.choice(["2026-01-01", "2026-07-01"], N_ROWS))})
    frame = frame.astype(f"datetime64[{unit}]")
    numbers = FunctionTransformer(pd.DataFrame.astype, kw_args={"dtype": "int64"})
    model = make_pipeline(numbers, StandardScaler(), LogisticRegression()).fit(frame, frame["when"].dt.month > 6)
    with pytest.raises(ModelLoadError, match="the unit in which pandas keeps times"):
        infer_signature(model, [{"when": "2026-01-01"}])


def lightgbm_on(frame: pd.DataFrame, **fit: Any) -> Any:
    lightgbm = pytest.importorskip("lightgbm")
    model = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1, min_child_samples=2, min_data_per_group=1)
    return model.fit(frame, (frame["code"] == 5) | (frame["city"] == "Rome"), **fit)


@pytest.fixture
def cities() -> pd.DataFrame:
    frame = pd.DataFrame({"code": RNG.choice([3, 5, 8], N_ROWS), "city": RNG.choice(["Rome", "Oslo", "Bern"], N_ROWS)})
    return frame.astype({"city": "category"})


@pytest.mark.parametrize("explicit", [["code"], ["code", "city"], "auto"])
@pytest.mark.parametrize("ordered", [True, False])
def test_lightgbms_categories_belong_to_their_columns(cities: Any, explicit: Any, ordered: bool) -> None:
    cities["city"] = cities["city"].cat.set_categories(["Rome", "Oslo", "Bern"], ordered=ordered)
    model = lightgbm_on(cities, categorical_feature=explicit)
    rows = cities.iloc[:20]
    assert probabilities(model, rows.to_numpy().tolist()) == pytest.approx(model.predict_proba(rows))


def test_lightgbms_categories_without_a_sure_column_are_refused(cities: Any) -> None:
    cities = cities.assign(code=cities["code"].map({3: 0, 5: 1, 8: 2}), two=cities["code"].map({3: 0, 5: 1, 8: 2}))
    cities["city"] = cities["city"].cat.as_ordered()
    with pytest.raises(ModelLoadError, match="does not keep which columns held pandas categories"):
        infer_signature(lightgbm_on(cities))


@pytest.mark.parametrize("wrap", [make_pipeline, lambda model: GridSearchCV(model, {"num_leaves": [3, 5]}, cv=2)])
def test_a_wrapped_lightgbm_takes_names_with_blanks(cities: Any, wrap: Any) -> None:
    lightgbm = pytest.importorskip("lightgbm")
    frame = pd.DataFrame({"petal width": RNG.normal(size=N_ROWS)})
    model = wrap(lightgbm.LGBMClassifier(n_estimators=3, verbose=-1)).fit(frame, frame["petal width"] > 0)
    expected = model.predict_proba(frame.iloc[:2])
    for name in ("petal width", "petal_width"):
        rows = [{name: value} for value in frame["petal width"][:2]]
        assert probabilities(model, rows) == pytest.approx(expected)


def test_two_names_for_one_column_are_refused() -> None:
    signature = FrameSignature("frame", (FrameColumn("a_b"), FrameColumn("c")), blanks_replaced=True)
    with pytest.raises(BadRows, match="not a column of this model"):
        signature.parse([{"a b": 1, "a_b": 2, "c": 3}])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_encoder_of_narrow_numbers_in_an_array_knows_them(dtype: str) -> None:
    array = RNG.choice([0.1, 0.2, 0.3], (N_ROWS, 2)).astype(dtype)
    model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()).fit(array, array[:, 0] > 0.15)
    assert probabilities(model, [[0.1, 0.3], [0.2, 0.1]]) == pytest.approx(
        model.predict_proba(np.array([[0.1, 0.3], [0.2, 0.1]], dtype=dtype))
    )


def test_boolean_categories_take_true_and_false() -> None:
    frame = pd.DataFrame({"x": RNG.normal(size=N_ROWS), "flag": RNG.random(N_ROWS) < 0.5}).astype({"flag": "category"})
    model = HistGradientBoostingClassifier(max_iter=5).fit(frame, frame["flag"].astype(bool))
    sent = [[0.5, True], [0.5, False], [0.5, 1]]
    rows = pd.DataFrame({"x": [0.5] * 3, "flag": pd.Categorical([True, False, True])})
    assert probabilities(model, sent) == pytest.approx(model.predict_proba(rows))


def test_a_category_that_cannot_be_sent_says_so() -> None:
    array = np.array([[2**63 + 5], [7]] * 20, dtype=np.uint64)
    model = make_pipeline(OneHotEncoder(), LogisticRegression()).fit(array, [0, 1] * 20)
    with pytest.raises(ModelLoadError, match="a category that an encoder was fitted on cannot be sent"):
        infer_signature(model)


@pytest.mark.parametrize(
    "step", [FunctionTransformer(scale), FunctionTransformer(StandardScaler().fit_transform), NMF(2, tol=0.1)]
)
def test_what_looks_at_all_rows_is_not_merged_though_it_is_scikit_learns(step: Any) -> None:
    array = RNG.uniform(1, 2, (N_ROWS, 3))
    model = make_pipeline(step, LogisticRegression()).fit(array, array[:, 0] > 1.5)
    signature, rows = infer_signature(model)
    assert "may look at several rows at once" in why_not(model, signature, rows)


def test_ufuncs_and_named_functions_of_estimators_are_merged() -> None:
    array = RNG.uniform(1, 2, (N_ROWS, 3))
    model = make_pipeline(FunctionTransformer(np.log1p), SelectKBest(f_classif, k=2), LogisticRegression())
    signature, rows = infer_signature(model.fit(array, array[:, 0] > 1.5))
    assert not why_not(model, signature, rows)


def test_an_encoder_fitted_on_an_array_of_strings_is_served() -> None:
    array = RNG.choice(["Oslo", "Bern"], (N_ROWS, 1))
    model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression())
    model.fit(array, array[:, 0] == "Oslo")
    assert probabilities(model, [["Oslo"], ["Ulm"]]) == pytest.approx(model.predict_proba([["Oslo"], ["Ulm"]]))


def test_a_null_does_not_turn_other_whole_numbers_into_floats(of_strings: Any) -> None:
    model, _ = of_strings
    expected = model.predict_proba(pd.DataFrame({"city": ["Oslo"], "code": [5]}))
    found = probabilities(model, [["Oslo", 5], ["Oslo", None]], [{"city": "Oslo", "code": 3}])
    assert found[:1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sample", "wrong"), [("2026-01-31T08:30:00+01:00", "2026-02-01"), ("2026-01-31", "2026-02-01T00:00:00Z")]
)
def test_dates_have_an_offset_as_the_samples_have(sample: str, wrong: str) -> None:
    dates = pd.to_datetime([sample, "2026-07-31T08:30:00+02:00"[: len(sample)]] * 9, utc="+" in sample)
    frame = pd.DataFrame({"when": dates})
    months = FunctionTransformer(lambda frame: frame.apply(lambda dates: dates.dt.month))
    model = make_pipeline(months, LogisticRegression()).fit(frame, frame["when"].dt.month > 6)
    signature, _ = infer_signature(model, [{"when": sample}])
    assert len(signature.parse([{"when": sample}])) == 1
    with pytest.raises(BadRows, match="an offset; expected a date as ISO 8601 with"):
        signature.parse([{"when": wrong}])


def test_xgboosts_booleans_may_be_missing() -> None:
    xgboost = pytest.importorskip("xgboost")
    flags = pd.Series(RNG.choice([True, False, None], N_ROWS), dtype="boolean")
    frame = pd.DataFrame({"flag": flags, "x": RNG.normal(size=N_ROWS)})
    model = xgboost.XGBClassifier(n_estimators=5).fit(frame, flags.fillna(False).astype(int))
    rows = pd.DataFrame({"flag": pd.array([True, None, False], dtype="boolean"), "x": [0.5] * 3})
    found = probabilities(model, [[True, 0.5], [None, 0.5], [0, 0.5]])
    assert found == pytest.approx(model.predict_proba(rows))


def test_skrub_parses_the_strings_of_a_sample() -> None:
    skrub = pytest.importorskip("skrub")
    when = pd.Series(pd.date_range("2026-01-15", periods=N_ROWS)).dt.strftime("%d/%m/%Y")
    frame = pd.DataFrame({"when": when, "code": RNG.choice(["3", "5"], N_ROWS)})
    model = make_pipeline(skrub.TableVectorizer(), StandardScaler(), LogisticRegression())
    model.fit(frame, frame["code"] == "3")
    rows = frame.iloc[:3].to_dict("records")
    assert probabilities(model, rows, rows) == pytest.approx(model.predict_proba(frame.iloc[:3]))


def boosters() -> dict[str, Any]:
    """Make a booster of each library that takes pandas' categories."""
    lightgbm, xgboost = pytest.importorskip("lightgbm"), pytest.importorskip("xgboost")
    return {
        "scikit-learn": HistGradientBoostingClassifier(max_iter=5, categorical_features="from_dtype"),
        "lightgbm": lightgbm.LGBMClassifier(n_estimators=5, verbose=-1, min_child_samples=2),
        "xgboost": xgboost.XGBClassifier(n_estimators=5, enable_categorical=True),
    }


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["scikit-learn", "lightgbm", "xgboost"])
def test_categories_reach_a_booster_through_a_column_transformer(name: str, nested: bool) -> None:
    frame = pd.DataFrame({"x": RNG.normal(size=N_ROWS), "city": RNG.choice(["Oslo", "Bern", "Rome"], N_ROWS)})
    frame = frame.astype({"city": "category"})
    scaled: Any = make_column_transformer((StandardScaler(), ["x"]), remainder="passthrough")
    if nested:
        scaled = make_column_transformer((make_pipeline("passthrough"), ["city"]), (scaled, ["x"]))
    model = make_pipeline(scaled.set_output(transform="pandas"), boosters()[name])
    model.fit(frame, (frame["city"] == "Oslo") ^ (frame["x"] > 0))
    rows = frame.iloc[:20]
    assert probabilities(model, rows.to_numpy().tolist()) == pytest.approx(model.predict_proba(rows))


@pytest.mark.parametrize("step", ["passthrough", FunctionTransformer(), make_pipeline("passthrough", None)])
@pytest.mark.parametrize("name", ["scikit-learn", "lightgbm", "xgboost"])
@pytest.mark.parametrize("sample", [None, [{"x": 0.5, "city": "Bern"}]])
def test_categories_reach_a_booster_through_steps_that_change_nothing(name: str, step: Any, sample: Any) -> None:
    frame = pd.DataFrame({"x": RNG.normal(size=N_ROWS), "city": RNG.choice(["Oslo", "Bern", "Rome"], N_ROWS)})
    frame = frame.astype({"city": "category"})
    model = make_pipeline(step, boosters()[name]).fit(frame, (frame["city"] == "Oslo") ^ (frame["x"] > 0))
    rows = frame.iloc[:20]
    assert probabilities(model, rows.to_numpy().tolist(), sample) == pytest.approx(model.predict_proba(rows))


def test_encoder_gets_columns_that_a_column_transformer_passes_on() -> None:
    frame = pd.DataFrame({"x": RNG.normal(size=N_ROWS), "size": RNG.choice([0.1, 0.2], N_ROWS).astype("float32")})
    passed = make_column_transformer((StandardScaler(), ["x"]), remainder="passthrough")
    model = make_pipeline(passed, OneHotEncoder(handle_unknown="ignore"), LogisticRegression())
    model.fit(frame, frame["size"] > 0.15)
    rows = frame.iloc[:9]
    sent = [[float(x), float(str(size))] for x, size in rows.to_numpy(dtype=object)]
    assert probabilities(model, sent) == pytest.approx(model.predict_proba(rows))


def own_step_before(model: Any, frame: pd.DataFrame) -> Any:
    return make_pipeline(FunctionTransformer(lambda frame: frame.assign(x=frame["x"] * 2)), model).fit(
        frame, frame["city"] == "Oslo"
    )


def test_lightgbms_categories_behind_a_step_of_ones_own_are_explained_without_promising_a_sample(cities: Any) -> None:
    model = own_step_before(boosters()["lightgbm"], cities.assign(x=RNG.normal(size=N_ROWS)))
    for sample in (None, [{"code": 3, "city": "Oslo", "x": 0.5}]):
        with pytest.raises(ModelLoadError, match="stands before a booster with pandas categories") as error:
            infer_signature(model, sample)
        assert "sample" not in str(error.value).partition("(")[0]


def test_a_wrong_sample_for_a_booster_alone_is_not_explained_by_a_step_before_it(cities: Any) -> None:
    with pytest.raises(ModelLoadError, match="the model refuses its recorded sample"):
        infer_signature(lightgbm_on(cities), [["three", 1]])


def test_catboosts_embeddings_are_refused_with_a_way_out() -> None:
    catboost = pytest.importorskip("catboost")
    frame = pd.DataFrame({"x": RNG.normal(size=N_ROWS), "parts": list(RNG.normal(size=(N_ROWS, 3)))})
    model = catboost.CatBoostClassifier(iterations=3, verbose=0, allow_writing_files=False)
    model.fit(frame, frame["x"] > 0, embedding_features=["parts"])
    with pytest.raises(ModelLoadError, match="train it on a column for each of their numbers"):
        infer_signature(model)


def next_code(frame: Any) -> Any:
    """Make strings of numbers, but take no strings."""
    return (frame + 1).astype(str)


def as_strings(frame: Any) -> Any:
    """Make strings of numbers, or take strings."""
    return frame.astype(str)


@pytest.mark.parametrize("held", [pd.DataFrame, np.asarray])
@pytest.mark.parametrize("dtype", ["int64", "float64"])
@pytest.mark.parametrize("make_strings", [next_code, as_strings])
def test_numbers_become_the_strings_that_an_encoder_learned(held: Any, dtype: str, make_strings: Any) -> None:
    codes = held(pd.DataFrame({"code": RNG.choice([3, 5, 8], N_ROWS)}, dtype=dtype))
    encoder = OneHotEncoder(handle_unknown="ignore")
    model = make_pipeline(FunctionTransformer(make_strings), encoder, LogisticRegression())
    model.fit(codes, np.ravel(codes) == 5)
    expected = model.predict_proba(held(pd.DataFrame({"code": [5, 8]}, dtype=dtype)))
    for sent in ([[5], [8]], [[5.0], [8.0]], [[5], [8.0]]):
        assert probabilities(model, sent) == pytest.approx(expected)


@pytest.mark.parametrize("held", [pd.DataFrame, np.asarray])
def test_numbers_of_which_a_step_makes_strings_are_warned_of(held: Any) -> None:
    codes = held(pd.DataFrame({"code": RNG.choice([3, 5, 8], N_ROWS)}))
    words = make_pipeline(FunctionTransformer(np.ravel), CountVectorizer(analyzer="char"))
    model = make_pipeline(FunctionTransformer(next_code), words, LogisticRegression())
    model.fit(codes, np.ravel(codes) == 5)
    assert "whether it was fitted on 3 or on 3.0" in infer_signature(model)[0].columns[0].doubt
    for sent in ([[5], [8]], [[5.0], [8.0]]):
        assert infer_signature(model, [[3]])[0].columns[0].doubt == ""
        assert probabilities(model, sent, [[3]]) == pytest.approx(
            model.predict_proba(held(pd.DataFrame({"code": [5, 8]})))
        )


def test_numbers_of_which_a_step_makes_catboosts_categories_are_warned_of() -> None:
    catboost = pytest.importorskip("catboost")
    codes = pd.DataFrame({"code": RNG.choice([3, 5, 8], N_ROWS)})
    booster = catboost.CatBoostClassifier(iterations=3, verbose=0, allow_writing_files=False, cat_features=["code"])
    model = make_pipeline(FunctionTransformer(next_code), booster).fit(codes, codes["code"] == 5)
    assert "whether it was fitted on 3 or on 3.0" in infer_signature(model)[0].columns[0].doubt


@pytest.mark.parametrize("dtype", ["int64", "object", "Int64"])
def test_null_in_a_sample_leaves_other_numbers_whole_and_is_warned_of(of_strings: Any, dtype: str) -> None:
    model, frame = of_strings
    five = frame["code"] == 5
    frame = frame[["code"]].astype(dtype)
    if dtype != "int64":
        frame.iloc[::7] = None
    model.fit(frame, five)
    rows = frame.iloc[1:4]
    found = probabilities(model, rows.astype(float).to_numpy().tolist(), [{"code": None}, {"code": 3}])
    assert found == pytest.approx(model.predict_proba(rows))
    signature, _ = infer_signature(model, [{"code": None}, {"code": 3}])
    assert "null beside whole numbers" in signature.columns[0].doubt
    assert infer_signature(model, [{"code": None}, {"code": 3.0}])[0].columns[0].doubt == ""


@pytest.mark.parametrize("encoder", [OneHotEncoder(handle_unknown="ignore"), TargetEncoder(cv=2)])
def test_dates_of_mixed_offsets_are_the_instants_that_the_encoder_learned(encoder: Any) -> None:
    dates = [pd.Timestamp("2026-01-31T08:30+01:00"), pd.Timestamp("2026-07-31T08:30+02:00")]
    frame = pd.DataFrame({"when": RNG.choice(np.array(dates, dtype=object), N_ROWS)}, dtype=object)
    model = make_pipeline(encoder, LogisticRegression()).fit(frame, frame["when"] == dates[0])
    expected = model.predict_proba(pd.DataFrame({"when": dates}, dtype=object))
    assert probabilities(model, [["2026-01-31T07:30Z"], ["2026-07-31T08:30+02:00"]]) == pytest.approx(expected)
    with pytest.raises(BadRows, match="without an offset; expected a date as ISO 8601 with an offset"):
        probabilities(model, [["2026-01-31"]])


def test_units_of_times_that_change_only_the_last_bits_are_served() -> None:
    frame = pd.DataFrame(
        {"when": pd.Timestamp("2026-01-01") + pd.to_timedelta(RNG.integers(0, 30_000_000, N_ROWS), "s")}
    )
    days = FunctionTransformer(lambda frame: (frame - pd.Timestamp("2026-01-01")) / pd.Timedelta(days=1) / 3)
    model = make_pipeline(days, LogisticRegression()).fit(frame, frame["when"].dt.month > 6)
    rows = frame.iloc[:5]
    sent = [[when.isoformat()] for when in rows["when"]]
    assert probabilities(model, sent, sent) == pytest.approx(model.predict_proba(rows))


def test_categories_beside_a_column_without_values_are_checked() -> None:
    alike = [Decimal("0.1"), Decimal("0.1000000000000000000001")] * (N_ROWS // 2)  # one number in JSON
    frame = pd.DataFrame({"empty": pd.Series([None] * N_ROWS, dtype=object), "x": alike})
    model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()).fit(frame, [0, 1] * 60)
    with pytest.raises(ModelLoadError, match="the encoder of the columns x was fitted on values that JSON does not"):
        infer_signature(model)


@pytest.mark.parametrize("dtype", ["int64", "float32"])
def test_encoders_within_a_bagging_get_its_columns(dtype: str) -> None:
    codes = (RNG.choice([1, 2, 3], (N_ROWS, 4)) * [1, 10, 100, 0.1 if dtype == "float32" else 7]).astype(dtype)
    encoded = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression())
    model = BaggingClassifier(encoded, 5, max_features=0.5, random_state=0).fit(codes, codes[:, 0] > 1)
    assert probabilities(model, codes[:9].tolist()) == pytest.approx(model.predict_proba(codes[:9]))


def test_arrays_are_taken_by_an_encoder_of_whole_numbers() -> None:
    codes = RNG.choice([3, 5, 8], (N_ROWS, 2))
    model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()).fit(codes, codes[:, 0] == 5)
    signature, _ = infer_signature(model)
    for held in ("int8", "int64", "float32", "float64"):
        found = model.predict_proba(signature.parse(codes[:9].astype(held)))
        assert found == pytest.approx(model.predict_proba(codes[:9]))
    assert model.predict(signature.parse(np.array([[3, np.nan]]))).shape == (1,)
    with pytest.raises(BadRows, match="an infinity; expected a finite number"):
        signature.parse(np.array([[3, np.inf]]))
    with pytest.raises(BadRows, match="does not take an array of numbers"):
        FrameSignature("frame", (FrameColumn("a"), FrameColumn("b", "text"))).parse(codes)
