"""The columns of a model: which JSON values each of them takes."""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
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
    (date, lambda value: value.isoformat()),
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
    """One input column of a model; `FORMS` has the kinds. `model/frames` has one that makes more of its values."""

    name: str | None  # None if the model was fitted without names
    kind: Kind = "number"
    nullable: bool = False  # the model answers a row in which this value is missing
    dtype: str = ""  # what the model gets, of numpy or pandas; by default that of the kind
    optional: bool = False  # the model drops it; a row that is an object may leave it out
    learned: tuple[Any, ...] = ()  # values that the model saw when it was fitted, if it keeps them; a "category" is one

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.dtype or FORMS[self.kind].dtype)

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

    @cached_property
    def convert(self) -> Callable[[Any], Any] | None:
        """The function that makes the model's value of an accepted one; None if both are equal. It raises BadRows."""
        return self._to_boolean if self.kind == "boolean" else None

    def _to_boolean(self, value: Any) -> Any:
        if value not in (0, 1):
            raise BadRows(NOT_BOOLEAN)
        return value == 1 if self.dtype in ("bool", "boolean", "object", "category") else int(value)

    @property
    def example(self) -> Any:
        """A JSON value that the model knows, or None."""
        return json_form(self.learned[0]) if self.learned else None

    @property
    def expected(self) -> str:
        """What a caller has to write."""
        if self.kind == "category" and self.learned:
            return "a category: " + ", ".join(as_json(json_form(value)) for value in self.learned[:5])
        return FORMS[self.kind].expected

    def json_example(self) -> str:
        """Show a value as JSON."""
        if self.kind in ("category", "boolean", "any") and isinstance(self.example, (str, bool, int, float)):
            return as_json(self.example)
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


def rows_as_lists(rows: Any, columns: Iterable[Column]) -> list[Any]:
    """Return rows with objects as lists of their values in column order; whatever else a sample holds is unchanged."""
    names: list[Any] = [c.name for c in columns]

    def as_list(row: Any) -> Any:
        if not isinstance(row, dict):
            return row
        row = {str(name).replace(" ", "_"): value for name, value in row.items()} | row  # as LightGBM names columns
        return list(map(row.get, names))

    return [as_list(row) for row in rows]


def as_json(value: Any) -> str:
    """Write a value as JSON."""
    return orjson.dumps(value).decode()


def to_array(values: Sequence[Any], dtype: str) -> Any:
    """Make an array of numbers. Raises: BadRows, one does not fit the type."""
    with np.errstate(over="ignore"), suppress(OverflowError):
        array = np.array(values, dtype=dtype)
        if dtype not in ("float32", "float16") or not np.isinf(array).any():
            return array
    misfit = "is too large for" if dtype.startswith("float") else "does not fit"
    raise BadRows(f"data holds a number that {misfit} {dtype}, which the model takes")
