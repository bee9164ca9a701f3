"""Exports: what an ONNX file answers next to the model that it was made of, and what is refused."""

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_diabetes, load_iris
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler, TargetEncoder
from sklearn.semi_supervised import LabelPropagation
from sklearn.svm import SVC

pytest.importorskip("skl2onnx", reason="skl2onnx is not installed: pip install -r requirements/onnx.txt")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -r requirements/onnx.txt")

from model.__main__ import main
from model.columns import BadRows
from model.formats import ModelLoadError
from model.loaded import LoadedModel, RowsRefused, load_model
from model.versions import onnx_export
from model.versions.onnx_export import TOLERANCE, NotExported, Report, export

IRIS = load_iris(as_frame=True)
X, Y = IRIS.data, IRIS.target
X += np.random.default_rng(0).normal(0, 0.01, X.shape)  # without ties: of two neighbours equally near any may be taken
IRIS_MODEL = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y)
ROWS = X.to_numpy().tolist()
NAMES = np.array(["setosa", "versicolor", "virginica"])[Y]


def saved(tmp_path: Path, model: Any) -> Path:
    """Save a model."""
    joblib.dump(model, tmp_path / "model.joblib")
    return tmp_path / "model.joblib"


def exported(tmp_path: Path, model: Any, sample: list[Any] | None = None, **options: Any) -> tuple[Report, LoadedModel]:
    """Export a model; return the report and the file as the server loads it."""
    report = export(saved(tmp_path, model), tmp_path / "model.onnx", sample, **options)
    return report, load_model(tmp_path / "model.onnx")


def refusal(tmp_path: Path, model: Any, sample: list[Any] | None = None) -> str:
    """Return why a model is not exported, and see that nothing is left of the try."""
    path = saved(tmp_path, model)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(NotExported) as error:
        export(path, tmp_path / "model.onnx", sample)
    assert sorted(os.listdir(tmp_path)) == before
    return str(error.value)


def answer(model: LoadedModel, rows: list[Any], method: str = "predict") -> Any:
    """Ask as a request does."""
    result = model.call(model.signature.parse(rows), method)
    return result.tolist() if isinstance(result, np.ndarray) else result


CLASSIFIERS = {
    "pipeline": make_pipeline(StandardScaler(), LogisticRegression()),
    "forest": RandomForestClassifier(100, random_state=0),
    "histogram boosting": HistGradientBoostingClassifier(max_iter=10),
    "gradient boosting": GradientBoostingClassifier(n_estimators=20),
    "neighbours": KNeighborsClassifier(),
    "network": MLPClassifier((8,), max_iter=200, random_state=0, tol=0.1),
    "search": GridSearchCV(LogisticRegression(max_iter=500), {"C": [1, 10]}, cv=2),
}


