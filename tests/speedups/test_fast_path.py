"""The fast path for simple requests: it reads each as gunicorn does, and hands over the rest as it came."""

import json
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent.socket
import pytest
from conftest import Gunicorn, basic, gunicorn, read_all, records
from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.http import unreader, wsgi
from gunicorn.http.body import LengthReader
from gunicorn.http.errors import InvalidResponseHeader
from gunicorn.http.message import HeaderPolicy
from gunicorn.http.parser import RequestParser
from gunicorn.workers.base import Worker as BaseWorker
from gunicorn.workers.ggevent import GeventWorker
from hypothesis import given, settings
from hypothesis import strategies as st

import speedups
from speedups import fast_path
from speedups.fast_path import (
    MAX_FIELDS,
    MAX_REQUEST_LINE,
    SETTINGS,
    UNSUPPORTED_HEADERS,
    format_response,
    is_possible,
    of_connection,
    parse_head,
)
from speedups.gevent_worker import Worker

ROW = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'
SERVER, CALLER = ("127.0.0.1", 5000), ("192.0.2.7", 4321)  # a caller that is not trusted to state its scheme
PROXY = ("127.0.0.1", 4321)
CFG = Config()


def head_of(*fields: str, line: str = "POST /predict HTTP/1.1", host: str = "Host: localhost:5000") -> bytes:
    """Return a request's head."""
    return "\r\n".join((line, *filter(None, (host,)), *fields, "\r\n")).encode("latin-1")


SIMPLE = [
    head_of("Content-Length: 0"),
    head_of(line="GET /model HTTP/1.1"),
    head_of(line="POST /predict?method=predict_proba&x=%2F HTTP/1.1"),
    head_of("Content-Type: application/json", "Content-Length: 32", "Authorization: Basic cDpw", "Accept: */*"),
    head_of("content-length:5", "x-odd:   a: b,  c  ", "X-Empty:", "X-Blank:   "),
    head_of("Connection: keep-alive", "User-Agent: curl/8 (x; y)"),
    head_of("Connection: close"),
    *(head_of(f"Connection: {each}") for each in ("Keep-Alive", "KEEP-ALIVE", "Close")),
    head_of("X-Forwarded-Proto: https", "X-Forwarded-For: 10.0.0.1, 10.0.0.2"),
    head_of("X-Forwarded-Proto: http"),
    head_of("X-Forwarded-Ssl: on", host="Host: example.com"),
    head_of(line="GET /a/b-c/d.e~f/../g HTTP/1.1"),
    head_of(*(f"X-{number}: {number}" for number in range(MAX_FIELDS - 1))),
    head_of(line="GET /".ljust(MAX_REQUEST_LINE - len(" HTTP/1.1"), "a") + " HTTP/1.1"),
    head_of(f"X-A: {'a' * 8000}"),
]
NOT_SIMPLE = [
    *(head_of(f"{name.title()}: 1") for name in sorted(UNSUPPORTED_HEADERS)),
    head_of("Connection: Upgrade"),
    head_of("Connection: close, X-Request-ID"),
    head_of("Content-Length: 1", "Content-Length: 1"),
    head_of("Content-Length: +1"),
    head_of("Content-Length: 1, 1"),
    head_of("Content-Length: 12345678901"),
    head_of("Content-Length: \xb2"),
    head_of("X-A: 1", "x-a: 2"),
    head_of("X_Forwarded_For: 1"),
    head_of("X-A : 1"),
    head_of(" X-A: 1"),
    head_of("X-A: 1\r\n folded"),
    head_of("X-A: 1\nX-B: 2"),
    head_of("X-A: 1\rX-B: 2"),
    head_of("X-A: \x00"),
    head_of("X-A: \xe9"),
    head_of("X-A: 1\t2"),
    head_of("no colon"),
    head_of(": no name"),
    head_of(host=""),
    head_of("Host: other"),
    head_of(*(f"X-{number}: {number}" for number in range(MAX_FIELDS))),
    head_of(line="GET /".ljust(MAX_REQUEST_LINE + 1 - len(" HTTP/1.1"), "a") + " HTTP/1.1"),
    *(head_of(host=f"Host: {host}") for host in ("", ":80", "a:b", "a:1:2", "[::1]:80", "a:")),
    *(
        head_of(line=line)
        for line in (
            *("POST /predict HTTP/1.0", "POST /predict HTTP/2.0", "POST /predict", "POST  /predict HTTP/1.1"),
            *("post /predict HTTP/1.1", "PUT /predict HTTP/1.1", "HEAD /model HTTP/1.1", "POST //predict HTTP/1.1"),
            *("POST /predict#a HTTP/1.1", "POST /pre%64ict HTTP/1.1", "POST / HTTP/1.1", "POST predict HTTP/1.1"),
            *("POST http://a/predict HTTP/1.1", "POST * HTTP/1.1", "POST /pr\xe9dict HTTP/1.1", "POST /a?b#c HTTP/1.1"),
            *("POST /predict?a='b' HTTP/1.1", "POST /predict/ HTTP/1.1", " POST /predict HTTP/1.1"),
        )
    ),
    b"\r\n" + SIMPLE[0],
    SIMPLE[0][:-1],
    SIMPLE[0][:-2],
    b"",
]


