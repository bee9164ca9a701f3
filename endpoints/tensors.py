"""Tensors as other protocols send them: a datatype, a shape, and data as JSON or as bytes ↔ numpy arrays.

    from_json("FP32", (2, 1), [0.5, None])    # array([[0.5], [nan]], dtype=float32)
    from_bytes("INT64", (1,), b"\\x03" + bytes(7))    # array([3])

Datatypes and bytes are those of the Open Inference Protocol: numbers little-endian without padding, BOOL one byte,
BYTES (strings here, as UTF-8) each with its length before it, four bytes.
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import itertools
import math
import struct
from typing import Any

import numpy as np
import orjson

from model.signature import BadRows

MAX_DIMENSIONS = 32  # of an array, as in numpy before 2.0
DTYPES = {"BOOL": "bool", "FP16": "float16", "FP32": "float32", "FP64": "float64"} | {
    f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)
}  # and BYTES, an array of objects: strings
DATATYPES = {dtype: datatype for datatype, dtype in DTYPES.items()} | {"object": "BYTES"}
# By the kind of a dtype: which JSON values stand for its elements (None: a missing value), and what they are called.
_ELEMENTS: dict[str, tuple[set[type], str]] = {
    "b": ({bool, type(None)}, "true and false"),
    "i": ({int}, "whole numbers, written without a decimal point"),
    "u": ({int}, "whole numbers, written without a decimal point"),
    "f": ({int, float, type(None)}, "numbers"),
    "O": ({str, type(None)}, "strings"),
}


def datatype_of(array: Any) -> str:
    """Return the datatype of an array."""
    return DATATYPES[array.dtype.name]


# --- what callers send


def read_shape(shape: Any) -> tuple[int, ...]:
    """Read a shape, a JSON value. Raises: BadRows, it is not a list of sizes of at least 1."""
    if type(shape) is not list or not 1 <= len(shape) <= MAX_DIMENSIONS or set(map(type, shape)) != {int}:
        raise BadRows(f"shape is not a list of 1 to {MAX_DIMENSIONS} whole numbers, such as [1, 4]")
    if min(shape) < 1:
        raise BadRows("shape has a size below 1")
    return tuple(shape)


def from_json(datatype: str, shape: tuple[int, ...], data: Any) -> Any:
    """Make an array of elements in JSON: nested lists, or one list, row by row.

    Null is a missing value: NaN among floats, None among strings and booleans. Raises: BadRows.
    """
    dtype = _dtype(datatype)
    if type(data) is not list:
        raise BadRows("data is not a list")
    sizes, values = flatten(data)
    if sizes is None:
        raise BadRows("the lists in data differ in length or depth")
    if sizes not in (shape, (math.prod(shape),)):
        raise BadRows(f"data has the sizes {_show(sizes)}, which is not the shape {_show(shape)}")
    accepted, expected = _ELEMENTS[dtype.kind]
    types = set(map(type, values))
    if not types <= accepted:
        found = next(value for value in values if type(value) not in accepted)
        raise BadRows(f"data holds {_name(found)}; {datatype} has {expected}")
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        if min(values) < bounds.min or max(values) > bounds.max:
            raise BadRows(f"data holds a number that does not fit {datatype}")
    if dtype.kind == "f":
        values = [math.nan if value is None else value for value in values]
        with np.errstate(over="ignore"):
            array = np.array(values, dtype)
        if np.isinf(array).any():
            raise BadRows(f"data holds a number that is too large for {datatype}")
        return array.reshape(shape)
    return np.array(values, object if type(None) in types else dtype).reshape(shape)


def from_bytes(datatype: str, shape: tuple[int, ...], raw: memoryview) -> Any:
    """Make an array of elements in bytes. Raises: BadRows."""
    dtype, count = _dtype(datatype), math.prod(shape)
    if dtype.kind == "O":
        return np.array(_strings(raw, count), object).reshape(shape)
    if len(raw) != count * dtype.itemsize:
        raise BadRows(f"{len(raw)} bytes; the shape {_show(shape)} of {datatype} has {count * dtype.itemsize}")
    if dtype.kind == "b" and raw and max(raw) > 1:
        raise BadRows("a byte of BOOL is neither 0 nor 1")
    # A copy: where the bytes begin they need not be aligned, which native code of models may rely on.
    return np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def _strings(raw: memoryview, count: int) -> list[str]:
    strings, at = [], 0
    try:
        while at < len(raw):
            (length,) = struct.unpack_from("<I", raw, at)
            at += 4 + length
            if at > len(raw):
                raise struct.error
            strings.append(str(raw[at - length : at], "utf-8"))
    except struct.error:
        raise BadRows("the bytes end inside a string, or inside its length") from None
    except UnicodeDecodeError:
        raise BadRows(f"string {len(strings)} is not UTF-8") from None
    if len(strings) != count:
        raise BadRows(f"the bytes hold {len(strings)} strings; the shape has {count}")
    return strings


def flatten(data: list[Any]) -> tuple[tuple[int, ...] | None, list[Any]]:
    """Return the sizes of nested lists, None if they differ in length or depth, and the values in them."""
    sizes, level = [len(data)], data
    while list in (types := set(map(type, level))):
        lengths = set(map(len, level)) if len(types) == 1 else set()
        if len(lengths) != 1 or len(sizes) == MAX_DIMENSIONS:
            return None, level
        sizes += lengths
        level = list(itertools.chain.from_iterable(level))
    return tuple(sizes), level


def _dtype(datatype: str) -> Any:
    if datatype not in DTYPES and datatype != "BYTES":
        raise BadRows(f"unknown datatype {datatype[:20]!r}; there are {', '.join([*DTYPES, 'BYTES'])}")
    return np.dtype(DTYPES.get(datatype, "object"))


def _show(shape: tuple[int, ...]) -> str:
    return str(list(shape))[:100]


def _name(value: Any) -> str:
    names = {bool: "true or false", str: "a string", type(None): "null", dict: "an object", float: "a fraction"}
    return names.get(type(value), "a number")


# --- rows for a model


def to_rows(array: Any) -> Any:
    """Return an array as nested lists of JSON values: what is missing is None. Raises: BadRows, it has an infinity."""
    if array.dtype.kind == "f":
        if np.isinf(array).any():
            raise BadRows("an infinity; expected a finite number")
        missing = np.isnan(array)
        if missing.any():
            array = array.astype(object)
            array[missing] = None
    return array.tolist()


# --- what a model answers


def from_prediction(prediction: Any) -> Any:
    """Make an array of the entries that `model.answers.to_json` returned, one for each row.

    Without exception: numbers and booleans stay what they are, beside missing values as float64 if that is exact;
    strings, and else the JSON of each entry, are an array of objects, in which None is a missing value. Raises:
    TypeError, an entry has no form in JSON.
    """
    if isinstance(prediction, np.ndarray):
        return prediction
    values = [each.tolist() if isinstance(each, np.ndarray) else each for each in prediction]
    sizes, leaves = flatten(values)
    types = set(map(type, leaves))
    if sizes is None or not types <= {bool, int, float, str, type(None)}:
        sizes, leaves, types = (len(values),), values, {dict}
    dtype = _dtype_for(leaves, types)
    if dtype == "object" and not types <= {str, type(None)}:
        leaves = [each if each is None or type(each) is str else _as_json(each) for each in leaves]
    return np.array(leaves, dtype).reshape(sizes)  # None becomes NaN among floats


def _dtype_for(values: list[Any], types: set[type]) -> str:
    if types == {bool}:
        return "bool"
    if types == {int}:
        return next((name for name in ("int64", "uint64") if _fits(values, np.iinfo(name))), "object")
    exact = all(abs(value) <= 2**53 for value in values if type(value) is int)
    return "float64" if types <= {int, float, type(None)} and exact else "object"


def _fits(values: list[int], bounds: Any) -> bool:
    return bool(bounds.min <= min(values) and max(values) <= bounds.max)


def _as_json(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()


def best_classes(array: Any, count: int, labels: Any) -> Any:
    """Return `(n_rows, count)` strings `value:index` or `value:index:label`, the largest value of a row first.

    Of fewer classes than `count` all are listed, and NaN is last.
    https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md

    Raises: BadRows, the array does not have a number for each class.
    """
    if array.ndim != 2 or array.dtype.kind not in "iuf":
        raise BadRows("classification: this output does not have a number for each class")
    names = [f":{label}" for label in labels] if labels and len(labels) == array.shape[1] else [""] * array.shape[1]
    order = np.argsort(-array.astype("float64"), axis=1, kind="stable")[:, :count]
    rows = [[f"{row[at]!s}:{at}{names[at]}" for at in best] for row, best in zip(array, order, strict=True)]
    return np.array(rows, object)


def json_data(array: Any) -> Any:
    """Return the elements as `web.errors.json_response` encodes them: one list, row by row."""
    return array.ravel().tolist() if array.dtype.kind == "O" else np.ascontiguousarray(array).ravel()


def to_bytes(array: Any) -> bytes | None:
    """Return the elements as bytes, or None if one is a missing string, which has none.

    Raises: UnicodeEncodeError, half a surrogate pair.
    """
    if array.dtype.kind != "O":
        return bytes(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    values = array.ravel().tolist()
    if None in values:
        return None
    encoded = [value.encode() for value in values]
    return b"".join(struct.pack("<I", len(each)) + each for each in encoded)
