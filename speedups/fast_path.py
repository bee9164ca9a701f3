"""A fast path for simple requests over a connection of gunicorn's gevent worker.

It saves 126 of the 144 µs that gunicorn takes for a request that does nothing: gunicorn's parser is written in Python.
Here one regular expression matches those heads that leave no room for interpretation, and a response is sent in one
piece. All else, from a chunked body to a folded header, is left to gunicorn, which gets the connection with what was
read of it. And it gets all connections if it is configured to do more with requests than by default (`is_possible`).

gunicorn: calls `HeaderPolicy._peer_trusted_for_forwarded`, its readers of bodies and `base_environ`, and makes the
environ that `http.wsgi.create` would make, except for HTTP/2 and early hints.
"""

import io
import os
import re
import time
from functools import lru_cache
from typing import Any

import gevent
import gunicorn
from gunicorn.http.body import Body, LengthReader
from gunicorn.http.errors import InvalidResponseHeader
from gunicorn.http.message import HeaderPolicy
from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import SocketUnreader
from gunicorn.http.wsgi import base_environ, create
from gunicorn.util import hop_headers, http_date, write_error

from processes import run_hooks

from . import UnexpectedInternals

TESTED = ("27.0.0", "27.0.1")  # versions of gunicorn with which the tests of this file pass
WATCH = 1000  # of so many heads one is read by gunicorn too

# A path without escapes, perhaps a query; then fields of printable ASCII. No possessive quantifiers: Python 3.11.2
# of Debian 12 matches some of them wrongly.
HEAD = re.compile(
    r"(GET|POST) (((?:/[A-Za-z0-9._~-]+)+)(?:\?([A-Za-z0-9._~=&%+-]+))?) HTTP/1\.1\r\n"
    r"((?:[A-Za-z0-9-]+:[ -~]*\r\n)+)\r\n"
)
FIELD = re.compile(r"([^:]+):([^\r]*)\r\n")
HOST = re.compile(r"([^:]+)(?::([0-9]+))?")

# gunicorn's default limits. That of a field, 8,190 bytes, needs no check: no head that fits one read exceeds it.
RECV_SIZE = 8192  # bytes
MAX_FIELDS = 100
MAX_REQUEST_LINE = 4094  # bytes

# Fields that frame a message other than by its length, or are between two hops.
UNSUPPORTED_HEADERS = {"EXPECT", "KEEP-ALIVE", "PROXY-CONNECTION", "TE", "TRAILER", "TRANSFER-ENCODING", "UPGRADE"}
UNSUPPORTED_VARIABLES = {f"HTTP_{name.replace('-', '_')}" for name in UNSUPPORTED_HEADERS}  # the same in an environ
SERVER_HEADERS = hop_headers | {"content-length"}  # headers of a response that the application does not set; lower case

# gunicorn's settings that change what it does with a request. If one is not at its default, it takes all requests.
SETTINGS = (
    *("http_protocols", "limit_request_field_size", "limit_request_fields", "limit_request_line", "logger_class"),
    *("post_request", "pre_request", "protocol", "proxy_protocol"),
)

_date = lru_cache(maxsize=1)(http_date)  # as HTTP writes a second


def is_possible(cfg: Any, log: Any) -> bool:
    """Return whether gunicorn is configured to do no more with a request than it does by default.

    Raises: UnexpectedInternals, or any other error, if gunicorn is a version that was not tested, or reads a request
    differently from this module.
    """
    is_default = all(each.get() == type(each)().get() for each in (cfg.settings[name] for name in SETTINGS))
    more = cfg.is_ssl or cfg.statsd_host or log.access_log_enabled or os.environ.get("SCRIPT_NAME")
    if more or not is_default or not cfg.keepalive:
        return False
    if gunicorn.__version__ not in TESTED:
        raise UnexpectedInternals(f"gunicorn {gunicorn.__version__}, which was not tested")
    head = b"POST /a?b=c HTTP/1.1\r\nHost: d:1\r\nContent-Length: 2\r\nX-Forwarded-Proto: https\r\nX-E: f\r\n\r\n"
    server, addr = ("127.0.0.1", 2), ("127.0.0.1", 3)
    if found := differences(head, parse_head(head, *of_connection(cfg, server, addr)) or {}, server, addr, cfg):
        raise UnexpectedInternals(f"gunicorn.http.wsgi.create: {', '.join(found)}")
    unreader = SocketUnreader(None)
    unreader.unread(b"body, next")
    body = Body(LengthReader(unreader, 4))
    if (body.read(9), body.failed, unreader.take_buffered()) != (b"body", False, b", next"):
        raise UnexpectedInternals("gunicorn.http.body")
    return True