def parsed_here(sent: bytes, addr: Any = CALLER, server: Any = SERVER) -> dict[str, Any] | None:
    """Return the environ that the fast path makes."""
    return parse_head(sent, *of_connection(CFG, server, addr))


def parsed_by_gunicorn(sent: bytes, addr: Any = CALLER, server: Any = SERVER) -> tuple[dict[str, Any], bool]:
    """Return the environ that gunicorn makes, and whether it would close the connection afterwards."""
    request = next(RequestParser(CFG, iter([sent]), addr))
    _, environ = wsgi.create(request, None, addr, server, CFG)
    return environ | {"wsgi.multithread": True}, request.should_close()  # which its asynchronous workers set


def check_same(sent: bytes, addr: Any = CALLER, server: Any = SERVER) -> None:
    """Check that gunicorn accepts a request too, and makes the same of it."""
    mine = parsed_here(sent, addr, server)
    assert mine is not None
    theirs, closes = parsed_by_gunicorn(sent, addr, server)
    only_theirs = {"wsgi.early_hints", "wsgi.input", "gunicorn.socket"}
    ignored = {"wsgi.errors"}  # an object each
    assert mine.keys() | only_theirs == theirs.keys()
    assert {k: v for k, v in mine.items() if k not in ignored} == {
        k: v for k, v in theirs.items() if k not in only_theirs | ignored
    }
    assert closes == (mine.get("HTTP_CONNECTION", "").lower() == "close")


@pytest.mark.parametrize("addr", [CALLER, PROXY, ""], ids=["caller", "proxy", "unix"])
@pytest.mark.parametrize("sent", SIMPLE)
def test_simple_request_is_read_as_gunicorn_reads_it(sent: bytes, addr: Any) -> None:
    check_same(sent + ROW, addr, SERVER if addr else "/run/server.sock")


@pytest.mark.parametrize("sent", NOT_SIMPLE)
def test_any_other_request_is_left_to_gunicorn(sent: bytes) -> None:
    assert parsed_here(sent) is None


@pytest.mark.parametrize("second", ["X-Forwarded-Proto: https", "X-Forwarded-Ssl: on"])
def test_proxy_that_gives_its_scheme_twice_is_left_to_gunicorn(second: str) -> None:
    assert parsed_here(head_of("X-Forwarded-Protocol: ssl", second), PROXY) is None
    assert parsed_here(head_of("X-Forwarded-Protocol: ssl", second), CALLER) is not None  # which is not trusted anyway


# Pieces that are put together to heads, of which a tenth is simple, and most others nearly.
SIMPLE_NAMES = ["Host", "Content-Length", "content-type", "X-A", "X-Forwarded-Proto", "Connection", "Via"]
VALUES = ["0", "4", "localhost", "close", "keep-alive", "https", "a: b", "", "100-continue", "a\r\n b", "a\nb", "é"]
FIELD = st.builds(
    "{}{}{}".format,
    st.sampled_from(SIMPLE_NAMES * 4 + ["TE", "Expect", "X_A"]),
    st.sampled_from([": ", ":", ":  "] * 5 + [" :", ""]),
    st.one_of(st.sampled_from(VALUES[:8] * 3 + VALUES), st.text(st.characters(max_codepoint=255), max_size=4)),
)
LINE = st.builds(
    "{}{}{}".format,
    st.sampled_from(["GET ", "POST "] * 5 + ["PUT ", "get ", "GET  "]),
    st.one_of(st.sampled_from(["/predict", "/a?b=c", "/a/b"] * 3 + ["/a#b", "//a", "/%61"]), st.text("/a.?&=%; é")),
    st.sampled_from([" HTTP/1.1"] * 8 + [" HTTP/1.0", ""]),
)


