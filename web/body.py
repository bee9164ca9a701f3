"""A request's body: within a size and a time.

gunicorn has no time limit on bodies: a caller that stops half-way would hold its thread for ever. Here each read
is noted with its deadline, and a sweep once a second shuts the reading side of the connections that are past theirs,
which ends the read at once under every worker class. A request whose body is there pays two dict operations.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from flask import Response
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge, RequestTimeout
from werkzeug.wsgi import get_content_length

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
