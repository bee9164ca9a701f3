"""What a fitted model takes, inferred from the model itself.

A fitted scikit-learn model records how many columns it takes and, if it was fitted on a data frame, their names. It
does not record which columns hold strings or may be missing: the first is read from the encoders and imputers inside
the model, the second is tried out, one missing value at a time.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .formats import ModelLoadError
from .formats.sklearn import estimators_in
from .signature import ACCEPTED, Column, Kind, Layout, Signature

NUMBER_OR_TEXT: tuple[Kind, ...] = ("number", "text")


def infer_signature(model: Any, sample: list[Any] | None = None) -> tuple[Signature, list[Any]]:
    """Infer what a fitted model takes, and validate it with rows that the model answers.

    >>> from sklearn.linear_model import LinearRegression
    >>> signature, rows = infer_signature(LinearRegression().fit([[1, 2], [3, 5]], [0, 1]))
    >>> signature.example(), rows
    ('[[0.5, 0.5]]', [[0.0, 0.0]])

    Args:
        model: a fitted estimator of scikit-learn, or a model that declares what it takes: it has a method
            `signatures(sample)`, which returns the signatures it may have, the likeliest first.
        sample: rows that the model is known to answer; without them a synthetic row is made.

    Returns:
        The signature, and the rows that it was validated with.

    Raises: ModelLoadError, the model does not answer the sample or, without one, any synthetic row.
    """
    failure: Exception | None = None
    declared = hasattr(model, "signatures")  # nothing is tried out then: a tensor model would just compute with NaN
    for signature in _candidates(model, sample):
        tried = signature if declared else _all_nullable(signature)
        # Two synthetic rows for a declared signature: such a model may be fixed to one row at a time.
        for rows in [sample] if sample else _synthetic_rows(signature, n_rows=2 if declared else 1):
            error = _failure(model, tried, rows)
            if error is not None:
                failure = failure or error
                continue
            if declared:
                return signature, rows
            if not sample:
                signature, rows = _without_needless_strings(model, signature, rows)
            return _with_nullable(model, signature, rows), rows
    what = "refuses its recorded sample"
    if not sample:
        what = "answers none of the synthetic rows that were tried; a recorded sample would show what it takes"
    raise ModelLoadError(f"the model {what} ({type(failure).__name__}: {failure})") from failure


# --- candidates


def _candidates(model: Any, sample: list[Any] | None) -> Iterable[Signature]:
    """Yield the signatures that the model may have, the likeliest first."""
    if hasattr(model, "signatures"):
        yield from model.signatures(sample)
    elif getattr(model, "n_features_in_", None) is not None:
        yield from _candidates_with_columns(model, sample)
    elif any(hasattr(part, "build_analyzer") for part, _ in raw_parts(model, range(sys.maxsize))):
        yield Signature("texts", ())
    else:
        one_dimension = False
        with suppress(AttributeError):  # only scikit-learn's own base classes have tags
            one_dimension = model.__sklearn_tags__().input_tags.one_d_array
        if not one_dimension:
            yield Signature("array", None)
            yield Signature("texts", ())
        yield Signature("numbers", ())


def _candidates_with_columns(model: Any, sample: list[Any] | None) -> Iterable[Signature]:
    names = [str(name) for name in getattr(model, "feature_names_in_", ())]
    found = inspect(model, model.n_features_in_)
    columns = [facts.column(name) for facts, name in itertools.zip_longest(found, names)]
    layout: Layout = "array"
    if names and (_selects_columns(model) or any(c.kind != "number" for c in columns)):
        layout = "frame"
    elif names:
        _forget_names(model)
    # The model does not show what a step of the user's own takes.
    unknown = [at for at, facts in enumerate(found) if layout == "frame" and facts.kind is None and not facts.dropped]
    for kinds in _guesses(unknown, columns, sample):
        yield Signature(layout, _with_kinds(columns, kinds))
    yield Signature(layout, tuple(columns), precision="float32")


def _selects_columns(model: Any) -> bool:
    """Return whether some part may select columns by name, so that it needs a data frame."""
    parts = list(estimators_in(model))
    return not parts or any(
        not type(part).__module__.startswith("sklearn.")
        or hasattr(part, "_transformer_to_input_indices")
        or hasattr(part, "inverse_func")  # FunctionTransformer
        or hasattr(part, "_sklearn_output_config")  # may pass data frames on
        for part in parts
    )


def _forget_names(model: Any) -> None:
    """Remove the column names from a model that gets arrays: the signature has them, and at each array without names
    scikit-learn would warn, which costs more than a small predict."""
    for part in estimators_in(model):
        vars(part).pop("feature_names_in_", None)


def _with_kinds(columns: Iterable[Column], kinds: dict[int, Kind]) -> tuple[Column, ...]:
    """Return the columns, some of them with another kind."""
    return tuple(replace(c, kind=kinds[at], dtype="") if at in kinds else c for at, c in enumerate(columns))


def _guesses(unknown: list[int], columns: list[Column], sample: Any) -> Iterable[dict[int, Kind]]:
    """Yield kinds for unknown columns: a sample's; else each combination of a few, or all alike or all but one."""
    if isinstance(sample, list) and sample:  # rows that do not fit are ignored
        rows = [row for row in _rows_as_lists(sample, columns) if isinstance(row, list) and len(row) == len(columns)]
        yield {at: _kind_of_values(row[at] for row in rows) for at in unknown}
    elif len(unknown) <= 6:
        for kinds in itertools.product(NUMBER_OR_TEXT, repeat=len(unknown)):
            yield dict(zip(unknown, kinds, strict=True))
    else:
        for common, other in itertools.permutations(NUMBER_OR_TEXT):
            alike = dict.fromkeys(unknown, common)
            yield alike
            for at in unknown if len(unknown) <= 64 else ():
                yield alike | {at: other}