ENDS = st.sampled_from([(CALLER, SERVER), (PROXY, SERVER), ("", "/run/server.sock")])


@settings(max_examples=1500, deadline=None)
@given(LINE, st.lists(FIELD, max_size=4), st.sampled_from(["Host: a", "Host: b:80", ""]), ENDS)
def test_no_request_is_simple_that_gunicorn_would_read_otherwise(
    line: str, fields: list[str], host: str, ends: Any
) -> None:
    sent = head_of(*fields, line=line, host=host)
    if parsed_here(sent, *ends) is not None:
        check_same(sent, *ends)


@settings(max_examples=800, deadline=None)
@given(st.sampled_from(SIMPLE), ENDS, st.data())
def test_no_byte_makes_a_request_simple_that_gunicorn_would_read_otherwise(sent: bytes, ends: Any, data: Any) -> None:
    at = data.draw(st.integers(0, len(sent) - 1))
    put = data.draw(st.one_of(st.binary(max_size=2), st.sampled_from([b"\r\n", b"\n", b"\r", b" ", b":", b"\t"])))
    changed = sent[:at] + put + sent[at + data.draw(st.integers(0, 1)) :]
    if parsed_here(changed, *ends) is not None:
        check_same(changed, *ends)


NAMES = ("Accept", "Accept-Encoding", "Authorization", "User-Agent", "X-Forwarded-For", "X-Request-ID", "Cookie", "Via")
ODD = (
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b":",
    b"\t",
    b"\0",
    b"\xe9",
    b"",
    b"\r\n ",
    b"Host: b\r\n",
    b"Content-Length: 1\r\n",
)


def made_head(choose: random.Random) -> bytes:
    """Return a head as a client may send it; a third have something odd at one place."""
    path = "".join(f"/{choose.choice(('predict', 'model', 'a-b', 'v1.0', '~x_'))}" for _ in range(choose.randint(1, 4)))
    query = choose.choice(("", "", "?a=b", "?a=%2F&b=1+2", "?=", "?a=b&a=c"))
    fields = [
        *(
            f"{name}:{' ' * choose.randint(0, 2)}{value_of(choose)}"
            for name in choose.sample(NAMES, choose.randint(0, 5))
        ),
        *choose.choice(([], ["Connection: keep-alive"], ["Connection: Keep-Alive"], ["connection: close"])),
        *choose.choice(([], [f"Content-Length: {choose.randint(0, 10**9)}"], ["Content-Type: application/json"])),
        *choose.choice(([], [], [], ["X-Forwarded-Proto: https"], ["X-Forwarded-Ssl: on"])),
    ]
    choose.shuffle(fields)
    host = f"Host: {choose.choice(('localhost', 'a.example:8080', '10.0.0.1:80'))}"
    sent = head_of(*fields, line=f"{choose.choice(('GET', 'POST'))} {path}{query} HTTP/1.1", host=host)
    if choose.random() < 1 / 3:
        at = choose.randrange(len(sent))
        sent = sent[:at] + choose.choice((*ODD, choose.randbytes(1))) + sent[at + choose.randint(0, 2) :]
    return sent


def value_of(choose: random.Random) -> str:
    """Return a field's value."""
    return "".join(map(chr, choose.choices(range(32, 127), k=choose.randint(0, 40))))


@pytest.mark.long
def test_none_of_20_000_heads_is_read_otherwise_than_by_gunicorn() -> None:
    choose, taken = random.Random(18), 0
    for _ in range(20_000):
        sent, ends = made_head(choose), choose.choice([(CALLER, SERVER), (PROXY, SERVER), ("", "/run/server.sock")])
        if parsed_here(sent, *ends) is not None:
            taken += 1
            check_same(sent, *ends)
    assert taken > 12_000


# --- whole connections, in this process

CHUNKED = head_of("Transfer-Encoding: chunked") + b"3\r\nabc\r\n2;a=b\r\nde\r\n0\r\n\r\n"
CONNECTIONS = {
    "all simple": head_of("Content-Length: 5", "X-A: 1") + b"\r\n\r\nx" + head_of(line="GET /a?b=c HTTP/1.1"),
    "others between": head_of("Content-Length: 2") + b"{}" + CHUNKED + head_of("Connection: Keep-Alive", "X-B: 2"),
    "one that ends it": head_of("Content-Length: 3", "Connection: Close") + b"[1]" + head_of("X-C: 3"),
    "one that is malformed": head_of("Content-Length: 1") + b"1" + head_of("X-A : 1") + head_of("X-D: 4"),
}


