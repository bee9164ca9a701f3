"""A request's body: within a size and a time, and as strict JSON.

gunicorn has no time limit on bodies: a caller that stops half-way would hold its thread for ever. Here each read
is noted with its deadline, and a sweep once a second shuts the reading side of the connections that are past theirs,
which ends the read at once under every worker class. A request whose body is there pays two dict operations.
"""

import io
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np
import numpy.lib.format as npy
import orjson
from flask import Response
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge, RequestTimeout, UnprocessableEntity
from werkzeug.wsgi import get_content_length

from model import METHODS

PIECE = 2**14  # bytes that are read at a time
LINGER = 2.0  # seconds that a refused body is read on, so that the caller can finish sending and see the answer


class BodyReader:
    """Reads bodies of at most `max_bytes` that arrive within `timeout` seconds (to the next sweep)."""

    def __init__(self, max_bytes: int, timeout: float) -> None:
        self.max_bytes, self.timeout = max_bytes, timeout
        self._reading: dict[object, tuple[float, Any]] = {}  # a token each → (deadline, WSGI environ)

    def read(self, environ: dict[str, Any]) -> bytes:
        """Read the whole body.

        Raises:
            RequestEntityTooLarge: longer than `max_bytes`, by its header or as it arrives.
            RequestTimeout: not there in time.
            BadRequest: it breaks off, or its chunks are malformed.
        """
        given = get_content_length(environ)
        stream, length = environ["wsgi.input"], given or 0
        if given is None and "HTTP_TRANSFER_ENCODING" in environ:
            length = self.max_bytes + 1
        elif length > self.max_bytes:
            raise self._too_large()
        body, broken, deadline = b"", False, time.monotonic() + self.timeout
        with self._deadline(environ, deadline):
            try:
                body = stream.read(length) if length <= PIECE else b"".join(_pieces(stream, length, deadline))
            except Exception:  # whatever the server raises for a bad chunk or a lost connection
                broken = True
        if len(body) > self.max_bytes:
            raise self._too_large()
        in_time = time.monotonic() < deadline
        environ["body.whole"] = whole = in_time and not broken and len(body) >= (given or 0)
        if whole:
            return body
        if not in_time:
            raise RequestTimeout(f"the body did not arrive within {self.timeout:g} seconds")
        raise BadRequest("the body breaks off before its end, or its chunks are malformed")

    def _too_large(self) -> RequestEntityTooLarge:
        return RequestEntityTooLarge(f"the body is larger than {self.max_bytes} bytes")

    def finish(self, environ: dict[str, Any], response: Response) -> None:
        """See to it that what is left of a body after an early answer is not taken for the next request."""
        if environ.get("body.whole"):
            return
        length = get_content_length(environ)
        if not (length or "HTTP_TRANSFER_ENCODING" in environ):
            return
        if "body.whole" in environ:  # it broke off, or was too slow
            response.call_on_close(lambda: _shut(environ, socket.SHUT_RDWR))
        else:
            response.call_on_close(lambda: self._discard(environ, length))

    def _discard(self, environ: dict[str, Any], length: int | None) -> None:
        """Read on a little, then shut the connection. Closed with data unread it is reset: the answer may be lost."""
        count, ended, deadline = 0, False, time.monotonic() + LINGER
        with suppress(Exception), self._deadline(environ, deadline):
            for piece in _pieces(environ["wsgi.input"], self.max_bytes + 1, deadline):
                count += len(piece)
            ended = count <= self.max_bytes and time.monotonic() < deadline
        if not ended or length not in (None, count):
            _shut(environ, socket.SHUT_RDWR)

    def sweep(self) -> None:
        """End the reads that are past their deadline. Call it once a second."""
        now = time.monotonic()
        for token, (deadline, environ) in list(self._reading.items()):
            if deadline <= now and self._reading.pop(token, None) is not None:
                _shut(environ, socket.SHUT_RD)

    @contextmanager
    def _deadline(self, environ: dict[str, Any], deadline: float) -> Iterator[None]:
        token = object()
        self._reading[token] = (deadline, environ)
        try:
            yield
        finally:
            self._reading.pop(token, None)


def _pieces(stream: Any, length: int, deadline: float) -> Iterator[bytes]:
    """Yield at most `length` bytes of a body as they come, until the deadline, giving way to other requests in between.

    gevent reads on without a pause for as long as there is data, so a fast sender would have the worker to itself.
    """
    gave_way = time.monotonic()
    while length > 0 and (piece := stream.read(min(length, PIECE))):
        length -= len(piece)
        yield piece
        now = time.monotonic()
        if now >= deadline:
            return
        if now - gave_way > 0.01:
            time.sleep(0.0001)  # not 0: then gevent would run other ready callbacks before it looks at sockets
            gave_way = time.monotonic()


def _shut(environ: dict[str, Any], how: int) -> None:
    """Shut a side of the request's connection. On a duplicate, since a TLS socket would forget its keys.

    What had arrived before can still be read. Where both sides are shut it must not be taken for a request, so the body
    is marked as failed: then gunicorn, or worker.py, ends the connection.
    """
    if how == socket.SHUT_RDWR:
        with suppress(AttributeError):  # another server's stream may not take it
            environ["wsgi.input"].failed = True
    connection = environ.get("gunicorn.socket")
    if connection is not None:
        with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
            duplicate.shutdown(how)


# --- JSON


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
        raise Unprocessable(f"method is not a text; expected one of {', '.join(METHODS)}")
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
