"""Alibaba Cloud's log service (SLS) on loopback, for tests that drive the real `aliyun-log-python-sdk`.

    with LoopbackSLS() as sls:
        run_a_child(env=os.environ | sls.environ())
        sls.wait_until(lambda: len(sls.logs) == 3)
        sls.mode = "quota"  # from now on
        sls.fail("POST", "/dashboards")  # as for a user who may not

The project and the log store are there, unless it begins with `LoopbackSLS().bare()`.

It is an HTTP proxy that answers itself: the SDK keeps a real-looking endpoint and `http_proxy` leads here, as it would
look up `project.127.0.0.1` otherwise. Errors are those of `error-codes` and `api-sls-2020-12-30-putlogs` in
https://www.alibabacloud.com/help/en/sls/developer-reference/; `loopback_console.py` says what is known of the control
plane's. It is stricter than the service where our client has no reason to differ: the body is lz4, topic and source are
given, keys are distinct.
"""

import base64
import hashlib
import hmac
import json
import math
import re
import select
import socket
import struct
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import lz4.block
from aliyun.log.log_logs_raw_pb2 import LogGroupRaw
from google.protobuf.message import DecodeError
from loopback_console import LOGSTORE, PROJECT, Refused, Request, held, operations, require

MAX_BATCH, MAX_LOG = 10 << 20, 1 << 20  # bytes, before compression
MAX_LOGS = 4096  # in a batch
MAX_SKEW = 900  # seconds
YEAR_2020, YEAR_2100 = 1_577_836_800, 4_102_444_800  # tells seconds from milliseconds, and from a clock never set
REFUSALS = {  # mode: status, code, message
    "throttled": (403, "ShardWriteQuotaExceed", "Write quota is exceed for shard"),
    "quota": (403, "WriteQuotaExceed", "Project write quota exceed: inflow"),
    "error500": (500, "InternalServerError", "Internal server error message."),
    "busy": (503, "ServerBusy", "The server is busy, please try again later."),
    "wrong key": (401, "Unauthorized", "AccessKeyId not found"),
    "no project": (404, "ProjectNotExist", "The Project does not exist"),
    "no logstore": (404, "LogStoreNotExist", "logstore does not exist"),
}


class Service:
    """A server on loopback that behaves by its `mode`, one of `modes`; it comes up on the port that it had before."""

    modes = frozenset({"ok"})

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._handler = handler
        self._mode = "ok"
        self._server: Server | None = None
        # Bound and never listening, it keeps the port ours while the service is down.
        self._port_holder = socket.socket()
        self._port_holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port_holder.bind(("127.0.0.1", 0))
        self.port: int = self._port_holder.getsockname()[1]

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._port_holder.close()

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        assert mode in self.modes, f"{mode!r} is none of {sorted(self.modes)}"
        self._mode = mode

    def up(self) -> None:
        """Listen, on the same port as before."""
        self._server = self._server or Server(self, self._handler)

    def down(self) -> None:
        """Refuse connections, and cut those that are open."""
        if self._server:
            self._server.stop()
            self._server = None


