"""Attacks on connections: while they last, a good caller is answered, and afterwards nothing of them is left.

Each fails when its protection is taken away. Times lie on a busy machine: of what a good caller waits, the time is
taken off for which it, or the worker, waited for a processor. And it is compared with what it waited just before.
"""

import os
import re
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
from conftest import Gunicorn, basic, free_port, gunicorn, records
from nginx_tools import certificate

pytestmark = pytest.mark.long
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")

BODY = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'
HEADERS = {"Content-Type": "application/json", "Authorization": basic("predict")}


@contextmanager
def attack(
    name: str, server: Gunicorn, connections: int, *authorization: str, over: str = "http", again: bool = True
) -> Iterator[None]:
    """Attack a server meanwhile (attacks.py)."""
    command = [sys.executable, Path(__file__).with_name("attacks.py"), name, str(server.port), str(connections)]
    process = subprocess.Popen([*command, over, "again" if again else "once", *authorization])
    try:
        time.sleep(1.5)
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def seconds_in_queue(process: int | str) -> float:
    """Return for how long the main thread of a process has waited for a processor so far."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9


def clock(server: Gunicorn) -> Callable[[], float]:
    """Return a clock that stands still while a server's worker, or this thread, waits for a processor."""
    (worker,) = server.workers()
    return lambda: time.monotonic() - seconds_in_queue(worker) - seconds_in_queue("thread-self")


def ask(connection: HTTPConnection) -> int:
    """Ask for a prediction; return the status."""
    connection.request("POST", "/predict", BODY, HEADERS)
    answer = connection.getresponse()
    answer.read()
    return answer.status


def waits(server: Gunicorn, seconds: float) -> list[float]:
    """Ask for a prediction again and again; return what each took, in seconds. All of them must be 200."""
    found, until, now = [], time.monotonic() + seconds, clock(server)
    with closing(server.connect(60.0)) as connection:
        while time.monotonic() < until:
            began = now()
            assert ask(connection) == 200
            found.append(now() - began)
            time.sleep(0.005)
    return found


def percentile(values: list[float], percent: float) -> float:
    """Return a percentile."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def check_good_caller(server: Gunicorn, calm: list[float], seconds: float, limit: float) -> None:
    """Check that a good caller waits for at most 20 times of what it waits otherwise, or for `limit` seconds."""
    found = waits(server, seconds)
    print(f"calm p50 {1e3 * statistics.median(calm):.1f} ms; now p50 {1e3 * statistics.median(found):.1f}", end=" ")
    print(f"p99 {1e3 * percentile(found, 99):.1f} max {1e3 * max(found):.1f} ms of {len(found)}")
    assert percentile(found, 99) <= max(20 * statistics.median(calm), limit)


def memory(server: Gunicorn) -> float:
    """Return the resident memory of a server's worker, in MB."""
    (worker,) = server.workers()
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{worker}/status").read_text())
    assert found
    return int(found[1]) / 1000


