"""What other libraries' models keep of their columns, with each library itself as the truth."""

from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from model.formats import ModelLoadError
from model.loaded import LoadedModel, load_model
from model.signature import BadRows

N = 120
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(N, 2))
Y = (X[:, 0] > 0).astype(int)
FRAME = pd.DataFrame({"petal width": X[:, 0], "city": DRAW.choice(["Oslo", "Bern", "Rome"], N)})
IS_ROME = (FRAME["city"] == "Rome").astype(int)


def library(name: str) -> Any:
    """Import a library, or skip the test."""
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install -r requirements/families.txt")


def loaded(place: Path, model: Any, **options: Any) -> LoadedModel:
    """Load a model as the server does."""
    joblib.dump(model, place / "model.joblib")
    return load_model(place / "model.joblib", **options)


def answers(model: LoadedModel, data: list[Any]) -> Any:
    """Return the predictions for rows as JSON."""
    return np.asarray(model.predict(model.signature.validate(data)))


def refused(model: LoadedModel, data: list[Any]) -> str:
    """Return why rows are refused."""
    with pytest.raises(BadRows) as error:
        model.predict(model.signature.validate(data))
    return error.value.detail


def raw(name: str, x: Any) -> tuple[Any, Any]:
    """Train a raw booster, and return it with its predictions for some rows."""
    if name == "lightgbm":
        lightgbm = library("lightgbm")
        booster = lightgbm.train({"verbose": -1, "num_threads": 1}, lightgbm.Dataset(x, Y), 3)
        return booster, booster.predict(x[:5])
    xgboost = library("xgboost")
    booster = xgboost.train({"nthread": 1}, xgboost.DMatrix(x, Y), 3)
    return booster, booster.predict(xgboost.DMatrix(x[:5]))


@pytest.mark.parametrize("name", ["lightgbm", "xgboost"])
@pytest.mark.parametrize("with_sample", [False, True], ids=["alone", "sample"])
def test_raw_booster_knows_its_width(tmp_path: Path, name: str, with_sample: bool) -> None:
    booster, expected = raw(name, X)
    served = loaded(tmp_path, booster, sample=[[0.1, 0.2]] if with_sample else None)
    assert np.allclose(answers(served, X[:5].tolist()), expected, rtol=1e-6)
    assert np.allclose(answers(served, X[:5]), expected, rtol=1e-6)  # as an array in the body
    assert "row 0: 1 values; expected 2" in refused(served, [[0.1]])
    assert "row 0: 3 values; expected 2" in refused(served, [[0.1, 0.2, 0.3]])
    assert "without column names" in refused(served, [{"a": 0.1, "b": 0.2}])


@pytest.mark.parametrize("name", ["lightgbm", "xgboost"])
def test_raw_booster_of_a_frame_knows_its_names(tmp_path: Path, name: str) -> None:
    frame = pd.DataFrame(X, columns=["petal width", "height"])
    booster, expected = raw(name, frame)
    served = loaded(tmp_path, booster)
    rows = [{"height": b, "petal width": a} for a, b in X[:5].tolist()]
    assert np.allclose(answers(served, rows), expected, rtol=1e-6)
    assert "column 'height': missing" in refused(served, [{"petal width": 1.0}])


def test_lightgbm_takes_the_names_that_it_has_rewritten(tmp_path: Path) -> None:
    lightgbm = library("lightgbm")
    frame = FRAME.assign(city=FRAME["city"].astype("category"))
    model = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1, num_threads=1).fit(frame, IS_ROME)
    rows = [{"city": city, "petal width": width} for width, city in FRAME.to_numpy().tolist()[:9]]
    renamed = [{name.replace(" ", "_"): value for name, value in row.items()} for row in rows]
    for sample in (None, rows[:2], renamed[:2]):
        served = loaded(tmp_path, model, sample=sample)
        assert answers(served, rows).tolist() == model.predict(frame[:9]).tolist()
        assert answers(served, renamed).tolist() == model.predict(frame[:9]).tolist()
    described = served.signature.describe()["columns"][1]
    assert (described["type"], described["categories"]) == ("category", ["Bern", "Oslo", "Rome"])