# --- rows that are tried


def _synthetic_rows(signature: Signature, n_rows: int) -> Iterable[list[Any]]:
    """Yield rows to try: values that the encoders know, and otherwise 0 or 1 (a logarithm takes no 0)."""
    if hasattr(signature, "synthetic_rows"):  # it has rows of its own kind
        yield from signature.synthetic_rows(n_rows)
        return
    for number in (0.0, 1.0):
        values = {"number": number, "integer": int(number), "text": "text", "boolean": False, "any": number}
        columns = signature.columns or (Column(None),)
        row: Any = [values[c.kind] if c.example is None else c.example for c in columns]
        if signature.layout in ("texts", "numbers"):
            row = "text" if signature.layout == "texts" else number
        yield [row] * n_rows


def _without_needless_strings(model: Any, signature: Signature, rows: list[Any]) -> tuple[Signature, list[Any]]:
    """Make numbers of the columns that were only guessed to be strings, if the model answers them as numbers."""
    columns = signature.columns or ()
    guessed = [at for at, c in enumerate(columns) if c.kind == "text" and c.example is None]
    numbers: dict[int, Kind] = {}

    def with_numbers(indices: list[int]) -> tuple[Signature, list[Any]]:
        kinds: dict[int, Kind] = numbers | dict.fromkeys(indices, "number")
        row = [0.0 if at in kinds else value for at, value in enumerate(rows[0])]
        return replace(signature, columns=_with_kinds(columns, kinds)), [row]

    for at in _accepted(guessed, lambda indices: _failure(model, *with_numbers(indices)) is None):
        numbers[at] = "number"
    return with_numbers([]) if numbers else (signature, rows)


def _with_nullable(model: Any, signature: Signature, rows: list[Any]) -> Signature:
    """Find which columns may be missing by leaving each out once. An imputer's tags cannot be trusted on this."""
    if not signature.columns:
        return signature
    # A value of each column from the rows that the model answered, not a missing one if some row has another.
    by_column = zip(*_rows_as_lists(rows, signature.columns), strict=True)
    values = [next((value for value in column if value is not None), None) for column in by_column]
    tried = _all_nullable(signature)

    def answers(indices: list[int]) -> bool:
        return _failure(model, tried, [[*values[:at], None, *values[at + 1 :]] for at in indices]) is None

    # If there are very many columns, the last few are tried together, and count as refused if one of them is.
    nullable = set(_accepted(list(range(len(values))), answers, finest=1 if len(values) <= 256 else 16))
    columns = tuple(replace(c, nullable=at in nullable) for at, c in enumerate(signature.columns))
    return replace(signature, columns=columns)


def _failure(model: Any, signature: Signature, rows: list[Any]) -> Exception | None:
    """Return what the model raises at rows, which may be anything; None if it answers them."""
    try:
        model.predict(signature.parse(rows))
    except Exception as error:
        return error
    return None


def _all_nullable(signature: Signature) -> Signature:
    return replace(signature, columns=signature.columns and tuple(replace(c, nullable=True) for c in signature.columns))


def _accepted(indices: list[int], accepts: Callable[[list[int]], bool], finest: int = 1) -> Iterator[int]:
    """Yield the indices that are accepted, trying many at once and halving what is refused, down to `finest`."""
    left = [indices[at : at + 64] for at in range(0, len(indices), 64)]
    while left:
        group = left.pop()
        if accepts(group):
            yield from group
        elif len(group) > finest:
            middle = len(group) // 2
            left += [group[:middle], group[middle:]]


def _rows_as_lists(rows: Any, columns: Iterable[Column]) -> list[Any]:
    """Return rows with objects as lists of their values in column order; whatever else a sample holds is unchanged."""
    names = [c.name for c in columns]
    return [list(map(row.get, names)) if isinstance(row, dict) else row for row in rows]


