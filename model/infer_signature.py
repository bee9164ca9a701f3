"""What a fitted model takes, inferred from the model itself.

A fitted scikit-learn model records how many columns it takes and, if it was fitted on a data frame, their names. It
does not record which may be missing: that is tried out, one missing value at a time. What has learned categories, or
selects columns of a data frame, is left to `frames/`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from .columns import rows_as_lists
from .formats import ModelLoadError, from_frames, has_frames, is_of_family
from .formats.sklearn import estimators_in
from .signature import Column, Signature

AnySignature = TypeVar("AnySignature", bound=Signature)
TRIAL_SECONDS = 10.0  # of each search; only models that are slow or have very many columns need more
# scikit-learn's trees make float32 of all numbers themselves.
SINGLE = ("sklearn.tree.", *(f"sklearn.ensemble._{name}" for name in ("forest", "gb", "iforest")))
# What parts of scikit-learn have that take more than arrays of numbers: encoders, vectorizers, column transformers,
# functions of the user's own, and whatever may pass data frames on.
TAKES_MORE = (
    *("categories_", "vocabulary_", "build_analyzer"),
    *("_transformer_to_input_indices", "inverse_func", "_sklearn_output_config"),
)


def infer_signature(
    model: Any, sample: list[Any] | None = None, nullable: Sequence[bool] | None = None
) -> tuple[Signature, list[Any]]:
    """Infer what a fitted model takes, and validate it with rows that the model answers.

    >>> from sklearn.linear_model import LinearRegression
    >>> signature, rows = infer_signature(LinearRegression().fit([[1, 2], [3, 5]], [0, 1]))
    >>> signature.example(), rows
    ('[[0.5, 0.5]]', [[0.0, 0.0]])

    Args:
        model: a fitted estimator of scikit-learn, or a model that declares what it takes: it has a method
            `signatures(sample)`, which returns the signatures it may have, the likeliest first.
        sample: rows that the model is known to answer; without them a synthetic row is made.
        nullable: which columns may be missing, if that is known; otherwise it is tried.

    Returns:
        The signature, and the rows that it was validated with.

    Raises: ModelLoadError, the model does not answer the sample or, without one, any synthetic row.
    """
    failure: Exception | None = None
    end = time.monotonic() + 3 * TRIAL_SECONDS
    declared = hasattr(model, "signatures")  # nothing is tried out then: a tensor model would just compute with NaN
    for signature in _candidates(model, sample):
        if failure is not None and time.monotonic() > end:
            break
        tried = signature if declared else all_nullable(signature)
        # Two synthetic rows for a declared signature: such a model may be fixed to one row at a time.
        example = getattr(model, "example", None) if declared else None
        made = synthetic_rows(signature, n_rows=2 if declared else 1) if example is None else [[example] * 2]
        for rows in [sample] if sample else made:
            if (error := failure_of(model, tried, rows)) is not None:
                failure = failure or error
                continue
            if declared:
                return signature, rows
            signature, rows = from_frames("complete", model, signature, rows, sample) or (signature, rows)
            return _with_nullable(model, signature, rows, nullable), rows
    why = _explain(model, failure, sample)
    raise ModelLoadError(f"{why} ({type(failure).__name__}: {failure})") from failure


def _explain(model: Any, failure: Exception | None, sample: list[Any] | None) -> str:
    """Return why a model answered nothing; suggest a sample only where it would help."""
    if any(each.__name__ == "NotFittedError" for each in type(failure).__mro__) or "no trained model" in str(failure):
        return "the model is not fitted; save it after fit"
    if why := from_frames("explain", model):
        return str(why)
    if isinstance(failure, ImportError):
        return "the model needs a library that is not installed here"
    if not has_frames() and not hasattr(model, "signatures") and not _takes_numbers(model):
        return "this server was installed without model/frames, which may know what such a model takes"
    if sample:
        named = not isinstance(sample, list) or isinstance(sample[0], dict) or hasattr(model, "feature_names_in_")
        objects = (
            "" if named else "; if it takes a data frame, write the rows as objects, with the names of its columns"
        )
        return f"the model refuses its recorded sample{objects}"
    return "the model answers none of the synthetic rows that were tried; a recorded sample would show what it takes"


# --- candidates


def _candidates(model: Any, sample: list[Any] | None) -> Iterable[Signature]:
    """Yield the signatures that the model may have, the likeliest first. Raises: ModelLoadError, `frames` is needed."""
    if hasattr(model, "signatures"):
        yield from model.signatures(sample)
    elif _takes_numbers(model):
        yield from _of_numbers(model, sample)
    elif (found := from_frames("candidates", model, sample)) is not None:
        yield from found
    elif hasattr(first_step(model), "build_analyzer"):
        yield Signature("texts", ())
    else:
        one_dimension = False
        with suppress(AttributeError):  # only scikit-learn's own base classes have tags
            one_dimension = model.__sklearn_tags__().input_tags.one_d_array
        of_sklearn = type(model).__module__.startswith("sklearn.")
        if not one_dimension and not has_frames() and (of_sklearn or is_of_family(model)):
            needed = "model/frames is needed, without which this server was installed"
            raise ModelLoadError(f"the model is not fitted, or it takes more than numbers, for which {needed}")
        if not one_dimension:
            yield Signature("array", None)
            yield Signature("texts", ())
        yield Signature("numbers", ())


def _takes_numbers(model: Any) -> bool:
    """Return whether a model takes arrays of numbers for certain: it consists of parts of scikit-learn that do."""
    parts, width = list(estimators_in(model)), getattr(first_step(model), "n_features_in_", 0)
    # A step may be any object with `fit` and `transform`, which is no estimator.
    steps = [step for part in parts for _, step in getattr(part, "steps", getattr(part, "transformer_list", ()))]
    parts += [step for step in steps if step not in (None, "passthrough", "drop")]
    return bool(parts) and bool(width) and all(map(_is_plain, parts))


def _is_plain(part: Any) -> bool:
    if not type(part).__module__.startswith("sklearn.") or any(hasattr(part, name) for name in TAKES_MORE):
        return False
    if hasattr(part, "statistics_"):  # an imputer
        return part.missing_values is not None and part.statistics_.dtype != object
    return not np.any(getattr(part, "is_categorical_", False))  # gradient boosting by histograms


def first_step(model: Any) -> Any:
    """Return the step of a pipeline that gets its input; any other model is its own."""
    while not getattr(model, "n_features_in_", 0):
        steps = [step for _, step in getattr(model, "steps", ()) if step not in (None, "passthrough")]
        if (inner := steps[0] if steps else getattr(model, "best_estimator_", None)) is None:
            break
        model = inner
    return model


def _of_numbers(model: Any, sample: list[Any] | None) -> Iterable[Signature]:
    reader: Any = first_step(model)
    names: list[Any] = [str(name) for name in getattr(reader, "feature_names_in_", ())]
    columns = [Column(name) for name in names or [None] * reader.n_features_in_]
    for at, values in enumerate(values_in(sample, columns)):
        if set(map(type, values)) - {type(None)} == {bool}:
            columns[at] = Column(columns[at].name, "boolean", dtype="float64")
    forget_names(model)
    precision = "float32" if type(model).__module__.startswith(SINGLE) else "float64"
    for each in dict.fromkeys((precision, "float32")):
        yield Signature("array", tuple(columns), each)


def forget_names(model: Any) -> None:
    """Remove the column names from a model that gets arrays: the signature has them, and at each array without names
    scikit-learn would warn, which costs more than a small predict."""
    for part in estimators_in(model):
        vars(part).pop("feature_names_in_", None)


def values_in(sample: Any, columns: Sequence[Column]) -> list[tuple[Any, ...]]:
    """Return the values in a sample by column; rows that do not fit are ignored, and without any there are none."""
    rows = rows_as_lists(sample, columns) if isinstance(sample, list) else []
    return list(zip(*(row for row in rows if isinstance(row, list) and len(row) == len(columns)), strict=True))


# --- rows that are tried


def synthetic_rows(signature: Signature, n_rows: int) -> Iterable[list[Any]]:
    """Yield rows to try: values that the encoders know, and otherwise 0 or 1 (a logarithm takes no 0)."""
    if hasattr(signature, "synthetic_rows"):  # it has rows of its own kind
        yield from signature.synthetic_rows(n_rows)
        return
    for number in (0.0, 1.0):
        values = {"number": number, "integer": int(number), "text": "text", "boolean": False, "any": number}
        values |= {"category": "text", "date": "2026-01-31"}
        columns = signature.columns or (Column(None),)
        row: Any = [values[c.kind] if c.example is None else c.example for c in columns]
        if signature.layout in ("texts", "numbers"):
            row = "text" if signature.layout == "texts" else number
        yield [row] * n_rows


def _with_nullable(model: Any, signature: Signature, rows: list[Any], known: Sequence[bool] | None) -> Signature:
    """Find which columns may be missing by leaving each out once. An imputer's tags cannot be trusted on this."""
    if not signature.columns:
        return signature
    if known is not None and len(known) == len(signature.columns):
        columns = (replace(c, nullable=null) for c, null in zip(signature.columns, known, strict=True))
        return replace(signature, columns=tuple(columns))
    # A value of each column from the rows that the model answered, not a missing one if some row has another.
    by_column = zip(*rows_as_lists(rows, signature.columns), strict=True)
    values = [next((value for value in column if value is not None), None) for column in by_column]
    tried = all_nullable(signature)

    def answers(indices: list[int]) -> bool:
        row = list(values)
        for at in indices:
            row[at] = None
        return failure_of(model, tried, [row]) is None

    nullable = set(accepted(list(range(len(values))), answers))
    columns = (replace(c, nullable=at in nullable) for at, c in enumerate(signature.columns))
    return replace(signature, columns=tuple(columns))


def failure_of(model: Any, signature: Signature, rows: list[Any]) -> Exception | None:
    """Return what the model raises at rows, which may be anything; None if it answers them."""
    try:
        model.predict(signature.parse(rows))
    except Exception as error:
        return error
    return None


def all_nullable(signature: AnySignature) -> AnySignature:
    """Return the signature with columns that may all be missing."""
    return replace(signature, columns=signature.columns and tuple(replace(c, nullable=True) for c in signature.columns))


def accepted(indices: list[int], accepts: Callable[[list[int]], bool], seconds: float | None = None) -> Iterator[int]:
    """Yield the indices that are accepted, trying many at once and halving what is refused.

    Of very many columns, or by a slow model, not all can be tried in a few seconds; the rest count as refused.
    """
    end = time.monotonic() + (TRIAL_SECONDS if seconds is None else seconds)
    left = [indices] if indices else []
    for _ in range(max(200, 2_000_000 // max(1, len(indices)))):
        if not left or time.monotonic() > end:
            return
        group = left.pop()
        if accepts(group):
            yield from group
        elif len(group) > 1:
            middle = len(group) // 2
            left += [group[:middle], group[middle:]]
