"""Stops and freezes: SIGTERM with idle connections open, and platforms that stop all processes between requests."""

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import WORKER_CLASSES, Gunicorn, basic, gunicorn

# A model of which a row [[-5.0]] takes five seconds.
SLEEPER = """
import time

class Sleeper:
    n_features_in_ = 1

    def predict(self, rows):
        time.sleep(max(0.0, *(-row[0] for row in rows)))
        return [row[0] for row in rows]
"""
IRIS = [[5.1, 3.5, 1.4, 0.2]]
HEADERS = {"Content-Type": "application/json", "Authorization": basic("predict")}
# Without speedups as well: then it is gunicorn's own gevent worker, but for its end.
KINDS = [*WORKER_CLASSES, pytest.param("gevent,-speedups", marks=pytest.mark.long)]


def of(kind: str) -> dict[str, str]:
    """Return the settings of a kind of worker."""
    worker_class, _, extensions = kind.partition(",")
    return {"worker_class": worker_class, "extensions": extensions}


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that takes as long as a row says."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.syspath_prepend(str(tmp_path))
    from sleeper import Sleeper  # type: ignore[import-not-found]  # just written

    joblib.dump(Sleeper(), tmp_path / "sleeper.joblib")
    (tmp_path / "sleeper.sample.json").write_text("[[1.0]]")
    yield tmp_path / "sleeper.joblib"
    sys.modules.pop("sleeper", None)


@pytest.fixture
def connect() -> Any:
    """Return a function that opens a connection to a server; they are closed in the end."""
    with ExitStack() as opened:
        yield lambda server: opened.enter_context(closing(server.connect()))


def ask(connection: http.client.HTTPConnection, rows: Any = IRIS) -> int:
    """POST rows on an open connection; return the status."""
    connection.request("POST", "/predict", json.dumps({"data": rows}).encode(), HEADERS)
    answer = connection.getresponse()
    answer.read()
    return answer.status


def is_closed(connection: socket.socket, seconds: float) -> bool:
    """Return whether the server closes a connection within some time; and close it."""
    connection.settimeout(seconds)
    with connection, suppress(TimeoutError):
        while connection.recv(4096):
            pass
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_sigterm_closes_idle_connections_and_answers_the_request_in_flight(
    tmp_path: Path, connect: Any, sleeper: Path, kind: str
) -> None:
    with gunicorn(tmp_path, model_path=sleeper, keepalive=900, graceful_timeout=60, **of(kind)) as server:
        kept, malformed = connect(server), socket.create_connection(("127.0.0.1", server.port))
        silent = socket.create_connection(("127.0.0.1", server.port))
        kept.request("GET", "/healthz")
        assert kept.getresponse().read()
        malformed.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nTE: x\r\n\r\n")  # gunicorn's own loop takes this one
        assert malformed.recv(4096).startswith(b"HTTP/1.1 200")
        if kind == "gthread":
            time.sleep(5.5)  # for which gunicorn's thread waits for the first byte of a connection
        answered: list[Any] = []

        def call() -> None:
            answered.extend([server.predict([[-5.0]]), time.monotonic()])

        caller = threading.Thread(target=call)
        caller.start()
        time.sleep(1.0)
        server.process.send_signal(signal.SIGTERM)
        assert kept.sock is not None
        for connection in (kept.sock, silent, malformed):
            assert is_closed(connection, 3.5)  # gthread grants two seconds
        assert not answered
        assert server.process.wait(30) == 0
        caller.join()
        assert answered[0] == (200, {"prediction": [-5.0]})
        assert time.monotonic() - answered[1] < 8


def outcomes_of_a_stop(server: Gunicorn) -> dict[Any, int]:
    """Stop a server while connection after connection is opened; return how many requests had which outcome."""
    outcomes: list[Any] = []

    def call() -> None:
        while not outcomes or outcomes[-1] == 200:
            try:
                with closing(server.connect()) as connection:
                    outcomes.append(ask(connection))
            except ConnectionRefusedError:
                return
            except (OSError, http.client.HTTPException) as error:
                outcomes.append(repr(error))

    callers = [threading.Thread(target=call) for _ in range(16)]
    for caller in callers:
        caller.start()
    time.sleep(2.0)
    server.process.send_signal(signal.SIGTERM)
    for caller in callers:
        caller.join(60)
    return {each: outcomes.count(each) for each in set(outcomes)}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_under_load_resets_no_connection(tmp_path: Path, iris_file: Path, kind: str, workers: int) -> None:
    """Who has connected is answered; afterwards connections are refused."""
    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=workers, **of(kind)) as server:
        assert outcomes_of_a_stop(server).keys() == {200}
        assert server.process.wait(40) == 0


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_sigterm_with_a_request_that_does_not_end_takes_no_longer_than_the_drain(
    tmp_path: Path, connect: Any, sleeper: Path, kind: str
) -> None:
    with gunicorn(tmp_path, model_path=sleeper, keepalive=900, graceful_timeout=3, **of(kind)) as server:
        idle = connect(server)
        idle.request("GET", "/healthz")
        assert idle.getresponse().read()

        def call() -> None:
            with suppress(OSError, http.client.HTTPException):
                server.predict([[-60.0]])

        caller = threading.Thread(target=call)
        caller.start()
        time.sleep(1.0)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)
        assert time.monotonic() - began < 3 + 1.5
        caller.join()


