"""JSON rows → the array or data frame the model was fitted on, or what is wrong with them.

signature, _ = learn(model)  # model/learning.py
model.predict(signature.parse([[5.1, 3.5, 1.4, 0.2]]))
"""

import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, Literal

import numpy as np

Kind = Literal["number", "integer", "text", "boolean", "any"]
Layout = Literal["array", "frame", "texts", "numbers", "records", "tensor"]

MAX_ERRORS = 20  # of one request that are listed; a caller mends the first few and tries again
ACCEPTED: dict[Kind, set[type]] = {
    "number": {int, float},
    "integer": {int},
    "text": {str},
    "boolean": {bool},
    "any": {int, float, str, bool},
}
_DTYPES: dict[Kind, str] = {"number": "float64", "integer": "int64", "text": "str", "boolean": "bool", "any": "object"}
_EXPECTED: dict[Kind, str] = {
    "number": "a number",
    "integer": "a whole number, written without a point",
    "text": "a text",
    "boolean": "true or false",
    "any": "a number, a text, or true or false",
}
_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    type(None): "null",
    int: "a number",
    float: "a number",
}


class BadRows(ValueError):
    """Rows that do not fit the model.

    Attributes:
        detail: what to mend, for the caller.
        errors: where, as `{"row": 3, "column": "petal width (cm)", "detail": "missing"}`; row and column optional.
    """

    def __init__(self, detail: str, errors: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = list(errors)


@dataclass(frozen=True)
class Column:
    """One input column of a model."""

    name: str | None  # None where the model was fitted without names
    kind: Kind = "number"
    nullable: bool = False  # the model answers a row in which this value is missing
    missing: float | None = math.nan  # what stands for a missing value at predict
    dtype: str = ""  # at predict: float64, int64 (where the values are whole), str, bool or object; "" by its kind;
    # in "records" whatever numpy type the model takes, such as float32
    example: Any = None  # a value the model saw at fit, where it keeps one

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.dtype or _DTYPES[self.kind])


