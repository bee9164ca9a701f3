"""A request's bytes → rows: strict JSON, or an array in numpy's format. Other protocols have theirs in endpoints/."""

import io
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.lib.format as npy
import orjson
from flask import Request
from werkzeug.exceptions import BadRequest, UnprocessableEntity, UnsupportedMediaType

from model.limits import Limits
from web.body import BodyReader

NPY = "application/x-npy"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # that some programs put before UTF-8
MAX_DIMENSIONS = 32  # of an array, as in numpy before 2.0
FORM = 'send {"data": [[…], …]}'
LARGE_BODY = 2**18  # bytes; from here on decoding takes milliseconds and goes to a native thread


class Decoder:
    """Decodes the bodies of a service's requests; large ones one at a time, since their rows are larger still."""

    def __init__(
        self, bodies: BodyReader, max_rows: int, models: Callable[[], list[Any]], run_in_thread: Callable[..., Any]
    ) -> None:
        """`models` returns those that are loaded; `run_in_thread` calls a function on a native thread."""
        self._bodies, self._max_rows, self._models, self._run_in_thread = bodies, max_rows, models, run_in_thread
        self._one_at_a_time = threading.Semaphore(1)

    def read_rows(self, request: Request) -> tuple[Any, str]:
        """Read a request's body and decode it, by its content type. Raises: HTTPException or BadRows, what is wrong.

        Returns:
            The rows, a decoded JSON value or an array `(n_rows, …)`, and the name of the method.
        """
        environ = request.environ
        require_json(request, NPY)
        body = read_body(environ, self._bodies)
        if environ["CONTENT_TYPE"] == NPY:
            rows, method = decode_npy(body), request.args.get("method", "predict")
        elif len(body) > LARGE_BODY:
            rows, method = self.decode_large(decode_json, body, self.limits())
        else:
            rows, method = decode_json(body)
        check_length(rows, self._max_rows)
        return rows, method

    def limits(self) -> Limits:
        """Return what a request may hold."""
        return Limits.of(self._max_rows, [model.signature for model in self._models()])

    def decode_large(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function makes of a large body: on a native thread, one at a time."""
        with self._one_at_a_time:
            return self._run_in_thread(function, *arguments)


def require_json(request: Request, *others: str) -> None:
    """Reject a content type that is neither JSON nor one of some others. Raises: UnsupportedMediaType."""
    if request.environ.get("CONTENT_TYPE") not in ("application/json", *others) and not request.is_json:
        raise UnsupportedMediaType("send JSON and say so: curl -H 'Content-Type: application/json' …")


def read_body(environ: dict[str, Any], bodies: BodyReader) -> bytes:
    """Read a request's body, which must not be compressed. Raises: HTTPException."""
    if "HTTP_CONTENT_ENCODING" in environ:
        raise UnsupportedMediaType("send the body as it is, without Content-Encoding")
    return bodies.read(environ)


def check_length(rows: Any, max_rows: int) -> None:
    """Reject more rows than one request may have. Raises: UnprocessableEntity."""
    if isinstance(rows, (list, np.ndarray)) and len(rows) > max_rows:
        raise UnprocessableEntity(f"data has {len(rows)} rows; this server takes {max_rows} in one request")


def parse_json(body: bytes, limits: Limits | None = None, form: str = FORM) -> Any:
    """Decode a body as strict JSON; `form` shows callers what to send.

    Raises: BadRequest, empty, or not JSON; BadRows, a large one holds more than the limits.
    """
    if not body:
        raise BadRequest(f"the body is empty; {form}")
    if limits and len(body) > LARGE_BODY:
        limits.check(body)
    try:
        return orjson.loads(body.removeprefix(BYTE_ORDER_MARK))
    except orjson.JSONDecodeError as error:
        raise BadRequest(_explain_json(body, error)) from None


def decode_json(body: bytes, limits: Limits | None = None) -> tuple[Any, str]:
    """Decode the JSON of `decode_call`. Raises: as that, and as `parse_json`."""
    return decode_call(parse_json(body, limits))


def decode_call(call: Any) -> tuple[Any, str]:
    """Return rows and method of `{"data": rows, "method": "predict"}`; the method is optional.

    Also what pandas writes: `to_json(orient="records")`, the list of rows alone, and `orient="split"`, with "columns".

    Raises: UnprocessableEntity, JSON of another form.
    """
    if type(call) is list:
        call = {"data": call}
    if type(call) is not dict:
        raise UnprocessableEntity(f"the body is not an object; {FORM}")
    known = {"data", "method", "columns", "index"} if "columns" in call else {"data", "method"}
    if unknown := call.keys() - known:
        raise UnprocessableEntity(f"unknown key {min(unknown)[:80]!r}; the body has data and may have method")
    if "data" not in call:
        raise UnprocessableEntity(f"data is missing; {FORM}")
    rows, method = call["data"], call.get("method", "predict")
    if not isinstance(method, str):
        raise UnprocessableEntity('method is not a string, such as "predict_proba"')
    return (_with_names(rows, call["columns"]) if "columns" in call else rows), method


def _with_names(rows: Any, columns: Any) -> Any:
    """Return rows as objects, from lists of values in the order of some columns; numbered columns have no names."""
    if columns == list(range(len(columns) if isinstance(columns, list) else 0)):
        return rows
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise UnprocessableEntity("columns is not a list of names")
    if len(set(columns)) < len(columns):
        raise UnprocessableEntity("columns has a name twice")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
        raise UnprocessableEntity(f"with columns, data is a list of rows with a value for each of the {len(columns)}")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def decode_npy(body: bytes) -> Any:
    """Decode an array of numbers `(n_rows, …)` in numpy's format (numpy.save), without copying it.

    Its header is checked against the body's length, so nothing is allocated for data that is not there, and an array
    of Python objects, which would be unpickled, is rejected.

    Raises: BadRequest, not of that format, version 1 or 2; UnprocessableEntity, not of numbers, or without rows.
    """
    file = io.BytesIO(body)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        shape, by_columns, dtype = readers[npy.read_magic(file)](file)
        if not all(type(size) is int for size in shape):  # True is one for numpy's reader, and not for reshape
            raise TypeError
    except Exception:  # a header is parsed as Python's literals; it may hold anything
        raise BadRequest("the body is not an array in numpy's format (numpy.save), version 1 or 2") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8 or dtype.subdtype:
        raise UnprocessableEntity("the array does not hold numbers of at most 64 bits")
    if not shape or len(shape) > MAX_DIMENSIONS or min(shape) < 1:
        raise UnprocessableEntity("the array has no rows, rows without values, or too many dimensions")
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