class LoopbackSLS(Service):
    """One project with one log store, what arrived in it, and how it behaves now.

    `logs` holds each accepted log as a dict of its contents (str), `__topic__`, `__source__`, `__time__` (seconds),
    `__time_ns__` and `__tag__:{key}`; `batches` and `batch_bytes` the number of logs and of raw bytes of each accepted
    batch; `outcomes` counts requests by "ok", by error code, or by a mode that gives no answer. All grow under a lock,
    before the client has its answer.

    `mode` is one of `modes`; a request keeps the mode it found. In "hang" a request waits once it was read: `release()`
    lets those that wait go on as "ok", and one whose client has left is forgotten. In "lying" the batch is stored and
    the answer waits, so a client that gives up and sends again stores it twice; "lying reset" stores and then resets
    the connection. In "skew" this clock is an hour ahead.

    `console` holds what the control plane keeps, by kind ("project", "logstore", "index", "dashboard", "savedsearch",
    "job", "record") and name: an index has that of its log store, a record is "{resource}/{id}".

    `key_id`, `secret` and `token` are accepted, and so is what `accept` adds, until it expires.
    """

    modes = frozenset({"ok", "skew", "reset", "hang", "lying", "lying reset", *REFUSALS})
    project, logstore, endpoint, region = "proj", "ls", "cn-test.log.aliyuncs.com", "cn-test"
    key_id, secret = "fake-key-id", "fake-key-secret"
    token: str | None = None  # of STS; where set, each request must carry it

    def __init__(self) -> None:
        super().__init__(Handler)
        self.logs: list[dict[str, Any]] = []
        self.batches: list[int] = []
        self.batch_bytes: list[int] = []
        self.outcomes: Counter[str] = Counter()
        self.console: dict[tuple[str, str], Any] = {
            ("project", self.project): {"projectName": self.project, "description": ""},
            ("logstore", self.logstore): {
                **{"logstoreName": self.logstore, "ttl": 30, "shardCount": 2, "enable_tracking": False},
                **{"appendMeta": True, "autoSplit": True, "maxSplitShard": 64},
            },
        }
        self.credentials: dict[str, tuple[str, str | None, float]] = {}  # key id: secret, token, end (seconds of epoch)
        self.operations = [("POST", "/logstores/([^/]+)/shards/lb", self._put_logs), *operations(self)]
        self._failures: list[tuple[str, str, tuple[int, str, str]]] = []
        self._is_refused: Callable[[dict[str, Any]], bool] = lambda log: False
        self._lock, self._released = threading.Lock(), threading.Event()

    def environ(self) -> dict[str, str]:
        """Return the variables that lead a child process here. Without `token` or `region`, theirs are left out."""
        variables = {
            "http_proxy": f"http://127.0.0.1:{self.port}",
            "no_proxy": "127.0.0.1,localhost",  # other calls on loopback go straight
            "ALIBABA_CLOUD_ACCESS_KEY_ID": self.key_id,
            "ALIBABA_CLOUD_ACCESS_KEY_SECRET": self.secret,
            "ALIBABA_CLOUD_SECURITY_TOKEN": self.token,
            "SLS_ENDPOINT": f"http://{self.endpoint}",
            "SLS_PROJECT": self.project,
            "SLS_LOGSTORE": self.logstore,
            "SLS_REGION": self.region,
        }
        return {name: value for name, value in variables.items() if value}

    def refuse(self, is_refused: Callable[[dict[str, Any]], bool]) -> None:
        """From now on refuse each batch that holds a log for which the predicate is true."""
        self._is_refused = is_refused

    def bare(self) -> Self:
        """Begin with nothing: no project, no log store."""
        self.console.clear()
        return self

    def fail(
        self,
        method: str,
        path: str,
        code: str = "Unauthorized",
        status: int = 401,
        message: str = "denied by sts or ram",
    ) -> None:
        """From now on refuse the requests of a method whose whole path matches; by default as for lack of a right."""
        self._failures.append((method, path, (status, code, message)))

    def heal(self) -> None:
        """Refuse no longer what `fail` named."""
        self._failures.clear()

    def accept(self, key_id: str, secret: str, token: str | None = None, end: float = math.inf) -> None:
        """Accept these credentials too, until a time (seconds of epoch)."""
        self.credentials[key_id] = (secret, token or None, end)

    def expire(self, key_id: str) -> None:
        """End the credentials with this key id, be they those of `environ()`."""
        secret, token, _ = self._known()[key_id]
        self.accept(key_id, secret, token, end=0)

    def _known(self) -> dict[str, tuple[str, str | None, float]]:
        return {self.key_id: (self.secret, self.token, math.inf)} | self.credentials

    def release(self) -> None:
        """Let the requests that hang now go on."""
        waiting, self._released = self._released, threading.Event()
        waiting.set()

    def wait_until(self, met: Callable[[], bool], seconds: float = 30.0) -> None:
        """Wait until `met()` is true."""
        deadline = time.monotonic() + seconds
        while not met():
            assert time.monotonic() < deadline, f"waited {seconds} s in vain; outcomes: {dict(self.outcomes)}"
            time.sleep(0.01)

    def count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1

    def answer(self, request: Request, mode: str) -> Any:
        """Do what a request asks, and return the body of the answer, None for an empty one. Raises: Refused."""
        host = request.headers.get("host", "").removesuffix(":80")
        project, _, rest = host.rpartition("." + self.endpoint)
        # Resources belong to the account, whose host is the endpoint; all else belongs to a project.
        is_account = request.path.startswith("/resources/")
        is_host = host == self.endpoint if is_account else project and not rest
        require(is_host, 400, "InvalidHost", f"Host header {host} is invalid.")
        version = request.headers.get("x-log-apiversion")
        require(version == "0.6.0", 400, "InvalidAPIVersion", f"x-log-apiversion {version} is unsupported.")
        self._check_signature(request, time.time() + (3600 if mode == "skew" else 0))
        if mode in REFUSALS:
            raise Refused(*REFUSALS[mode])
        for method, pattern, refusal in list(self._failures):
            if method == request.method and re.fullmatch(pattern, request.path):
                raise Refused(*refusal)
        if not is_account and (request.method, request.path) != ("POST", "/"):
            held(self, PROJECT, project)
        for method, pattern, operation in self.operations:
            if method == request.method and (match := re.fullmatch(pattern, request.path)):
                return operation(request, *match.groups())
        raise Refused(404, "NotOnLoopback", f"the stand-in has no {request.method} {request.path}")

    def _check_signature(self, request: Request, now: float) -> None:
        given, date = request.headers.get("authorization", ""), request.headers.get("x-log-date", "")
        v4 = re.fullmatch("SLS4-HMAC-SHA256 Credential=([^/]+)/.*", given)
        key = v4 or re.fullmatch("LOG ([^:]+):.*", given)
        if key is None:
            raise Refused(400, "ParameterInvalid", f"Http extend authorization : {given} is invalid.")
        known = self._known()
        require(key[1] in known, 401, "Unauthorized", f"AccessKeyId not found: {key[1]}")
        secret, token, end = known[key[1]]
        try:
            if v4:
                signed_at = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
                expected = sign_v4(request, key[1], secret, self.region)
            else:
                signed_at = parsedate_to_datetime(date or request.headers.get("date", ""))
                expected = sign_v1(request, key[1], secret)
        except ValueError:
            raise Refused(400, "InvalidRequestTime", f"Request time {date} is invalid.") from None
        is_token = request.headers.get("x-acs-security-token") == token
        require(is_token, 401, "Unauthorized", "The security token you provided is invalid.")
        require(time.time() < end, 401, "Unauthorized", "The security token you provided has expired.")
        skew = abs(signed_at.timestamp() - now)
        require(skew <= MAX_SKEW, 400, "RequestTimeExpired", f"Request time {date} has been expired.")
        md5 = hashlib.md5(request.body).hexdigest().upper()
        require(request.headers.get("content-md5", md5) == md5, 401, "SignatureNotMatch", "Content-MD5 not match")
        require(given == expected, 401, "SignatureNotMatch", f"signature {given} not match")

    def _put_logs(self, request: Request, logstore: str) -> None:
        held(self, LOGSTORE, logstore)
        raw = decompress(request)
        logs = decode(raw)
        require(not any(map(self._is_refused, logs)), 400, "PostBodyInvalid", "a log is refused, as the test asked")
        with self._lock:
            self.batches.append(len(logs))
            self.batch_bytes.append(len(raw))
            self.logs += logs  # last, since it is what tests wait for


