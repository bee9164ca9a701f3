"""scikit-learn's models: `.joblib` and pickles by joblib. Loading one runs whatever code its author put in it."""

import re
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
    """Load what `joblib.dump` or `pickle.dump` wrote. Raises: as `ready`."""
    import joblib  # also reads plain pickles

    # Copy on write: the compiled parts of some models take no read-only arrays.
    mode = "c" if immutable and path.stat().st_size >= MIN_MAPPED else None
    return ready(lambda: joblib.load(path, mmap_mode=mode), allow_version_mismatch)


def ready(load_it: Callable[[], Any], allow_version_mismatch: bool) -> Any:
    """Load a model and make it ready to predict in one thread.

    Raises: ModelLoadError, another minor version of scikit-learn made it, whose attributes may have another meaning.
    """
    for prepare in before_import:
        prepare()
    from sklearn import __version__ as here
    from sklearn.exceptions import InconsistentVersionWarning

    minor = re.escape(".".join(here.split(".")[:2]))
    with warnings.catch_warnings():
        # As an error the warning stops the load at the first estimator, before the rest is built.
        warnings.simplefilter("ignore" if allow_version_mismatch else "error", InconsistentVersionWarning)
        warnings.filterwarnings("ignore", rf".* from version {minor}\b", InconsistentVersionWarning)
        warnings.filterwarnings("ignore", "mmap_mode", UserWarning)  # joblib cannot map a compressed file
        try:
            model = load_it()
        except InconsistentVersionWarning as mismatch:
            made = mismatch.original_sklearn_version
            raise ModelLoadError(
                f"the model was made with scikit-learn {made}, this server runs {here}. Either train and save it again "
                f"with scikit-learn {here}, or put scikit-learn=={made} into requirements.in and run `make lock`. "
                "ALLOW_VERSION_MISMATCH=1 serves it anyway, with results that may differ"
            ) from None
    # The server runs a process for each core, and a pool of threads costs more than a small predict.
    for estimator in estimators_in(model):
        if getattr(estimator, "n_jobs", None) not in (None, 1):
            estimator.n_jobs = 1
    for hook in after_load:
        hook(model)
    return model


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