@pytest.mark.parametrize("labels", [Y, NAMES], ids=["numbers", "texts"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_answers_as_before(tmp_path: Path, name: str, labels: Any) -> None:
    trained = CLASSIFIERS[name].fit(X, labels)
    report, model = exported(tmp_path, trained, ROWS)
    assert (report.rows, report.labels, report.compared) == (150, 0, "predict_proba")
    assert 900 < report.synthetic <= 1000
    assert report.absolute < 1e-6
    assert answer(model, ROWS) == trained.predict(X).tolist()
    assert np.allclose(answer(model, ROWS, "predict_proba"), trained.predict_proba(X), atol=1e-6)


def test_file_takes_the_same_requests_as_the_model(tmp_path: Path) -> None:
    trained = make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression()).fit(X, NAMES)
    _, model = exported(tmp_path, trained)
    before = load_model(tmp_path / "model.joblib")
    assert model.signature.describe() == before.signature.describe()
    assert model.classes == before.classes == ["setosa", "versicolor", "virginica"]
    named = [dict(zip(reversed(X.columns), reversed(row), strict=True)) for row in ROWS]
    assert answer(model, named) == answer(before, named)
    assert answer(model, [[5.1, None, 1.4, 0.2]]) == answer(before, [[5.1, None, 1.4, 0.2]])


@pytest.mark.parametrize(
    "model", [Ridge(), RandomForestRegressor(20), HistGradientBoostingRegressor(max_iter=10)], ids=str
)
def test_regressor_answers_one_value_a_row(tmp_path: Path, model: Any) -> None:
    rows, values = load_diabetes(return_X_y=True)
    trained = model.fit(rows, values)
    report, served = exported(tmp_path, trained, rows.tolist())
    assert (report.labels, report.compared) == (None, "predict")
    assert report.relative < TOLERANCE
    assert np.allclose(answer(served, rows.tolist()), trained.predict(rows), rtol=1e-5)


def test_several_targets_are_a_list_a_row(tmp_path: Path) -> None:
    trained = Ridge().fit(X.iloc[:, :2], X.iloc[:, 2:])
    _, model = exported(tmp_path, trained)
    assert np.allclose(answer(model, X.iloc[:, :2].to_numpy().tolist()), trained.predict(X.iloc[:, :2]))


FRAME = pd.DataFrame(
    {
        "city": ["Oslo", "Rome", "Bern", "Rome"] * 20,
        "size": np.random.default_rng(0).uniform(1, 9, 80),
        "age": np.tile([30, 40, 50, 60, 70], 16),
    }
)


def of_columns(model: Any) -> Any:
    """Fit a pipeline on texts and numbers by name."""
    scaled = isinstance(model, LogisticRegression)  # a forest would find its thresholds on whole numbers, rounded
    numbers = make_pipeline(SimpleImputer(), StandardScaler()) if scaled else SimpleImputer()
    steps = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["city"]), (numbers, ["size", "age"]))
    return make_pipeline(steps, model).fit(FRAME, (FRAME["size"] * 10 > FRAME["age"]).map({True: "yes", False: "no"}))


@pytest.mark.parametrize("inner", [LogisticRegression(), RandomForestClassifier(21, random_state=0)], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["sample", "made up"])
def test_columns_of_texts_and_numbers_keep_their_names(tmp_path: Path, inner: Any, given: bool) -> None:
    trained = of_columns(inner)
    rows = FRAME.to_dict("records")
    report, model = exported(tmp_path, trained, rows if given else None)
    assert report.labels == 0
    assert answer(model, rows) == trained.predict(FRAME).tolist()
    assert [(c.name, c.kind, c.nullable) for c in model.signature.columns or ()] == [
        ("city", "text", False),  # a missing text has no form in ONNX
        ("size", "number", True),
        ("age", "number", True),
    ]
    missing = [{"city": "Paris", "size": None, "age": 35}]
    assert answer(model, missing) == trained.predict(pd.DataFrame(missing).astype({"size": float})).tolist()


def test_texts_stay_texts(tmp_path: Path) -> None:
    texts = ["good and cheap", "bad", "cheap", "very bad and slow"]
    trained = make_pipeline(TfidfVectorizer(lowercase=False), LogisticRegression()).fit(texts, [1, 0, 1, 0])
    report, model = exported(tmp_path, trained, texts)
    assert report.labels == 0
    assert answer(model, texts) == [1, 0, 1, 0]


def test_outliers_are_labels(tmp_path: Path) -> None:
    trained = IsolationForest(n_estimators=10, random_state=0).fit(X.to_numpy())
    report, model = exported(tmp_path, trained, ROWS)
    assert report.labels == 0
    assert report.lost == ("decision_function", "score_samples")
    assert answer(model, ROWS) == trained.predict(X.to_numpy()).tolist()


def test_scores_of_a_vector_machine_are_not_served_as_probabilities(tmp_path: Path) -> None:
    trained = SVC().fit(X, Y)
    report, model = exported(tmp_path, trained, ROWS)
    assert (report.labels, report.compared, report.lost) == (0, "", ("decision_function",))
    assert model.methods == ("predict",)
    assert "without decision_function" in str(report)