@dataclass(frozen=True)
class Signature:
    """What a model takes.

    Layouts: "array" a 2-D array, `(n_rows, n_columns)` float64 (object where a column is not of numbers); "frame" a
    pandas data frame; "texts" and "numbers" a list of `n_rows` scalars; "records" a numpy structured array `(n_rows,)`
    with a field for each column; "tensor" an array `(n_rows, *shape)`, such as images, whose rows are nested lists.
    `columns` is None where the model does not tell how many it takes, and empty where rows have none.
    """

    layout: Layout
    columns: tuple[Column, ...] | None
    precision: str = "float64"  # of an array or tensor; some models take only the float32 they were fitted on
    shape: tuple[int | None, ...] = ()  # of a row of a "tensor"; None is a size that may differ from request to request

    @property
    def sizes_open(self) -> bool:
        """Tell whether rows may have a shape that only the model itself can refuse."""
        return self.columns is None or None in self.shape

    def parse(self, data: Any) -> Any:
        """Turn the decoded JSON value of `data` into what the model's `predict` takes.

        Raises:
            BadRows: naming the row and column, with at most `MAX_ERRORS` places.
        """
        return self.build([self.check(data)])

    def check(self, data: Any) -> Any:
        """Return the rows of `data`, a list or an array of them, where they fit the model.

        Args:
            data: a decoded JSON value, or an array of numbers `(n_rows, …)`.

        Raises:
            BadRows: naming the row and column, with at most `MAX_ERRORS` places.
        """
        if isinstance(data, np.ndarray):
            return self._check_array(data)
        if type(data) is not list:
            raise BadRows(f"data is {_json_name(data)}; expected a list of rows, {self.example()}")
        if not data:
            raise BadRows("data has no rows")
        if self.layout in ("texts", "numbers"):
            return self._check_scalars(data)
        if self.layout == "tensor":
            return self._tensor(data)
        rows = self._in_column_order(data)
        if self._all_floats:
            self._check_numbers(rows)
        else:
            self._check_values(rows)
        return rows

    def merges_with(self, rows: Any) -> Hashable:
        """Return what rows that `check` returned must have in common with others to go with them into `build`."""
        if isinstance(rows, np.ndarray):
            return tuple(rows.shape[1:])
        return len(rows[0]) if self.columns is None else None

    def build(self, parts: Sequence[Any]) -> Any:
        """Make what the model's `predict` takes out of rows that `check` returned, those of several callers.

        Raises:
            BadRows: a number does not fit the type of its column.
        """
        if isinstance(parts[0], np.ndarray):
            array = parts[0] if len(parts) == 1 else np.concatenate(parts)
            return self._frame(array) if self.layout == "frame" else array
        rows = parts[0] if len(parts) == 1 else list(itertools.chain.from_iterable(parts))
        if self.layout == "texts":
            return rows
        if self.layout == "numbers":
            return _numpy(rows, self.precision)
        if self._all_floats:
            numbers = _numpy(rows, self.precision)  # None becomes NaN
            return self._frame(numbers) if self.layout == "frame" else numbers
        return self._records(rows) if self.layout == "records" else self._mixed(rows)

    def example(self) -> str:
        """Show the form of `data` with one row, as JSON."""
        if self.layout == "texts":
            return '["some text"]'
        if self.layout == "numbers":
            return "[0.5]"
        if self.layout == "tensor":
            return _nested(_SHOWN[kind_of(self.precision)], self.shape)
        if self.columns is None or len(self.columns) > 8:
            return "[[1.0, 2.0, …]]" + (f" with {len(self.columns)} values each" if self.columns else "")
        return "[[" + ", ".join(_SHOWN[c.kind] for c in self.columns) + "]]"

    def describe(self) -> dict[str, Any]:
        """Describe the signature for people and programs, as JSON values."""
        columns = None
        if self.columns is not None:
            columns = [{"name": c.name, "type": c.kind, "nullable": c.nullable} for c in self.columns]
        described: dict[str, Any] = {"layout": self.layout, "columns": columns, "form": self.example()}
        if self.layout == "tensor":
            described |= {"shape": list(self.shape), "type": kind_of(self.precision)}
        return described

    # --- rows as lists, in column order

    def _in_column_order(self, data: list[Any]) -> list[list[Any]]:
        """Return rows as lists or tuples of the right width, whichever way the caller wrote them."""
        kind = type(data[0])
        if kind is dict:
            return self._from_objects(data)
        if kind is not list:
            raise BadRows(
                f"data is a list of {_json_name(data[0], plural=True)}; this model takes a list of rows, so one "
                f"row is written with two brackets: {self.example()}"
            )
        width = len(self.columns) if self.columns is not None else len(data[0])
        if width == 0:
            raise BadRows("row 0 has no values")
        if set(map(type, data)) != {list} or set(map(len, data)) != {width}:
            raise _bad(self._wrong_rows(data, width))
        return data

    def _wrong_rows(self, data: list[Any], width: int) -> Iterable[dict[str, Any]]:
        for at, row in enumerate(data):
            if type(row) is not list:
                yield {"row": at, "detail": f"{_json_name(row)}; expected a list of {width} values, as row 0"}
            elif len(row) != width:
                yield {"row": at, "detail": f"{len(row)} values; expected {width}"}

    def _from_objects(self, data: list[Any]) -> list[Any]:
        if self.columns is None or any(c.name is None for c in self.columns):
            raise BadRows(f"this model was fitted without column names; send each row as a list: {self.example()}")
        names = [c.name for c in self.columns]
        if set(map(type, data)) == {dict} and set(map(len, data)) == {len(names)}:
            pick = itemgetter(*names)
            try:
                return [pick(row) for row in data] if len(names) > 1 else [[pick(row)] for row in data]
            except KeyError:
                pass
        raise _bad(self._wrong_objects(data, names))

    def _wrong_objects(self, data: list[Any], names: list[str | None]) -> Iterable[dict[str, Any]]:
        for at, row in enumerate(data):
            if type(row) is not dict:
                yield {"row": at, "detail": f"{_json_name(row)}; expected an object, as row 0"}
                continue
            yield from ({"row": at, "column": name, "detail": "missing"} for name in names if name not in row)
            yield from (
                {"row": at, "column": name[:80], "detail": "not a column of this model"}
                for name in row
                if name not in names
            )

    # --- values

    @cached_property
    def _all_floats(self) -> bool:
        return self.columns is None or (self.layout != "records" and all(c.dtype == "float64" for c in self.columns))

    def _check_numbers(self, rows: list[Any]) -> None:
        kinds = set(map(type, itertools.chain.from_iterable(rows)))
        if not kinds <= {int, float} and not (
            kinds <= {int, float, type(None)} and self.columns and all(c.nullable for c in self.columns)
        ):
            self._check_values(rows)

    def _frame(self, numbers: Any) -> Any:
        import pandas as pd

        return pd.DataFrame(numbers, columns=[c.name for c in self.columns or ()])

    def _mixed(self, rows: list[Any]) -> Any:
        assert self.columns is not None  # a model that does not tell its columns takes numbers
        if kind_of(self.precision) != "number":  # all columns are of this type
            return _numpy(rows, self.precision)
        by_column = [
            [c.missing if value is None else value for value in values]
            for c, values in zip(self.columns, zip(*rows, strict=True), strict=True)
        ]
        if self.layout == "frame":
            import pandas as pd

            series = {c.name: _series(values, c) for c, values in zip(self.columns, by_column, strict=True)}
            return pd.DataFrame(series)
        if all(c.dtype in ("float64", "int64") for c in self.columns):
            whole = all(map(_are_whole, by_column))
            return np.column_stack(
                [_numbers(values, c, whole) for c, values in zip(self.columns, by_column, strict=True)]
            )
        array = np.empty((len(rows), len(by_column)), dtype=object)
        for at, values in enumerate(by_column):
            array[:, at] = values
        return array

    def _records(self, rows: list[Any]) -> Any:
        assert self.columns is not None
        types = [(str(c.name), object if c.dtype == "str" else c.dtype) for c in self.columns]
        array = np.empty(len(rows), dtype=types)
        for column, values in zip(self.columns, zip(*rows, strict=True), strict=True):
            array[column.name] = _numpy(values, column.dtype)  # None becomes NaN
        return array

    def _check_values(self, rows: list[Any]) -> None:
        """Check the type of each value; the rows have the right width."""
        columns = self.columns or tuple(Column(None) for _ in rows[0])
        for column, values in zip(columns, zip(*rows, strict=True), strict=True):
            kinds = set(map(type, values))
            if not kinds <= ACCEPTED[column.kind] | ({type(None)} if column.nullable else set()):
                raise _bad(self._wrong_values(rows, columns))

    def _wrong_values(self, rows: list[Any], columns: tuple[Column, ...]) -> Iterable[dict[str, Any]]:
        for at, row in enumerate(rows):
            for index, (column, value) in enumerate(zip(columns, row, strict=True)):
                if type(value) in ACCEPTED[column.kind] or (value is None and column.nullable):
                    continue
                where = {"row": at, "column": index if column.name is None else column.name}
                if value is None:
                    yield where | {"detail": "null; this model does not take a missing value here"}
                else:
                    yield where | {"detail": f"{_json_name(value)}; expected {_EXPECTED[column.kind]}"}

    # --- rows as an array

    @cached_property
    def width_in_floats(self) -> int:
        """How many columns an array of float64 has that means the same as rows of JSON numbers; 0 where none does."""
        return len(self.columns) if self.columns and self.layout in ("array", "frame") and self._all_floats else 0

    def _check_array(self, array: Any) -> Any:
        kind = kind_of(self.precision)
        plain = self.layout in ("tensor", "numbers") or (self.layout in ("array", "frame") and self._all_floats)
        if kind not in ("number", "integer") or not (plain or (self.layout == "array" and kind == "integer")):
            raise BadRows(f"this model does not take an array of numbers; send rows as JSON: {self.example()}")
        if array.ndim == 0 or len(array) == 0:
            raise BadRows("the array has no rows")
        if self.layout == "tensor":
            wanted: tuple[int | None, ...] = self.shape
        elif self.layout == "numbers":
            wanted = ()
        else:
            wanted = (len(self.columns) if self.columns is not None else None,)
        found = array.shape[1:]
        if len(found) != len(wanted) or 0 in found or _filled(wanted, found) != found:
            shape = ", ".join(["rows", *("any" if size is None else str(size) for size in wanted)])
            raise BadRows(f"the array has the shape {array.shape}; expected ({shape})")
        if array.dtype.kind not in ("iu" if kind == "integer" else "iuf"):
            raise BadRows(f"the array holds {array.dtype.name}; expected numbers that become {self.precision}")
        with np.errstate(over="ignore"):
            numbers = np.ascontiguousarray(array, dtype=self.precision)
        for what, is_wrong in ("an infinity", np.isinf), ("NaN or null, a missing value", np.isnan):
            if numbers.dtype.kind == "f" and (wrong := self._wrong_cells(is_wrong(numbers), what)):
                raise wrong
        return numbers

    def _wrong_cells(self, mask: Any, what: str) -> BadRows | None:
        """Make the error for cells that hold what they must not, unless it is a NaN where one is taken."""
        if what.startswith("NaN") and self.columns and mask.ndim == 2:
            mask &= [not c.nullable for c in self.columns]
        if not mask.any():
            return None
        return _bad(
            {"row": int(at[0]), **self._named(at[1:]), "detail": f"{what}; expected a finite number"}
            for at in np.argwhere(mask)[: MAX_ERRORS + 1]
        )

    def _named(self, at: Any) -> dict[str, Any]:
        if len(at) != 1:
            return {}
        name = self.columns[at[0]].name if self.columns else None
        return {"column": int(at[0]) if name is None else name}

    # --- rows as nested lists

    def _tensor(self, data: list[Any]) -> Any:
        values = data
        sizes: list[int] = []
        for size in self.shape:  # open one level of lists after the other
            lengths = set(map(len, values)) if set(map(type, values)) == {list} else set()
            if len(lengths) != 1 or size not in (None, *lengths) or 0 in lengths:
                raise _bad(self._wrong_tensors(data))
            sizes += lengths
            values = list(itertools.chain.from_iterable(values))
        if not set(map(type, values)) <= ACCEPTED[kind_of(self.precision)]:
            raise _bad(self._wrong_tensors(data))
        return _numpy(values, self.precision).reshape(len(data), *sizes)

    def _wrong_tensors(self, data: list[Any]) -> Iterable[dict[str, Any]]:
        kind, wanted = kind_of(self.precision), self.shape
        for at, row in enumerate(data):
            found = _shape(row)
            if found is None:
                yield {"row": at, "detail": "the lists in it differ in length or depth"}
            elif 0 in found or len(found) != len(wanted) or _filled(wanted, found) != found:
                yield {"row": at, "detail": f"{_sizes(found)}; expected {_sizes(self.shape)}"}
            else:
                wanted = found  # the rows of a request are alike, where their sizes are open
                for value in _leaves(row, len(found)):
                    if type(value) not in ACCEPTED[kind]:
                        yield {"row": at, "detail": f"holds {_json_name(value)}; expected {_EXPECTED[kind]}"}
                        break

    def _check_scalars(self, data: list[Any]) -> Any:
        kind: Kind = "text" if self.layout == "texts" else "number"
        if not set(map(type, data)) <= ACCEPTED[kind]:
            raise _bad(
                {"row": at, "detail": f"{_json_name(value)}; expected {_EXPECTED[kind]}: data is {self.example()}"}
                for at, value in enumerate(data)
                if type(value) not in ACCEPTED[kind]
            )
        return data


