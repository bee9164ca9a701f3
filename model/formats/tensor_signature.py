"""What models of tensor libraries take: rows that are nested lists, or columns that each have a type of their own."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..columns import FORMS, Kind, json_name, to_array
from ..signature import BadRows, Signature, bad_rows, matches


def kind_of(dtype: str) -> Kind:
    """Return what a caller sends for a numpy type."""
    if dtype in ("object", "bool"):
        return "text" if dtype == "object" else "boolean"
    return "integer" if "int" in dtype else "number"


@dataclass(frozen=True)
class TypedSignature(Signature):
    """Takes an array `(n_rows, n_columns)` of a numpy type, such as int64."""

    def _validate_array(self, array: Any) -> Any:
        if kind_of(self.precision) in ("text", "boolean"):
            raise BadRows(f"this model does not take an array of numbers; send rows as JSON: {self.example()}")
        if kind_of(self.precision) == "integer" and array.dtype.kind not in "iu":
            raise BadRows(f"the array holds {array.dtype.name}; expected numbers that become {self.precision}")
        return super()._validate_array(array)


@dataclass(frozen=True)
class RecordSignature(Signature):
    """Takes a numpy structured array `(n_rows,)` with a field for each column, of any numpy type, such as float32."""

    is_one_array = False  # a property there

    def assemble(self, parts: Sequence[Any]) -> Any:
        """Make what `predict` takes of rows with equal keys. Raises: BadRows, a number does not fit its column."""
        rows, columns = super().assemble(parts), self.columns or ()
        array = np.empty(len(rows), dtype=[(str(c.name), c.dtype) for c in columns])
        for column, values in zip(columns, zip(*rows, strict=True), strict=True):
            array[column.name] = to_array(values, column.dtype)  # null becomes NaN
        return array


@dataclass(frozen=True)
class TensorSignature(TypedSignature):
    """Takes an array `(n_rows, *shape)`, such as images; the rows are nested lists."""

    shape: tuple[int | None, ...] = ()  # of a row; None is a size that may differ between requests

    def example(self) -> str:
        """Show the form of `data` with one row, as JSON."""
        value = FORMS[kind_of(self.precision)].example
        for size in reversed(self.shape):  # a list is shown in full if it is short, else as its first value
            value = f"[{', '.join([value] * size)}]" if size and size * len(value) < 60 else f"[{value}, …]"
        return f"[{value}]"

    def describe(self) -> dict[str, Any]:
        """Describe the signature for people and programs, as JSON values."""
        return super().describe() | {"shape": list(self.shape), "type": kind_of(self.precision)}

    def synthetic_rows(self, n_rows: int) -> Iterable[list[Any]]:
        """Yield rows to try. Of sizes that are open, small ones first; an image must be larger than the strides."""
        for number in (0.0, 1.0):
            value = {"text": "text", "boolean": False, "integer": int(number)}.get(kind_of(self.precision), number)
            for size in (1, 28, 32, 64, 224) if None in self.shape else (1,):
                shape = [size if fixed is None else fixed for fixed in self.shape]
                yield [np.full(shape, value, dtype=object).tolist()] * n_rows

    @property
    def row_shape(self) -> tuple[int | None, ...]:
        return self.shape

    def _validate_rows(self, data: list[Any]) -> Any:
        sizes, values, types = _flatten(data)
        if sizes is None or not matches(self.shape, sizes[1:]) or not types <= _accepted(kind_of(self.precision)):
            raise bad_rows(self._wrong_rows(data))
        return to_array(values, self.precision).reshape(sizes)

    def _wrong_rows(self, data: list[Any]) -> Iterable[dict[str, Any]]:
        kind, shape = kind_of(self.precision), self.shape
        for at, row in enumerate(data):
            sizes, values, _ = _flatten(row)
            if sizes is None:
                yield {"row": at, "detail": "the lists in it differ in length or depth"}
            elif not matches(shape, sizes):
                yield {"row": at, "detail": f"{_show_sizes(sizes)}; expected {_show_sizes(shape)}"}
            else:
                shape = sizes  # if sizes are open, the first row sets them for the others
                if wrong := [value for value in values if type(value) not in _accepted(kind)]:
                    yield {"row": at, "detail": f"holds {json_name(wrong[0])}; expected {FORMS[kind].expected}"}


def _accepted(kind: Kind) -> set[type]:
    return {bool} if kind == "boolean" else FORMS[kind].accepted


def _flatten(row: Any) -> tuple[tuple[int, ...] | None, list[Any], set[type]]:
    """Return the sizes of nested lists (None if they are ragged), the values in them, and the types of those."""
    level = [row]
    sizes: list[int] = []
    while list in (types := set(map(type, level))):
        if len(types) > 1 or len(lengths := set(map(len, level))) > 1:
            return None, [], types
        sizes += lengths
        level = list(itertools.chain.from_iterable(level))
    return tuple(sizes), level, types


def _show_sizes(shape: Sequence[int | None]) -> str:
    sizes = " × ".join("any number" if size is None else str(size) for size in shape)
    return f"nested lists of {sizes}" if shape else "a single value"
