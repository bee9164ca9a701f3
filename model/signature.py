"""JSON rows → what a model was fitted on, or an error that says what is wrong with them."""

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from .columns import FORMS, NOT_BOOLEAN, BadRows, Column, Kind, json_name, to_array

__all__ = ["BadRows", "Column", "Signature", "bad_rows", "matches"]

Layout = Literal["array", "frame", "texts", "numbers", "records", "tensor"]

MAX_ERRORS = 20  # listed for one request; callers fix the first few and try again


@dataclass(frozen=True)
class Signature:
    """What a model takes, and the way from rows of JSON values to that.

    >>> signature = Signature("array", (Column("height"), Column("width", nullable=True)))
    >>> signature.parse([[0.5, None], [1.5, 2]])
    array([[0.5, nan],
           [1.5, 2. ]])
    >>> signature.parse([{"width": 2, "height": "tall"}])
    Traceback (most recent call last):
    model.columns.BadRows: row 0, column 'height': a string; expected a number

    Layouts: "array" a 2-D array of numbers, `(n_rows, n_columns)`; "texts" and "numbers" a list of `n_rows` scalars.
    `columns` is None if the model does not show how many it takes, and empty if rows have no columns. Those of other
    layouts are subclasses: "frame", a pandas data frame, in `frames/`; the others in `formats/tensor_signature.py`.
    """

    layout: Layout
    columns: tuple[Column, ...] | None
    precision: str = "float64"  # of an array; some models take only the float32 they were fitted on
    ignores_extra: bool = False  # members of a row that are not columns

    def parse(self, data: Any) -> Any:
        """Turn the decoded JSON value of `data` into what the model's `predict` takes. Raises: as `validate`."""
        return self.assemble([self.validate(data)])

    def validate(self, data: Any) -> Any:
        """Return the rows of a decoded JSON value or an array of numbers `(n_rows, …)`. Raises: BadRows."""
        if isinstance(data, np.ndarray):
            return self._validate_array(data)
        if type(data) is not list:
            raise BadRows(f"data is {json_name(data)}; expected a list of rows, {self.example()}")
        if not data:
            raise BadRows("data has no rows")
        return self._validate_rows(data)

    def batch_key(self, rows: Any) -> Hashable:
        """Return a key for rows that `validate` returned: those with equal keys can be assembled together."""
        if isinstance(rows, np.ndarray):
            return tuple(rows.shape[1:])
        return len(rows[0]) if self.columns is None else None

    def assemble(self, parts: Sequence[Any]) -> Any:
        """Make what `predict` takes of rows with equal keys. Raises: BadRows, a number does not fit its column."""
        if isinstance(parts[0], np.ndarray):
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        rows = parts[0] if len(parts) == 1 else list(itertools.chain.from_iterable(parts))
        return to_array(rows, self.precision) if self.is_one_array else rows  # null becomes NaN

    def example(self) -> str:
        """Show the form of `data` with one row, as JSON."""
        if self.layout == "texts":
            return '["some text"]'
        if self.layout == "numbers":
            return "[0.5]"
        if self.columns is None or len(self.columns) > 8:
            return "[[1.0, 2.0, …]]" + (f" with {len(self.columns)} values each" if self.columns else "")
        return "[[" + ", ".join(c.json_example() for c in self.columns) + "]]"

    def describe(self) -> dict[str, Any]:
        """Describe the signature for people and programs, as JSON values."""
        columns = None if self.columns is None else [c.describe() for c in self.columns]
        return {"layout": self.layout, "columns": columns, "form": self.example()}

    def warnings(self) -> list[str]:
        """Return what an operator should know: columns that may hold something else than they seem to."""
        return []

    @property
    def is_one_array(self) -> bool:
        """Whether all values go into one array of the signature's precision."""
        return self.layout != "texts"

    @property
    def row_shape(self) -> tuple[int | None, ...]:
        """The shape of a row in an array; None is a size that may differ between requests."""
        if self.layout in ("texts", "numbers"):
            return ()
        return (len(self.columns) if self.columns is not None else None,)

    # --- rows of columns, as lists or objects

    def _validate_rows(self, data: list[Any]) -> Any:
        """Return a non-empty list of rows in column order, if their values fit the model."""
        if self.layout in ("texts", "numbers"):
            return self._validate_scalars(data)
        rows = data
        if type(data[0]) is dict:
            rows = self._rows_from_objects(data)
        elif set(map(type, data)) != {list} or set(map(len, data)) != {len(self.columns or data[0])} or not data[0]:
            raise bad_rows(self._wrong_lists(data))
        common = self._accepted_by_all
        if not common or not set(map(type, itertools.chain.from_iterable(rows))) <= common:
            self._check_each_column(rows)
        rows = self._convert(rows) if self._converted else rows
        if self.precision == "float32" and self.is_one_array:
            return to_array(rows, self.precision)  # before others' rows are with them, since it may raise
        return rows

    def _wrong_lists(self, data: list[Any]) -> Iterator[dict[str, Any]]:
        """Yield the rows that are not lists of the right width. Raises: BadRows, the first one is not a row at all."""
        if type(data[0]) is not list:
            form = f"this model takes a list of rows, so one row is written with two brackets: {self.example()}"
            raise BadRows(f"data[0] is {json_name(data[0])}; {form}")
        width = len(self.columns or data[0])
        if width == 0:
            raise BadRows("row 0 has no values")
        for at, row in enumerate(data):
            if type(row) is not list:
                yield {"row": at, "detail": f"{json_name(row)}; expected a list of {width} values, as row 0"}
            elif len(row) != width:
                yield {"row": at, "detail": f"{len(row)} values; expected {width}"}

    def _rows_from_objects(self, data: list[Any]) -> list[Any]:
        names = [c.name for c in self.columns or ()]
        if not names or None in names:
            raise BadRows(f"this model was fitted without column names; send each row as a list: {self.example()}")
        if set(map(type, data)) == {dict} and set(map(len, data)) == {len(names)}:
            pick = itemgetter(*names)
            with suppress(KeyError):
                return [pick(row) for row in data] if len(names) > 1 else [[pick(row)] for row in data]
        adapted = [self._adapt(row) for row in data]
        if adapted != data:
            return self._rows_from_objects(adapted)
        raise bad_rows(self._wrong_objects(data))

    def _adapt(self, row: Any) -> Any:
        """Return a row with its optional columns added and, if they are ignored, its extra keys removed."""
        if type(row) is not dict or self.columns is None:
            return row
        row = {c.name: None for c in self.columns if c.optional} | row
        if self.ignores_extra:
            names = {c.name for c in self.columns}
            row = {name: value for name, value in row.items() if name in names}
        return row

    def _wrong_objects(self, data: list[Any]) -> Iterable[dict[str, Any]]:
        columns = {c.name: c for c in self.columns or ()}
        for at, row in enumerate(data):
            if type(row) is not dict:
                yield {"row": at, "detail": f"{json_name(row)}; expected an object, as row 0"}
                continue
            for name in [name for name in columns if name not in row]:
                missing = "missing; write null for a value that is not known" if columns[name].nullable else "missing"
                yield {"row": at, "column": name, "detail": missing}
            for name in [name for name in row if name not in columns]:
                yield {"row": at, "column": name[:80], "detail": "not a column of this model"}

    def _check_each_column(self, rows: list[Any]) -> None:
        columns = self.columns or [Column(None)] * len(rows[0])
        for column, values in zip(columns, zip(*rows, strict=True), strict=True):
            if not set(map(type, values)) <= column.accepted:
                raise bad_rows(_wrong_values(rows, columns))

    @cached_property
    def _accepted_by_all(self) -> set[type]:
        return set.intersection(*(c.accepted for c in self.columns or [Column(None)]))

    @cached_property
    def _converted(self) -> list[int]:
        """The columns whose JSON values are not yet what the model gets."""
        return [at for at, c in enumerate(self.columns or ()) if c.convert is not None]

    def _convert(self, rows: list[Any]) -> list[Any]:
        """Return the rows with the values of those columns converted. Raises: BadRows."""
        by_column: list[Sequence[Any]] = list(zip(*rows, strict=True))
        errors: list[dict[str, Any]] = []
        for at in self._converted:
            column, converted = self.columns[at], []  # type: ignore[index]  # there are columns then
            place = column.place(at)
            for row, value in enumerate(by_column[at]):
                try:
                    converted.append(None if value is None else column.convert(value))  # type: ignore[misc]  # is not None
                except BadRows as error:
                    errors.append({"row": row, "column": place, "detail": error.detail})
            by_column[at] = converted
        if errors:
            raise bad_rows(sorted(errors, key=itemgetter("row")))
        return list(zip(*by_column, strict=True))

    # --- rows that are scalars, or an array

    def _validate_scalars(self, data: list[Any]) -> Any:
        kind: Kind = "text" if self.layout == "texts" else "number"
        if not set(map(type, data)) <= FORMS[kind].accepted:
            raise bad_rows(
                {"row": at, "detail": f"{json_name(value)}; expected {FORMS[kind].expected}: data is {self.example()}"}
                for at, value in enumerate(data)
                if type(value) not in FORMS[kind].accepted
            )
        return data

    def _validate_array(self, array: Any) -> Any:
        if self.layout == "texts" or not all(c.accepted & {int, float} for c in self.columns or ()):
            raise BadRows(f"this model does not take an array of numbers; send rows as JSON: {self.example()}")
        shape = self.row_shape
        if not matches((None, *shape), array.shape):
            expected = ", ".join(["rows", *("any" if size is None else str(size) for size in shape)])
            raise BadRows(f"the array has the shape {array.shape}; expected ({expected})")
        if array.dtype.kind not in "iuf":
            raise BadRows(f"the array holds {array.dtype.name}; expected numbers that become {self.precision}")
        if not self.is_one_array:
            self._check_finite(array)
            return self._validate_rows(np.where(np.isnan(array), np.array(None), array).tolist())
        if np.dtype(self.precision).kind in "iu":
            bounds = np.iinfo(self.precision)
            if array.min() < bounds.min or array.max() > bounds.max:
                raise BadRows(f"the array holds a number that does not fit {self.precision}, which the model takes")
        with np.errstate(over="ignore"):
            numbers = np.ascontiguousarray(array, dtype=self.precision)
        self._check_finite(numbers)
        for at, column in enumerate(self.columns or ()):
            if column.kind == "boolean":
                self._reject(~(np.isin(numbers[:, at], (0, 1)) | np.isnan(numbers[:, at])), at, NOT_BOOLEAN)
        return numbers

    def _reject(self, wrong: Any, at: int, why: str) -> None:
        """Reject the rows of an array whose value in a column is marked as wrong, if any are."""
        if wrong.any():
            place = (self.columns or ())[at].place(at)
            raise bad_rows({"row": row, "column": place, "detail": why} for row in np.flatnonzero(wrong).tolist())

    def _check_finite(self, numbers: Any) -> None:
        """Reject infinities, and NaN unless the column may be missing."""
        wrong = ~np.isfinite(numbers)
        if not wrong.any():
            return
        if self.columns:
            wrong &= ~np.isnan(numbers) | [not c.nullable for c in self.columns]
        errors: list[dict[str, Any]] = []
        for row, *indices in np.argwhere(wrong)[: MAX_ERRORS + 1].tolist():
            what = "NaN, a missing value" if np.isnan(numbers[(row, *indices)]) else "an infinity"
            errors.append({"row": row, "detail": f"{what}; expected a finite number"})
            if len(indices) == 1:
                errors[-1]["column"] = self.columns[indices[0]].place(indices[0]) if self.columns else indices[0]
        if errors:
            raise bad_rows(errors)


