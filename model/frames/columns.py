"""Columns of which the model gets something else than what JSON holds: categories, dates, whole numbers, and others."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np

from ..columns import ISO_DATE, BadRows, Column, json_form, to_array

TOO_LARGE = "a number that is too large for float32, which the model makes of it"
MAX_SINGLE = 2.0**128 - 2.0**103  # from here on it becomes an infinity


@dataclass(frozen=True)
class FrameColumn(Column):
    """One input column, and what the model gets for its values.

    Its `dtype` is one of numpy or pandas: float64, int64 (if all values are whole), str, bool, object,
    "datetime64[us]", "datetime64[us, Europe/Oslo]", "category"; "date" for a date as the caller wrote it; "infer" for
    numbers as they were written, or strings; "infer int64" and "infer float64" the same with 3.0 as 3, and 3 as 3.0.
    """

    missing: Any = math.nan  # what the model gets for a missing value
    zoned: bool | None = None  # of dates: whether those of the encoder, or of the sample, have an offset
    doubt: str = ""  # a warning that it may not be what it seems to be; {} stands for its name
    single: bool = False  # the model makes a float32 of it, before anything else

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype.startswith("datetime64"):
            object.__setattr__(self, "zoned", "," in self.dtype)

    @property
    def expected(self) -> str:
        """What a caller has to write."""
        if self.kind != "date":
            return super().expected
        if self.zoned is not None:
            return f"a date as ISO 8601 {'with' if self.zoned else 'without'} an offset, {self.json_example()}"
        return "a date as ISO 8601, such as 2026-01-31 or 2026-01-31T08:30:00+01:00"

    def json_example(self) -> str:
        """Show a value as JSON."""
        return '"2026-01-31T08:30:00+01:00"' if self.kind == "date" and self.zoned else super().json_example()

    @cached_property
    def convert(self) -> Callable[[Any], Any] | None:
        """The function that makes the model's value of an accepted one; None if both are equal. It raises BadRows."""
        if self.kind == "boolean":
            return self._to_boolean
        if self.kind == "date":
            return self._to_date
        if self.learned and self.dtype in ("object", "category"):
            return self._to_learned
        if self.kind == "category":
            return self._to_category
        return self._check_single if self.single and self.kind == "number" else _AS_WRITTEN.get(self.dtype)

    def _check_single(self, value: Any) -> Any:
        if abs(value) >= MAX_SINGLE:
            raise BadRows(TOO_LARGE)
        return value

    def _to_learned(self, value: Any) -> Any:
        found = self._by_json_value.get(value, None if self.dtype == "category" else value)
        return Decimal(repr(value)) if found is value and isinstance(self.learned[0], Decimal) else found

    def _to_category(self, value: Any) -> Any:
        """Return a category of CatBoost, which takes strings and whole numbers, and keeps none to compare with."""
        if isinstance(value, float):
            if not value.is_integer():
                raise BadRows("a fraction; expected a category: a string or a whole number")
            return int(value)
        return int(value) if isinstance(value, bool) else value  # CatBoost writes True as 1

    @cached_property
    def _by_json_value(self) -> dict[Any, Any]:
        """JSON value → the value that was learned: the number that it equals, or is the shortest form of."""
        exact = {value: value for value in self.learned}
        return {json_form(value): value for value in self.learned} | exact

    def _to_date(self, text: str) -> Any:
        import pandas as pd

        try:
            if not ISO_DATE.fullmatch(text):
                raise ValueError(text)
            date = pd.Timestamp(text)
        except ValueError:
            raise BadRows(f"not a valid date; expected {self.expected}") from None
        if self.zoned not in (None, date.tzinfo is not None):
            raise BadRows(f"a date {'with' if date.tzinfo else 'without'} an offset; expected {self.expected}")
        if self.dtype in ("date", "object"):
            return self._by_date.get(date, date)
        try:
            return date.as_unit(self.dtype[11:].split("]")[0].split(",")[0], round_ok=False)
        except pd.errors.OutOfBoundsDatetime:
            raise BadRows(f"a date outside the range of the model's dates, which are {self.dtype}") from None
        except ValueError:
            raise BadRows(f"a time finer than the model's dates, which are {self.dtype}") from None

    @cached_property
    def _by_date(self) -> dict[Any, Any]:
        import pandas as pd

        return {pd.Timestamp(value): value for value in self.learned}


