"""The columns of a model: which JSON values each of them takes, and what the model gets for them."""

import datetime
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson

Kind = Literal["number", "integer", "text", "boolean", "category", "date", "any"]


class Form(NamedTuple):
    """What is common to the columns of a kind."""

    accepted: set[type]  # types of JSON values
    expected: str  # what errors call such a value
    example: str  # as JSON
    dtype: str = "object"  # that the model gets


FORMS: dict[Kind, Form] = {
    "number": Form({int, float}, "a number", "0.5", "float64"),
    "integer": Form({int}, "a whole number, written without a decimal point", "1", "int64"),
    "text": Form({str}, "a string", '"text"', "str"),
    "boolean": Form({bool, int, float}, "true or false", "true", "bool"),  # 1 and 0 stand for true and false
    "category": Form({int, float, str, bool}, "a category", '"text"'),  # or only the types that its categories have
    "date": Form({str}, "a date", '"2026-01-31"', "date"),
    "any": Form({int, float, str, bool}, "a number, a string, or true or false", "0.5"),
}
TOO_LARGE = "a number that is too large for float32, which the model makes of it"
MAX_SINGLE = 2.0**128 - 2.0**103  # from here on it becomes an infinity
NOT_BOOLEAN = "a number; expected true or false, or 1 or 0"
JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
# ISO 8601 as programs write it; pandas would also take "now", and guess at "1/2/2026".
ISO_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d(:?\d\d)?)?)?")


class BadRows(ValueError):
    """A request that does not fit: `detail` says what the caller has to fix, and `errors` where.

    Each as `{"row": 3, "column": "petal width (cm)", "detail": "missing"}`; row and column are optional.
    """

    def __init__(self, detail: str, errors: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(detail)
        self.detail, self.errors = detail, list(errors)


def json_name(value: Any) -> str:
    """Return what JSON calls a value."""
    return JSON_NAMES.get(type(value), "a number")


_JSON_FORMS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (str, str),
    ((bool, np.bool_), bool),
    ((int, np.integer), int),
    ((float, np.floating, Decimal), lambda value: float(str(value))),
    (np.datetime64, str),
    (datetime.date, lambda value: value.isoformat()),
)


def json_form(value: Any) -> Any:
    """Return a value that a model learned as callers write it in JSON.

    A number of less than 64 bits is written as briefly as it can be; a date or a time as ISO 8601; what is missing as
    null. Raises: TypeError, there is no such form.
    """
    if value is None or value != value:  # NaN and NaT
        return None
    for types, form in _JSON_FORMS:
        if isinstance(value, types):
            return form(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


@dataclass(frozen=True)
class Column:
    """One input column of a model; `FORMS` has the kinds."""

    name: str | None  # None if the model was fitted without names
    kind: Kind = "number"
    nullable: bool = False  # the model answers a row in which this value is missing
    missing: Any = math.nan  # what the model gets for a missing value
    # What the model gets, a dtype of numpy or pandas: float64, int64 (if all values are whole), str, bool, object,
    # "datetime64[us]", "datetime64[us, Europe/Oslo]", "category"; "date" for a date as the caller wrote it; "infer" for
    # numbers as they were written, or strings; "infer int64" and "infer float64" the same with 3.0 as 3, and 3 as 3.0.
    # By default that of the kind.
    dtype: str = ""
    optional: bool = False  # the model drops it; a row that is an object may leave it out
    zoned: bool | None = None  # of dates: whether those of the encoder, or of the sample, have an offset
    doubt: str = ""  # a warning that it may not be what it seems to be; {} stands for its name
    learned: tuple[Any, ...] = ()  # values that the model saw when it was fitted, if it keeps them; a "category" is one
    single: bool = False  # the model makes a float32 of it, before anything else

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.dtype or FORMS[self.kind].dtype)
        if self.dtype.startswith("datetime64"):
            object.__setattr__(self, "zoned", "," in self.dtype)

    @cached_property
    def accepted(self) -> set[type]:
        """The types of its JSON values."""
        types = FORMS[self.kind].accepted
        if self.kind == "category" and self.learned:
            types = {type(json_form(value)) for value in self.learned}
            if types & {int, float, bool}:
                types |= {int, float}
            if set(self.learned) == {0, 1}:  # a library may keep true and false as numbers
                types |= {bool}
        return types | ({type(None)} if self.nullable else set())

    @property
    def example(self) -> Any:
        """A JSON value that the model knows, or None."""
        return json_form(self.learned[0]) if self.learned else None

    @property
    def expected(self) -> str:
        """What a caller has to write."""
        if self.kind == "category" and self.learned:
            return "a category: " + ", ".join(_as_json(json_form(value)) for value in self.learned[:5])
        if self.kind == "date":
            if self.zoned is not None:
                return f"a date as ISO 8601 {'with' if self.zoned else 'without'} an offset, {self.json_example()}"
            return "a date as ISO 8601, such as 2026-01-31 or 2026-01-31T08:30:00+01:00"
        return FORMS[self.kind].expected

    def json_example(self) -> str:
        """Show a value as JSON."""
        if self.kind == "date" and self.zoned:
            return '"2026-01-31T08:30:00+01:00"'
        if self.kind in ("category", "boolean", "any") and isinstance(self.example, (str, bool, int, float)):
            return _as_json(self.example)
        return FORMS[self.kind].example

    def place(self, at: int) -> str | int:
        """Return what errors call the column that is number `at` of the model's."""
        return at if self.name is None else self.name

    def describe(self) -> dict[str, Any]:
        """Describe the column for people and programs, as JSON values."""
        found: dict[str, Any] = {"name": self.name, "type": self.kind, "nullable": self.nullable}
        if self.kind == "category" and self.learned:
            found["categories"] = [json_form(value) for value in self.learned[:100]]
        return found

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

    def _to_boolean(self, value: Any) -> Any:
        if value not in (0, 1):
            raise BadRows(NOT_BOOLEAN)
        return value == 1 if self.dtype in ("bool", "boolean", "object", "category") else int(value)

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


def rows_as_lists(rows: Any, columns: Iterable[Column]) -> list[Any]:
    """Return rows with objects as lists of their values in column order; whatever else a sample holds is unchanged."""
    names: list[Any] = [c.name for c in columns]

    def as_list(row: Any) -> Any:
        if not isinstance(row, dict):
            return row
        row = {str(name).replace(" ", "_"): value for name, value in row.items()} | row  # as LightGBM names columns
        return list(map(row.get, names))

    return [as_list(row) for row in rows]


def _as_json(value: Any) -> str:
    return orjson.dumps(value).decode()


def context(values: list[Any], column: Column) -> Any:
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


def to_array(values: Sequence[Any], dtype: str) -> Any:
    """Make an array of numbers. Raises: BadRows, one does not fit the type."""
    with np.errstate(over="ignore"), suppress(OverflowError):
        array = np.array(values, dtype=dtype)
        if dtype not in ("float32", "float16") or not np.isinf(array).any():
            return array
    misfit = "is too large for" if dtype.startswith("float") else "does not fit"
    raise BadRows(f"data holds a number that {misfit} {dtype}, which the model takes")


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


def to_series(values: list[Any], column: Column) -> Any:
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