def own_headers(request: Request, *others: str) -> list[tuple[str, str]]:
    """Return the headers that are signed: the service's own, and others by name."""
    is_signed = re.compile("|".join(("x-acs-.*", "x-log-(?!meta-).*", *others))).fullmatch
    return sorted((name, value.strip()) for name, value in request.headers.items() if is_signed(name))


def sign_v4(request: Request, key_id: str, secret: str, region: str) -> str:
    """Return the Authorization that a request must bear: HMAC-SHA256, with a key for the day and the region.

    The digest is that of the body received, so a request that bears another has not this signature.
    """
    date = request.headers.get("x-log-date", "")
    scope = f"{date[:8]}/{region}/sls/aliyun_v4_request"
    headers = own_headers(request, "host", "content-type")
    canonical = [
        request.method,
        request.path,
        "&".join(f"{k}={quote(v, safe='~')}" if v else k for k, v in sorted(request.query.items())),
        *(f"{name}:{value}" for name, value in headers),
        "",
        ";".join(name for name, _ in headers),
        hashlib.sha256(request.body).hexdigest(),
    ]
    hashed = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
    key = ("aliyun_v4" + secret).encode()
    for part in [*scope.split("/"), f"SLS4-HMAC-SHA256\n{date}\n{scope}\n{hashed}"]:
        key = hmac.digest(key, part.encode(), "sha256")
    return f"SLS4-HMAC-SHA256 Credential={key_id}/{scope},Signature={key.hex()}"


def sign_v1(request: Request, key_id: str, secret: str) -> str:
    """Return the Authorization that a request must bear: HMAC-SHA1. `x-log-date` repeats `Date` and is not signed."""
    headers = request.headers
    query = "&".join(f"{k}={v}" for k, v in sorted(request.query.items()))
    lines = [
        request.method,
        headers.get("content-md5", ""),
        headers.get("content-type", ""),
        headers.get("x-log-date") or headers.get("date", ""),
        *(f"{name}:{value}" for name, value in own_headers(request) if name != "x-log-date"),
        request.path + ("?" + query if query else ""),
    ]
    signature = hmac.digest(secret.encode(), "\n".join(lines).encode(), "sha1")
    return f"LOG {key_id}:{base64.b64encode(signature).decode()}"


