"""Models whose rows skip scikit-learn's checks answer, and refuse, as they would with them."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from conftest import ROOT
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.exceptions import NotFittedError
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier, _base
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, PolynomialFeatures, StandardScaler
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils import parallel, validation

import speedups
from model import formats
from model.formats import sklearn as sklearn_format
from speedups import sklearn_checks

X, Y = load_breast_cancer(return_X_y=True)
X = X[:, :6]
FEW = slice(0, 200)
LINEAR = LogisticRegression(max_iter=500)
MODELS = {
    type(model).__name__ if not hasattr(model, "steps") else "+".join(name for name, _ in model.steps): model
    for model in [
        make_pipeline(StandardScaler(), LogisticRegression()),
        make_pipeline(MinMaxScaler(), PolynomialFeatures(), PCA(3), SGDClassifier(random_state=0)),
        make_pipeline(SimpleImputer(), StandardScaler(), Ridge()),
        make_pipeline(FunctionTransformer(np.log1p), GaussianNB()),
        make_pipeline(ColumnTransformer([("a", StandardScaler(), [0, 1]), ("b", "passthrough", [2])]), SVC()),
        RandomForestClassifier(20, random_state=0),
        RandomForestRegressor(20, random_state=0),
        ExtraTreesRegressor(20, random_state=0),
        IsolationForest(n_estimators=20, random_state=0),
        HistGradientBoostingClassifier(max_iter=20),
        GradientBoostingClassifier(n_estimators=10),
        AdaBoostClassifier(n_estimators=10),
        BaggingClassifier(n_estimators=5, random_state=0),
        DecisionTreeClassifier(random_state=0),
        KNeighborsClassifier(),
        LocalOutlierFactor(novelty=True),
        KMeans(3, n_init=1, random_state=0),
        MLPClassifier((5,), max_iter=20, random_state=0),
        SVR(),
        GaussianProcessClassifier(),
        CalibratedClassifierCV(GaussianNB(), cv=2),
        VotingClassifier([("a", GaussianNB()), ("b", DecisionTreeClassifier(random_state=0))]),
        StackingClassifier([("a", GaussianNB())], LINEAR, cv=2),
    ]
}


def asked(path: Path, skipped: bool) -> dict[str, dict[tuple[str, str], Any]]:
    """Ask all models in a fresh process, with the checks or without, for all their methods and kinds of rows."""
    script = f"""
import warnings, joblib
from model.loaded import METHODS
from speedups.sklearn_checks import skip_validation
warnings.simplefilter("ignore")
models, rows = joblib.load({str(path)!r})
answers = {{}}
for model_name, model in models.items():
    if {skipped}:
        skip_validation(model)
    found = answers[model_name] = {{}}
    for method in METHODS:
        for name, x in rows.items():
            if callable(getattr(model, method, None)):
                try:
                    found[method, name] = getattr(model, method)(x)
                except Exception as error:
                    found[method, name] = type(error).__name__ + ": " + str(error)
joblib.dump(answers, {str(path)!r} + ".answers")
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    return joblib.load(str(path) + ".answers")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Return what all models answer with all checks, and without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some do not converge in so few rounds, which is not the subject
        models = {name: model.fit(X[FEW], Y[FEW]) for name, model in MODELS.items()}
    holed, infinite, huge = X[:3].copy(), X[:3].copy(), X[:3].copy()
    holed[1, 2], infinite[1, 2], huge[1, 2] = np.nan, np.inf, 1e300
    rows = {
        "one": X[:1],
        "many": X[300:500],
        "whole": X[:5].astype(int),
        "float32": X[:5].astype("float32"),
        "columns first": np.asfortranarray(X[:5]),
        "as lists": X[:5].tolist(),
        "strings": X[:5].astype(str),
        "NaN": holed,
        "infinity": infinite,
        "huge": huge,
        "none": X[:0],
        "too narrow": X[:, :3],
        "flat": X[0],
        "read only": np.frombuffer(X[:5].tobytes()).reshape(5, -1),
    }
    path = tmp_path_factory.mktemp("checks") / "models"
    joblib.dump((models, rows), path)
    return asked(path, False), asked(path, True)


@pytest.mark.parametrize("name", MODELS)
def test_answers_and_refusals_are_those_with_all_checks(name: str, answers: tuple[Any, Any]) -> None:
    expected, found = (each[name] for each in answers)
    assert expected.keys() == found.keys()
    assert len(expected) >= 14
    for key, answer in expected.items():
        if isinstance(answer, str):
            assert found[key] == answer, key
        else:
            assert np.array_equal(answer, found[key], equal_nan=True), key
            assert answer.dtype == found[key].dtype


def test_estimator_that_is_not_fitted_is_still_refused() -> None:
    sklearn_checks.skip_validation(fitted := make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y))
    fitted.predict(X[:1])
    for unfitted in (LogisticRegression(), make_pipeline(StandardScaler(), LogisticRegression())):
        with pytest.raises(NotFittedError):
            unfitted.predict(X[:1])


def test_array_of_the_caller_is_not_changed() -> None:
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y)
    sklearn_checks.skip_validation(model)
    before = X.copy()
    model.predict(X)
    assert np.array_equal(before, X)


def test_several_jobs_still_run_in_a_pool() -> None:
    forest = RandomForestClassifier(10, n_jobs=2, random_state=0).fit(X, Y)
    expected = forest.predict_proba(X)
    sklearn_checks.skip_validation(forest)
    assert np.array_equal(forest.predict_proba(X), expected)


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models be loaded as in a server, whatever was switched on before."""
    monkeypatch.setattr(sklearn_format, "after_load", [speedups.skip_validation])
    monkeypatch.setattr(_base, "validate_data", validation.validate_data)


@pytest.mark.usefixtures("switched_on")
def test_loaded_model_skips_the_checks(tmp_path: Path) -> None:
    joblib.dump(LINEAR.fit(X[FEW], Y[FEW]), tmp_path / "model.joblib")
    formats.load(tmp_path / "model.joblib")
    assert _base.validate_data is sklearn_checks.validate_data
    assert validation.validate_data is not sklearn_checks.validate_data  # in its own place it stays what it was


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (validation, "validate_data", lambda X, y, reset, estimator: X),  # noqa: N803
        (validation, "check_is_fitted", lambda model: None),
        (validation, "check_is_fitted", None),
        (parallel, "Parallel", len),
    ],
)
def test_scikit_learn_that_has_changed_keeps_its_checks(
    owner: Any, name: str, other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    joblib.dump(LINEAR.fit(X[FEW], Y[FEW]), tmp_path / "model.joblib")
    original = _base.validate_data
    monkeypatch.delitem(sys.modules, "speedups.sklearn_checks")  # so that it is imported again
    monkeypatch.delattr(speedups, "sklearn_checks")
    with monkeypatch.context() as patch:
        if other is None:
            patch.delattr(owner, name)
        else:
            patch.setattr(owner, name, other)
        model = formats.load(tmp_path / "model.joblib")
    assert _base.validate_data is original
    assert np.array_equal(model.predict(X[FEW]), LINEAR.predict(X[FEW]))
    assert [record.message for record in caplog.records if "sklearn_checks is left off" in record.message]
