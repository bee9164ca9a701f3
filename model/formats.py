"""One loader per file format, chosen by the file's suffix.

Loading a pickle runs whatever code its author put in it: serve only files that you would run as a script. `.skops`
is the exception: its types are checked before anything is built. The formats of tensor libraries are in `tensors.py`.
"""

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from . import tensors

MAPPED = 8 * 2**20  # bytes; smaller files are not worth it: a mapped array is a little slower to slice


class ModelLoadError(Exception):
    """A model that cannot be served. The message says what to mend; it goes to the log, never to a caller."""


def load(path: Path, *, allow_version_mismatch: bool = False, immutable: bool = False) -> Any:
    """Load a fitted model from a file, ready to predict in one thread.

    Of an `immutable` file, one that is only ever replaced by another, large arrays are mapped into memory and so shared
    by all processes that load it. A file that is written to while it is mapped would change the model, or kill us.

    What comes from another library than scikit-learn is a `tensors.TensorModel`.

    Raises:
        ModelLoadError: an unknown suffix, a damaged file, a library or class that is not here, or a model that was
            made with another minor version of scikit-learn (unless `allow_version_mismatch`).
    """
    check_name(path)
    suffix = path.suffix.lower()
    try:
        if suffix in tensors.LOADERS:
            return tensors.LOADERS[suffix](path)
        _import_sklearn()
        loader = _map_joblib if immutable and _is_mappable(path) else _LOADERS[suffix]
        model = _with_version_check(lambda: loader(path), allow_version_mismatch)
    except ModelLoadError:
        raise
    except tensors.NotServable as error:
        raise ModelLoadError(f"{path.name} {error}") from error
    except Exception as error:
        raise ModelLoadError(_explain(path, error)) from error
    if isinstance(model, type):
        raise ModelLoadError(f"{path.name} holds the class {model.__name__}; save the fitted model itself")
    if not callable(getattr(model, "predict", None)):
        raise ModelLoadError(
            f"{path.name} holds a {type(model).__name__} without predict(); save the fitted model itself"
        )
    _run_in_one_thread(model)
    from .sparing import spare_checks

    spare_checks(model)
    return model


def check_name(path: Path) -> None:
    """Refuse what is no model file by its name, before it is opened.

    Raises:
        ModelLoadError: an unknown suffix, or TensorFlow's SavedModel.
    """
    if path.suffix == ".pb" or (path / "saved_model.pb").exists():
        directory = path.parent if path.suffix == ".pb" else path
        raise ModelLoadError(
            f"{path.name} is TensorFlow's SavedModel, a directory; a model is served from one file. Make one:\n"
            "    pip install tf2onnx\n"
            f"    python -m tf2onnx.convert --saved-model {directory} --output model.onnx"
        )
    known = [*_LOADERS, *tensors.LOADERS]
    if path.suffix.lower() not in known:
        raise ModelLoadError(f"{path.name}: the suffix says the format; expected one of {', '.join(known)}")


def _import_sklearn() -> None:
    """Import scikit-learn, but neither pandas nor `scipy.stats`: 44 MB and half a second in each worker.

    `sklearn.utils.fixes` imports both without a use for them. Of `scipy.stats` the modules that are imported here take
    some functions more, nearly all for fitting. What is left out is imported when it is used.
    """
    if {"sklearn", "pandas", "scipy.stats"}.intersection(sys.modules):
        return
    sys.modules["pandas"] = None  # type: ignore[assignment]  # so that an import of it fails
    sys.modules["scipy.stats"] = _Postponed("scipy.stats")
    try:
        for name in ("covariance", "isotonic", "linear_model", "model_selection", "preprocessing"):
            importlib.import_module(f"sklearn.{name}")
    finally:
        del sys.modules["pandas"], sys.modules["scipy.stats"]


class _Postponed(ModuleType):
    """Stands for a module while others import from it."""

    def __getattr__(self, name: str) -> "_PostponedName":
        if name.startswith("__"):
            raise AttributeError(name)
        return _PostponedName(self.__name__, name)


class _PostponedName:
    """A function, or an object with methods; its module is imported at the first call."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _find(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._find()(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._find(), name)


def _load_joblib(path: Path) -> Any:
    import joblib  # also reads plain pickles

    return joblib.load(path)


def _is_mappable(path: Path) -> bool:
    """Tell whether a file is large enough, and joblib's, and not compressed."""
    if path.suffix.lower() == ".skops" or path.stat().st_size < MAPPED:
        return False
    with path.open("rb") as file:
        return file.read(1) == b"\x80"  # a pickle's first byte; a compressed file has another


def _map_joblib(path: Path) -> Any:
    import joblib

    # Copy on write: some models' compiled parts take no read-only arrays.
    return joblib.load(path, mmap_mode="c")


