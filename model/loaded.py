"""One version in memory: loaded from its file, proved with its sample, and asked for predictions."""

import hashlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import formats
from .batching import MOST_ROWS, Batcher
from .formats import ModelLoadError
from .formats.sklearn import estimators_in
from .infer_signature import learn
from .signature import Signature
from .versions.store import Manifest

# What a caller may ask for in "method", where the model has it.
METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function", "score_samples")
_WITH_CLASSES = ("predict_proba", "predict_log_proba", "decision_function")


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
    batcher: Batcher
    about: dict[str, Any]  # for GET /model

    def ask(self, rows: Any, method: str = "predict") -> Any:
        """Call the model's `method` on what `signature.check` returned, in one call with what others ask meanwhile.

        Returns:
            What `as_json` says, for these rows.

        Raises:
            Overloaded, BadRows, RowsRefused, ModelFailed: see there.
        """
        shape = self.signature.merges_with(rows)
        if len(rows) <= MOST_ROWS:
            return self.batcher.call(self.answer, rows, method, shape)
        pieces = (rows[at : at + MOST_ROWS] for at in range(0, len(rows), MOST_ROWS))
        return _joined([self.batcher.call(self.answer, piece, method, shape) for piece in pieces])

    def answer(self, parts: Sequence[Any], method: str = "predict") -> list[Any]:
        """Call the model once for the rows of several callers; return a result for each of them."""
        if len(parts) == 1:
            return [self.predict(self.signature.build(parts), method)]
        return _split(self.predict(self.signature.build(parts), method), [len(part) for part in parts])

    def predict(self, rows: Any, method: str = "predict") -> Any:
        """Call the model's `method` on what `signature.parse` returned, at once; see `as_json` for the result.

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

    def classes_for(self, method: str) -> Any:
        """Return the classes, in the order of the columns of the method's result, or None where they say nothing."""
        if method == "decision_function" and self.scores_pairs:
            return None
        return self.classes if method in _WITH_CLASSES else None


def as_json(result: Any, n_rows: int) -> Any:
    """Turn what a model returned into what orjson encodes: one entry a row; of several outputs a tuple of such.

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
            return tuple(as_json(each, n_rows) for each in result)
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


def _split(result: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut what `as_json` returned into the rows of each caller."""
    if isinstance(result, tuple):
        return list(zip(*(_split(each, sizes) for each in result), strict=True))
    ends = list(itertools.accumulate(sizes))
    return [result[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _joined(results: list[Any]) -> Any:
    """Put together what `as_json` returned for pieces of one caller's rows."""
    if isinstance(results[0], tuple):
        return tuple(_joined(list(each)) for each in zip(*results, strict=True))
    if isinstance(results[0], np.ndarray):
        return np.concatenate(results)
    return list(itertools.chain.from_iterable(results))


def _check_length(found: int | str, n_rows: int) -> None:
    if found != n_rows:
        raise ModelFailed(f"the model returned {found} for {n_rows} rows")


def load_version(
    manifest: Manifest, allow_version_mismatch: bool = False, batcher: Batcher | None = None
) -> LoadedModel:
    """Load a version and prove it: its bytes first, then that it answers its sample as it did when it was published.

    Its calls will be merged by `batcher`.

    Raises:
        ModelLoadError: saying what is wrong with it.
    """
    path, about = manifest.artifact, manifest.about
    sha256 = check_bytes(manifest)
    estimator = formats.load(path, allow_version_mismatch=allow_version_mismatch, immutable=bool(manifest.version))
    signature, rows = learn(estimator, about.get("sample"))
    methods = tuple(method for method in METHODS if callable(getattr(estimator, method, None)))
    version = manifest.version or sha256[:12]
    classes = _as_lists(getattr(estimator, "classes_", None))
    pairs = any(getattr(part, "decision_function_shape", "") == "ovo" for part in estimators_in(estimator))
    batcher = batcher or Batcher()
    model = LoadedModel(version, estimator, signature, methods, classes, pairs, batcher, {})
    try:
        parsed = signature.parse(rows)
        predictions = model.predict(parsed)
        began = time.perf_counter()
        model.predict(parsed)  # again: the first call pays for what is made only once
        batcher.timings.note("predict", len(rows), time.perf_counter() - began)
    except (ModelFailed, RowsRefused) as error:
        raise ModelLoadError(f"version {version} does not answer row by row: {error}") from error
    if about.get("predictions") is not None and not same_predictions(predictions, about["predictions"]):
        raise ModelLoadError(f"version {version} answers its recorded sample otherwise than when it was published")
    told = {"signature": signature.describe(), "methods": list(methods), "classes": model.classes}
    for name, found in told.items():
        if name in about and about[name] != found:
            raise ModelLoadError(f"version {version} has another {name} than its manifest says")
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
            "proved_with": "its recorded sample"
            if about.get("sample") and about.get("sample_from") != "synthetic"
            else "a synthetic row (no sample was recorded)",
            "made_with": about.get("libraries"),
            "published": about.get("published"),
            "metrics": about.get("metrics"),
            "note": about.get("note"),
        }
    )
    return model


def check_bytes(manifest: Manifest) -> str:
    """Return the sha256 of a version's artifact.

    Raises:
        ModelLoadError: it cannot be read, or is not what the manifest says.
    """
    path, published = manifest.artifact, manifest.about.get("sha256")
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        what = f"version {manifest.version}: " if manifest.version else ""
        raise ModelLoadError(f"{what}{path} cannot be read: {error}") from error
    if published not in (None, sha256):
        raise ModelLoadError(
            f"{path} is not the file that was published: its sha256 is {sha256}, its manifest says {published}"
        )
    return sha256


def same_predictions(now: Any, recorded: Any, tolerance: float = 1e-9) -> bool:
    """Compare predictions: labels exactly, floats within 1e-9 relative (another CPU may round the last bits).

    Of float32 arrays within 1e-5, of float16 within 1e-2: what networks answer.
    """
    if isinstance(now, np.ndarray):
        tolerance = {"float32": 1e-5, "float16": 1e-2}.get(now.dtype.name, tolerance)
        now = now.tolist()
    if isinstance(now, list) and isinstance(recorded, list):
        pairs = zip(now, recorded, strict=False)
        return len(now) == len(recorded) and all(same_predictions(a, b, tolerance) for a, b in pairs)
    if isinstance(now, float) and isinstance(recorded, (int, float)):
        close = math.isclose(now, recorded, rel_tol=tolerance, abs_tol=max(1e-12, tolerance / 100))
        return close or (math.isnan(now) and math.isnan(recorded))
    if isinstance(now, float) and recorded is None:
        return not math.isfinite(now)  # as JSON keeps it
    return bool(now == recorded)


def _as_lists(classes: Any) -> Any:
    if classes is None:
        return None
    if isinstance(classes, (list, tuple)):  # one array for each output
        return [_as_lists(each) for each in classes]
    return np.asarray(classes).tolist()
