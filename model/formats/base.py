"""What models of every tensor library share."""

import importlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from ..signature import Column, Signature, kind_of
from . import UnsupportedModel


class TensorModel:
    """What `model/learning.py` and `model/serving.py` use of a scikit-learn estimator, over another library's model."""

    signature: Signature | None = None  # None where the file does not tell
    sizes_open = False  # rows may have a shape that only the model itself can refuse

    def signatures(self, sample: list[Any] | None) -> Iterable[Signature]:
        """Yield what the model may take, the likeliest first; a single one where the file tells."""
        assert self.signature is not None
        yield self.signature

    def predict(self, rows: Any) -> Any:
        """Return the model's output, `(n_rows, …)`; of several outputs the first."""
        raise NotImplementedError


def of_rows(shape: tuple[int | None, ...], dtype: str, known: dict[str, Any] | None = None) -> Signature:
    """Describe rows of a shape: of named or unnamed columns where that is fixed, else tensors."""
    known = known or {}
    kind = kind_of(dtype)
    if kind in ("number", "text") and (not shape or known.get("layout") == "texts"):
        return Signature("texts" if kind == "text" else "numbers", (), precision=dtype)
    if len(shape) != 1 or shape[0] is None:
        if shape == (None,) and kind == "number":
            return Signature("array", None, precision=dtype)
        return Signature("tensor", (), precision=dtype, shape=shape)
    columns = known.get("columns") or [{"name": None, "nullable": False}] * shape[0]
    if len(columns) != shape[0]:
        raise UnsupportedModel(f"takes {shape[0]} columns, but its metadata name {len(columns)}")
    return Signature(
        "array",
        tuple(Column(c["name"], kind, kind == "number" and bool(c["nullable"])) for c in columns),
        precision=dtype,
    )


def threads() -> int:
    """Return how many threads a predict may use: `OMP_NUM_THREADS`, as gunicorn.conf.py sets it, else 1."""
    found = re.match(r"\d+", os.environ.get("OMP_NUM_THREADS", ""))
    return max(1, int(found[0])) if found else 1


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
        if error.name != name.partition(".")[0]:
            raise
        raise UnsupportedModel(
            f"needs the library {error.name}, which is not installed: pip install -r {requirements}"
        ) from None


def import_torch() -> Any:
    """Import torch, with the number of threads that a worker has."""
    torch = import_library("torch", "requirements/torch.txt")
    if torch.get_num_threads() != threads():
        torch.set_num_threads(threads())
    if torch.get_num_interop_threads() != threads():
        with suppress(RuntimeError):  # work has begun with the old number; few models run operators side by side
            torch.set_num_interop_threads(threads())
    return torch


def first_line(error: Exception) -> str:
    """Sum up a library's exception."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:300]}"


def values_of(tree: Any, key: str) -> Iterator[Any]:
    """Yield every value of a key, however deep, in decoded JSON."""
    left = [tree]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if key in value:
                yield value[key]
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
