"""The model in memory: loaded beside the traffic, proved with a sample, then swapped in as one reference."""

import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import formats, versions
from .formats import ModelLoadError
from .learning import learn
from .signature import Signature

log = logging.getLogger(__name__)

# What a caller may ask for in "method", where the model has it.
METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function", "score_samples")
SLOW = 0.002  # seconds of a predict; handing it to a native thread costs 0.15 ms
MANY_ROWS = 500  # even a fast model takes milliseconds for them
_WITH_CLASSES = ("predict_proba", "predict_log_proba", "decision_function")


class ModelNotReady(Exception):
    """No version has been loaded and proved yet."""


class RowsRefused(Exception):
    """The model raised ValueError or TypeError on these rows: their values are the caller's to mend.

    `__cause__` holds the model's own exception, whose text may hold the caller's data.
    """


class ModelFailed(Exception):
    """The model raised anything else, or answered with something that is not one prediction a row."""


@dataclass(frozen=True)
class LoadedModel:
    """One version, ready to predict."""

    version: str
    estimator: Any
    signature: Signature
    methods: tuple[str, ...]
    classes: Any  # as the estimator's classes_; None where it has none
    scores_pairs: bool  # its decision_function has a column for each pair of classes (an SVC with "ovo")
    seconds: float  # that one predict of the proving rows took
    about: dict[str, Any]  # for GET /model

    def predict(self, rows: Any, method: str = "predict") -> Any:
        """Call the model's `method` on what `signature.parse` returned; see `as_json` for the result.

        Raises:
            RowsRefused, ModelFailed: see there.
        """
        try:
            result = getattr(self.estimator, method)(rows)
        except (ValueError, TypeError) as error:
            raise RowsRefused(type(error).__name__) from error
        except (Exception, SystemExit) as error:  # let out, a SystemExit would end the worker, or the whole server
            raise ModelFailed(f"{type(error).__name__} in {method}") from error
        try:
            return as_json(result, len(rows))
        except ModelFailed:
            raise
        except Exception as error:
            raise ModelFailed(f"{method} returned what is not one prediction a row") from error

    def is_slow(self, rows: Any) -> bool:
        """Tell whether a predict would hold up an event loop for more than a few milliseconds."""
        return self.seconds > SLOW or len(rows) > MANY_ROWS

    def classes_for(self, method: str) -> Any:
        """Return the classes, in the order of the columns of the method's result, or None where they say nothing."""
        if method == "decision_function" and self.scores_pairs:
            return None
        return self.classes if method in _WITH_CLASSES else None


def as_json(result: Any, n_rows: int) -> Any:
    """Turn what a model returned into what orjson encodes: one entry a row, or one list a row for each output.

    Args:
        result: an array `(n_rows, …)`, sparse or not, a data frame, a list of values, or (multi-output
            `predict_proba`) a list of arrays.
        n_rows: the number of rows asked about.

    Raises:
        ModelFailed: the result does not have one entry a row.
    """
    if isinstance(result, list):
        arrays = bool(result) and all(isinstance(each, np.ndarray) for each in result)
        if arrays and (len(result) != n_rows or result[0].ndim == 2):
            return [as_json(each, n_rows) for each in result]
        _check_length(len(result), n_rows)
        return [each.tolist() if isinstance(each, np.ndarray) else each for each in result]
    if hasattr(result, "toarray"):
        result = result.toarray()
    array = np.asarray(result.to_numpy() if hasattr(result, "to_numpy") else result)
    _check_length(len(array) if array.ndim else "a single value", n_rows)
    if array.dtype.kind in "biuf":
        # orjson encodes arrays of numbers itself, in the machine's byte order, NaN and infinities as null.
        native = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.float64
        return np.ascontiguousarray(array, dtype=native)
    if array.dtype.kind == "M":
        array = array.astype("datetime64[us]")  # nanoseconds would become plain numbers
    return array.tolist()


def _check_length(found: int | str, n_rows: int) -> None:
    if found != n_rows:
        raise ModelFailed(f"the model returned {found} for {n_rows} rows")


