"""scikit-learn's models: `.joblib` and pickles by joblib. Loading one runs whatever code its author put in it."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import ModelLoadError

MIN_MAPPED = 8 * 2**20  # bytes; smaller files are not worth it: a mapped array is a little slower to slice

# Hooks for extensions, called before scikit-learn is imported, and with each model that was loaded.
before_import: list[Callable[[], None]] = []
after_load: list[Callable[[Any], None]] = []


def load_joblib(path: Path, *, allow_version_mismatch: bool, immutable: bool) -> Any:
    """Load what `joblib.dump` or `pickle.dump` wrote. Raises: ModelLoadError, made with another scikit-learn."""
    import joblib  # also reads plain pickles

    # Copy on write: the compiled parts of some models take no read-only arrays. A file that is written to while it is
    # mapped would change the model, or kill the process.
    mode = "c" if immutable and _is_mappable(path) else None
    return ready(lambda: joblib.load(path, mmap_mode=mode), allow_version_mismatch)


def ready(load_it: Callable[[], Any], allow_version_mismatch: bool) -> Any:
    """Load a model and make it ready to predict in one thread."""
    for prepare in before_import:
        prepare()
    model = _with_version_check(load_it, allow_version_mismatch)
    _run_in_one_thread(model)
    for hook in after_load:
        hook(model)
    return model


def _is_mappable(path: Path) -> bool:
    """Return whether a file is large enough, and not compressed."""
    if path.stat().st_size < MIN_MAPPED:
        return False
    with path.open("rb") as file:
        return file.read(1) == b"\x80"  # a pickle's first byte; a compressed file has another


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
                    "`make lock`. ALLOW_VERSION_MISMATCH=1 serves it anyway, with results that may differ"
                ) from None
        warnings.simplefilter("ignore", InconsistentVersionWarning)  # only the patch version differs
        return load_it()


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
