"""How a body is read: its time, and how its connection is ended."""

import io
import resource
import shutil
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import gevent.socket
import gevent.ssl
import pytest
from gunicorn.http.body import Body, ChunkedReader
from gunicorn.http.unreader import IterUnreader
from nginx_tools import certificate
from werkzeug.exceptions import RequestTimeout

from web.body import CHUNK_SIZE, BodyReader, shutdown_socket


class Slow(io.BytesIO):
    """A body of which each byte takes a second."""

    reader: BodyReader

    def read(self, size: int | None = -1, /) -> bytes:
        self.reader.expire_reads()
        return super().read(1)


@pytest.mark.parametrize(("length", "is_late"), [(2, False), (3, True), (30, True)])
def test_body_has_as_many_ticks_as_seconds(length: int, is_late: bool) -> None:
    reader, body = BodyReader(1000, 2.0), Slow(b"x" * length)
    body.reader = reader
    environ = {"CONTENT_LENGTH": str(length), "wsgi.input": body}
    if not is_late:
        assert reader.read(environ) == b"x" * length
        return
    with pytest.raises(RequestTimeout, match="within 2 seconds"):
        reader.read(environ)
    assert body.tell() == 3


def chunked(body: bytes, size: int) -> Any:
    """Return the WSGI environ of a body that comes in chunks of a size, read by gunicorn."""
    sent = b"".join(
        b"%x\r\n%s\r\n" % (len(part), part) for part in (body[i : i + size] for i in range(0, len(body), size))
    )
    reader = ChunkedReader(object(), IterUnreader(iter([sent + b"0\r\n\r\n"])))
    return {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input": Body(reader)}


@pytest.mark.parametrize("body", [b"x" * 5000, b"\n" * 5000, b"ab\ncd\r\n\r\n" * 500, b"y" * 3 * CHUNK_SIZE, b""])
@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
def test_body_is_the_same_whatever_the_size_of_its_chunks(body: bytes, size: int) -> None:
    body = body[: 10_000 * size]  # as many chunks take a second
    assert BodyReader(10**6, 30.0).read(chunked(body, size)) == body


def test_body_in_tiny_chunks_lets_others_in(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep, this = time.sleep, threading.get_ident()
    # Services of other tests sleep as well, in threads of their own.
    monkeypatch.setattr(time, "sleep", lambda s: pauses.append(s) if threading.get_ident() == this else sleep(s))
    reader = BodyReader(10**6, 30.0)
    assert reader.read(chunked(b"x" * 20_000, 1)) == b"x" * 20_000  # which takes 160 ms at least
    assert len(pauses) > 20
    assert sorted(pauses)[len(pauses) // 10] >= 0.004  # a few may be short where some chunks had been read ahead
    pauses.clear()
    reader.read({"CONTENT_LENGTH": "900000", "wsgi.input": io.BytesIO(b"x" * 900_000)})
    assert all(pause < 0.001 for pause in pauses)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
@pytest.mark.parametrize("over", ["plain", "TLS", "gevent", "gevent's TLS"])
def test_connection_can_be_ended_when_no_descriptor_is_left(over: str, tmp_path: Path) -> None:
    ours, theirs = gevent.socket.socketpair() if "gevent" in over else socket.socketpair()
    connection: Any = theirs
    if "TLS" in over:
        context = (gevent.ssl if "gevent" in over else ssl).SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate(tmp_path))
        connection = context.wrap_socket(theirs, server_side=True, do_handshake_on_connect=False)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        shutdown_socket(connection, socket.SHUT_WR)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    ours.settimeout(5)
    assert ours.recv(1) == b""
    assert "TLS" not in over or connection._sslobj is not None  # it has kept its keys
    for each in (ours, connection):
        each.close()