def matches(shape: Sequence[int | None], sizes: Sequence[int]) -> bool:
    """Return whether rows of these sizes, all above 0, have the shape."""
    pairs = zip(shape, sizes, strict=False)
    return len(shape) == len(sizes) and 0 not in sizes and all(wanted in (None, found) for wanted, found in pairs)


# --- error messages


def bad_rows(errors: Iterable[dict[str, Any]]) -> BadRows:
    """Make the error from the first places, with one sentence that sums them up."""
    places = list(itertools.islice(errors, MAX_ERRORS + 1))
    first, others = places[0], len(places) - 1
    where = f"row {first['row']}" + (f", column {first['column']!r}" if "column" in first else "")
    more = f" (and {others} more)" if others else ""
    if others == MAX_ERRORS:
        more = f" (and more; the first {MAX_ERRORS} are listed)"
    return BadRows(f"{where[:200]}: {first['detail']}{more}", places[:MAX_ERRORS])


def _wrong_values(rows: list[Any], columns: Sequence[Column]) -> Iterable[dict[str, Any]]:
    for at, row in enumerate(rows):
        for index, (column, value) in enumerate(zip(columns, row, strict=True)):
            if type(value) in column.accepted:
                continue
            detail = f"{json_name(value)}; expected {column.expected}"
            if value is None:
                detail = "null; this model does not take a missing value here"
            yield {"row": at, "column": column.place(index), "detail": detail}
