"""A request's body: read within a size and a time.

gunicorn has no time limit on bodies: a caller that stops half-way would hold its thread for ever. Here each read is
registered with its deadline, and once a second the reading side of the connections that are past theirs is shut down,
which ends the read at once under every worker class. For a body that has arrived this costs two dict operations.
"""

import _socket
import io
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from flask import Response
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge, RequestTimeout
from werkzeug.wsgi import get_content_length

CHUNK_SIZE = 2**16  # bytes that are read at a time, at most; gunicorn copies all that has arrived at each read
MIN_CHUNK_SIZE = 64  # at first, if the body comes in chunks: each of them may be one byte, which takes 10 µs
LINGER = 2.0  # seconds for which a rejected body is read on, so that the caller finishes sending and sees the answer


class BodyReader:
    """Reads bodies of at most `max_bytes` that arrive within `timeout` seconds, give or take one."""

    def __init__(self, max_bytes: int, timeout: float) -> None:
        self.max_bytes, self.timeout = max_bytes, timeout
        self._reads: dict[object, tuple[float, Any]] = {}  # a token each → (deadline, WSGI environ)
        self._seconds = 0  # that this process has run; the system's clocks go on while a platform has stopped it

    def read(self, environ: dict[str, Any]) -> bytes:
        """Read the whole body of a request.

        Raises:
            RequestEntityTooLarge: longer than `max_bytes`, by its header or as it arrives.
            RequestTimeout: not there in time.
            BadRequest: it breaks off, or its chunks are malformed.
        """
        if ((declared := _length(environ)) or 0) <= self.max_bytes:
            buffer = io.BytesIO()  # whose value is not copied; a list of chunks and their join would be there together
            buffer.writelines(self._chunks(environ, declared, self.timeout))
            if len(body := buffer.getvalue()) <= self.max_bytes:
                environ["body.complete"] = True
                return body
        raise RequestEntityTooLarge(f"the body is larger than {self.max_bytes} bytes")

    def finish(self, environ: dict[str, Any], response: Response) -> None:
        """Keep the rest of a body from being taken for the next request, when the answer came before its end."""
        complete = environ.get("body.complete")  # None if it was not read; False if it broke off, or was too slow
        if complete is False:
            response.call_on_close(lambda: _shutdown(environ, socket.SHUT_RDWR))
        elif complete is None and _length(environ) != 0:
            response.call_on_close(lambda: self._discard(environ))

    def _discard(self, environ: dict[str, Any]) -> None:
        """Read on a little, then shut the connection down: closed with unread data it is reset, and the answer lost."""
        with suppress(HTTPException):
            if sum(map(len, self._chunks(environ, _length(environ), LINGER))) <= self.max_bytes:
                return
        _shutdown(environ, socket.SHUT_RDWR)

    def expire_reads(self) -> None:
        """End the reads that are past their deadline. To be called once a second."""
        self._seconds += 1
        for token, (deadline, environ) in list(self._reads.items()):
            if deadline <= self._seconds and self._reads.pop(token, None) is not None:
                _shutdown(environ, socket.SHUT_RD)

    def _chunks(self, environ: dict[str, Any], declared: int | None, seconds: float) -> Iterator[bytes]:
        """Yield a body of `_length` as it arrives, up to one byte more than allowed; let other requests in between.

        gevent reads on without a pause for as long as there is data, so a fast sender would have the worker to itself.
        Raises: RequestTimeout, BadRequest; the connection is of no further use then.
        """
        token, stream = object(), environ["wsgi.input"]
        length = left = self.max_bytes + 1 if declared is None else min(declared, self.max_bytes + 1)
        size, now = MIN_CHUNK_SIZE if declared is None else CHUNK_SIZE, time.monotonic()
        yielded = now
        deadline = self._seconds + 1 + seconds  # the second under way may be nearly over
        self._reads[token] = (deadline, environ)
        try:
            # gunicorn's `read` takes 1,024 bytes of a body at least, its `readline` no more than it is asked for.
            while left > 0 and (chunk := (stream.readline if size < 1024 else stream.read)(min(left, size))):
                left -= len(chunk)
                yield chunk
                if self._seconds >= deadline:
                    break
                before, now = now, time.monotonic()
                if declared is None:
                    size = min(2 * size, CHUNK_SIZE) if now - before < 0.0005 else max(size // 2, MIN_CHUNK_SIZE)
                if now - yielded > 0.002:
                    # Not 0: gevent would then run other ready callbacks before it looks at sockets. And bodies that
                    # take this long for a few bytes leave at least half of the time to others, however many they are.
                    time.sleep(0.0001 if size >= 1024 else 0.004 * min(len(self._reads), 50))
                    now = yielded = time.monotonic()
            complete = length - left >= (declared or 0)
        except Exception:  # whatever the server raises for a bad chunk or a lost connection
            complete = False
        finally:
            self._reads.pop(token, None)
        late = self._seconds >= deadline
        if late or not complete:
            environ["body.complete"] = False
            if late:
                raise RequestTimeout(f"the body did not arrive within {seconds:g} seconds")
            raise BadRequest("the body breaks off before its end, or its chunks are malformed")


def _length(environ: dict[str, Any]) -> int | None:
    """Return how many bytes a request's body has; None if it comes in chunks."""
    return None if "HTTP_TRANSFER_ENCODING" in environ else get_content_length(environ) or 0


def _shutdown(environ: dict[str, Any], how: int) -> None:
    """Shut down a side of the request's connection.

    Data that had arrived can still be read. When both sides are shut down it must not be taken for a request, so the
    body is marked as failed; then gunicorn, or speedups/gevent_worker.py, ends the connection.
    """
    if how == socket.SHUT_RDWR:
        with suppress(AttributeError):  # another server's stream may not take it
            environ["wsgi.input"].failed = True
    if (connection := environ.get("gunicorn.socket")) is not None:
        shutdown_socket(connection, how)


def shutdown_socket(connection: Any, how: int) -> None:
    """Shut down a side of a connection as the kernel does it.

    A TLS socket's own method would forget its keys, and gevent's would raise an error in the reader. This needs no new
    descriptor: the connections to be ended may hold all there are.
    """
    with suppress(OSError, AttributeError):  # it is closed; gevent's then has no socket
        while not isinstance(connection, _socket.socket):
            connection = connection._sock
        _socket.socket.shutdown(connection, how)