def decompress(request: Request) -> bytes:
    """Return the protobuf in a request. Raises: Refused."""
    size, compression = (request.headers.get(name, "") for name in ("x-log-bodyrawsize", "x-log-compresstype"))
    require(re.fullmatch("[0-9]{1,18}", size), 400, "InvalidBodyRawSize", "x-log-bodyrawsize is missing or invalid.")
    require(int(size) <= MAX_BATCH, 400, "PostBodyTooLarge", f"Logs must be less than {MAX_BATCH} bytes")
    require(compression == "lz4", 400, "InvalidCompressType", f"x-log-compresstype {compression} is unsupported.")
    raw = b""
    with suppress(lz4.block.LZ4BlockError):
        raw = lz4.block.decompress(request.body, uncompressed_size=int(size))
    require(raw and len(raw) == int(size), 400, "PostBodyUncompressError", f"not lz4, or not of {size} bytes")
    return raw


def decode(raw: bytes) -> list[dict[str, Any]]:
    """Return the logs of a serialized LogGroup, as `LoopbackSLS.logs` holds them. Raises: Refused."""
    try:
        group = LogGroupRaw.FromString(raw)
    except DecodeError:
        group = LogGroupRaw()  # which is refused
    is_whole = group.IsInitialized() and group.Topic and group.Source
    require(is_whole, 400, "PostBodyInvalid", "Not a LogGroup, or Topic, Source or a required field is missing.")
    require(len(group.Logs) <= MAX_LOGS, 400, "PostBodyTooLarge", f"{len(group.Logs)} logs, more than {MAX_LOGS}")
    common = {"__topic__": group.Topic, "__source__": group.Source}
    common |= {f"__tag__:{tag.Key}": tag.Value for tag in group.LogTags}
    logs = []
    for log in group.Logs:
        require(log.ByteSize() <= MAX_LOG, 400, "PostBodyTooLarge", f"a log is larger than {MAX_LOG} bytes")
        in_seconds = YEAR_2020 <= log.Time < YEAR_2100 and log.Time_ns < 10**9
        require(in_seconds, 400, "InvalidTimestamp", f"Time {log.Time}, Time_ns {log.Time_ns}")
        decoded = common | {"__time__": log.Time, "__time_ns__": log.Time_ns}
        for key, value in ((content.Key, content.Value) for content in log.Contents):
            require(key and key not in decoded, 400, "InvalidKey", f"key {key!r} is empty, reserved or repeated")
            try:
                decoded[key] = value.decode()
            except UnicodeDecodeError:
                raise Refused(400, "InvalidEncoding", "Non-UTF8 characters are in logs.") from None
        logs.append(decoded)
    return logs


class Server(ThreadingHTTPServer):
    """The listening socket and the open connections, a thread for each."""

    daemon_threads = False  # so that server_close waits for them
    request_queue_size = 128

    def __init__(self, service: Service, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", service.port), handler)
        self.service: Any = service
        self.connections: set[socket.socket] = set()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        for connection in self.connections.copy():
            with suppress(OSError):  # it may have ended by itself
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients may leave; anything else is a mistake here or in a test
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 on one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def respond(self) -> None:
        """Read a whole request, and answer it or not, depending on the mode."""
        length = int(self.headers.get("Content-Length", 0))
        received = self.rfile.read(length)
        if len(received) < length:  # the client has left
            self.close_connection = True
            return
        sls, mode = self.server.service, self.server.service.mode
        released = sls._released  # before it is counted: a test may release it at once
        url = urlsplit(self.path)  # an absolute URI, or a path alone
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        if mode in ("reset", "hang"):
            sls.count(mode)
        if mode == "reset":
            return self.reset()
        if mode == "hang" and not self.is_released(released):
            return
        try:
            body = sls.answer(Request(self.command, unquote(url.path), query, headers, received), mode)
        except Refused as refused:
            status, code, message = refused.args
            sls.count(code)
            return self.send(status, json.dumps({"errorCode": code, "errorMessage": message}).encode())
        sls.count(mode if mode.startswith("lying") else "ok")
        if mode == "lying reset":
            return self.reset()
        if mode != "lying" or self.is_released(released):
            self.send(200, b"" if body is None else json.dumps(body).encode())

    do_GET = do_POST = do_PUT = do_DELETE = respond  # noqa: N815 - the names http.server looks for

    def is_released(self, released: threading.Event) -> bool:
        """Wait until `release()`, which is True, or until the client has left or the server stops, which is False."""
        is_released = False
        poll = select.poll()  # select.select takes no descriptor above 1023
        poll.register(self.connection, select.POLLIN)
        while not is_released:
            is_released = released.wait(0.02)
            if poll.poll(0):
                self.close_connection = True
                return False
        return True

    def reset(self) -> None:
        """Close the connection with RST, which is what closing without lingering sends."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()  # it shares the socket
        self.connection.close()

    def send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        self.send_header("x-log-requestid", uuid.uuid4().hex[:24].upper())
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""