@pytest.mark.long
def test_connection_that_was_idle_for_a_minute_is_usable(tmp_path: Path, connect: Any, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, keepalive=75) as server:
        connection = connect(server)
        assert ask(connection) == 200
        before = connection.sock
        time.sleep(60)
        assert ask(connection) == 200
        assert connection.sock is before


# --- freezes


def resume_all(server: Gunicorn) -> None:
    """Let the master and its workers go on at the same time."""
    os.killpg(server.process.pid, signal.SIGCONT)


def resume_master_first(server: Gunicorn) -> None:
    """Let the master go on 1.5 seconds before its workers."""
    server.process.send_signal(signal.SIGCONT)
    time.sleep(1.5)
    resume_all(server)


def resume_workers_first(server: Gunicorn) -> None:
    """Let the workers go on 1.5 seconds before their master."""
    for pid in server.workers():
        os.kill(pid, signal.SIGCONT)
    time.sleep(1.5)
    resume_all(server)


def freeze(server: Gunicorn, seconds: float, resume: Callable[[Gunicorn], None]) -> None:
    """Stop all processes of a server for some time, as a platform does between requests."""
    os.killpg(server.process.pid, signal.SIGSTOP)
    time.sleep(seconds)
    resume(server)


def call_and_hang_up(server: Gunicorn, rows: Any) -> None:
    """Send a request, and close the connection before its answer."""
    connection = server.connect()
    connection.request("POST", "/predict", json.dumps({"data": rows}).encode(), HEADERS)
    time.sleep(0.5)
    connection.close()


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_no_worker_dies_of_freezes(tmp_path: Path, connect: Any, sleeper: Path, kind: str) -> None:
    limits = {"worker_timeout": 4, "predict_timeout": 4, "body_timeout": 4, "keepalive": 75}
    with gunicorn(tmp_path, model_path=sleeper, web_concurrency=2, **limits, **of(kind)) as server:
        # A busy machine may take a worker longer than its time-out to start: what counts is what comes after.
        before, started, idle = server.workers(), len(server.log.read_text()), connect(server)
        calm = []
        for _ in range(20):
            began = time.monotonic()
            assert ask(idle, [[1.0]]) == 200
            calm.append(time.monotonic() - began)
        kept = idle.sock
        # Longer than the time-outs, and once three times as long.
        for resume, seconds in ((resume_master_first, 6.0), (resume_workers_first, 6.0), (resume_all, 12.0)):
            slow = connect(server)
            slow.request("POST", "/predict", headers=HEADERS | {"Content-Length": "19"})  # its body after the freeze
            call_and_hang_up(server, [[-2.0]])
            freeze(server, seconds, resume)
            began = time.monotonic()
            assert ask(idle, [[1.0]]) == 200
            first = time.monotonic() - began
            assert first < max(0.6, 30 * max(calm)), (resume.__name__, first)
            assert idle.sock is kept
            slow.send(b'{"data": [[1.0]]}  ')
            assert slow.getresponse().status == 200
            time.sleep(6.0)  # longer than any of the time-outs
            assert server.workers() == before
            assert "WORKER TIMEOUT" not in server.log.read_text()[started:]
        assert server.predict([[1.0]]) == (200, {"prediction": [1.0]})


@pytest.mark.long
def test_worker_that_hangs_is_still_replaced_after_a_freeze(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, worker_timeout=3, predict_timeout=3) as server:
        freeze(server, 4.0, resume_all)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)  # it alone: to the master its event loop hangs
        server.wait_until(lambda: "WORKER TIMEOUT" in server.log.read_text(), 15)
        server.wait_until(lambda: server.log.read_text().count("serving version") >= 2, 30)
        assert worker not in server.workers()


@pytest.mark.long
def test_worker_that_hangs_is_left_alone_without_a_timeout(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, worker_timeout=0, predict_timeout=1) as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        time.sleep(4.0)
        os.kill(worker, signal.SIGCONT)
        assert server.predict(IRIS) == (200, {"prediction": [0]})
        assert server.workers() == [worker]
