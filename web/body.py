"""A request's body: read within a size and a time.

gunicorn has no time limit on bodies: a caller that stops half-way would hold its thread for ever. Here each read is
registered with its deadline, and once a second the reading side of the connections that are past theirs is shut down,
which ends the read at once under every worker class. For a body that has arrived this costs two dict operations.
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

CHUNK_SIZE = 2**14  # bytes that are read at a time
LINGER = 2.0  # seconds for which a rejected body is read on, so that the caller finishes sending and sees the answer


class BodyReader:
    """Reads bodies of at most `max_bytes` that arrive within `timeout` seconds, give or take one."""

    def __init__(self, max_bytes: int, timeout: float) -> None:
        self.max_bytes, self.timeout = max_bytes, timeout
        self._reads: dict[object, tuple[float, Any]] = {}  # a token each → (deadline, WSGI environ)

    def read(self, environ: dict[str, Any]) -> bytes:
        """Read the whole body of a request.

        Raises:
            RequestEntityTooLarge: longer than `max_bytes`, by its header or as it arrives.
            RequestTimeout: not there in time.
            BadRequest: it breaks off, or its chunks are malformed.
        """
        declared = get_content_length(environ)
        stream, length = environ["wsgi.input"], declared or 0
        if declared is None and "HTTP_TRANSFER_ENCODING" in environ:
            length = self.max_bytes + 1
        elif length > self.max_bytes:
            raise self._too_large()
        body, broken, deadline = b"", False, time.monotonic() + self.timeout
        with self._until(deadline, environ):
            try:
                body = stream.read(length) if length <= CHUNK_SIZE else b"".join(_chunks(stream, length, deadline))
            except Exception:  # whatever the server raises for a bad chunk or a lost connection
                broken = True
        if len(body) > self.max_bytes:
            raise self._too_large()
        in_time = time.monotonic() < deadline
        environ["body.complete"] = complete = in_time and not broken and len(body) >= (declared or 0)
        if complete:
            return body
        if not in_time:
            raise RequestTimeout(f"the body did not arrive within {self.timeout:g} seconds")
        raise BadRequest("the body breaks off before its end, or its chunks are malformed")

    def _too_large(self) -> RequestEntityTooLarge:
        return RequestEntityTooLarge(f"the body is larger than {self.max_bytes} bytes")

    def finish(self, environ: dict[str, Any], response: Response) -> None:
        """Keep the rest of a body from being taken for the next request, when the answer came before its end."""
        if environ.get("body.complete"):
            return
        length = get_content_length(environ)
        if not (length or "HTTP_TRANSFER_ENCODING" in environ):
            return
        if "body.complete" in environ:  # it broke off, or was too slow
            response.call_on_close(lambda: _shutdown(environ, socket.SHUT_RDWR))
        else:
            response.call_on_close(lambda: self._discard(environ, length))

    def _discard(self, environ: dict[str, Any], length: int | None) -> None:
        """Read on a little, then shut the connection down: closed with unread data it is reset, and the answer lost."""
        count, ended, deadline = 0, False, time.monotonic() + LINGER
        with suppress(Exception), self._until(deadline, environ):
            for chunk in _chunks(environ["wsgi.input"], self.max_bytes + 1, deadline):
                count += len(chunk)
            ended = count <= self.max_bytes and time.monotonic() < deadline
        if not ended or length not in (None, count):
            _shutdown(environ, socket.SHUT_RDWR)

    def expire_reads(self) -> None:
        """End the reads that are past their deadline. To be called once a second."""
        now = time.monotonic()
        for token, (deadline, environ) in list(self._reads.items()):
            if deadline <= now and self._reads.pop(token, None) is not None:
                _shutdown(environ, socket.SHUT_RD)

    @contextmanager
    def _until(self, deadline: float, environ: dict[str, Any]) -> Iterator[None]:
        token = object()
        self._reads[token] = (deadline, environ)
        try:
            yield
        finally:
            self._reads.pop(token, None)


def _chunks(stream: Any, length: int, deadline: float) -> Iterator[bytes]:
    """Yield at most `length` bytes of a body as they arrive, until the deadline, and let other requests in between.

    gevent reads on without a pause for as long as there is data, so a fast sender would have the worker to itself.
    """
    yielded = time.monotonic()
    while length > 0 and (chunk := stream.read(min(length, CHUNK_SIZE))):
        length -= len(chunk)
        yield chunk
        now = time.monotonic()
        if now >= deadline:
            return
        if now - yielded > 0.01:
            time.sleep(0.0001)  # not 0: gevent would then run other ready callbacks before it looks at sockets
            yielded = now


def _shutdown(environ: dict[str, Any], how: int) -> None:
    """Shut down a side of the request's connection: on a duplicate, since a TLS socket would forget its keys.

    Data that had arrived can still be read. When both sides are shut down it must not be taken for a request, so the
    body is marked as failed; then gunicorn, or speedups/gevent_worker.py, ends the connection.
    """
    if how == socket.SHUT_RDWR:
        with suppress(AttributeError):  # another server's stream may not take it
            environ["wsgi.input"].failed = True
    connection = environ.get("gunicorn.socket")
    if connection is not None:
        with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
            duplicate.shutdown(how)
