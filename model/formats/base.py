"""What the loaders of ONNX, PyTorch and Keras share."""

import importlib
from collections.abc import Sequence
from typing import Any

from ..columns import Kind
from ..signature import Column, Signature
from . import UnsupportedModel
from .tensor_signature import TensorSignature, TypedSignature, kind_of


class TensorModel:
    """A model of another library, with the methods of a scikit-learn estimator that the server uses."""

    signature: Signature  # only if the file records it
    example: Any = None  # a row that it answers, if the file records one
    sizes_open = True  # whether rows may have a shape that only the model itself can reject

    def signatures(self, sample: list[Any] | None) -> Sequence[Signature]:
        """Return what the model may take, the likeliest first; only one if the file records it."""
        return [self.signature]


def signature_of(shape: Sequence[Any], dtype: str, fix: str = "", known: dict[str, Any] | None = None) -> Signature:
    """Return the signature of an input's rows: columns, named or not, if their number is fixed, else tensors.

    Args:
        shape: of the input, `(n_rows, …)`; a size that is open is not an int.
        dtype: numpy's name for the type of its elements; strings are objects.
        fix: what to do if the number of rows is fixed.
        known: the metadata that `python -m model export` leaves in a file.

    Raises: UnsupportedModel, the number of rows is fixed, or the metadata names another number of columns.
    """
    if not shape:
        raise UnsupportedModel("takes a single value, not rows")
    if isinstance(shape[0], int):
        raise UnsupportedModel(f"takes exactly {shape[0]} row(s) at a time{fix}")
    known = known or {}
    row = tuple(size if isinstance(size, int) else None for size in shape[1:])
    kind = kind_of(dtype)
    if kind in ("number", "text") and (not row or known.get("layout") == "texts"):
        return Signature("texts" if kind == "text" else "numbers", (), precision=dtype)
    if row == (None,) and kind == "number":
        return Signature("array", None, precision=dtype)
    if len(row) != 1 or row[0] is None:
        return TensorSignature("tensor", (), precision=dtype, shape=row)
    named = known.get("columns") or [{"name": None, "nullable": False}] * row[0]
    if len(named) != row[0]:
        raise UnsupportedModel(f"takes {row[0]} columns, but its metadata names {len(named)}")
    kinds: list[Kind] = ["boolean" if kind == "number" and c.get("type") == "boolean" else kind for c in named]
    nullable = [kind == "number" and bool(c["nullable"]) for c in named]
    columns = tuple(
        Column(c["name"], each, missing, dtype="float64" if each == "boolean" and kind == "number" else "")
        for c, each, missing in zip(named, kinds, nullable, strict=True)
    )
    return (Signature if kind == "number" else TypedSignature)("array", columns, precision=dtype)


def first(result: Any) -> Any:
    """Return the first of several outputs."""
    while isinstance(result, (tuple, list, dict)):
        result = next(iter(result.values() if isinstance(result, dict) else result))
    return result


def import_library(name: str, requirements: str) -> Any:
    """Import a library. Raises: UnsupportedModel, which names the requirements that install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        why = f"needs the library {error.name}, which is not installed: pip install -r {requirements}"
        raise UnsupportedModel(why) from None


def first_line(error: Exception) -> str:
    """Return the type of an exception and the first line of its message."""
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message[:300]}"
