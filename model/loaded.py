"""One model in memory: loaded from its file, validated with its sample, and called for predictions."""

import hashlib
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from . import formats, merging
from .answers import ModelFailed, are_arrays, join, split, to_json
from .batching import Batcher
from .formats import ModelLoadError
from .formats.sklearn import estimators_in
from .infer_signature import infer_signature
from .signature import BadRows, Signature

log = logging.getLogger(__name__)

# What a caller may ask for in "method", if the model has it.
METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function", "score_samples")
TIMED_ROWS, TIMED_BYTES, TIMED_SECONDS = 1024, 2**20, 0.05  # of the calls of a method that are timed at load, at most
CHEAPER_SECONDS = 1.0  # of them, while a row becomes cheaper in larger calls: how cheap decides how many may wait

# Hooks of extensions, called with the estimator and its rows, on the thread on which it will be called.
before_call: list[Callable[[Any, int], None]] = []


class RowsRefused(Exception):
    """The model raised ValueError or TypeError on these rows: the caller has to fix their values.

    `__cause__` holds the model's own exception, whose message may hold the caller's data.
    """


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
    path: Path = Path()  # its file
    merges: bool = True  # the rows of several callers, or the pieces of a large request, may go into one call

    def predict(
        self, rows: Any, method: str = "predict", caller: Hashable = None, check: Callable[[], Any] = bool
    ) -> Any:
        """Return predictions for rows that `signature.validate` returned, from one call with those of other callers.

        Many rows are answered in pieces, with other callers in between, if that changes no answer. See `to_json` for
        the result, `Batcher.submit` for `caller` and `check`. Raises: Overloaded, BadRows, RowsRefused, ModelFailed, or
        what `check` raises.
        """
        shape = self.signature.batch_key(rows) if self.merges else object()  # a key that no other call has
        results, done = [], 0
        while done < len(rows):
            if done:
                check()
            size = self.batcher.timings.bound(method)[0] if self.merges and len(rows) > 1 else len(rows)
            piece = rows[done : done + size]
            results.append(self.batcher.submit(self._predict_batch, piece, method, shape, caller, check, not done))
            done += size
        return join(results) if len(results) > 1 else results[0]

    def _predict_batch(self, parts: Sequence[Any], method: str) -> list[Any]:
        """Call the model once for the rows of several callers; return a result for each of them."""
        result = self.call(self.signature.assemble(parts), method)
        return [result] if len(parts) == 1 else split(result, [len(part) for part in parts])

    def call(self, inputs: Any, method: str = "predict") -> Any:
        """Call the estimator's method on what `signature.parse` returned. Raises: RowsRefused, ModelFailed."""
        for hook in before_call:
            hook(self.estimator, len(inputs))
        try:
            result = getattr(self.estimator, method)(inputs)
        except (ValueError, TypeError) as error:
            raise RowsRefused(type(error).__name__) from error
        except (Exception, SystemExit) as error:  # a SystemExit would end the worker, or the whole server
            raise ModelFailed(f"{type(error).__name__} in {method}") from error
        try:
            by_output = type(result) is list and self._is_by_output(result, inputs, method)
            return to_json(result, len(inputs), by_output)
        except TypeError as error:
            raise ModelFailed(f"{method} returned what JSON cannot hold: {error}") from error
        except Exception as error:
            raise ModelFailed(f"{method} did not return one prediction per row: {error}") from error

    def _is_by_output(self, result: Any, inputs: Any, method: str) -> bool:
        """Return whether a result has an array for each output, though it might be one for each row as well.

        One more row decides: it does not change the number of outputs.
        """
        if not are_arrays(result) or len(result) != len(inputs):
            return False
        indices = [*range(len(inputs)), 0]
        more = inputs.iloc[indices] if hasattr(inputs, "iloc") else np.asarray(inputs)[indices]
        return len(getattr(self.estimator, method)(more)) == len(result)

    def classes_for(self, method: str) -> Any:
        """Return the classes in the order of the columns of the method's result, or None if it has no such columns."""
        return self.classes if method in self.methods_by_class else None

    def time_calls(self) -> None:
        """Time calls of several sizes, so that no request is refused, or cut, because nothing is known of them yet."""
        row = self.about["example"]["data"]
        for method in self.methods:
            rows, spent, each, limit = 1, 0.0, inf, CHEAPER_SECONDS
            while rows <= TIMED_ROWS and rows * len(orjson.dumps(row)) <= TIMED_BYTES and spent < limit:
                with suppress(BadRows, RowsRefused, ModelFailed):  # it may not take a row by itself, or twice
                    validated, began = self.signature.validate(row * rows), time.perf_counter()
                    self._predict_batch([validated], method)
                    self.batcher.timings.note(method, rows, seconds := time.perf_counter() - began)
                    spent, before, each = spent + seconds, each, seconds / rows
                    limit = CHEAPER_SECONDS if each < 0.75 * before else TIMED_SECONDS
                rows *= 4 if rows > 1 else 2

    def describe(self) -> dict[str, Any]:
        """Return what GET /model shows of the model, as JSON values."""
        return self.about | {"calls": self.batcher.timings.describe()}

    def __str__(self) -> str:
        estimator, validated_with = self.about["estimator"], self.about["validated_with"]
        why_not = self.about["merges_requests"].removeprefix("no: ")
        shared = "" if self.merges else f"; callers share no calls: {why_not}"
        return f"{self.version} ({estimator} of {self.path}, validated with {validated_with}{shared})"