def echo(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Answer with what a request consists of."""
    known = {name: value for name, value in environ.items() if isinstance(value, str)}
    body = json.dumps([sorted(known.items()), environ["wsgi.input"].read().decode()]).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def make_worker(has_fast_path: bool) -> Worker:
    """Return a worker without a process that answers by `echo`."""
    worker = Worker.__new__(Worker)
    worker.cfg, worker.wsgi, worker.has_fast_path = CFG, echo, has_fast_path
    worker.nr, worker.max_requests, worker.alive, worker.worker_connections = 0, sys.maxsize, True, 1000
    names = ("access", "debug", "error", "exception", "info", "warning")
    worker.log = SimpleNamespace(**{name: lambda *arguments: None for name in names})
    return worker


def talk(worker: Worker, *pieces: bytes) -> list[Any]:
    """Send pieces over a connection, each when the one before has been read; return the answers."""
    ours, theirs = gevent.socket.socketpair()
    listener = SimpleNamespace(getsockname=lambda: SERVER)
    serving, reading = gevent.spawn(worker.handle, listener, theirs, CALLER), gevent.spawn(read_all, ours)
    with suppress(BrokenPipeError):  # the connection has ended
        for piece in pieces:
            ours.sendall(piece)
            gevent.sleep(0.0001)
        ours.shutdown(socket.SHUT_WR)
    received = reading.get()
    ours.close()
    serving.join()
    found = re.findall(rb"HTTP/1.1 (\d+).*?\r\n\r\n(\[.*?\](?=HTTP|$))?", received, re.DOTALL)
    return [(status, re.search(rb"Connection: ([a-z-]+)", received)[1], body) for status, body in found]  # type: ignore[index]


@pytest.mark.parametrize("name", CONNECTIONS)
def test_connection_cut_at_any_byte_is_answered_as_gunicorn_alone_answers_it(name: str) -> None:
    sent = CONNECTIONS[name]
    expected = talk(make_worker(False), sent)
    assert len(expected) >= 1
    for cut in range(len(sent) + 1):
        assert talk(make_worker(True), sent[:cut], sent[cut:]) == expected, (cut, sent[:cut])


def test_one_in_a_thousand_heads_is_read_by_gunicorn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[Any] = []
    monkeypatch.setattr(fast_path, "watch", lambda worker, *request: watched.append(request))
    worker, sent = make_worker(True), [head_of(f"X-A: {number}") for number in range(4)]
    worker.nr = fast_path.WATCH - 2
    talk(worker, *sent)
    assert fast_path.WATCH == 1000
    assert [head for head, *_ in watched] == [sent[2]]


@pytest.mark.parametrize(
    "changed",
    [
        {"QUERY_STRING": "a=b"},
        {"HTTP_X_NEW": ""},
        {"HTTP_HOST": None},
        {"CONTENT_LENGTH": "3"},
        {"HTTP_CONNECTION": "close"},
    ],
)
def test_head_that_gunicorn_reads_otherwise_ends_the_fast_path(changed: dict[str, Any]) -> None:
    sent, worker, lines, counted = head_of("Content-Length: 2"), make_worker(True), [], []  # type: ignore[var-annotated]
    worker.log.error = lambda line, *arguments: lines.append(line % arguments)
    hooks = {"on_fast_path_difference": [lambda: counted.append(1)]}
    worker.wsgi = SimpleNamespace(extensions=hooks)  # type: ignore[assignment]
    environ = parsed_here(sent)
    assert environ is not None
    fast_path.watch(worker, sent, environ.copy(), SERVER, CALLER)
    assert (worker.has_fast_path, lines) == (True, [])
    for _ in range(2):
        environ = {name: value for name, value in (environ | changed).items() if value is not None}
        fast_path.watch(worker, sent, environ, SERVER, CALLER)
    assert (worker.has_fast_path, len(lines), counted) == (False, 1, [1])
    assert next(iter(changed)) in lines[0]


def test_head_that_gunicorn_rejects_ends_the_fast_path() -> None:
    worker = make_worker(True)
    fast_path.watch(worker, head_of("X-A : 1"), {}, SERVER, CALLER)
    assert not worker.has_fast_path


# --- what is sent


def test_answer_has_the_applications_headers_and_the_servers_own() -> None:
    headers = [
        ("X-A", "1"),
        ("content-length", "7"),
        ("Connection", "close"),
        ("Transfer-Encoding", "chunked"),
        ("Date", ""),
    ]
    head, _, body = format_response("200 OK", headers, b"{}", True).partition(b"\r\n\r\n")
    line, *fields = head.decode().split("\r\n")
    assert (line, body) == ("HTTP/1.1 200 OK", b"{}")
    names = [field.split(": ")[0] for field in fields]
    assert names == ["X-A", "Server", "Date", "Connection", "Content-Length"]
    assert (fields[-2], fields[-1]) == ("Connection: keep-alive", "Content-Length: 2")
    assert b"Connection: close" in format_response("200 OK", [], b"", False)


@pytest.mark.parametrize("status", ["204 NO CONTENT", "304 NOT MODIFIED"])
def test_answer_without_a_body_has_neither_body_nor_length(status: str) -> None:
    message = format_response(status, [("Content-Length", "2")], b"{}", True)
    assert message.endswith(b"keep-alive\r\n\r\n")
    assert b"Length" not in message


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        ("", []),
        ("200 OK\r\nX-B: 2", []),
        *(("200 OK", [each]) for each in (("X-A", "1\r\nX-B: 2"), ("X-A", "1\nX-B: 2"), ("X-A", "\r"), ("X\nA", ""))),
    ],
)
def test_answer_that_would_be_split_is_not_made(status: str, headers: Any) -> None:
    with pytest.raises(InvalidResponseHeader):
        format_response(status, headers, b"", True)


# --- through a real worker


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, iris_file: Path) -> Iterator[Gunicorn]:
    """A server of one worker."""
    with gunicorn(tmp_path_factory.mktemp("worker"), model_path=iris_file) as running:
        yield running


def call(body: bytes = ROW, *fields: str, password: str = "correct horse") -> bytes:
    """Return a whole request to /predict."""
    known = (f"Content-Length: {len(body)}", f"Authorization: {basic('predict', password)}")
    return head_of("Content-Type: application/json", *known, *fields) + body


def answers(received: bytes) -> list[tuple[int, dict[str, str], Any]]:
    """Take apart what came over a connection: status, headers, decoded body."""
    found = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        line, *fields = head.decode().split("\r\n")
        headers = dict(each.split(": ", 1) for each in fields)
        length = int(headers["Content-Length"])
        found.append((int(line.split()[1]), headers, json.loads(received[:length])))
        received = received[length:]
    return found


def test_requests_sent_at_once_are_answered_in_turn_simple_or_not(server: Gunicorn) -> None:
    chunked = head_of(
        "Content-Type: application/json", "Transfer-Encoding: chunked", f"Authorization: {basic('predict')}"
    )
    chunked += b"%x\r\n%s\r\n0\r\n\r\n" % (len(ROW), ROW)
    sent = [call(), call(b'{"data": []}'), call(), chunked, call(b"{"), call(ROW, "Connection: close")]
    got = answers(server.raw(b"".join(sent)))
    assert [status for status, _, _ in got] == [200, 422, 200, 200, 400, 200]
    assert {str(body) for status, _, body in got if status == 200} == {"{'prediction': [0]}"}
    assert [headers["Connection"] for _, headers, _ in got] == ["keep-alive"] * 5 + ["close"]
    assert all(headers["Server"] == "gunicorn" and headers["Date"].endswith("GMT") for _, headers, _ in got)


@pytest.mark.parametrize("size", [1, 7, 150, 10_000])
def test_request_may_come_in_pieces_of_any_size(server: Gunicorn, size: int) -> None:
    sent = call(ROW.ljust(9000 if size > 1000 else 200)) + call(ROW, "Connection: close")
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(sent), size):
            connection.sendall(sent[at : at + size])
            time.sleep(0.001)
        assert [status for status, _, _ in answers(read_all(connection))] == [200, 200]


def test_body_behind_its_head_is_read_and_what_follows_is_the_next_request(server: Gunicorn) -> None:
    first, second = call(ROW.ljust(100_000)), call(ROW, "Connection: close")
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(first[:300])
        time.sleep(0.2)
        connection.sendall(first[300:] + second)
        assert [status for status, _, _ in answers(read_all(connection))] == [200, 200]


@pytest.mark.parametrize(
    ("path", "expected"), [("//predict", 200), ("/predict//", 404), ("/predict/", 404), ("//", 405)]
)
def test_path_with_too_many_slashes_is_answered_without_a_redirect(path: str, expected: int, server: Gunicorn) -> None:
    known = {"Authorization": basic("predict"), "Content_Type": "application/json"}
    status, headers, body = server.ask("POST", path, ROW, **known)
    assert (status, headers["Location"]) == (expected, None)
    assert status == 200 or json.loads(body)["status"] == expected


def test_body_that_is_not_read_is_not_taken_for_a_request(server: Gunicorn) -> None:
    smuggled = call(ROW, "X-Request-ID: smuggled")
    got = answers(server.raw(call(smuggled, password="wrong") + call(ROW, "Connection: close")))
    assert [status for status, _, _ in got] == [401, 200]
    assert "smuggled" not in str(got)


ODD_APPLICATION = """
import server

class Pieces(list):
    def close(self):
        raise RuntimeError("as it closed")

def odd(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/raises":
        raise RuntimeError("before it answered")
    if path == "/disk":
        raise OSError(28, "No space left on device")
    if path == "/exits":
        raise SystemExit(3)
    if path != "/silent":
        start_response("200 OK", [("X-A", "1\\r\\nSet-Cookie: a=b" if path == "/splits" else "1")])
    return Pieces([b"{}"]) if path == "/closes" else [b"{}"]

app = server.app
app.wsgi_app = odd
"""


@pytest.mark.parametrize("path", ["/raises", "/disk", "/exits", "/silent", "/splits", "/closes"])
def test_application_that_fails_gives_one_answer_and_a_line_in_the_log(path: str, odd: Gunicorn) -> None:
    logged = odd.log.stat().st_size
    received = odd.raw(head_of(line=f"GET {path} HTTP/1.1") + head_of(line="GET /fine HTTP/1.1", host="Host: second"))
    assert received.count(b"HTTP/1.1 ") == 1
    assert received.startswith(b"HTTP/1.1 200" if path == "/closes" else b"HTTP/1.1 500")
    assert b"Set-Cookie" not in received
    assert b"before it" not in received
    assert "Traceback" in odd.log.read_text()[logged:]
    assert odd.raw(head_of("Connection: close", line="GET /fine HTTP/1.1")).startswith(b"HTTP/1.1 200")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, iris_file: Path) -> Iterator[Gunicorn]:
    """A worker whose application misbehaves."""
    place = tmp_path_factory.mktemp("odd")
    (place / "odd.py").write_text(ODD_APPLICATION)
    with gunicorn(place, "odd:app", model_path=iris_file) as running:
        yield running


@pytest.mark.parametrize("first", ["simple", "not simple"])
def test_caller_that_never_waits_does_not_keep_others_waiting(first: str, server: Gunicorn) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Pad: ".ljust(60, b"a") + b"\r\n\r\n"  # 128 are just a read
    enough = threading.Event()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        if first == "not simple":
            connection.sendall(request.replace(b"GET", b"HEAD"))

        def read() -> None:
            with suppress(OSError):  # it may be reset as it ends
                while connection.recv(2**20):
                    pass

        reader = threading.Thread(target=read)
        reader.start()

        def send() -> None:
            with suppress(OSError):
                while not enough.is_set():
                    connection.sendall(request * 1024)
                connection.shutdown(socket.SHUT_RDWR)

        sender = threading.Thread(target=send)
        sender.start()
        time.sleep(0.3)
        try:
            for _ in range(3):
                assert server.ask("GET", "/healthz")[0] == 200
            assert sender.is_alive()  # the flood did not end before
        finally:
            enough.set()
            sender.join()
            reader.join()


@pytest.mark.long
@pytest.mark.parametrize("arguments", [(), ("--worker-class", "gevent")], ids=["this worker", "gunicorn's"])
def test_bytes_after_a_body_that_was_given_up_are_no_request(
    tmp_path: Path, iris_file: Path, arguments: tuple[str, ...]
) -> None:
    inner = call(b"", "X-Request-ID: smuggled")
    length = 16_000 // len(inner) * len(inner)
    given = (f"Content-Length: {length}", f"Authorization: {basic('predict')}")
    outer = head_of("Content-Type: application/json", *given)

    def send(number: int) -> None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(outer)
            time.sleep(0.95 + number * 0.0007)  # so that some arrive just when the time for the body is over
            for _ in range(length // len(inner)):
                connection.sendall(inner)
                time.sleep(0.008)

    with (
        gunicorn(tmp_path, *arguments, model_path=iris_file, body_timeout=1) as running,
        ThreadPoolExecutor(40) as pool,
    ):
        list(pool.map(send, range(120)))
        running.wait_until(lambda: len(records(running.journal_dir)) > 100)
        time.sleep(2.0)  # what is left comes with the next sweep
        found = records(running.journal_dir)
    assert len(found) > 100
    assert {record["status"] for record in found} <= {408, 400}
    assert not [record for record in found if record["request_id"] == "smuggled"]


DRIFTED_APPLICATION = """
import server
from speedups import fast_path

parse_head, fast_path.WATCH = fast_path.parse_head, 1

def drifted(data, base, schemes):
    environ = parse_head(data, base, schemes)
    if environ and environ.get("HTTP_X_DRIFT"):
        environ["HTTP_X_DRIFT"] += "!"
    return environ

fast_path.parse_head = drifted
app = server.app
"""


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """Return what comes over a connection until something has."""
    received = b""
    while end not in received:
        received += connection.recv(4096)
    return received


def test_fast_path_that_has_drifted_turns_itself_off_and_is_counted(tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "drifted.py").write_text(DRIFTED_APPLICATION)
    with gunicorn(tmp_path, "drifted:app", model_path=iris_file) as running:

        def metric() -> str:
            text = running.ask("GET", "/metrics", Authorization=basic("metrics"))[2].decode()
            (line,) = re.findall("^prediction_fast_path_differences_total .*", text, re.MULTILINE)
            return line.split()[1]  # type: ignore[no-any-return]

        assert metric() == "0.0"
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
            for _ in range(3):  # on a connection that is open already, too
                connection.sendall(head_of("X-Drift: 1", line="GET /healthz HTTP/1.1"))
                assert read_until(connection, b"ok").startswith(b"HTTP/1.1 200")
                running.wait_until(lambda: "fast path is off" in running.log.read_text(), 30)
        assert (
            running.log.read_text().count("the fast path is off: gunicorn reads a request differently: HTTP_X_DRIFT")
            == 1
        )
        assert metric() == "1.0"


@pytest.mark.parametrize("value", ["0", "1"])
def test_setting_turns_the_fast_path_off(value: str, tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, fast_path=value) as running:
        answer = running.raw(head_of("Connection: close", line="GET /healthz HTTP/1.1"))
        # gunicorn puts its own headers first
        assert (answer.index(b"Server: ") < answer.index(b"Content-Type: ")) == (value == "0")


def test_fast_path_ends_idle_connections_without_the_worker_of_operations(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, extensions="-operations.workers", keepalive=1) as running:
        assert "Using worker: speedups.gevent_worker.Worker + GeventWorker\n" in running.log.read_text()
        answer = running.raw(head_of(line="GET /healthz HTTP/1.1"))  # until the server closes
        assert answer.index(b"Content-Type: ") < answer.index(b"Server: ")


def is_refused(port: int) -> bool:
    """Return whether nobody listens on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_connection_is_served_on_when_a_stop_has_closed_the_listener(tmp_path: Path, iris_file: Path) -> None:
    chunked = head_of(
        *("Content-Type: application/json", "Transfer-Encoding: chunked", "Connection: close"),
        f"Authorization: {basic('predict')}",
    )
    without = "-operations.workers,-operations.last_connections"
    with (
        gunicorn(tmp_path, model_path=iris_file, extensions=without, keepalive=30, graceful_timeout=30) as running,
        socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection,
    ):
        connection.sendall(call())
        while not connection.recv(2**16).endswith(b"}\n"):
            pass
        running.process.send_signal(signal.SIGTERM)
        running.wait_until(lambda: is_refused(running.port))
        connection.sendall(chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(ROW), ROW))
        assert [status for status, _, _ in answers(read_all(connection))] == [200]


def test_version_of_gunicorn_that_was_not_tested_reads_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_possible(CFG, SimpleNamespace(access_log_enabled=False))
    monkeypatch.setattr("gunicorn.__version__", "27.99.0")
    with pytest.raises(speedups.UnexpectedInternals, match=r"27\.99\.0"):
        is_possible(CFG, SimpleNamespace(access_log_enabled=False))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("accesslog", "-"), ("certfile", "a"), ("keepalive", 0), ("statsd_host", "localhost:8125"), ("logconfig", "a")],
)
def test_gunicorn_gets_all_requests_if_it_is_configured_to_do_more_with_them(setting: str, value: Any) -> None:
    def simple() -> bool:
        return is_possible(cfg, SimpleNamespace(access_log_enabled=Logger._compute_access_log_enabled(self)))

    cfg = Config()
    self = SimpleNamespace(cfg=cfg)
    for name in ("keepalive", "graceful_timeout", "timeout", "worker_connections", "workers"):  # as in gunicorn.conf.py
        cfg.set(name, 20)
    assert simple()
    cfg.set(setting, value)
    assert not simple()


