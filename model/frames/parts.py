"""What the fitted parts of a model show about its raw columns: their kinds, and the values that encoders learned."""

import datetime
import functools
import itertools
import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from ..columns import Kind
from ..formats import ModelLoadError
from ..infer_signature import SINGLE
from .columns import FrameColumn
from .foreign import booster_columns, column_kinds, learned_categories


class Selection(NamedTuple):
    """The columns that a part hands to one of those within it."""

    indices: Sequence[int]

    def transform(self, inputs: Any) -> Any:
        """Select them of a data frame or an array."""
        return inputs.iloc[:, list(self.indices)] if hasattr(inputs, "iloc") else inputs[:, list(self.indices)]


class RawPart(NamedTuple):
    """A fitted part of a model that raw columns reach."""

    part: Any
    columns: Sequence[int | None]  # the raw column that each of its own is; None if a step has made it
    before: tuple[Any, ...] = ()  # the steps on the way to it, which have `transform`


def raw_parts(part: Any, columns: Sequence[int | None], before: tuple[Any, ...] = ()) -> Iterator[RawPart]:
    """Yield each fitted part that raw columns reach, unchanged or through an imputer, or "drop"."""
    yield RawPart(part, columns, before)
    if hasattr(part, "steps"):
        for _, step in part.steps:
            if is_identity(step):
                continue
            yield from raw_parts(step, columns, before)
            columns = _passed_on(step, columns)
            if not columns:
                return
            before = (*before, step)
    elif hasattr(part, "_transformer_to_input_indices"):  # ColumnTransformer: names, masks and callables resolved
        for name, inner, _ in part.transformers_:
            if not is_identity(inner):
                indices = part._transformer_to_input_indices[name]
                yield from raw_parts(inner, [columns[at] for at in indices], (*before, Selection(indices)))
    elif hasattr(part, "estimators_features_"):  # Bagging: each gets some of the columns
        for inner, indices in itertools.islice(zip(part.estimators_, part.estimators_features_, strict=True), 10):
            yield from raw_parts(inner, [columns[at] for at in indices], (*before, Selection(indices)))
    else:
        for inner in _inner_estimators(part):
            yield from raw_parts(inner, columns, before)


def find_single(model: Any, width: int) -> set[int]:
    """Return the raw columns of which some tree of scikit-learn makes float32, as far as this is certain.

    What does not fit is then known before the tree is called. It is not certain if a part may be code of somebody's
    own, which may call the tree for some rows only, or a selector, which may not call it at all, or if an imputer takes
    certain numbers for missing ones.
    """
    parts = list(raw_parts(model, range(width)))
    for part in (*(raw.part for raw in parts), *(step for raw in parts for step in raw.before)):
        marker = getattr(part, "missing_values", None)
        is_own = not (type(part).__module__.startswith("sklearn.") or isinstance(part, (str, Selection)))
        if is_own or hasattr(part, "get_support") or (isinstance(marker, numbers.Number) and marker == marker):
            return set()
    trees = [raw for raw in parts if type(raw.part).__module__.startswith(SINGLE)]
    fitting = [raw.columns for raw in trees if getattr(raw.part, "n_features_in_", 0) == len(raw.columns)]
    return {at for columns in fitting for at in columns if at is not None}


def _passed_on(step: Any, columns: Sequence[int | None]) -> Sequence[int | None]:
    """Return the raw columns that a step passes on, with None for each that it makes; nothing if it makes all."""
    if is_identity(step):
        return columns
    if hasattr(step, "statistics_"):  # an imputer leaves out columns without any value
        empty = [not step.keep_empty_features and value != value for value in step.statistics_]
        kept = [at for at, is_empty in zip(columns, empty, strict=False) if not is_empty]
        return kept + [None] * len(getattr(step.indicator_, "features_", ()))
    if hasattr(step, "steps"):
        return functools.reduce(lambda passed, inner: _passed_on(inner[1], passed), step.steps, columns)
    found: list[int | None] = []
    if hasattr(step, "_transformer_to_input_indices"):
        found = [None] * max(made.stop for made in step.output_indices_.values())
        for name, inner, _ in step.transformers_:
            made = step.output_indices_[name]
            passed = _passed_on(inner, [columns[at] for at in step._transformer_to_input_indices[name]])
            if len(passed) == made.stop - made.start:
                found[made] = passed
    return found if any(at is not None for at in found) else []


def is_identity(step: Any) -> bool:
    """Return whether a step changes nothing, as a FunctionTransformer without a function does."""
    if hasattr(step, "steps"):
        return all(is_identity(inner) for _, inner in step.steps)
    return step in (None, "passthrough") or (hasattr(step, "inverse_func") and step.func is None)


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
class ColumnFacts:
    """What the model's parts show about one raw column."""

    kind: Kind | None = None
    dtype: str = ""
    missing: Any = math.nan
    learned: tuple[Any, ...] = ()
    dropped: bool = False  # by some part; a column that no part keeps never reaches the model
    is_category: bool = False  # of pandas, as the model takes it

    def learn(self, categories: Any) -> None:
        """Note the categories that an encoder was fitted on: they show what the column holds."""
        array = np.asarray(categories)
        is_object = array.dtype.kind == "O"
        if is_object and any(value is None for value in array):
            self.missing = None
        known = array[is_present(array)]
        values = known.tolist() if is_object else known
        present = tuple(str(v) if isinstance(v, np.str_) else v for v in values)
        if present and not self.learned:
            self.learned = present
            self.kind, self.dtype = _kind_and_dtype(array.dtype, present)

    def column(self, name: str | None) -> FrameColumn:
        if self.is_category and self.learned:
            return FrameColumn(name, "category", dtype="category", learned=self.learned)
        kind: Kind = self.kind or ("any" if self.dropped else "number")
        optional = self.dropped and self.kind is None
        zoned = kind == "date" and getattr(self.learned[0], "tzinfo", None) is not None if self.learned else None
        dtype = "object" if self.missing is None and self.dtype in ("", "str") else self.dtype
        return FrameColumn(
            name, kind, missing=self.missing, dtype=dtype, optional=optional, zoned=zoned, learned=self.learned
        )