def differences(head: bytes, environ: dict[str, Any], server: Any, addr: Any, cfg: Any) -> list[str]:
    """Return the names of what gunicorn makes differently of a head from which `parse_head` made an environ."""
    try:
        request = next(RequestParser(cfg, iter([head]), addr))
        _, expected = create(request, None, addr, server, cfg)
    except Exception as error:  # gunicorn rejects it, or waits for more
        return [type(error).__name__]
    # Objects of one request; and the last, which gunicorn's asynchronous workers set later.
    ignored = dict.fromkeys(("gunicorn.socket", "wsgi.early_hints", "wsgi.errors", "wsgi.input", "wsgi.multithread"))
    expected, found = expected | ignored, environ | ignored
    expected["the body's length"] = getattr(request.body.reader, "length", None)
    found["the body's length"] = int(environ.get("CONTENT_LENGTH", 0))
    expected["the connection's end"] = request.should_close()
    found["the connection's end"] = not keeps_alive(environ)
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def watch(worker: Any, head: bytes, environ: dict[str, Any], server: Any, addr: Any) -> None:
    """Compare a head that was taken with what gunicorn makes of it; if that differs, take no more."""
    if worker.has_fast_path and (found := differences(head, environ, server, addr, worker.cfg)):
        worker.has_fast_path = False
        worker.log.error("the fast path is off: gunicorn reads a request differently: %s", ", ".join(found)[:500])
        run_hooks(getattr(worker.wsgi, "extensions", {}).get("on_fast_path_difference", ()))


def keeps_alive(environ: dict[str, Any]) -> bool:
    """Return whether a request leaves its connection open."""
    return str(environ.get("HTTP_CONNECTION", "")).lower() != "close"


def serve(worker: Any, server: Any, client: Any, addr: Any) -> bytes:
    """Answer a connection's simple requests; return what was read of the first other one, or nothing at its end.

    A simple request is a `GET` or `POST` of HTTP/1.1 whose path has no escapes. Its head arrives in one read, has a
    Host, no field twice, none of `UNSUPPORTED_HEADERS`, and no Connection but keep-alive or close. A body has a
    Content-Length; what has not arrived of it yet is read by gunicorn's own reader.
    """
    base, schemes = of_connection(worker.cfg, server, addr)
    base["gunicorn.socket"], data = client, b""
    while True:
        if not data:
            with worker.timeout_ctx():
                data = client.recv(RECV_SIZE)
            if not data:  # closed, or idle for too long
                return b""
        environ = parse_head(data, base, schemes) if worker.has_fast_path else None
        if environ is None:
            return data
        end = data.index(b"\r\n\r\n") + 4
        head, data, length = data[:end], data[end:], int(environ.get("CONTENT_LENGTH", 0))
        stream: Any = io.BytesIO(data[:length])
        if arrives_later := len(data) < length:
            unreader = SocketUnreader(client)
            unreader.unread(data)
            stream = Body(LengthReader(unreader, length))
        environ["wsgi.input"] = stream
        worker.yield_to_hub()
        if worker.nr % WATCH == 0:
            gevent.spawn(watch, worker, head, environ.copy(), server, addr)
        if not _respond(worker, client, environ) or getattr(stream, "failed", False):
            return b""
        data = data[length:]
        if arrives_later:
            while stream.read(RECV_SIZE):  # what the application left
                pass
            data = unreader.take_buffered()


def _respond(worker: Any, client: Any, environ: dict[str, Any]) -> bool:
    """Call the application and send its response. Return whether the connection is kept."""
    worker.nr += 1
    if worker.nr >= worker.max_requests and worker.alive:
        worker.log.info("Autorestarting worker after current request.")
        worker.alive = False
    keep_alive = worker.alive and keeps_alive(environ)
    status, headers = "", []
    body: Any = None

    def start_response(line: str, fields: list[tuple[str, str]], exc_info: Any = None) -> None:
        nonlocal status, headers
        status, headers = line, fields

    try:
        try:
            body = worker.wsgi(environ, start_response)
            message = format_response(status, headers, b"".join(body), keep_alive)
        except (Exception, SystemExit):
            worker.log.exception("error handling request %s %s", environ["REQUEST_METHOD"], environ["RAW_URI"])
            write_error(client, 500, "Internal Server Error", "")
            return False
        # gevent's sendall would first ask for the size of the kernel's buffer.
        if (sent := client.send(message)) < len(message):
            client.sendall(memoryview(message)[sent:])
    finally:
        if hasattr(body, "close"):
            body.close()
    return keep_alive