def test_catboost_answers_with_and_without_categories(tmp_path: Path) -> None:
    catboost = library("catboost")
    options = {"iterations": 5, "verbose": 0, "allow_writing_files": False, "thread_count": 1}
    plain = catboost.CatBoostClassifier(**options).fit(X, Y)
    served = loaded(tmp_path, plain)
    assert answers(served, X[:9].tolist()).tolist() == plain.predict(X[:9]).tolist()
    assert "row 0: 1 values; expected 2" in refused(served, [[0.1]])
    named = catboost.CatBoostClassifier(cat_features=["city"], **options).fit(FRAME, IS_ROME)
    served = loaded(tmp_path, named)
    rows = FRAME[:9].to_dict(orient="records")
    assert answers(served, rows).tolist() == named.predict(FRAME[:9]).tolist()
    assert "column 'city': a fraction; expected a category" in refused(served, [{"petal width": 1.0, "city": 0.5}])


@pytest.mark.parametrize("held", ["bool", "object"])
def test_true_of_catboost_is_the_one_that_it_learned(tmp_path: Path, held: str) -> None:
    catboost = library("catboost")
    frame = pd.DataFrame({"flag": pd.Series(DRAW.random(N) < 0.5).astype(held), "x": X[:, 1]})
    target = frame["flag"].astype(int) + 0.1 * X[:, 1]
    model = catboost.CatBoostRegressor(
        iterations=20, verbose=0, allow_writing_files=False, cat_features=["flag"], thread_count=1
    ).fit(frame, target)
    expected = model.predict(frame[:9])
    assert np.ptp(expected) > 0.3
    rows = frame[:9].astype(object).to_dict(orient="records")
    for sample in (None, rows[:2]):
        assert np.allclose(answers(loaded(tmp_path, model, sample=sample), rows), expected, rtol=1e-9)


def test_categories_that_xgboost_cuts_off_are_refused_at_load_with_a_way_out(tmp_path: Path) -> None:
    xgboost = library("xgboost")
    frame = pd.DataFrame({"city": pd.Categorical(["Zürich", "東京"] * (N // 2)), "x": X[:, 0]})
    model = xgboost.XGBClassifier(n_estimators=3, enable_categorical=True, nthread=1).fit(frame, [0, 1] * (N // 2))
    with pytest.raises(ModelLoadError, match="put an OrdinalEncoder before it in a pipeline"):
        loaded(tmp_path, model)


def _category_encoders() -> list[Any]:
    encoders = library("category_encoders")
    return [encoders.TargetEncoder(cols=["city"]), encoders.OrdinalEncoder(cols=["city"])]


def _feature_engine() -> list[Any]:
    encoding = library("feature_engine.encoding")
    return [encoding.OneHotEncoder(variables=["city"]), encoding.MeanEncoder(variables=["city"])]


def _skrub() -> list[Any]:
    return [library("skrub").TableVectorizer()]


@pytest.mark.parametrize("make", [_category_encoders, _feature_engine, _skrub], ids=lambda make: make.__name__[1:])
@pytest.mark.parametrize("with_sample", [False, True], ids=["alone", "sample"])
@pytest.mark.filterwarnings("ignore")  # each of these libraries warns of what pandas 3 has changed
def test_encoder_of_another_library_gets_strings(tmp_path: Path, make: Any, with_sample: bool) -> None:
    for encoder in make():
        model = make_pipeline(encoder, LogisticRegression()).fit(FRAME, IS_ROME)
        rows = FRAME[:9].to_dict(orient="records")
        served = loaded(tmp_path, model, sample=rows[:2] if with_sample else None)
        assert answers(served, rows).tolist() == model.predict(FRAME[:9]).tolist()
        assert "column 'petal width': a string; expected a number" in refused(
            served, [{"petal width": "a", "city": "a"}]
        )


def test_statsmodels_answers_a_frame_or_an_array(tmp_path: Path) -> None:
    statsmodels = library("statsmodels.api")
    model = statsmodels.OLS(Y, X).fit()
    assert np.allclose(answers(loaded(tmp_path, model, sample=[[0.1, 0.2]]), X[:5].tolist()), model.predict(X[:5]))


def test_pipeline_of_imbalanced_learn_answers_as_scikit_learns_does(tmp_path: Path) -> None:
    pipeline, sampling = library("imblearn.pipeline"), library("imblearn.over_sampling")
    model = pipeline.make_pipeline(sampling.RandomOverSampler(random_state=0), LogisticRegression()).fit(X, Y)
    served = loaded(tmp_path, model)
    assert answers(served, X[:9].tolist()).tolist() == model.predict(X[:9]).tolist()
    assert served.about["merges_requests"] == "yes"
