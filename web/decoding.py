"""A request's bytes → rows: strict JSON, or an array in numpy's format. Nothing else turns bytes into rows."""

import io
import json
import math
import re
from collections.abc import Sequence
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np
import numpy.lib.format as npy
import orjson
from werkzeug.exceptions import BadRequest, UnprocessableEntity


class Unprocessable(UnprocessableEntity):
    """422: JSON, but not of the right form; `errors` says where, as in `model.BadRows`."""

    def __init__(self, detail: str, errors: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(detail)
        self.errors = errors


def parse_call(body: bytes, max_rows: int, width: int = 0) -> tuple[Any, str]:
    """Decode a request's body to its `data` and `method`.

    Args:
        body: JSON.
        max_rows: that `data` may have.
        width: if not 0, large `data` of rows of so many numbers or nulls may come as a float64 array of them.

    Raises:
        BadRequest: not JSON.
        Unprocessable: JSON of another form.
    """
    form = 'send {"data": [[…], …]}'
    if not body:
        raise BadRequest(f"the body is empty; {form}")
    if width and len(body) > PIECE_OF_ROWS and (found := _parse_in_pieces(body, max_rows, width)):
        return found
    try:
        call = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(_explain_json(body, error)) from None
    if type(call) is not dict:
        raise Unprocessable(f"the body is not an object; {form}")
    data = call.get("data")
    if isinstance(data, list) and len(data) > max_rows:
        raise Unprocessable(f"data has {len(data)} rows; this server takes {max_rows} in one request")
    if _has_duplicate_key(body, call):
        raise Unprocessable("an object has the same key twice, so it is not clear which value is meant")
    for key in call:
        if key not in ("data", "method"):
            raise Unprocessable(f"unknown key {key[:80]!r}; the body has data and may have method")
    if "data" not in call:
        raise Unprocessable(f"data is missing; {form}")
    method = call.get("method", "predict")
    if not isinstance(method, str):
        raise Unprocessable('method is not a string, such as "predict_proba"')
    return call["data"], method


def _parse_in_pieces(body: bytes, max_rows: int, width: int) -> tuple[Any, str] | None:
    """Decode a body of plain rows of numbers, a piece at a time; None where it is anything else, or has a fault.

    A number takes 32 bytes as a Python object in a list, 8 in an array, and some 7 in the body.
    """
    head, tail = _HEAD.match(body), _TAIL.search(body, max(0, len(body) - 200))
    n_rows = body.count(b"[") - 1
    if not head or not tail or body.count(b'"') != (2 if tail[1] is None else 6) or not 0 < n_rows <= max_rows:
        return None
    array = np.empty((n_rows, width))
    at, end, done = head.end(), tail.start(), 0
    while at < end:
        stop = body.find(b"]", min(at + PIECE_OF_ROWS, end - 1), end) + 1
        try:
            rows = orjson.loads(b"[" + body[at:stop] + b"]")
            if set(map(type, rows)) != {list} or set(map(len, rows)) != {width}:
                return None
            if not set(map(type, chain.from_iterable(rows))) <= {int, float, NoneType}:
                return None
            array[done : done + len(rows)] = rows  # None becomes NaN
        except (orjson.JSONDecodeError, OverflowError):
            return None
        done += len(rows)
        between = _BETWEEN.match(body, stop, end)
        if stop < end and not between:
            return None
        at = between.end() if between else end
    return (array, tail[1].decode() if tail[1] else "predict") if done == n_rows else None


PIECE_OF_ROWS = 2**15  # bytes
_HEAD = re.compile(rb'\s*\{\s*"data"\s*:\s*\[\s*')
_BETWEEN = re.compile(rb"\s*,\s*(?=\[)")
_TAIL = re.compile(rb'\s*\]\s*(?:,\s*"method"\s*:\s*"(\w+)"\s*)?\}\s*$')


def parse_array(body: bytes, max_rows: int) -> Any:
    """Decode an array of numbers `(n_rows, …)` in numpy's format (numpy.save), without copying it.

    Its header is checked against the body's length, so nothing is allocated for what is not there, and what holds
    Python objects, which would be unpickled, is refused.

    Raises:
        BadRequest: not of that format, version 1 or 2, or it breaks off.
        Unprocessable: an array that is not of numbers, or has no rows or too many.
    """
    file = io.BytesIO(body)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        shape, by_columns, dtype = readers[npy.read_magic(file)](file)
    except Exception:  # a header is parsed as Python's literals; it may hold anything
        raise BadRequest("the body is not an array in numpy's format (numpy.save), version 1 or 2") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8 or dtype.subdtype:
        raise Unprocessable("the array does not hold numbers of at most 64 bits")
    if not shape or min(shape) < 1:
        raise Unprocessable("the array has no rows, or rows without values")
    if shape[0] > max_rows:
        raise Unprocessable(f"the array has {shape[0]} rows; this server takes {max_rows} in one request")
    if math.prod(shape) * dtype.itemsize != len(body) - file.tell():
        raise BadRequest(f"the body does not hold as many bytes as an array of shape {shape} of {dtype.name} has")
    return np.frombuffer(body, dtype, offset=file.tell()).reshape(shape, order="F" if by_columns else "C")


def _explain_json(body: bytes, error: orjson.JSONDecodeError) -> str:
    """Say what to mend in a body that is not JSON, in our own words: the parser's may quote it."""
    if "infinity" in error.msg:
        return "a number is too large for a 64-bit float"
    if "depth" in error.msg:
        return "nested too deeply"
    try:
        body.decode()
    except UnicodeDecodeError as bad:
        return f"the body is not UTF-8 (byte {bad.start})"
    return (
        f"not JSON: it goes wrong at line {error.lineno} column {error.colno}. NaN, Infinity, single quotes, comments "
        "and trailing commas are not JSON; a missing value is null"
    )


def _has_duplicate_key(body: bytes, call: dict[str, Any]) -> bool:
    """Tell whether an object has a key twice, of which the parser keeps the last without a word."""
    data = call.get("data")
    rows = data if isinstance(data, list) else ()
    keys = len(call) + sum(len(row) for row in rows if type(row) is dict)
    if body.count(b":") == keys:  # a colon for each key that is left, none lost: the usual case, at memchr's speed
        return False
    duplicates = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        if len({key for key, _ in pairs}) < len(pairs):
            duplicates.append(True)

    try:
        json.loads(body, object_pairs_hook=note)
    except RecursionError:  # it gives up a little before orjson does
        raise BadRequest("nested too deeply") from None
    return bool(duplicates)