def kind_of(dtype: str) -> Kind:
    """Return what a caller sends for a numpy type."""
    if dtype in ("str", "bool"):
        return "text" if dtype == "str" else "boolean"
    return "integer" if "int" in dtype else "number"


def _numpy(values: Sequence[Any], dtype: str) -> Any:
    if dtype == "str":
        return np.array(values, dtype=object)
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=dtype)
    except OverflowError:
        raise BadRows(f"data holds a whole number that is too large for {_NUMBERS.get(dtype, dtype)}") from None
    if dtype in ("float32", "float16") and np.isinf(array).any():
        raise BadRows(f"data holds a number that is too large for {_NUMBERS[dtype]}, which the model takes")
    return array


_NUMBERS = {f"float{bits}": f"a {bits}-bit float" for bits in (16, 32, 64)}
_SHOWN: dict[Kind, str] = {"number": "0.5", "integer": "1", "text": '"text"', "boolean": "true", "any": "0.5"}


def _nested(value: str, shape: Sequence[int | None]) -> str:
    """Show the first row of a tensor: `[[[0.5, …], …]]`, in full where it is short."""
    for size in reversed(shape):
        value = f"[{', '.join([value] * size)}]" if size and size * len(value) < 60 else f"[{value}, …]"
    return f"[{value}]"