def _load_skops(path: Path) -> Any:
    import skops.io

    found = skops.io.get_untrusted_types(file=path)
    unknown = [name for name in found if not name.startswith(_COMPILED)]
    if unknown:
        raise ModelLoadError(
            f"{path.name} holds types that are not known to be safe: {', '.join(unknown)}. "
            "Where you trust its author, save the model with joblib instead"
        )
    return skops.io.load(path, trusted=found)


# scikit-learn's compiled parts: arrays with methods. skops knows its Python classes and leaves these to the user.
_COMPILED = (
    "sklearn.tree._tree.",
    "sklearn.ensemble._hist_gradient_boosting.",
    "sklearn.metrics._dist_metrics.",
    "sklearn.neighbors._kd_tree.",
    "sklearn.neighbors._ball_tree.",
    "sklearn._loss.",
    "sklearn.linear_model._sgd_fast.",
)

_LOADERS: dict[str, Callable[[Path], Any]] = {
    ".joblib": _load_joblib,
    ".pkl": _load_joblib,
    ".pickle": _load_joblib,
    ".skops": _load_skops,
}


def _with_version_check(load_it: Callable[[], Any], allowed: bool) -> Any:
    """Load, refusing a model of another minor version of scikit-learn: its attributes may have changed meaning."""
    from sklearn.exceptions import InconsistentVersionWarning

    # As an error the warning stops the load at the first estimator, before the rest is built.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if allowed else "error", InconsistentVersionWarning)
        try:
            return load_it()
        except InconsistentVersionWarning as mismatch:
            made, here = mismatch.original_sklearn_version, mismatch.current_sklearn_version
            if made.split(".")[:2] != here.split(".")[:2]:
                raise ModelLoadError(
                    f"the model was made with scikit-learn {made}, this server runs {here}. Either train and save it "
                    f"again with scikit-learn {here}, or put scikit-learn=={made} into requirements.in and run "
                    "`make lock`. ALLOW_VERSION_MISMATCH=1 serves it all the same, with results nobody vouches for"
                ) from None
        warnings.simplefilter("ignore", InconsistentVersionWarning)  # only the patch version differs
        return load_it()


def _explain(path: Path, error: Exception) -> str:
    """Say in plain words why a file did not load. The usual causes each have their own mend."""
    text = f"{path.name} does not load: {type(error).__name__}: {error}"
    module = ""  # that something was looked for in
    if isinstance(error, ModuleNotFoundError):
        module = str(error.name)
    elif isinstance(error, AttributeError) and (found := re.search(r"<module '([^']+)'", str(error))):
        module = found[1]
    root = module.partition(".")[0]
    if module.endswith("__main__"):
        return (
            f"{text}. It uses a class or function that was defined in a notebook or script: move that into a module "
            "of its own, put the module beside server.py, import it from there, train and save again"
        )
    if root in _OURS:
        return (
            f"{text}. It was saved beside a module of yours that is named {root}, which is one of this server's: "
            "rename your module, put it beside server.py, train and save again"
        )
    if root in ("sklearn", "numpy", "scipy") or "incompatible dtype" in str(error):
        return (
            f"{text}. It was made with another version of scikit-learn or numpy, whose parts have changed since: "
            "train and save it again with the versions in requirements.txt"
        )
    if isinstance(error, ModuleNotFoundError) and root.isidentifier():
        return (
            f"{text}. The model needs the library {root!r}: add it to requirements.in and run `make lock`, or "
            "install it beside the server"
        )
    if isinstance(error, (AttributeError, ImportError, OSError, MemoryError)) and not isinstance(
        error, ModuleNotFoundError
    ):
        return text
    return f"{text}. The file is damaged, not complete, or not of the format that its suffix says"


# The server's own modules: a pickle that names one of them means a module of its author's.
_OURS = {
    "auth",
    "body",
    "housekeeping",
    "metrics",
    "model",
    "monitor",
    "native",
    "problems",
    "report",
    "server",
    "settings",
    "slots",
    "sls",
    "worker",
}


def _run_in_one_thread(model: Any) -> None:
    """Set each `n_jobs` to 1: the server runs a process for each core, and a pool costs more than a small predict."""
    for estimator in estimators_in(model):
        if getattr(estimator, "n_jobs", None) not in (None, 1):
            estimator.n_jobs = 1


def estimators_in(model: Any) -> Iterator[Any]:
    """Yield the model and every estimator inside it, fitted or not, each once."""
    seen: set[int] = set()
    left = [model]
    while left:
        value = left.pop()
        if isinstance(value, (str, int, float, type)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (list, tuple)):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend(value.values())
        elif hasattr(value, "get_params") or type(value).__module__.startswith("sklearn."):
            if hasattr(value, "get_params"):
                yield value
            left.extend(getattr(value, "__dict__", {}).values())