def test_each_of_the_settings_is_checked() -> None:
    values = {
        "http_protocols": "h1,h2",
        "limit_request_field_size": 9,
        "limit_request_fields": 3,
        "limit_request_line": 9,
    }
    values |= {
        "logger_class": "odd.Logger",
        "post_request": lambda worker, req: None,
        "pre_request": lambda worker, req: None,
    }
    values |= {"protocol": "uwsgi", "proxy_protocol": "auto"}
    assert values.keys() == set(SETTINGS)
    for name, value in values.items():
        cfg = Config()
        assert is_possible(cfg, SimpleNamespace(access_log_enabled=False))
        cfg.set(name, value)
        assert not is_possible(cfg, SimpleNamespace(access_log_enabled=False)), name


def test_access_log_is_written_if_it_is_configured(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, "--access-logfile", "-", model_path=iris_file) as running:
        assert running.predict([[5.1, 3.5, 1.4, 0.2]])[0] == 200
        running.wait_until(lambda: '"POST /predict HTTP/1.1" 200' in running.log.read_text(), 30)


def test_worker_that_has_answered_its_share_is_replaced_and_no_request_fails(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, "--max-requests", "20", model_path=iris_file) as running:
        first = running.workers()
        for _ in range(60):
            assert running.predict([[5.1, 3.5, 1.4, 0.2]])[0] == 200
        running.wait_until(lambda: running.workers() not in (first, []))
        assert running.predict([[5.1, 3.5, 1.4, 0.2]])[0] == 200
        logged = re.findall(r"\[(\d+)\] \[INFO\] Autorestarting worker", running.log.read_text())
        assert len(logged) == len(set(logged)) >= 1  # each worker once; on a slow machine a second one gets to its 20