@dataclass
class Answer:
    """What a model answered to the rows of a request."""

    prediction: Any  # one entry per row; for several outputs a tuple of those
    classes: Any  # in the order of the columns of the prediction, or None
    model: LoadedModel
    method: str
    rows: Any  # as `Signature.validate` returned them


# --- loading


def load_model(
    path: Path,
    *,
    version: str = "",
    sha256: str = "",
    sample: list[Any] | None = None,
    nullable: Sequence[bool] | None = None,
    allow_version_mismatch: bool = False,
    merge_requests: str = "auto",
    extra_columns: str = "refuse",
    batcher: Batcher | None = None,
) -> LoadedModel:
    """Load a model from its file, and let it answer a sample.

    Args:
        path: the file; its suffix names the format.
        version: its name, if it is a published one, whose file never changes, so that it may be mapped into memory; by
            default the beginning of its hash.
        sha256: its hash, if it was checked already.
        sample: rows that it is known to answer, as in the "data" of a request; by default a synthetic one is made.
        nullable: which columns may be missing, if that is known already.
        allow_version_mismatch, merge_requests, extra_columns: as in the settings.
        batcher: merges its calls.

    Raises: ModelLoadError, what is wrong with it.
    """
    sha256 = sha256 or hash_file(path)
    estimator = formats.load(path, allow_version_mismatch=allow_version_mismatch, immutable=bool(version))
    signature, rows = infer_signature(estimator, sample, nullable)
    signature = replace(signature, ignores_extra=extra_columns == "ignore")
    why_not = f"MERGE_REQUESTS={merge_requests}" if merge_requests == "never" else ""
    if merge_requests == "auto":
        why_not = merging.why_not(estimator, signature, rows)
    version = version or sha256[:12]
    about: dict[str, Any] = {"version": version, "file": path.name, "sha256": sha256}
    about |= _describe(estimator, signature, rows)
    about["merges_requests"] = f"no: {why_not}" if why_not else "yes"
    answers = about["methods"], about["classes"], _methods_by_class(estimator)
    model = LoadedModel(version, estimator, signature, *answers, batcher or Batcher(), about, path, not why_not)
    model = _answer_sample(model, rows)
    for warning in about["warnings"]:
        log.warning("%s: %s", path.name, warning)
    return model


def _describe(estimator: Any, signature: Signature, rows: list[Any]) -> dict[str, Any]:
    return {
        "estimator": type(estimator).__name__,
        "methods": tuple(method for method in METHODS if callable(getattr(estimator, method, None))),
        "classes": _as_lists(getattr(estimator, "classes_", None)),
        "signature": signature.describe(),
        "example": {"data": rows[:1]},
        "validated_with": "a synthetic row (no sample was recorded)",
        "warnings": signature.warnings(),
    }


def _methods_by_class(estimator: Any) -> list[str]:
    by_class = ["predict_proba", "predict_log_proba"]
    if all(getattr(part, "decision_function_shape", "") != "ovo" for part in estimators_in(estimator)):
        by_class.append("decision_function")  # else an SVC's has a column for each pair of classes
    return by_class


def _answer_sample(model: LoadedModel, rows: list[Any]) -> LoadedModel:
    """Return the model with the methods that answer, and a warning of others. Raises: ModelLoadError, not predict."""
    answering: list[str] = []
    for method in model.methods:
        try:
            answer = model.call(model.signature.parse(rows), method)
            orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        except (BadRows, ModelFailed, RowsRefused, TypeError) as error:
            if method == "predict":
                raise ModelLoadError(f"version {model.version} does not answer row by row: {error}") from error
            model.about["warnings"].append(f"{method} is not served: {error}")
        else:
            answering.append(method)
    model.about["methods"] = tuple(answering)
    return replace(model, methods=tuple(answering))


def read_sample(path: Path) -> list[Any]:
    """Read rows, as in the "data" of a request, or a request. Raises: ModelLoadError, there are none to read."""
    try:
        rows = orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"the sample {path}: {error}") from error
    if isinstance(rows, dict) and rows.keys() <= {"data", "method"}:
        rows = rows.get("data")
    if not isinstance(rows, list) or not rows:
        raise ModelLoadError(f'the sample {path} is not a list of rows, as in the "data" of a request')
    return rows


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
