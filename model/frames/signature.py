"""What models take whose columns differ: rows of JSON values → a data frame, or an array of more than one type."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..columns import to_array
from ..signature import Signature, bad_rows
from .columns import MAX_SINGLE, TOO_LARGE, FrameColumn, are_whole, context, to_numbers, to_series


@dataclass(frozen=True)
class FrameSignature(Signature):
    """Takes a pandas data frame, or with the layout "array" a 2-D array, of objects if a column does not hold numbers.

    >>> signature = FrameSignature("frame", (FrameColumn("size"), FrameColumn("color", "text")))
    >>> signature.parse([[0.5, "red"]])
       size color
    0   0.5   red
    """

    columns: tuple[FrameColumn, ...]
    blanks_replaced: bool = False  # by underscores in the names, as LightGBM does; callers may write either

    def batch_key(self, rows: Any) -> Hashable:
        """Return a key for rows that `validate` returned: those with equal keys can be assembled together."""
        if isinstance(rows, np.ndarray) or not self._contextual:
            return super().batch_key(rows)
        return tuple(context([row[at] for row in rows], self.columns[at]) for at in self._contextual)

    def assemble(self, parts: Sequence[Any]) -> Any:
        """Make what `predict` takes of rows with equal keys. Raises: BadRows, a number does not fit its column."""
        array = super().assemble(parts)
        if not isinstance(array, np.ndarray):
            return self._assemble_columns(array)
        if self.layout != "frame":
            return array
        import pandas as pd

        return pd.DataFrame(array, columns=[c.name for c in self.columns])

    def warnings(self) -> list[str]:
        """Return what an operator should know: columns that may hold something else than they seem to."""
        names: dict[str, list[str]] = {}
        for at, column in enumerate(self.columns):
            if column.doubt:
                names.setdefault(column.doubt, []).append(str(column.place(at)))
        return [doubt.format(", ".join(columns)) for doubt, columns in names.items()]

    @cached_property
    def is_one_array(self) -> bool:
        """Whether all values go into one array of the signature's precision."""
        return all(c.dtype == "float64" for c in self.columns)

    @cached_property
    def _contextual(self) -> list[int]:
        """The columns of which the model gets another type for other values of a call: see `context`."""
        return [at for at, c in enumerate(self.columns) if context([], c) is not None]

    def _adapt(self, row: Any) -> Any:
        if self.blanks_replaced and type(row) is dict:
            replaced = {name.replace(" ", "_"): value for name, value in row.items()}
            row = replaced if len(replaced) == len(row) else row
        return super()._adapt(row)

    def _convert(self, rows: list[Any]) -> list[Any]:
        rows = super()._convert(rows)
        for at in [at for at, column in enumerate(self.columns) if column.dtype == "date"]:
            if len({row[at].utcoffset() for row in rows if row[at] is not None}) > 1:
                place, detail = self.columns[at].place(at), "dates with different offsets in one request"
                raise bad_rows([{"row": 0, "column": place, "detail": detail}])
        return rows

    def _assemble_columns(self, rows: list[Any]) -> Any:
        """Make a data frame or an array whose columns differ in type."""
        columns = [
            (c, [c.missing if value is None else value for value in values])
            for c, values in zip(self.columns, zip(*rows, strict=True), strict=True)
        ]
        if self.layout == "frame":
            import pandas as pd

            return pd.DataFrame({column.name: to_series(values, column) for column, values in columns})
        if all(c.dtype in ("float64", "float32", "float16", "int64") for c in self.columns):
            whole = all(are_whole(values) for _, values in columns)
            return np.column_stack([to_numbers(values, c.name, c.dtype, whole) for c, values in columns])
        if len(narrow := {c.dtype for c in self.columns} - {"float64"}) == 1 and narrow <= {"float32", "float16"}:
            return np.column_stack([to_array(values, *narrow) for _, values in columns])  # an array has one type
        by_column = [
            to_array(values, c.dtype) if c.dtype in ("float32", "float16") else values for c, values in columns
        ]
        return np.array(by_column, dtype=object).T

    def _validate_array(self, array: Any) -> Any:
        rows = super()._validate_array(array)
        for at, column in enumerate(self.columns) if self.is_one_array else ():
            if column.single:
                self._reject(np.abs(rows[:, at]) >= MAX_SINGLE, at, TOO_LARGE)
        return rows