def of_connection(cfg: Any, server: Any, addr: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the environs of a connection's simple requests have in common, and its scheme headers.

    `server` and `addr` are its ends: a pair each, or on a unix socket a path and nothing. By scheme headers a trusted
    peer states that it was itself asked over TLS; they are returned with their values in that case.
    """
    environ: dict[str, Any] = base_environ(cfg)
    environ |= {"wsgi.multithread": True, "SERVER_PROTOCOL": "HTTP/1.1", "SCRIPT_NAME": "", "REMOTE_ADDR": addr}
    if isinstance(addr, tuple):
        environ |= {"REMOTE_ADDR": addr[0], "REMOTE_PORT": str(addr[1])}
    if isinstance(server, tuple):
        environ |= {"SERVER_NAME": server[0], "SERVER_PORT": str(server[1])}
    policy = HeaderPolicy()  # of gunicorn, which decides here too which peers FORWARDED_ALLOW_IPS trusts
    policy.cfg, policy.peer_addr = cfg, addr
    return environ, {variable_of(name): value for name, value in policy._peer_trusted_for_forwarded()[0].items()}


@lru_cache(256)
def variable_of(name: str) -> str:
    """Return the name that a header field has in an environ."""
    variable = name.upper().replace("-", "_")
    return variable if variable in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{variable}"


def parse_head(data: bytes, base: dict[str, Any], schemes: dict[str, str]) -> dict[str, Any] | None:
    """Return the WSGI environ of the simple request that `data` begins with, as gunicorn would make it.

    None if it is not simple. `base` and `schemes` are what `of_connection` returned.
    """
    head = HEAD.match(data.decode("latin-1"))
    if head is None or head.end(2) + len(" HTTP/1.1") > MAX_REQUEST_LINE:
        return None
    method, target, path, query, fields = head.groups("")
    environ = {**base, "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "RAW_URI": target}
    found, scheme = FIELD.findall(fields), ""
    for name, value in found:
        variable, value = variable_of(name), value.strip(" ")
        if variable in UNSUPPORTED_VARIABLES or variable in environ:
            return None
        if variable == "HTTP_CONNECTION" and value.lower() not in ("keep-alive", "close"):
            return None
        if variable == "CONTENT_LENGTH" and not (value.isdigit() and len(value) < 10):
            return None
        if variable in schemes:
            if scheme:
                return None
            scheme = "https" if value == schemes[variable] else "http"
        environ[variable] = value
    environ["wsgi.url_scheme"] = scheme or "http"
    host = HOST.fullmatch(environ.get("HTTP_HOST", ""))
    if host is None or len(found) > MAX_FIELDS:
        return None
    if "SERVER_NAME" not in environ:
        environ |= {"SERVER_NAME": host[1], "SERVER_PORT": host[2] or ("443" if scheme == "https" else "80")}
    return environ


def format_response(status: str, headers: list[tuple[str, str]], body: bytes, keep_alive: bool) -> bytes:
    """Return a response as it is sent; of the application's headers without those that are the server's to set.

    Raises: InvalidResponseHeader, no status (as in WSGI, `200 OK`), or a line break within a line.
    """
    fields = [f"{name}: {value}" for name, value in headers if name.lower() not in SERVER_HEADERS]
    lines = [f"HTTP/1.1 {status}", *fields]
    text = "".join(lines)
    if not status or "\n" in text or "\r" in text:
        raise InvalidResponseHeader("no status, or a line break in a header")
    connection = "keep-alive" if keep_alive else "close"
    lines += "Server: gunicorn", f"Date: {_date(int(time.time()))}", f"Connection: {connection}"
    if status.startswith(("204", "304")):
        body = b""
    else:
        lines.append(f"Content-Length: {len(body)}")
    lines.append("\r\n")
    return "\r\n".join(lines).encode("latin-1") + body
