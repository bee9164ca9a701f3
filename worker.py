"""gunicorn's gevent worker, with a short way for plain requests.

    worker_class = "worker.Worker"          # in gunicorn.conf.py, where WORKER_CLASS is gevent

gunicorn's parser is written in Python; it and what surrounds it took more of a request's time than the whole of this
server (docs/performance.md). Here one regular expression takes the head of a request that every server reads in the
same way, and its answer is sent in one piece. Whatever else comes, from a chunked body to a folded header, is not
judged here: gunicorn gets the connection with all that was read of it, and keeps it.
"""

import io
import os
import re
import time
from typing import Any

from gevent import Timeout
from gunicorn.http.body import Body, LengthReader
from gunicorn.http.errors import InvalidResponseHeader
from gunicorn.http.message import HeaderPolicy
from gunicorn.http.unreader import SocketUnreader
from gunicorn.http.wsgi import base_environ
from gunicorn.util import close, http_date
from gunicorn.workers.ggevent import GeventWorker

MOST = 8192  # bytes that are read at once, so no plain head is longer

# A path without escapes, perhaps a query; then fields of printable ASCII.
HEAD = re.compile(
    rb"(GET|POST) ((?:/[A-Za-z0-9._~-]+)+)(?:\?([A-Za-z0-9._~=&%+-]+))? HTTP/1\.1\r\n"
    rb"((?:[A-Za-z0-9-]+:[ -~]*\r\n)+)\r\n"
)
FIELD = re.compile(r"([^:]+):([^\r]*)\r\n")
MOST_FIELDS = 100

# Fields that frame a message otherwise than by its length, or are between two hops.
NOT_PLAIN = {"EXPECT", "KEEP-ALIVE", "PROXY-CONNECTION", "TE", "TRAILER", "TRANSFER-ENCODING", "UPGRADE"}

# What gunicorn can be told to do with a request. Where one of these is not as it comes, it does so itself.
SETTINGS = (
    *("http_protocols", "limit_request_field_size", "limit_request_fields", "limit_request_line"),
    *("post_request", "pre_request", "protocol", "proxy_protocol"),
)


# What an environ holds for every plain request.
BASIS = {"wsgi.multithread": True, "SERVER_PROTOCOL": "HTTP/1.1", "SCRIPT_NAME": ""}


