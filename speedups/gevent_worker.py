"""gunicorn's gevent worker, with a short way for plain requests.

    worker_class = "worker.Worker"          # in gunicorn.conf.py, where WORKER_CLASS is gevent

gunicorn's parser is written in Python; it and what surrounds it took half of the processor time of a request that does
nothing (docs/performance.md). Here one regular expression takes those heads that leave no room for interpretation, and
an answer is sent in one piece. Anything else, from a chunked body to a folded header, is not judged here: gunicorn gets
the connection, with all that was read of it, and keeps it until it ends. And it gets all connections where it speaks
TLS itself, writes an access log or is told anything else about requests (`leaves_requests_alone`).
"""

import io
import os
import re
import time
from typing import Any

import gevent
from gunicorn.http.body import Body, LengthReader
from gunicorn.http.errors import InvalidResponseHeader
from gunicorn.http.message import HeaderPolicy
from gunicorn.http.unreader import SocketUnreader
from gunicorn.http.wsgi import base_environ
from gunicorn.util import close, hop_headers, http_date, write_error
from gunicorn.workers.ggevent import GeventWorker

# A path without escapes, perhaps a query; then fields of printable ASCII.
HEAD = re.compile(
    rb"((?:GET|POST) ((?:/[A-Za-z0-9._~-]+)+)(?:\?([A-Za-z0-9._~=&%+-]+))? HTTP/1\.1)\r\n"
    rb"((?:[A-Za-z0-9-]+:[ -~]*\r\n)+)\r\n"
)
FIELD = re.compile(r"([^:]+):([^\r]*)\r\n")
HOST = re.compile(r"([^:]+)(?::([0-9]+))?")

# gunicorn's default limits. That of a field, 8,190 bytes, needs no check: no head that fits one read exceeds it.
MOST = 8192  # bytes that are read at once
MOST_FIELDS = 100
MOST_OF_A_LINE = 4094  # bytes of the first line

# Fields that frame a message otherwise than by its length, or are between two hops.
NOT_PLAIN = {"EXPECT", "KEEP-ALIVE", "PROXY-CONNECTION", "TE", "TRAILER", "TRANSFER-ENCODING", "UPGRADE"}

# gunicorn's settings that change what it does with a request. Where one is not at its default, it takes all requests.
SETTINGS = (
    *("http_protocols", "limit_request_field_size", "limit_request_fields", "limit_request_line", "logger_class"),
    *("post_request", "pre_request", "protocol", "proxy_protocol"),
)

# What an environ holds for every plain request.
BASIS = {"wsgi.multithread": True, "SERVER_PROTOCOL": "HTTP/1.1", "SCRIPT_NAME": ""}

OURS = hop_headers | {"content-length"}  # headers of an answer that the application does not set; lower case