# --- precision

LARGE = 1.6e9 + np.random.default_rng(0).integers(0, 1000, (500, 3)).astype(float)  # such as seconds since 1970
LATER = (LARGE[:, 0] > LARGE[:, 1]).astype(int)
TWO = (LARGE[:, 0] > 1.6e9 + 500).astype(int)


def test_linear_model_on_large_numbers_is_exported_with_double_precision(tmp_path: Path) -> None:
    trained = make_pipeline(StandardScaler(), LogisticRegression()).fit(LARGE, LATER)
    report, model = exported(tmp_path, trained, LARGE.tolist())
    assert (report.labels, report.precision) == (0, "float64")
    assert answer(model, LARGE.tolist()) == trained.predict(LARGE).tolist()


def test_forest_on_large_numbers_is_exported_with_the_single_precision_that_it_has(tmp_path: Path) -> None:
    trained = RandomForestClassifier(20, random_state=0).fit(LARGE, LATER)
    report, _ = exported(tmp_path, trained, LARGE.tolist())
    assert (report.labels, report.precision) == (0, "float32")


@pytest.mark.parametrize("given", [True, False], ids=["sample", "made up"])
def test_boosting_on_large_numbers_is_refused_for_its_thresholds_have_no_single_precision(
    tmp_path: Path, given: bool
) -> None:
    trained = HistGradientBoostingClassifier(max_iter=10).fit(LARGE, TWO)
    why = refusal(tmp_path, trained, LARGE.tolist() if given else None)
    assert "labels differ" in why
    assert "0 labels differ" not in why.replace("0 rows", "")
    assert "Nothing was written; --force writes it anyway" in why


def test_force_writes_what_differs_and_says_by_how_much(tmp_path: Path) -> None:
    trained = HistGradientBoostingClassifier(max_iter=10).fit(LARGE, TWO)
    signature = load_model(saved(tmp_path, trained)).signature
    rows = LARGE.tolist() + onnx_export._synthetic_rows(trained, signature, LARGE[0].tolist())
    report, model = exported(tmp_path, trained, LARGE.tolist(), force=True)
    different = (np.array(answer(model, rows)) != trained.predict(np.array(rows))).sum()
    assert report.labels == different > 0
    apart = abs(np.array(answer(model, rows, "predict_proba")) - trained.predict_proba(np.array(rows))).max()
    assert report.absolute == pytest.approx(apart)
    assert not report.alike


def test_refused_export_leaves_an_older_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"older")
    refusal(tmp_path, HistGradientBoostingClassifier(max_iter=10).fit(LARGE, TWO), LARGE.tolist())
    assert (tmp_path / "model.onnx").read_bytes() == b"older"


def test_neighbours_that_are_equally_near_make_a_refusal(tmp_path: Path) -> None:
    trained = KNeighborsClassifier().fit(np.round(X, 1), Y)
    assert "its ONNX form predicts differently" in refusal(tmp_path, trained, np.round(X, 1).to_numpy().tolist())


@pytest.mark.parametrize("given", [True, False], ids=["sample", "made up"])
def test_forest_that_knows_no_missing_values_takes_none_as_onnx(tmp_path: Path, given: bool) -> None:
    trained = RandomForestClassifier(20, random_state=0).fit(X, Y)
    report, model = exported(tmp_path, trained, ROWS if given else None)
    assert (report.labels, report.null) == (0, False)
    assert "null is rejected" in str(report)
    assert not any(column.nullable for column in model.signature.columns or ())
    before = load_model(tmp_path / "model.joblib")
    assert all(column.nullable for column in before.signature.columns or ())


def test_missing_values_that_the_model_knows_stay_so(tmp_path: Path) -> None:
    holed = X.mask(np.random.default_rng(0).random(X.shape) < 0.2)
    trained = HistGradientBoostingClassifier(max_iter=10).fit(holed, Y)
    rows = holed.astype(object).where(holed.notna(), None).to_numpy().tolist()
    report, model = exported(tmp_path, trained, rows)
    assert (report.labels, report.null) == (0, True)
    assert answer(model, rows) == trained.predict(holed).tolist()