def _shape(row: Any) -> tuple[int, ...] | None:
    """Return the shape of nested lists, or None where they are ragged."""
    level = [row]
    sizes: list[int] = []
    while any(type(value) is list for value in level):
        lengths = {len(value) if type(value) is list else -1 for value in level}
        if len(lengths) > 1:
            return None
        sizes += lengths
        level = list(itertools.chain.from_iterable(level))
    return tuple(sizes)


def _filled(shape: Sequence[int | None], found: Sequence[int]) -> tuple[int, ...]:
    return tuple(f if size is None else size for size, f in zip(shape, found, strict=True))


def _sizes(shape: Sequence[int | None]) -> str:
    if not shape:
        return "a single value"
    return "nested lists of " + " × ".join("any number" if size is None else str(size) for size in shape)


def _leaves(row: Any, depth: int) -> list[Any]:
    values = [row]
    for _ in range(depth):
        values = list(itertools.chain.from_iterable(values))
    return values


def _are_whole(values: list[Any]) -> bool:
    return all(type(value) is int and -(2**63) <= value < 2**63 for value in values)


def _numbers(values: list[Any], column: Column, whole: bool) -> Any:
    """Make an array of a column's numbers. An encoder may tell whole numbers apart whose floats are equal."""
    if whole and column.dtype == "int64":
        return np.array(values, dtype=np.int64)
    if column.dtype == "int64" and any(type(value) is int and abs(value) > 2**53 for value in values):
        raise BadRows(
            f"column {column.name!r}: a whole number beyond 2**53 is not exact beside a missing, fractional or larger "
            "value; send those rows in a request of their own"
        )
    return _numpy(values, "float64")


