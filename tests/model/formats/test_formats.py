"""Model files: each format loads, and what does not load says why and what to do."""

import io
import pickle
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn import __version__ as sklearn_version
from sklearn.base import BaseEstimator
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import (
    BaggingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.feature_selection import RFE
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import (
    StandardScaler,
)
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from sklearn.tree._tree import Tree

from model import formats
from model.formats import ModelLoadError
from model.serving import Serving, SingleFile

X, Y = load_iris(return_X_y=True)
MODEL = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y)
DUMPS: dict[str, Callable[[Any, Path], Any]] = {
    ".joblib": joblib.dump,
    ".pkl": lambda model, path: path.write_bytes(pickle.dumps(model)),
    ".pickle": lambda model, path: path.write_bytes(pickle.dumps(model, protocol=4)),
    ".skops": skops.io.dump,
}


@pytest.fixture(params=DUMPS)
def suffix(request: pytest.FixtureRequest) -> str:
    """Each suffix in turn."""
    skip_if_removed(request.param)
    return str(request.param)


def skip_if_removed(suffix: str) -> None:
    """Skip a test of skops' files if their loader was removed."""
    if suffix == ".skops":
        pytest.importorskip("model.formats.skops", reason="model/formats/skops.py was removed")


def saved(tmp_path: Path, model: Any, suffix: str = ".pkl") -> Path:
    """Save a model in the format of a suffix."""
    skip_if_removed(suffix)
    path = tmp_path / f"model{suffix}"
    DUMPS[suffix](model, path)
    return path


def refusal(path: Path, **options: Any) -> str:
    """Return why a file does not load."""
    with pytest.raises(ModelLoadError) as error:
        formats.load(path, **options)
    return str(error.value)


def error_of_serving(path: Path) -> str:
    """Return what the server says of a file that it cannot serve."""
    serving = Serving(SingleFile(path))
    serving.start()
    assert serving.finished.wait(60)
    assert not serving.describe()["ready"]
    return str(serving.describe()["error"])


# --- what loads


def test_each_format_loads_and_predicts_as_before(tmp_path: Path, suffix: str) -> None:
    model = formats.load(saved(tmp_path, MODEL, suffix))
    assert model.predict(X).tolist() == MODEL.predict(X).tolist()


def test_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    path = saved(tmp_path, MODEL).rename(tmp_path / "MODEL.PKL")
    assert formats.load(path).predict(X[:1]) == [0]


@pytest.mark.parametrize(
    "model",
    [
        RandomForestClassifier(3),
        HistGradientBoostingClassifier(max_iter=3),
        KNeighborsClassifier(),
        SVC(),
        make_pipeline(make_column_transformer((StandardScaler(), [0, 1])), LogisticRegression()),
    ],
    ids=lambda model: type(model).__name__,
)
def test_scikit_learns_own_models_load_from_skops(tmp_path: Path, model: Any) -> None:
    model.fit(X, Y)
    assert formats.load(saved(tmp_path, model, ".skops")).predict(X).tolist() == model.predict(X).tolist()


@pytest.mark.parametrize("compress", [3, ("zlib", 1), ("gzip", 3), ("bz2", 3), ("lzma", 3), ("xz", 3)], ids=str)
def test_compressed_joblib_file_loads(tmp_path: Path, compress: Any) -> None:
    joblib.dump(MODEL, tmp_path / "model.joblib", compress=compress)
    assert formats.load(tmp_path / "model.joblib").predict(X[:1]) == [0]


@pytest.mark.parametrize("compress", [0, 1])
def test_large_file_that_never_changes_is_mapped_unless_it_is_compressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: int
) -> None:
    monkeypatch.setattr("model.formats.sklearn.MIN_MAPPED", 0)
    joblib.dump(KNeighborsClassifier(algorithm="brute").fit(X, Y), tmp_path / "model.joblib", compress=compress)
    for immutable in (True, False):
        rows = formats.load(tmp_path / "model.joblib", immutable=immutable)._fit_X
        assert isinstance(rows, np.memmap) == (immutable and not compress)


# --- what is not a model


@pytest.mark.parametrize("name", ["model", "model.npz", "model.joblib.gz", "model.", ".joblib"])
def test_unknown_suffix_is_refused_with_the_ones_that_are_known(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(MODEL))
    assert refusal(tmp_path / name).endswith(
        "expected one of .joblib, .pkl, .pickle, .skops, .onnx, .pt, .pt2, .h5, .keras"
    )