def _kind_and_dtype(dtype: Any, values: tuple[Any, ...]) -> tuple[Kind, str]:
    """Return the kind of a column, and the type that the model gets, from the categories that an encoder learned."""
    if dtype.kind == "M":
        return "date", str(dtype)
    if dtype.kind in "biuf":
        kind: Kind = "boolean" if dtype.kind == "b" or set(values) == {0, 1} else "number"
        return kind, _dtype_of_numbers(dtype, values)
    types = set(map(type, values))
    if types == {str}:
        return "text", ""
    if types == {bool}:
        return "boolean", "object"
    if all(issubclass(each, datetime.datetime) for each in types):
        import pandas as pd

        dates = pd.Series(list(values))
        return "date", "object" if dates.dtype == object else str(dates.dtype)
    if types == {datetime.date}:
        return "date", "object"
    numbers = all(issubclass(each, (int, float, np.number, Decimal)) for each in types)
    if numbers and not types & {bool, np.timedelta64}:
        return "number", "object"
    if types <= {str, bool, int, float}:
        return "any", "object"
    raise ModelLoadError(
        f"an encoder was fitted on values of the type {', '.join(sorted(each.__name__ for each in types))}, which have "
        "no form in JSON; train the model on strings or numbers made of them"
    )


def _dtype_of_numbers(dtype: Any, values: tuple[Any, ...]) -> str:
    """Return the type of a column of numbers whose categories an encoder has kept."""
    if dtype.kind != "f":
        return "bool" if dtype.kind == "b" else "int64"
    # pandas passes its nullable Float32 on as 64 bits, in which 0.1 looks like 0.10000000149011612.
    if dtype == np.float64 and any(float(str(np.float32(value))) != value for value in values):
        singles = np.array(values, dtype=np.float32)
        if (singles == np.array(values)).all():
            return "float32"
    return str(dtype)


def inspect(model: Any, width: int) -> list[ColumnFacts]:
    """Return what the fitted parts of a model show about its raw columns."""
    found = [ColumnFacts() for _ in range(width)]
    for raw in raw_parts(model, list(range(width))):
        part, columns = raw.part, [ColumnFacts() if at is None else found[at] for at in raw.columns]
        if getattr(part, "categorical_features", None) == "from_dtype" and part.is_categorical_ is not None:
            for facts, flag in zip(columns, part.is_categorical_, strict=False):
                facts.is_category = bool(flag)
        if isinstance(part, str):  # "drop"
            for facts in columns:
                facts.dropped = True
        elif hasattr(part, "steps") or hasattr(part, "_transformer_to_input_indices"):
            continue  # only its parts matter
        elif (boosted := booster_columns(part)) is not None:
            for facts, column in zip(columns, boosted, strict=False):
                facts.kind = facts.kind or column.kind
                facts.dtype, facts.learned = facts.dtype or column.dtype, facts.learned or column.learned
        elif (learned := learned_categories(part)) is not None or hasattr(part, "categories_"):
            names = getattr(part, "feature_names_in_", ())
            arrays = part.categories_ if learned is None else [learned.get(name, ()) for name in names]
            for facts, values in zip(columns, arrays, strict=False):
                facts.learn(values)
        elif (kinds := column_kinds(part)) is not None:
            for facts, name in zip(columns, getattr(part, "feature_names_in_", ()), strict=False):
                facts.kind = facts.kind or kinds.get(name)
        elif hasattr(part, "statistics_"):
            for facts in columns:
                if getattr(part, "missing_values", 0) is None:
                    facts.missing = None
                if getattr(part, "strategy", "") in ("mean", "median"):
                    facts.kind = facts.kind or "number"
        elif hasattr(part, "build_analyzer") or _is_fitted_leaf(part):
            for facts in columns:
                facts.kind = facts.kind or ("text" if hasattr(part, "build_analyzer") else "number")
    return found


def _is_fitted_leaf(part: Any) -> bool:
    """Return whether a part is a fitted estimator of scikit-learn, which takes numbers, with no other inside it."""
    of_sklearn = type(part).__module__.startswith("sklearn.") and not hasattr(part, "inverse_func")
    return of_sklearn and hasattr(part, "n_features_in_") and not any(True for _ in _inner_estimators(part))


def is_present(array: Any) -> Any:
    """Return which values of an array are neither None, NaN nor NaT, as an array of booleans."""
    return np.array([value is not None and value == value for value in array], dtype=bool)