# --- gunicorn in another version


def more_in_the_environ(*arguments: Any) -> Any:
    response, environ = wsgi.create(*arguments)
    return response, environ | {"gunicorn.new": 1}


class OtherReader(LengthReader):  # type: ignore[misc]  # gunicorn has no types
    def read(self, size: int) -> bytes:
        return super().read(size)[:1]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (fast_path, "create", more_in_the_environ),
        (fast_path, "LengthReader", OtherReader),
        (HeaderPolicy, "_peer_trusted_for_forwarded", None),
        (unreader, "SocketUnreader", None),
    ],
)
def test_gunicorn_that_has_changed_reads_all_requests(
    owner: Any, name: str, other: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if other is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, other)
    if owner is unreader:
        monkeypatch.delitem(sys.modules, "speedups.fast_path")  # so that it is imported again
        monkeypatch.delattr(speedups, "fast_path")
    worker = Worker.__new__(Worker)
    worker.cfg, worker.log = Config(), SimpleNamespace(access_log_enabled=False)
    worker.wsgi = echo
    monkeypatch.setattr(BaseWorker, "load_wsgi", lambda self: None)
    worker.load_wsgi()
    assert not worker.has_fast_path
    assert caplog.text.count("fast_path is left off") == 1
    given = []
    monkeypatch.setattr(GeventWorker, "handle", lambda self, *arguments: given.append(arguments))
    worker.handle("listener", "client", CALLER)
    assert given == [("listener", "client", CALLER)]


def test_worker_on_a_loop_that_does_not_count_its_rounds_still_yields(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, naps, until = Worker.__new__(Worker), [], time.monotonic() + 0.5
    monkeypatch.setattr("gevent.get_hub", lambda: SimpleNamespace(loop=object()))
    monkeypatch.setattr("gevent.sleep", naps.append)
    while not naps and time.monotonic() < until:
        worker.yield_to_hub()
    assert naps