class Serving:
    """The served version of this process.

    `choose` may be called from any thread; one thread loads. A model is swapped in by setting one reference, so a
    request sees the old or the new version, never a mixture.
    """

    def __init__(
        self,
        model_path: Path | None = None,
        model_dir: Path = Path("var/models"),
        allow_version_mismatch: bool = False,
        native: Callable[..., Any] = lambda function, *arguments: function(*arguments),
    ) -> None:
        """Remember where the model is; nothing is read before `start`.

        Args:
            model_path: one file to serve, or None to serve the stable version of `model_dir`.
            native: runs a function on a native thread and returns its result, while the caller's event loop goes on.
        """
        self._path, self._dir = model_path, model_dir
        self._allow_version_mismatch = allow_version_mismatch
        self._native = native
        self._stable: LoadedModel | None = None
        self._error: str | None = None
        self.finished = threading.Event()  # the first load has ended, well or badly

    def start(self) -> None:
        """Load the model on a thread of its own."""
        threading.Thread(target=self._load, name="load-model", daemon=True).start()

    def choose(self) -> LoadedModel:
        """Return the version to answer a request with.

        Raises:
            ModelNotReady: none is loaded.
        """
        if self._stable is None:
            raise ModelNotReady(
                "the model did not load; the server's log says why" if self._error else "the model is still loading"
            )
        return self._stable

    def describe(self) -> dict[str, Any]:
        """Describe what is served, as JSON values."""
        return {
            "ready": self._stable is not None,
            "error": self._error,
            "stable": self._stable and self._stable.about,
        }

    def _load(self) -> None:
        # Exceptions come back as values: a native thread must not log, and gevent would print them a second time.
        model, error = self._native(self._read)
        if error is None:
            self._stable = model
            log.info(
                "serving version %s (%s, proved with %s)",
                model.version,
                model.about["estimator"],
                model.about["proved_with"],
            )
        else:
            self._error = str(error)
            log.error("NOT READY, no model is served: %s", error)
        self.finished.set()

    def _read(self) -> tuple[LoadedModel | None, Exception | None]:
        try:
            started = time.monotonic()
            if self._path is not None:
                manifest = versions.Manifest.of_bare_file(self._path)
            else:
                manifest = versions.stable(self._dir)
            model = load_version(manifest, self._allow_version_mismatch)
            model.about["load_seconds"] = round(time.monotonic() - started, 3)
            return model, None
        except ModelLoadError as error:
            return None, error
        except BaseException as error:  # a pickle runs code of its own, which may even raise SystemExit
            return None, ModelLoadError(f"{type(error).__name__}: {error}")


def load_version(manifest: "versions.Manifest", allow_version_mismatch: bool = False) -> LoadedModel:
    """Load a version and prove it: its bytes first, then that it answers its sample as it did when it was published.

    Raises:
        ModelLoadError: saying what is wrong with it.
    """
    path = manifest.artifact
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        what = f"version {manifest.version}: " if manifest.version else ""
        raise ModelLoadError(f"{what}{path} cannot be read: {error}") from error
    if manifest.sha256 and sha256 != manifest.sha256:
        raise ModelLoadError(
            f"{path} is not the file that was published: its sha256 is {sha256}, its manifest says {manifest.sha256}"
        )
    estimator = formats.load(path, allow_version_mismatch=allow_version_mismatch)
    signature, rows = learn(estimator, manifest.sample)
    methods = tuple(method for method in METHODS if callable(getattr(estimator, method, None)))
    version = manifest.version or sha256[:12]
    classes = _as_lists(getattr(estimator, "classes_", None))
    pairs = any(getattr(part, "decision_function_shape", "") == "ovo" for part in formats.estimators_in(estimator))
    model = LoadedModel(version, estimator, signature, methods, classes, pairs, 0.0, {})
    try:
        parsed = signature.parse(rows)
        predictions = model.predict(parsed)
        began = time.perf_counter()
        model.predict(parsed)  # again: the first call pays for what is made only once
        model = replace(model, seconds=time.perf_counter() - began)
    except (ModelFailed, RowsRefused) as error:
        raise ModelLoadError(f"version {version} does not answer row by row: {error}") from error
    if manifest.predictions is not None and not same_predictions(predictions, manifest.predictions):
        raise ModelLoadError(f"version {version} answers its recorded sample otherwise than when it was published")
    model.about.update(
        {
            "version": version,
            "file": path.name,
            "sha256": sha256,
            "estimator": type(estimator).__name__,
            "methods": methods,
            "classes": model.classes,
            "signature": signature.describe(),
            "example": {"data": rows[:1]},
            "predict_seconds": round(model.seconds, 6),
            "proved_with": "its recorded sample"
            if manifest.sample
            else "a synthetic row (the file has no recorded sample)",
            "made_with": manifest.libraries,
        }
    )
    return model


def same_predictions(now: Any, recorded: Any) -> bool:
    """Compare predictions: labels exactly, floats within 1e-9 relative (another CPU may round the last bits)."""
    now = now.tolist() if hasattr(now, "tolist") else now
    if isinstance(now, list) and isinstance(recorded, list):
        return len(now) == len(recorded) and all(map(same_predictions, now, recorded))
    if isinstance(now, float) and isinstance(recorded, (int, float)):
        return math.isclose(now, recorded, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(now) and math.isnan(recorded))
    if isinstance(now, float) and recorded is None:
        return not math.isfinite(now)  # as JSON keeps it
    return bool(now == recorded)


def _as_lists(classes: Any) -> Any:
    if classes is None:
        return None
    if isinstance(classes, (list, tuple)):  # one array for each output
        return [_as_lists(each) for each in classes]
    return np.asarray(classes).tolist()