class Worker(GeventWorker):  # type: ignore[misc]  # gunicorn has no types
    """Serves a connection's requests as long as they are plain; from the first that is not, GeventWorker does.

    A plain request is a `GET` or `POST` of HTTP/1.1 whose path has no escapes. Its head arrives in one read, has a
    Host, no field twice, none of `NOT_PLAIN`, and no Connection but keep-alive or close. A body has a Content-Length;
    what has not arrived of it yet is read by gunicorn's own reader.
    """

    alive: bool  # false from the signal to stop on

    def init_process(self) -> None:
        """Look, once, at whether gunicorn is told to do anything special with requests."""
        self.takes_plain = leaves_requests_alone(self.cfg, self.log)
        self._looked, self._turns = 0.0, 0
        super().init_process()

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve a connection."""
        if not self.takes_plain:
            super().handle(listener, client, addr)
            return
        rest = b""
        try:
            client.setblocking(1)  # whatever socket.setdefaulttimeout says
            rest = self._serve_plain(listener.getsockname(), client, addr)
        except (BrokenPipeError, ConnectionResetError) as error:
            self.log.debug("connection lost: %s", error)
        except (Exception, SystemExit):  # SystemExit: gunicorn aborts a worker that hangs
            self.log.exception("error on a connection")
        finally:
            if not rest:
                close(client)
        if rest:
            super().handle(listener, _Unread(client, rest), addr)

    def handle_request(self, *arguments: Any) -> Any:
        """Answer a request that gunicorn has read."""
        self._give_way()
        return super().handle_request(*arguments)

    def _give_way(self) -> None:
        """Let other connections have their turn where none has had one for 10 ms.

        gevent stays with one connection as long as there is something to read. A caller that sends request after
        request without waiting for answers would keep the worker to itself, until gunicorn took it to hang.
        """
        now = time.monotonic()
        if now - self._looked > 0.01:
            self._looked = now
            loop = gevent.get_hub().loop
            if loop.iteration == self._turns:
                gevent.sleep(0.0001)  # not 0: then gevent would run other ready callbacks before it looks at sockets
            self._turns = loop.iteration

    def _serve_plain(self, server: Any, client: Any, addr: Any) -> bytes:
        """Answer plain requests. Return what was read of the first other; nothing where the connection has ended."""
        basis = base_environ(self.cfg) | BASIS | _ends(server, addr) | {"gunicorn.socket": client}
        schemes = _schemes(self.cfg, addr)
        data = b""
        while True:
            if not data:
                with gevent.Timeout(self.cfg.keepalive, False):
                    data = client.recv(MOST)
                if not data:
                    return b""
            environ, size = environ_of(data, basis, schemes)
            if environ is None:
                return data
            length, data = int(environ.get("CONTENT_LENGTH", 0)), data[size:]
            unreader = None
            if len(data) >= length:
                stream: Any = io.BytesIO(data[:length])
            else:
                unreader = SocketUnreader(client)
                unreader.unread(data)
                stream = Body(LengthReader(unreader, length))
            environ["wsgi.input"] = stream
            self._give_way()
            if not self._answer(client, environ) or getattr(stream, "failed", False):
                return b""
            if unreader is None:
                data = data[length:]
            else:
                while stream.read(MOST):  # what the application left
                    pass
                data = unreader.take_buffered()

    def _answer(self, client: Any, environ: dict[str, Any]) -> bool:
        """Call the application and send what it answers. Return whether the connection goes on."""
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("Autorestarting worker after current request.")
            self.alive = False
        stays = self.alive and environ.get("HTTP_CONNECTION") != "close"
        status, headers = "", []

        def start_response(line: str, fields: list[tuple[str, str]], exc_info: Any = None) -> None:
            nonlocal status, headers
            status, headers = line, fields

        try:
            pieces = self.wsgi(environ, start_response)
            try:
                message = message_of(status, headers, b"".join(pieces), stays)
            except BaseException:
                _end(pieces)
                raise
        except (Exception, SystemExit):
            self.log.exception("error handling request %s %s", environ["REQUEST_METHOD"], environ["RAW_URI"])
            write_error(client, 500, "Internal Server Error", "")
            return False
        try:
            # gevent's sendall would first ask for the size of the kernel's buffer.
            if (sent := client.send(message)) < len(message):
                client.sendall(memoryview(message)[sent:])
        finally:
            _end(pieces)
        return stays


def leaves_requests_alone(cfg: Any, log: Any) -> bool:
    """Tell whether gunicorn is told to do no more with a request than it does by default."""
    by_default = all(each.get() == type(each)().get() for each in (cfg.settings[name] for name in SETTINGS))
    more = cfg.is_ssl or cfg.statsd_host or log.access_log_enabled or os.environ.get("SCRIPT_NAME")
    return bool(by_default and cfg.keepalive and not more)


def _ends(server: Any, addr: Any) -> dict[str, str]:
    """Return what an environ tells of a connection's two ends: a pair each, or on a unix socket a path and nothing."""
    ends = {"REMOTE_ADDR": addr[0], "REMOTE_PORT": str(addr[1])} if isinstance(addr, tuple) else {"REMOTE_ADDR": addr}
    return ends | ({"SERVER_NAME": server[0], "SERVER_PORT": str(server[1])} if isinstance(server, tuple) else {})