def test_vote_that_is_even_is_told(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    trained = RandomForestClassifier(20, random_state=0).fit(generator.random((200, 1)), generator.integers(0, 2, 200))
    report, _ = exported(tmp_path, trained, generator.random((500, 1)).tolist(), force=True)
    assert report.absolute < 1e-6
    assert report.labels == report.undecided > 0
    assert f"{report.labels} labels differ (for {report.labels} the model itself is undecided)" in str(report)


def test_labels_that_are_true_and_false_are_not_made_numbers(tmp_path: Path) -> None:
    assert "150 labels differ" in refusal(tmp_path, LogisticRegression(max_iter=500).fit(X, Y > 0), ROWS)


# --- what is refused


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (make_pipeline(FunctionTransformer(np.log1p), Ridge()).fit(X, Y), "no ONNX form that works"),
        (LabelPropagation().fit(X, Y), "no ONNX form that works"),
        (MultiOutputClassifier(LogisticRegression(max_iter=500)).fit(X, np.c_[Y, Y]), "classifier of several outputs"),
    ],
    ids=["function of ones own", "no converter", "several outputs"],
)
def test_model_without_an_onnx_form_is_told(tmp_path: Path, model: Any, why: str) -> None:
    assert why in refusal(tmp_path, model, (X.to_numpy() > 3).astype(int).tolist())


def test_sample_that_does_not_fit_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="refuses its recorded sample"):
        export(saved(tmp_path, IRIS_MODEL), tmp_path / "model.onnx", [[1, 2, 3]])


def test_what_is_onnx_already_is_refused(tmp_path: Path) -> None:
    exported(tmp_path, IRIS_MODEL)
    with pytest.raises(NotExported, match="not a model of scikit-learn"):
        export(tmp_path / "model.onnx", tmp_path / "again.onnx")


def test_other_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotExported, match=r"name ends in \.onnx"):
        export(saved(tmp_path, IRIS_MODEL), tmp_path / "model.bin")


def test_missing_library_is_named_with_the_requirements_that_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "skl2onnx"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "skl2onnx", None)
    why = refusal(tmp_path, IRIS_MODEL)
    assert "needs the library skl2onnx, which is not installed: pip install -r requirements/onnx.txt" in why


def test_command_ends_in_the_file_and_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out, rows = saved(tmp_path, IRIS_MODEL), tmp_path / "iris.onnx", tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))
    assert main(["export", str(path), str(out)]) == 0
    assert capsys.readouterr().out.endswith(
        f"\nwrote {out}; make a version of it with: python -m model publish {out}\n"
    )
    assert main(["export", str(path), str(out), "--sample", str(rows)]) == 0
    assert capsys.readouterr().out.endswith(f"python -m model publish {out} --sample ROWS.JSON\n")
    joblib.dump(LabelPropagation().fit(X, Y), path)
    assert main(["export", str(path), str(out)]) == 1
    assert capsys.readouterr().err.endswith(f"The model is served without it: python -m model publish {path}\n")


# --- rows that are made up


def test_report_says_that_rows_are_synthetic_rows(tmp_path: Path) -> None:
    report, _ = exported(tmp_path, make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y))
    assert report.rows == 0
    assert 900 < report.synthetic <= 1000
    assert re.match(r"\d+ synthetic rows, float64 numbers; 0 labels differ; predict_proba differs by ", str(report))
    assert "--sample rows.json" in str(report)