_AS_WRITTEN: dict[str, Callable[[Any], Any]] = {
    "infer int64": lambda value: int(value) if type(value) is float and are_whole([value]) else value,
    "infer float64": lambda value: float(value) if type(value) is int else value,
}


def context(values: list[Any], column: FrameColumn) -> Any:
    """Return what decides the type of a column in one call, where its values do; None if they do not.

    Rows of which it differs must not share a call: each caller's answer would depend on the others' values. It is the
    offset of dates that stay as they were written, and whether numbers are whole before a step of the user's own,
    which may make strings of them.
    """
    present = [value for value in values if value is not None]
    if column.dtype == "date":
        return (present[0].utcoffset(),) if present else ()
    if column.dtype.startswith("infer") or (column.dtype == "int64" and not column.learned):
        return len(present) < len(values), are_whole(present), frozenset(map(type, present))
    return None


# --- columns of values that were converted → what the model gets


def are_whole(values: list[Any]) -> bool:
    """Return whether all values are whole numbers of 64 bits; 3.0 is one, too."""
    return all((type(v) is int or (type(v) is float and v.is_integer())) and -(2**63) <= v < 2**63 for v in values)


def to_numbers(values: list[Any], name: str | None, dtype: str, whole: bool) -> Any:
    """Make an array of a column's numbers. An encoder may distinguish whole numbers whose floats are equal."""
    if dtype != "int64":
        return to_array(values, dtype)
    if whole:
        return np.array(list(map(int, values)), dtype=np.int64)
    if any(type(value) is int and abs(value) > 2**53 for value in values):
        raise BadRows(
            f"column {name!r}: a whole number beyond 2**53 is not exact beside a missing, fractional or larger value; "
            "send those rows in a request of their own"
        )
    return to_array(values, "float64")


def to_series(values: list[Any], column: FrameColumn) -> Any:
    """Make a column of a data frame, of a type that depends on its values only as far as `context` says."""
    import pandas as pd

    dtype = column.dtype
    if dtype.startswith("infer"):
        types = set(map(type, values))
        if not types <= {int, float}:
            return pd.Series(values, dtype=object)
        dtype = "int64" if all(type(value) is int for value in values if value == value) else "float64"
    if dtype == "int64" and not column.learned and not are_whole(values):
        present = [value for value in values if value is not None and value == value]
        if 0 < len(present) < len(values) and are_whole(present):
            # Before a step of the user's own, which may make strings of them: a null must not turn 3 into 3.0.
            return pd.array([int(v) if v is not None and v == v else None for v in values], dtype="Int64")
    if dtype in ("float64", "float32", "float16", "int64"):
        return to_numbers(values, column.name, dtype, whole=are_whole(values))
    if dtype == "boolean":  # pandas' own, which may be missing
        return pd.array([value if isinstance(value, bool) else None for value in values], dtype="boolean")
    if dtype == "category":
        return pd.Series(pd.Categorical(values, categories=pd.Index(list(column.learned))))
    if dtype.startswith("datetime64"):
        dates = pd.Series(pd.to_datetime(values, utc=True) if "," in dtype else values)
        return dates.astype(dtype)
    if dtype == "date":
        missing = all(value is None or value != value for value in values)
        return pd.Series(values, dtype="datetime64[us]" if missing else None)
    if dtype == "str" and int(pd.__version__.split(".")[0]) >= 3:
        return pd.Series(values, dtype="str")
    return pd.Series(values, dtype=bool if dtype == "bool" and column.missing not in values else object)