class Worker(GeventWorker):  # type: ignore[misc]  # gunicorn has no types
    """Serves the requests of a connection as long as they are plain; from the first other on, GeventWorker does.

    A plain request is `GET` or `POST` of HTTP/1.1. Its head is there in one read, has a Host, no field twice, and none
    of `NOT_PLAIN`. Its body has a Content-Length; what is not there of it yet, gunicorn's own reader brings.
    """

    def init_process(self) -> None:
        """Look once at what gunicorn is told to do with requests."""
        self.takes_plain = leaves_requests_alone(self.cfg, self.log)
        self._basis = base_environ(self.cfg) | BASIS
        self._date = 0, ""
        super().init_process()

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve a connection."""
        if not self.takes_plain:
            super().handle(listener, client, addr)
            return
        rest = b""
        try:
            rest = self._serve_plain(listener.getsockname(), client, addr)
        except OSError as error:
            self.log.debug("connection lost: %s", error)
        except (Exception, SystemExit) as error:
            self.handle_error(None, client, addr, error)
        finally:
            if not rest:
                close(client)
        if rest:
            super().handle(listener, _Unread(client, rest), addr)

    def _serve_plain(self, server: Any, client: Any, addr: Any) -> bytes:
        """Answer plain requests. Return what was read of the first other; nothing where the connection has ended."""
        basis, schemes = self._basis | _ends(server, addr) | {"gunicorn.socket": client}, _schemes(self.cfg, addr)
        data = b""
        while True:
            if not data:
                with Timeout(self.cfg.keepalive, False):
                    data = client.recv(MOST)
                if not data:
                    return b""
            head = HEAD.match(data)
            environ = _environ(head, basis, schemes) if head else None
            if head is None or environ is None:
                return data
            length, data = int(environ.get("CONTENT_LENGTH", 0)), data[head.end() :]
            unreader = None
            if len(data) >= length:
                environ["wsgi.input"] = io.BytesIO(data[:length])
            else:
                unreader = SocketUnreader(client)
                unreader.unread(data)
                environ["wsgi.input"] = Body(LengthReader(unreader, length))
            if not self._answer(client, environ):
                return b""
            if unreader is None:
                data = data[length:]
            else:
                while environ["wsgi.input"].read(MOST):  # what the application left
                    pass
                data = unreader.take_buffered()

    def _answer(self, client: Any, environ: dict[str, Any]) -> bool:
        """Call the application and send what it answers. Return whether the connection goes on."""
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("Autorestarting worker after current request.")
            self.alive: bool = False
        stays = self.alive and environ.get("HTTP_CONNECTION") != "close"
        status, headers = "", []

        def start_response(*given: Any) -> None:
            nonlocal status, headers
            status, headers = given[:2]

        pieces = self.wsgi(environ, start_response)
        try:
            body = b"".join(pieces)
            lines = [f"{name}: {value}" for name, value in headers if name != "Content-Length"]
            if "\n" in (text := "".join(lines)) or "\r" in text:
                raise InvalidResponseHeader("a line break")
            lines += "Server: gunicorn", f"Date: {self._now()}", f"Connection: {'keep-alive' if stays else 'close'}"
            if not status.startswith(("204", "304")):  # which have no body
                lines.append(f"Content-Length: {len(body)}")
            message = "\r\n".join((f"HTTP/1.1 {status}", *lines, "\r\n")).encode("latin-1") + body
            if (sent := client.send(message)) < len(message):  # gevent's sendall would first ask for the buffer's size
                client.sendall(message[sent:])
        finally:
            if hasattr(pieces, "close"):
                pieces.close()
        return stays

    def _now(self) -> str:
        """Return the time as HTTP has it."""
        second = int(time.time())
        if self._date[0] != second:
            self._date = second, http_date(second)
        return self._date[1]


def leaves_requests_alone(cfg: Any, log: Any) -> bool:
    """Tell whether gunicorn is told to do no more with a request than it does by default."""
    told = (cfg.settings[name] for name in SETTINGS)
    by_default = all(each.get() == type(each)().get() for each in told) and cfg.keepalive
    more = cfg.is_ssl or cfg.statsd_host or log.access_log_enabled or os.environ.get("SCRIPT_NAME")
    return bool(by_default and not more)


def _ends(server: Any, addr: Any) -> dict[str, str]:
    """Return what an environ tells of a connection's two ends: a pair each, or on a unix socket a path and nothing."""
    ends = {"REMOTE_ADDR": addr[0], "REMOTE_PORT": str(addr[1])} if isinstance(addr, tuple) else {"REMOTE_ADDR": addr}
    return ends | ({"SERVER_NAME": server[0], "SERVER_PORT": str(server[1])} if isinstance(server, tuple) else {})


def _schemes(cfg: Any, addr: Any) -> dict[str, str]:
    """Return the fields by which this peer may say that it was itself asked over TLS, and how."""
    policy = HeaderPolicy()
    policy.cfg, policy.peer_addr = cfg, addr
    return policy._peer_trusted_for_forwarded()[0]  # type: ignore[no-any-return]


def _environ(head: re.Match[bytes], basis: dict[str, Any], schemes: dict[str, str]) -> dict[str, Any] | None:
    """Return the WSGI environ of a request, as gunicorn would make it; None if it is not plain after all."""
    method, path, query, fields = (part.decode("ascii") for part in head.groups(b""))
    environ = basis | {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "RAW_URI": f"{path}?{query}" if query else path,
    }
    found, scheme = FIELD.findall(fields), ""
    for name, value in found:
        name, value = name.upper(), value.strip(" ")
        if name in NOT_PLAIN or (name == "CONNECTION" and value not in ("keep-alive", "close")):
            return None
        if name in schemes:
            if scheme:
                return None
            scheme = "https" if value == schemes[name] else "http"
        key = name.replace("-", "_")
        if name == "CONTENT-LENGTH":
            if not (value.isdigit() and len(value) < 10):
                return None
        elif name != "CONTENT-TYPE":
            key = f"HTTP_{key}"
        if key in environ:
            return None
        environ[key] = value
    if len(found) > MOST_FIELDS or "HTTP_HOST" not in environ:
        return None
    environ["wsgi.url_scheme"] = scheme or "http"
    if "SERVER_NAME" not in environ:
        host, _, port = environ["HTTP_HOST"].partition(":")
        environ |= {"SERVER_NAME": host, "SERVER_PORT": port or ("443" if scheme == "https" else "80")}
    return environ


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