def _series(values: list[Any], column: Column) -> Any:
    """Make a column of a data frame, of a type that does not hang on the values of one request."""
    import pandas as pd

    if column.dtype in ("float64", "int64"):
        return _numbers(values, column, whole=_are_whole(values))
    if column.dtype == "str" and int(pd.__version__.split(".")[0]) >= 3:
        return pd.Series(values, dtype="str")
    return pd.Series(values, dtype=bool if column.dtype == "bool" and column.missing not in values else object)


def _bad(errors: Iterable[dict[str, Any]]) -> BadRows:
    """Make the error from the first places and sum them up in one sentence."""
    places = list(itertools.islice(errors, MAX_ERRORS + 1))
    first = places[0]
    where = f"row {first['row']}" + (f", column {first['column']!r}" if "column" in first else "")
    more = {1: "", MAX_ERRORS + 1: f" (and more; the first {MAX_ERRORS} are listed)"}.get(
        len(places), f" (and {len(places) - 1} more)"
    )
    return BadRows(f"{where[:200]}: {first['detail']}{more}", places[:MAX_ERRORS])


def _json_name(value: Any, plural: bool = False) -> str:
    name = _JSON_NAMES.get(type(value), "a value")
    if not plural:
        return name
    return {"an object": "objects", "a list": "lists", "null": "nulls", "true or false": "true or false"}.get(
        name, name[2:] + "s"
    )