def descriptors(server: Gunicorn) -> int:
    """Count the file descriptors of a server's worker."""
    (worker,) = server.workers()
    return len(os.listdir(f"/proc/{worker}/fd"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, iris_file: Path) -> Iterator[Gunicorn]:
    """A server of one worker."""
    with gunicorn(tmp_path_factory.mktemp("sockets"), model_path=iris_file) as running:
        yield running


@pytest.fixture(scope="module")
def calm(server: Gunicorn) -> list[float]:
    """What a good caller waits while nobody attacks."""
    return waits(server, 2.0)


@pytest.mark.parametrize(
    ("name", "connections", "authorization", "limit"),
    [
        ("chunks", 16, (basic("predict"),), 0.3),
        ("chunks", 16, (), 0.3),
        ("pipeline", 16, (), 0.2),
        ("pipeline", 40, (), 0.2),
        ("pipeline_not_simple", 40, (), 0.2),
        ("fall_silent", 40, (), 0.2),
        ("malformed", 16, (), 0.2),
        ("half_body", 100, (), 0.2),
    ],
)
def test_good_caller_is_answered_during(
    server: Gunicorn, calm: list[float], name: str, connections: int, authorization: Any, limit: float
) -> None:
    before, at_rest = memory(server), descriptors(server)
    logged, began = server.log.stat().st_size, time.monotonic()
    with attack(name, server, connections, *authorization):
        check_good_caller(server, calm, 5.0, limit)
        assert memory(server) < before + 300
        assert server.log.stat().st_size - logged < 10_000 * (time.monotonic() - began)
    server.wait_until(lambda: descriptors(server) <= at_rest + 3, 60)


# --- descriptors

FEW_DESCRIPTORS = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")


@needs_openssl
@pytest.mark.parametrize("over", ["http", "https"])
@pytest.mark.parametrize("name", ["half_body", "half_handshake"])
def test_connections_that_send_half_of_something_keep_no_descriptor(
    tmp_path: Path, iris_file: Path, name: str, over: str
) -> None:
    arguments: tuple[str, ...] = ()
    if over == "https":
        made, key = certificate(tmp_path)
        arguments = "--certfile", str(made), "--keyfile", str(key)
    with gunicorn(tmp_path, *arguments, model_path=iris_file, keepalive=5, within=FEW_DESCRIPTORS) as running:
        if over == "https":
            context = ssl.create_default_context(cafile=str(made))
            running.connect = lambda timeout=60.0: HTTPSConnection(  # type: ignore[method-assign]
                "127.0.0.1", running.port, timeout=timeout, context=context
            )
        at_rest = descriptors(running)
        with attack(name, running, 300, over=over):
            for _ in range(3):
                now = clock(running)
                began = now()
                assert running.predict([[5.1, 3.5, 1.4, 0.2]]) == (200, {"prediction": [0]})
                assert now() - began < 12
            assert descriptors(running) < 256
        running.wait_until(lambda: descriptors(running) <= at_rest + 2, 60)
        assert "Too many open files" not in running.log.read_text()


def test_two_listeners_share_the_descriptors(tmp_path: Path, iris_file: Path) -> None:
    ports = free_port(), free_port()
    binds = [argument for port in ports for argument in ("--bind", f"127.0.0.1:{port}")]
    with gunicorn(tmp_path, *binds, model_path=iris_file, within=FEW_DESCRIPTORS) as running, ExitStack() as stack:
        for running.port in ports:
            stack.enter_context(attack("half_body", running, 150))
        assert running.predict([[5.1, 3.5, 1.4, 0.2]])[0] == 200
        assert descriptors(running) < 256
        assert "Too many open files" not in running.log.read_text()


def test_idle_connections_leave_room_for_the_next(tmp_path: Path, iris_file: Path) -> None:
    with (
        gunicorn(tmp_path, model_path=iris_file, keepalive=300, within=FEW_DESCRIPTORS) as running,
        ExitStack() as stack,
    ):
        first = stack.enter_context(closing(running.connect()))
        for _ in range(2):  # the first is not closed while there is room
            assert ask(first) == 200
        kept = first.sock
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
        assert ask(first) == 200
        assert first.sock is kept
        for _ in range(300):
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
        for _ in range(5):
            assert running.predict([[5.1, 3.5, 1.4, 0.2]])[0] == 200  # within the 30 seconds of a connection


def test_connections_without_a_whole_head_end(tmp_path: Path, iris_file: Path) -> None:
    whole = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    with gunicorn(tmp_path, model_path=iris_file, keepalive=2) as running, ExitStack() as stack:
        at_rest, began = descriptors(running), time.monotonic()
        for sent in (b"", whole[:20], whole, whole.replace(b"GET", b"HEAD"), whole + whole[:20]):
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port))).sendall(sent)
        running.wait_until(lambda: descriptors(running) >= at_rest + 5, 30)
        running.wait_until(lambda: descriptors(running) <= at_rest, 30)
        assert time.monotonic() - began > 1.9


# --- answers that nobody reads


@pytest.mark.parametrize("way", ["fast path", "gunicorn's"])
def test_answers_that_nobody_reads_end_their_connections(tmp_path: Path, iris_file: Path, way: str) -> None:
    name = "unread" if way == "fast path" else "unread_not_simple"
    with gunicorn(tmp_path, model_path=iris_file) as running:
        at_rest = descriptors(running)
        with attack(name, running, 40, again=False):
            running.wait_until(lambda: descriptors(running) >= at_rest + 35, 60)
            running.wait_until(lambda: descriptors(running) <= at_rest + 2, 60)
        raised = re.findall(r"^\s*([\w.]+(?:Error|Exception))\b", running.log.read_text(), re.MULTILINE)
        assert set(raised) <= {"TimeoutError"}  # which gunicorn logs if it was sending just then


def has_answered(running: Gunicorn, count: int) -> bool:
    """Return whether so many requests were recorded."""
    return len(records(running.journal_dir)) >= count


def test_stop_does_not_wait_for_answers_that_nobody_reads(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, graceful_timeout=120) as running, ExitStack() as stack:
        for count in 8, 16, 24, 32, 40:  # more at once would be refused: they would wait for each other
            stack.enter_context(attack("unread_large", running, 8, basic("predict"), again=False))
            running.wait_until(partial(has_answered, running, count), 90)
        assert {each["status"] for each in records(running.journal_dir)} == {200}
        time.sleep(2.0)
        began = time.monotonic()
        assert running.stop(seconds=180) == 0
        print(f"stopped after {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began < min(100.0, 15 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))