def test_empty_file_is_reported_as_damaged(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.touch()
    assert "damaged, incomplete" in refusal(path)


@pytest.mark.parametrize("kept", [1, 2, 10, 0.1, 0.5, 0.9, 0.99, -1], ids=str)
def test_truncated_file_is_reported_as_damaged(tmp_path: Path, suffix: str, kept: float) -> None:
    path = saved(tmp_path, MODEL, suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    assert "damaged, incomplete" in refusal(path)


@pytest.mark.parametrize("compress", ["zlib", "gzip", "bz2", "lzma", "xz"])
def test_truncated_compressed_file_is_reported_as_damaged(tmp_path: Path, compress: str) -> None:
    path = tmp_path / "model.joblib"
    joblib.dump(MODEL, path, compress=(compress, 3))
    path.write_bytes(path.read_bytes()[:-200])
    assert "damaged, incomplete" in refusal(path)


@pytest.mark.parametrize("seed", range(12))
def test_random_bytes_are_reported_as_damaged(tmp_path: Path, suffix: str, seed: int) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(np.random.default_rng(seed).bytes(4000))
    assert "damaged, incomplete" in refusal(path)


@pytest.mark.parametrize(
    "text",
    [
        "hello\n",
        "city,size\nOslo,3\n",
        '{"a": 1}',
        "<html>404 Not Found</html>",
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n",
        "\x89PNG\r\n\x1a\n",
    ],
    ids=lambda text: text[:10].strip().encode("unicode_escape").decode(),
)
def test_file_of_something_else_is_reported_as_damaged_or_of_another_format(
    tmp_path: Path, suffix: str, text: str
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text(text, "latin-1")
    assert "not of the format that its suffix names" in refusal(path)


@pytest.mark.parametrize("saved_as", [".joblib", ".skops"])
def test_file_with_the_suffix_of_another_format_is_refused(tmp_path: Path, saved_as: str) -> None:
    skip_if_removed(".skops")
    path = saved(tmp_path, MODEL, saved_as)
    other = path.rename(path.with_suffix(".pkl" if saved_as == ".skops" else ".skops"))
    assert "not of the format that its suffix names" in refusal(other)


def test_directory_and_missing_file_are_load_errors(tmp_path: Path) -> None:
    (tmp_path / "model.joblib").mkdir()
    assert "model.joblib does not load" in refusal(tmp_path / "model.joblib")
    assert "gone.joblib does not load" in refusal(tmp_path / "gone.joblib")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (pd.DataFrame({"a": [1]}), "a DataFrame"),
        (None, "a NoneType"),
        (X, "a ndarray"),
        (StandardScaler().fit(X), "a StandardScaler"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_value_without_predict_is_named(tmp_path: Path, value: Any, kind: str) -> None:
    why = refusal(saved(tmp_path, value))
    assert f"holds {kind} without predict()" in why
    assert any(
        way in why for way in ("save the fitted model itself", "joblib.dump(bundle", "serve a model that has one")
    )


SCALER = StandardScaler().fit(X)
FINAL = LogisticRegression().fit(SCALER.transform(X), Y)


class Bundle:
    """An object with parts."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


@pytest.mark.parametrize(
    ("bundle", "found", "line"),
    [
        (
            {"model": FINAL, "scaler": SCALER},
            "bundle['scaler'] (StandardScaler), bundle['model'] (LogisticRegression)",
            "make_pipeline(bundle['scaler'], bundle['model'])",
        ),
        (
            (SCALER, FINAL),
            "bundle[0] (StandardScaler), bundle[1] (LogisticRegression)",
            "make_pipeline(bundle[0], bundle[1])",
        ),
        (
            [FINAL, SCALER, "notes"],
            "bundle[1] (StandardScaler), bundle[0] (LogisticRegression)",
            "make_pipeline(bundle[1], bundle[0])",
        ),
        (
            Bundle(clf=FINAL, prep=SCALER, names=["a"]),
            "bundle.prep (StandardScaler), bundle.clf (LogisticRegression)",
            "make_pipeline(bundle.prep, bundle.clf)",
        ),
    ],
    ids=["dict", "tuple", "list", "object"],
)
def test_bundle_of_a_model_and_its_transformer_is_explained_with_lines_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Any, found: str, line: str
) -> None:
    why = refusal(saved(tmp_path, bundle, ".joblib"))
    assert f"several parts: {found}" in why
    assert line in why
    assert "save the fitted model itself" not in why  # alone it would get rows that nothing scaled
    program = [each[4:] for each in why.splitlines() if each.startswith("    ")]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(["import joblib", *program]), {})
    assert formats.load(tmp_path / "model.joblib").predict(X).tolist() == FINAL.predict(SCALER.transform(X)).tolist()


def test_bundle_with_one_model_says_how_to_save_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = refusal(saved(tmp_path, {"model": MODEL, "trained": "2026-03-01"}, ".joblib"))
    program = [each[4:] for each in why.splitlines() if each.startswith("    ")]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(["import joblib", *program]), {})
    assert formats.load(tmp_path / "model.joblib").predict(X).tolist() == MODEL.predict(X).tolist()


def test_class_is_not_taken_for_a_model(tmp_path: Path) -> None:
    assert "save the fitted model itself" in refusal(saved(tmp_path, LogisticRegression))


@pytest.mark.frames
@pytest.mark.parametrize("model", [LogisticRegression(), make_pipeline(StandardScaler(), KNeighborsClassifier())])
def test_model_that_was_not_fitted_is_named(tmp_path: Path, model: Any) -> None:
    error = error_of_serving(saved(tmp_path, model))
    assert error.startswith("the model is not fitted; save it after fit (NotFittedError: ")
    assert "sample" not in error


class NeedsLibrary(BaseEstimator):
    """Imports a library that is not there when it predicts."""

    def predict(self, rows: Any) -> Any:
        """Fail."""
        import no_such_library

        return no_such_library.predict(rows)


def test_library_that_a_model_needs_when_it_predicts_is_named(tmp_path: Path) -> None:
    error = error_of_serving(saved(tmp_path, NeedsLibrary()))
    assert error.startswith("the model needs a library that is not installed here (ModuleNotFoundError: No module")
    assert "no_such_library" in error
    assert "sample" not in error


# --- code in a pickle


class Raises:
    """Raises an exception when it is unpickled."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return _raise, (self.error,)


def _raise(error: type[BaseException]) -> None:
    raise error("from the pickle")


@pytest.mark.parametrize("error", [SystemExit, RuntimeError, KeyboardInterrupt, MemoryError, RecursionError])
def test_pickle_that_raises_leaves_the_server_up_and_not_ready(tmp_path: Path, error: type[BaseException]) -> None:
    assert f"{error.__name__}: from the pickle" in error_of_serving(saved(tmp_path, Raises(error)))


def pickled_elsewhere(tmp_path: Path, **modules: str) -> Path:
    """Run a script, with modules beside it, in a process of its own; it pickles `thing` as model.pkl."""
    for name, text in modules.items():
        path = tmp_path / (name.replace("__", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    with (tmp_path / "script.py").open("a") as script:
        script.write("\nimport pickle\npickle.dump(thing, open('model.pkl', 'wb'))\n")
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True, timeout=60)
    return tmp_path / "model.pkl"


MINE = """
    class Mine:
        def predict(self, x):
            return x

    def half(x):
        return x / 2
"""


@pytest.mark.parametrize("thing", ["Mine()", "half"])
def test_class_or_function_of_a_notebook_is_explained(tmp_path: Path, thing: str) -> None:
    script = textwrap.dedent(MINE) + f"thing = {thing}"
    why = refusal(pickled_elsewhere(tmp_path, script=script))
    assert "defined in a notebook or script" in why
    assert "put the module beside server.py" in why


@pytest.mark.parametrize(
    "module",
    ["model", "model__mine", "model__formats", "server", "settings", "auth", "monitor", "web", "processes"],
)
def test_users_module_with_a_name_of_the_servers_is_explained(tmp_path: Path, module: str) -> None:
    dotted = module.replace("__", ".")
    script = f"from {dotted} import Mine\nthing = Mine()"
    why = refusal(pickled_elsewhere(tmp_path, script=script, **{module: MINE}))
    assert f"saved beside a module named {dotted.partition('.')[0]}" in why
    assert "rename it" in why


def test_missing_library_is_named_with_the_way_to_add_it(tmp_path: Path) -> None:
    script = "from somelib.inner import Mine\nthing = Mine()"
    why = refusal(pickled_elsewhere(tmp_path, script=script, somelib__inner=MINE))
    assert "put somelib.py beside server.py; if it is a library, add it to requirements.in and run `make lock`" in why


def test_class_that_a_library_no_longer_has_is_named(tmp_path: Path) -> None:
    script = "import fractions\nclass Mine: pass\nMine.__module__ = 'fractions'\nfractions.Mine = Mine\nthing = Mine()"
    assert "Can't get attribute 'Mine' on <module 'fractions'" in refusal(pickled_elsewhere(tmp_path, script=script))


def test_untrusted_type_in_skops_is_named_and_its_code_is_not_run(tmp_path: Path) -> None:
    path = saved(tmp_path, make_pipeline(Mine(), KNeighborsClassifier()), ".skops")
    why = refusal(path)
    assert f"{Mine.__module__}.Mine" in why
    assert "save the model with joblib instead" in why


class Mine(BaseEstimator):
    """A class that skops does not know."""

    def __setstate__(self, state: Any) -> None:
        pytest.fail("built before it was checked")


# --- versions of scikit-learn

MAJOR, MINOR = sklearn_version.split(".")[:2]
OTHER_PATCH = f"{MAJOR}.{MINOR}.99"


@pytest.fixture
def made_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a model as another version of scikit-learn would have."""

    def save(version: str, suffix: str, model: Any = MODEL) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr("sklearn.base.__version__", version)
            return saved(tmp_path, model, suffix)

    return save


@pytest.mark.parametrize("version", ["1.2.2", "0.24.2", f"{MAJOR}.{int(MINOR) + 1}.0", "1.3.dev0"])
def test_model_of_another_scikit_learn_is_refused_with_both_ways_out(made_with: Any, suffix: str, version: str) -> None:
    why = refusal(made_with(version, suffix))
    assert f"made with scikit-learn {version}, this server runs {sklearn_version}" in why
    assert f"save it again with scikit-learn {sklearn_version}" in why
    assert f"scikit-learn=={version} into requirements.in" in why
    assert "ALLOW_VERSION_MISMATCH=1" in why


def test_other_patch_version_loads_without_a_word(made_with: Any, suffix: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert formats.load(made_with(OTHER_PATCH, suffix)).predict(X[:1]) == [0]


def test_version_mismatch_may_be_allowed(made_with: Any, suffix: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = formats.load(made_with("1.2.2", suffix), allow_version_mismatch=True)
    assert model.predict(X).tolist() == MODEL.predict(X).tolist()


class OldTrees(pickle.Pickler):
    """Writes trees as scikit-learn 1.2 did: without the field that came with 1.3."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tree):
            return NotImplemented
        make, arguments, state = value.__reduce__()
        names = [name for name in state["nodes"].dtype.names if name != "missing_go_to_left"]
        nodes = np.zeros(len(state["nodes"]), [(name, state["nodes"].dtype[name]) for name in names])
        for name in names:
            nodes[name] = state["nodes"][name]
        return make, arguments, state | {"nodes": nodes}


def test_tree_of_another_scikit_learn_is_not_reported_as_damaged(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("sklearn.base.__version__", "1.2.2")
    OldTrees(file := io.BytesIO()).dump(DecisionTreeClassifier().fit(X, Y))
    (tmp_path / "model.pkl").write_bytes(file.getvalue())
    why = refusal(tmp_path / "model.pkl")  # the tree fails before the version is read
    assert "another version of scikit-learn" in why


@pytest.mark.parametrize("gone", ["sklearn.linear_model.logistic", "sklearn._loss.loss_gone"])
def test_module_that_scikit_learn_no_longer_has_is_not_reported_as_a_missing_library(
    monkeypatch: Any, tmp_path: Path, gone: str
) -> None:
    module = types.ModuleType(gone)
    module.Mine = type("Mine", (), {"__module__": gone})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, gone, module)
        path = saved(tmp_path, module.Mine())
    why = refusal(path)
    assert "needs the library" not in why
    assert "another version of scikit-learn" in why


# --- threads

FOREST = RandomForestClassifier(2, n_jobs=-1, random_state=0)
NEIGHBOURS = KNeighborsClassifier(n_jobs=-1)
NESTED = {
    "alone": FOREST,
    "pipeline": make_pipeline(StandardScaler(), FOREST),
    "search": GridSearchCV(make_pipeline(StandardScaler(), FOREST), {}, cv=2),
    "votes": VotingClassifier([("a", FOREST), ("b", NEIGHBOURS)], n_jobs=2),
    "stack": StackingClassifier([("a", NEIGHBOURS)], FOREST, cv=2, n_jobs=2),
    "bags": BaggingClassifier(NEIGHBOURS, 2, n_jobs=2),
    "calibrated": CalibratedClassifierCV(FOREST, cv=2),
    "one against the rest": OneVsRestClassifier(NEIGHBOURS, n_jobs=2),
    "outputs": MultiOutputClassifier(FOREST, n_jobs=2),
    "union": make_pipeline(make_union(StandardScaler(), n_jobs=2), NEIGHBOURS),
    "columns": make_pipeline(make_column_transformer((StandardScaler(), [0, 1]), n_jobs=2), NEIGHBOURS),
    "selection": RFE(FOREST, n_features_to_select=2),
}


@pytest.mark.parametrize("name", NESTED)
def test_every_part_runs_in_one_thread(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    with joblib.parallel_config("threading"):  # processes take seconds to start
        model = NESTED[name].fit(X, np.c_[Y, Y] if name == "outputs" else Y)
        expected = model.predict(X).tolist()
    loaded = formats.load(saved(tmp_path, model))
    asked, start = [], joblib.Parallel.__init__

    def note(self: Any, n_jobs: Any = None, *arguments: Any, **options: Any) -> None:
        asked.append(n_jobs)
        start(self, n_jobs, *arguments, **options)

    monkeypatch.setattr(joblib.Parallel, "__init__", note)
    assert loaded.predict(X).tolist() == expected
    assert set(asked) <= {None, 1}