@pytest.mark.parametrize("name", ["pipeline", "forest", "histogram boosting", "neighbours"])
def test_synthetic_rows_rows_reach_every_class(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    make = onnx_export._synthetic_rows
    monkeypatch.setattr(onnx_export, "_synthetic_rows", lambda *given: made.extend(make(*given)) or made)
    trained = CLASSIFIERS[name].fit(X.to_numpy(), Y)
    exported(tmp_path, trained)
    assert set(trained.predict(np.array(made))) == {0, 1, 2}


# --- strings


WORDS = ["schön und günstig", "häßlich und öde", "très réussi", "raté déçu", "очень хорошо", "плохо", "好 的"]
LIKED = [1, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    "vectorizer",
    [
        TfidfVectorizer(),
        TfidfVectorizer(lowercase=False),
        CountVectorizer(ngram_range=(1, 2)),
        TfidfVectorizer(token_pattern=r"(?u)\b\w+\b"),
    ],
    ids=["words", "as written", "pairs", "letters"],
)
def test_words_of_all_scripts_are_exported(tmp_path: Path, vectorizer: Any) -> None:
    trained = make_pipeline(vectorizer, LogisticRegression(C=100)).fit(WORDS, LIKED)
    report, model = exported(tmp_path, trained)
    assert (report.labels, report.relative < TOLERANCE) == (0, True)
    texts = [
        "schön",
        "SCHÖN",
        "öde!",
        "réussi",
        "re\u0301ussi",
        "raté-déçu",
        "Очень хорошо",
        "好",
        "",
        "schönes",
        "und",
    ]
    expected = trained.predict_proba(texts)
    assert np.allclose(answer(model, texts, "predict_proba"), expected, atol=1e-6)
    assert np.allclose([answer(model, [text], "predict_proba")[0] for text in texts], expected, atol=1e-6)


@pytest.mark.parametrize(
    "vectorizer",
    [TfidfVectorizer(token_pattern=r"[^\W\d]{2,}"), TfidfVectorizer(analyzer="char", ngram_range=(1, 3))],
    ids=["letters that onnxruntime takes for others", "runs of blanks, which scikit-learn joins"],
)
def test_words_that_are_read_differently_are_found_without_a_sample(tmp_path: Path, vectorizer: Any) -> None:
    why = refusal(tmp_path, make_pipeline(vectorizer, LogisticRegression(C=100)).fit(WORDS, LIKED))
    assert re.search(r"[1-9]\d* labels differ", why)
    assert "python -m model publish" in why


def test_strings_of_a_column_are_made_of_its_vocabulary(tmp_path: Path) -> None:
    frame = pd.DataFrame({"words": WORDS, "size": np.arange(7.0)})
    steps = make_column_transformer((TfidfVectorizer(), "words"), remainder="passthrough")
    trained = make_pipeline(steps, LogisticRegression(C=100)).fit(frame, LIKED)
    report, model = exported(tmp_path, trained, frame.to_dict("records")[:1])
    assert (report.rows, report.labels, report.synthetic > 900) == (1, 0, True)
    assert np.allclose(
        answer(model, frame.to_numpy().tolist(), "predict_proba"), trained.predict_proba(frame), atol=1e-5
    )


def test_sample_is_compared_beside_synthetic_rows(tmp_path: Path) -> None:
    trained = HistGradientBoostingClassifier(max_iter=10).fit(LARGE, TWO)
    alone = [[1.0, 2.0, 3.0]]  # far from all thresholds
    why = refusal(tmp_path, trained, alone)
    assert "1 rows of the sample and 1000 synthetic rows" in why


# --- categories


CATEGORIES = pd.DataFrame({"c": ["a", "b", "d", "b"] * 20, "k": [1, 2, 3, 4] * 20, "x": np.linspace(-1, 1, 80)})
CHOSEN = ((CATEGORIES.c == "d") | (CATEGORIES.x > 0.5)).astype(int)


def of_categories(encoder: Any) -> Any:
    steps = make_column_transformer((encoder, ["c", "k"]), remainder="passthrough")
    return make_pipeline(steps, LogisticRegression()).fit(CATEGORIES, CHOSEN)


@pytest.mark.parametrize(
    "encoder",
    [
        OneHotEncoder(),
        OneHotEncoder(handle_unknown="ignore"),
        OrdinalEncoder(),
        OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1),
        TargetEncoder(),
    ],
    ids=["one hot", "ignored", "ordinal", "ordinal with a value", "target"],
)
def test_unknown_category_is_answered_as_the_model_does(tmp_path: Path, encoder: Any) -> None:
    report, model = exported(tmp_path, of_categories(encoder))
    before = load_model(tmp_path / "model.joblib")
    assert report.unknown == ()
    for row in (["a", 2, 0.3], ["ZZ", 2, 0.3], ["A", 2, 0.3], ["", 2, 0.3], ["a", 99, 0.3], ["a", 2.5, 0.3]):
        try:
            expected = answer(before, [row], "predict_proba")
        except RowsRefused:
            with pytest.raises((RowsRefused, BadRows)):
                answer(model, [row], "predict_proba")
        else:
            with suppress(BadRows):  # a fraction, where the file takes whole numbers only
                assert np.allclose(answer(model, [row], "predict_proba"), expected, atol=1e-6)
                continue
            assert row[1] == 2.5