# --- what the parts of a model show about its columns


def raw_parts(part: Any, columns: Sequence[int]) -> Iterator[tuple[Any, Sequence[int]]]:
    """Yield each fitted part that raw columns reach unchanged, or "drop", with the indices of those columns."""
    yield part, columns
    if hasattr(part, "steps"):
        for _, step in part.steps:
            if step in (None, "passthrough"):
                continue
            yield from raw_parts(step, columns)
            if not hasattr(step, "statistics_"):  # an imputer passes its columns on; other steps make new ones
                return
    elif hasattr(part, "_transformer_to_input_indices"):  # ColumnTransformer: names, masks and callables resolved
        for name, inner, _ in part.transformers_:
            if inner != "passthrough":
                yield from raw_parts(inner, [columns[at] for at in part._transformer_to_input_indices[name]])
    else:
        for inner in _inner_estimators(part):
            yield from raw_parts(inner, columns)


def _inner_estimators(part: Any) -> Iterable[Any]:
    """Yield the fitted estimators to which a meta-estimator passes its own input."""
    for name in ("best_estimator_", "estimator_", "regressor_", "_preprocessor"):
        inner = getattr(part, name, None)
        if inner is not None:
            yield inner
    for name in ("calibrated_classifiers_", "estimators_"):
        fitted = getattr(part, name, ())
        # A few are enough of a forest, and are all of a vote between models of different columns.
        for inner in itertools.islice(fitted.flat if isinstance(fitted, np.ndarray) else fitted, 10):
            yield getattr(inner, "estimator", inner) if name == "calibrated_classifiers_" else inner
    for _, inner in getattr(part, "transformer_list", ()):
        yield inner


@dataclass
class _ColumnFacts:
    """What the model's parts show about one raw column."""

    kind: Kind | None = None
    dtype: str = ""
    none_is_missing: bool = False
    values: list[Any] = field(default_factory=list)
    dropped: bool = False  # by some part; a column that no part keeps never reaches the model

    def add(self, values: Any) -> None:
        """Add values that a part was fitted on: an encoder's categories or an imputer's replacement."""
        array = np.asarray(values)
        present = [v for v in array.ravel().tolist() if v is not None and v == v]
        self.none_is_missing |= any(v is None for v in array.astype(object).ravel())
        if self.kind is None and present:
            self.kind = _kind_of_values(present)
        if self.kind is not None and set(map(type, present)) <= ACCEPTED[self.kind]:
            self.values = present
            if self.kind == "number" and array.dtype.kind in "iuO":
                self.dtype = "object" if array.dtype.kind == "O" else "int64"

    def column(self, name: str | None) -> Column:
        kind: Kind = self.kind or ("any" if self.dropped else "number")
        dtype = "object" if self.none_is_missing else self.dtype
        example = self.values[0] if self.values else None
        return Column(name, kind, missing=None if self.none_is_missing else math.nan, dtype=dtype, example=example)


def _kind_of_values(values: Iterable[Any]) -> Kind:
    """Return the first kind that includes all values but None; "number" if there are no others."""
    types = set(map(type, values)) - {type(None)}
    return next((kind for kind, accepted in ACCEPTED.items() if types <= accepted), "any")


def inspect(model: Any, width: int) -> list[_ColumnFacts]:
    """Return what the fitted parts of a model show about its raw columns."""
    found = [_ColumnFacts() for _ in range(width)]
    for part, indices in raw_parts(model, range(width)):
        columns = [found[at] for at in indices]
        if isinstance(part, str):  # "drop"
            for column in columns:
                column.dropped = True
        elif hasattr(part, "steps") or hasattr(part, "_transformer_to_input_indices"):
            continue  # only its parts matter
        elif hasattr(part, "categories_") or hasattr(part, "statistics_"):
            known = part.categories_ if hasattr(part, "categories_") else [[value] for value in part.statistics_]
            for column, values in zip(columns, known, strict=False):
                column.none_is_missing |= getattr(part, "missing_values", 0) is None
                column.add(values)
        elif hasattr(part, "build_analyzer"):  # a text vectorizer
            for column in columns:
                if column.kind is None:
                    column.add(["text"])
        elif _is_fitted_leaf(part):
            for column in columns:
                column.kind = column.kind or "number"
    return found


def _is_fitted_leaf(part: Any) -> bool:
    """Return whether a part is a fitted estimator of scikit-learn, which takes numbers, with no other inside it."""
    of_sklearn = type(part).__module__.startswith("sklearn.") and not hasattr(part, "inverse_func")
    return of_sklearn and hasattr(part, "n_features_in_") and not any(True for _ in _inner_estimators(part))
