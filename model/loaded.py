"""One model in memory: loaded from its file, validated with its sample, and called for predictions."""

import hashlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import formats
from .batching import MAX_BATCH_ROWS, Batcher
from .formats import ModelLoadError
from .formats.sklearn import estimators_in
from .infer_signature import infer_signature
from .signature import Signature

# What a caller may ask for in "method", if the model has it.
METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function", "score_samples")


class RowsRefused(Exception):
    """The model raised ValueError or TypeError on these rows: the caller has to fix their values.

    `__cause__` holds the model's own exception, whose message may hold the caller's data.
    """


class ModelFailed(Exception):
    """The model raised anything else, or returned something other than one prediction per row."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to predict."""

    version: str
    estimator: Any
    signature: Signature
    methods: tuple[str, ...]
    classes: Any  # as the estimator's classes_; None if it has none
    methods_by_class: list[str]  # those whose result has a column for each class
    batcher: Batcher
    about: dict[str, Any]  # for GET /model

    def predict(self, rows: Any, method: str = "predict") -> Any:
        """Return predictions for rows that `signature.validate` returned, from one call with those of other callers.

        See `to_json` for the result. Raises: Overloaded, BadRows, RowsRefused, ModelFailed.
        """
        shape = self.signature.batch_key(rows)
        if len(rows) <= MAX_BATCH_ROWS:
            return self.batcher.submit(self._predict_batch, rows, method, shape)
        pieces = (rows[at : at + MAX_BATCH_ROWS] for at in range(0, len(rows), MAX_BATCH_ROWS))
        return _join([self.batcher.submit(self._predict_batch, piece, method, shape) for piece in pieces])

    def _predict_batch(self, parts: Sequence[Any], method: str) -> list[Any]:
        """Call the model once for the rows of several callers; return a result for each of them."""
        result = self.call(self.signature.assemble(parts), method)
        return [result] if len(parts) == 1 else _split(result, [len(part) for part in parts])

    def call(self, inputs: Any, method: str = "predict") -> Any:
        """Call the estimator's method on what `signature.parse` returned. Raises: RowsRefused, ModelFailed."""
        try:
            result = getattr(self.estimator, method)(inputs)
        except (ValueError, TypeError) as error:
            raise RowsRefused(type(error).__name__) from error
        except (Exception, SystemExit) as error:  # a SystemExit would end the worker, or the whole server
            raise ModelFailed(f"{type(error).__name__} in {method}") from error
        try:
            return to_json(result, len(inputs))
        except Exception as error:
            raise ModelFailed(f"{method} did not return one prediction per row: {error}") from error

    def classes_for(self, method: str) -> Any:
        """Return the classes in the order of the columns of the method's result, or None if it has no such columns."""
        return self.classes if method in self.methods_by_class else None

    def describe(self) -> dict[str, Any]:
        """Return what GET /model shows of the model, as JSON values."""
        return self.about | {"calls": self.batcher.timings.describe()}

    def __str__(self) -> str:
        return f"{self.version} ({self.about['estimator']}, validated with {self.about['validated_with']})"


def to_json(result: Any, n_rows: int) -> Any:
    """Turn a model's result into what orjson encodes: one entry per row; for several outputs a tuple of those.

    The result is an array `(n_rows, …)`, sparse or not, a data frame, a list of values, or (multi-output
    `predict_proba`) a list of arrays. Raises: ModelFailed, it does not have one entry per row.
    """
    if isinstance(result, list):
        arrays = bool(result) and all(isinstance(each, np.ndarray) for each in result)
        if arrays and (len(result) != n_rows or result[0].ndim == 2):
            return tuple(to_json(each, n_rows) for each in result)
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
    """Cut what `to_json` returned into the rows of each caller."""
    if isinstance(result, tuple):
        return list(zip(*(_split(each, sizes) for each in result), strict=True))
    ends = list(itertools.accumulate(sizes))
    return [result[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _join(results: list[Any]) -> Any:
    """Put together what `to_json` returned for pieces of one caller's rows."""
    if isinstance(results[0], tuple):
        return tuple(_join(list(each)) for each in zip(*results, strict=True))
    if isinstance(results[0], np.ndarray):
        return np.concatenate(results)
    return list(itertools.chain.from_iterable(results))


def _check_length(found: int | str, n_rows: int) -> None:
    if found != n_rows:
        raise ModelFailed(f"the model returned {found} for {n_rows} rows")


def load_model(
    path: Path,
    *,
    version: str = "",
    sha256: str = "",
    sample: list[Any] | None = None,
    allow_version_mismatch: bool = False,
    batcher: Batcher | None = None,
) -> LoadedModel:
    """Load a model from its file, and let it answer a sample.

    Args:
        path: the file; its suffix names the format.
        version: its name; by default the beginning of its hash.
        sha256: its hash, if it was checked already. The file of a version is immutable, so it may be mapped.
        sample: rows that it is known to answer, as in the "data" of a request; by default a synthetic one is made.
        allow_version_mismatch: load a model that another scikit-learn made.
        batcher: merges its calls.

    Raises: ModelLoadError, what is wrong with it.
    """
    sha256 = sha256 or hash_file(path)
    estimator = formats.load(path, allow_version_mismatch=allow_version_mismatch, immutable=bool(version))
    signature, rows = infer_signature(estimator, sample)
    methods = tuple(method for method in METHODS if callable(getattr(estimator, method, None)))
    classes = _as_lists(getattr(estimator, "classes_", None))
    by_class = ["predict_proba", "predict_log_proba"]
    if all(getattr(part, "decision_function_shape", "") != "ovo" for part in estimators_in(estimator)):
        by_class.append("decision_function")  # else an SVC's has a column for each pair of classes
    version = version or sha256[:12]
    about = {
        "version": version,
        "file": path.name,
        "sha256": sha256,
        "estimator": type(estimator).__name__,
        "methods": methods,
        "classes": classes,
        "signature": signature.describe(),
        "example": {"data": rows[:1]},
        "validated_with": "a synthetic row (no sample was recorded)",
    }
    model = LoadedModel(version, estimator, signature, methods, classes, by_class, batcher or Batcher(), about)
    _answer_sample(model, rows)
    return model


def _answer_sample(model: LoadedModel, rows: list[Any]) -> None:
    """Call a model twice: the first call pays for what is made only once. Raises: ModelLoadError."""
    try:
        inputs = model.signature.parse(rows)
        model.call(inputs)
        began = time.perf_counter()
        model.call(inputs)
        model.batcher.timings.note("predict", len(rows), time.perf_counter() - began)
    except (ModelFailed, RowsRefused) as error:
        raise ModelLoadError(f"version {model.version} does not answer row by row: {error}") from error


def hash_file(path: Path) -> str:
    """Return the sha256 of a file. Raises: ModelLoadError, it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error


def _as_lists(classes: Any) -> Any:
    if isinstance(classes, (list, tuple)):  # one array for each output
        return [_as_lists(each) for each in classes]
    return None if classes is None else np.asarray(classes).tolist()
