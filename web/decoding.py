"""A request's bytes → rows: strict JSON, or an array in numpy's format. Nothing else turns bytes into rows."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.lib.format as npy
import orjson
from flask import Request
from werkzeug.exceptions import BadRequest, UnsupportedMediaType

from web.body import BodyReader
from web.errors import Unprocessable

LARGE_BODY = 2**18  # bytes; from here on decoding takes milliseconds and goes to a native thread


def read_rows(
    request: Request, bodies: BodyReader, max_rows: int, run_in_thread: Callable[..., Any]
) -> tuple[Any, str]:
    """Read a request's body and decode it, by its content type.

    Returns:
        The rows, a decoded JSON value or an array `(n_rows, …)`, and the name of the method.

    Raises:
        UnsupportedMediaType: another content type, or a compressed body.
        BadRequest, Unprocessable, RequestEntityTooLarge, RequestTimeout: see there.
    """
    environ = request.environ
    content_type = environ.get("CONTENT_TYPE", "")
    is_npy = content_type == "application/x-npy"
    if not is_npy and content_type != "application/json" and not request.is_json:
        raise UnsupportedMediaType("send JSON and say so: curl -H 'Content-Type: application/json' …")
    if "HTTP_CONTENT_ENCODING" in environ:
        raise UnsupportedMediaType("send the body as it is, without Content-Encoding")
    body = bodies.read(environ)
    if is_npy:
        return decode_npy(body, max_rows), request.args.get("method", "predict")
    if len(body) > LARGE_BODY:
        return run_in_thread(decode_json, body, max_rows)  # type: ignore[no-any-return]  # as decode_json
    return decode_json(body, max_rows)


def decode_json(body: bytes, max_rows: int) -> tuple[Any, str]:
    """Decode `{"data": rows, "method": "predict"}`; the method is optional.

    Raises:
        BadRequest: not JSON.
        Unprocessable: JSON of another form.
    """
    form = 'send {"data": [[…], …]}'
    if not body:
        raise BadRequest(f"the body is empty; {form}")
    try:
        call = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(_explain_json(body, error)) from None
    if type(call) is not dict:
        raise Unprocessable(f"the body is not an object; {form}")
    for key in call:
        if key not in ("data", "method"):
            raise Unprocessable(f"unknown key {key[:80]!r}; the body has data and may have method")
    if "data" not in call:
        raise Unprocessable(f"data is missing; {form}")
    rows, method = call["data"], call.get("method", "predict")
    if isinstance(rows, list) and len(rows) > max_rows:
        raise Unprocessable(f"data has {len(rows)} rows; this server takes {max_rows} in one request")
    if not isinstance(method, str):
        raise Unprocessable('method is not a string, such as "predict_proba"')
    return rows, method


def decode_npy(body: bytes, max_rows: int) -> Any:
    """Decode an array of numbers `(n_rows, …)` in numpy's format (numpy.save), without copying it.

    Its header is checked against the body's length, so nothing is allocated for data that is not there, and an array
    of Python objects, which would be unpickled, is rejected.

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
    """Explain how to fix a body that is not JSON, in our own words: the parser's may quote it."""
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