def _schemes(cfg: Any, addr: Any) -> dict[str, str]:
    """Return the fields by which this peer may say that it was itself asked over TLS, and how."""
    policy = HeaderPolicy()  # of gunicorn, which decides here too whom FORWARDED_ALLOW_IPS trusts
    policy.cfg, policy.peer_addr = cfg, addr
    return policy._peer_trusted_for_forwarded()[0]  # type: ignore[no-any-return]


def environ_of(
    data: bytes, basis: dict[str, Any], schemes: dict[str, str]
) -> tuple[dict[str, Any], int] | tuple[None, int]:
    """Read the head of a plain request.

    Args:
        data: what was received.
        basis: what the environ holds for every request of the connection.
        schemes: see `_schemes`.

    Returns:
        The WSGI environ, as gunicorn would make it, and the head's length in bytes; None if the request is not plain.
    """
    head = HEAD.match(data)
    if head is None or head.end(1) > MOST_OF_A_LINE:
        return None, 0
    line, path, query, fields = (part.decode("ascii") for part in head.groups(b""))
    method, target, _ = line.split(" ")
    environ = basis | {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "RAW_URI": target}
    found, scheme = FIELD.findall(fields), ""
    for name, value in found:
        name, value = name.upper(), value.strip(" ")
        if name in NOT_PLAIN or (name == "CONNECTION" and value not in ("keep-alive", "close")):
            return None, 0
        if name in schemes:
            if scheme:
                return None, 0
            scheme = "https" if value == schemes[name] else "http"
        key = name.replace("-", "_")
        if name == "CONTENT-LENGTH":
            if not (value.isdigit() and len(value) < 10):
                return None, 0
        elif name != "CONTENT-TYPE":
            key = f"HTTP_{key}"
        if key in environ:
            return None, 0
        environ[key] = value
    environ["wsgi.url_scheme"] = scheme or "http"
    host = HOST.fullmatch(environ.get("HTTP_HOST", ""))
    if host is None or len(found) > MOST_FIELDS:
        return None, 0
    if "SERVER_NAME" not in environ:
        environ |= {"SERVER_NAME": host[1], "SERVER_PORT": host[2] or ("443" if scheme == "https" else "80")}
    return environ, head.end()


def message_of(status: str, headers: list[tuple[str, str]], body: bytes, stays: bool) -> bytes:
    """Return an answer as it is sent.

    Args:
        status: as in WSGI, `200 OK`.
        headers: of the application; those that are the server's to set are left out.
        body: the whole of it.
        stays: whether the connection goes on.

    Raises:
        InvalidResponseHeader: no status, or a line break within a line.
    """
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers if name.lower() not in OURS)]
    text = "".join(lines)
    if not status or "\n" in text or "\r" in text:
        raise InvalidResponseHeader("no status, or a line break in a header")
    lines += "Server: gunicorn", f"Date: {_now()}", f"Connection: {'keep-alive' if stays else 'close'}"
    if status.startswith(("204", "304")):
        body = b""
    else:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, "\r\n")).encode("latin-1") + body


_date = 0, ""  # the second that was last asked for, and how HTTP writes it


def _now() -> str:
    global _date
    second = int(time.time())
    if _date[0] != second:
        _date = second, http_date(second)
    return _date[1]


def _end(pieces: Any) -> None:
    """Tell the application that its answer was sent, as WSGI has it."""
    if hasattr(pieces, "close"):
        pieces.close()


class _Unread:
    """A socket of which some was read already: that comes first."""

    def __init__(self, sock: Any, data: bytes) -> None:
        self._sock, self._data = sock, data

    def recv(self, *arguments: Any) -> bytes:
        """Return what was read; then what the socket has."""
        data, self._data = self._data, b""
        return data or self._sock.recv(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)