def test_names_with_blanks_and_booleans_are_those_of_the_model(tmp_path: Path) -> None:
    frame = CATEGORIES.assign(k=CATEGORIES.k > 2).astype({"k": int})
    frame.columns = ["the city", "is large", "größe (m)"]
    steps = make_column_transformer((OneHotEncoder(), ["the city", "is large"]), remainder="passthrough")
    _, model = exported(tmp_path, make_pipeline(steps, LogisticRegression()).fit(frame, CHOSEN))
    columns = [(c.name, c.kind) for c in model.signature.columns or ()]
    assert columns == [("the city", "text"), ("is large", "boolean"), ("größe (m)", "number")]
    before = load_model(tmp_path / "model.joblib")
    for large in (True, False, 1, 0):
        row = {"größe (m)": 0.4, "the city": "b", "is large": large}
        assert answer(model, [row]) == answer(before, [row])


@pytest.mark.parametrize("values", [["2026-01-31", "2026-02-01"], ["a", "b"]], ids=["dates", "pandas categories"])
def test_columns_that_onnx_does_not_have_are_named(tmp_path: Path, values: list[str]) -> None:
    if values[0] == "a":
        frame = pd.DataFrame({"c": pd.Categorical(values * 40), "x": np.arange(80.0)})
        model = HistGradientBoostingClassifier(categorical_features="from_dtype", max_iter=3)
    else:
        frame = pd.DataFrame({"c": pd.to_datetime(values * 40), "x": np.arange(80.0)})
        steps = make_column_transformer((OneHotEncoder(), ["c"]), remainder="passthrough")
        model = make_pipeline(steps, LogisticRegression(max_iter=1000))
    why = refusal(tmp_path, model.fit(frame, np.arange(80) % 2))
    assert re.search(r"column 'c' holds (dates|pandas categories), which ONNX does not have. The model is served", why)


def test_unknown_category_that_only_the_file_rejects_is_told(tmp_path: Path) -> None:
    encoder = OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=5)
    trained = of_categories(encoder)
    why = refusal(tmp_path, trained)
    assert "column 'c': an unknown category is answered by the model, and rejected by its ONNX form" in why
    report, _ = exported(tmp_path, trained, force=True)
    assert not report.alike


def test_file_without_a_synthetic_row_that_fits_loads_with_the_row_that_it_records(tmp_path: Path) -> None:
    _, model = exported(tmp_path, of_categories(OneHotEncoder()))
    assert model.about["validated_with"] == "a synthetic row (no sample was recorded)"
    assert answer(model, [{"c": "d", "k": 1, "x": 0.0}]) == [1]
    numbers = make_pipeline(OneHotEncoder(), LogisticRegression()).fit([[3.0], [7.0], [9.0]] * 9, [0, 1, 1] * 9)
    _, model = exported(tmp_path, numbers)
    assert answer(model, [[3], [7]]) == [0, 1]
    with pytest.raises((RowsRefused, BadRows)):
        answer(model, [[4]])
