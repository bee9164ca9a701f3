"""A model gets its columns in the types it was fitted on, and answers as it does in-process."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import NMF
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler, scale

from model.formats import ModelLoadError
from model.infer_signature import infer_signature
from model.merging import why_not
from model.signature import BadRows, Column, Signature

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
    signature = Signature("frame", (Column("a_b"), Column("c")), blanks_replaced=True)
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
