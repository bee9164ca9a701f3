"""More than a model can answer: refused at once or answered in time, and no worker ends."""

import http.client
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import WORKER_CLASS, WORKER_CLASSES, Gunicorn, basic, gunicorn, records

pytestmark = pytest.mark.long

PER_ROW = 0.02  # seconds
SLOW = f"""
import time, warnings
from pathlib import Path
import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin

class Slow(RegressorMixin, BaseEstimator):
    def __init__(self, calls=""):
        self.calls = calls

    def fit(self, x, y=None):
        self.n_features_in_ = 1
        return self

    def predict(self, x):
        x = np.asarray(x)
        with warnings.catch_warnings():  # as scikit-learn does, which makes Python forget what it has shown
            if (x < 0).any():
                warnings.warn("a negative number", RuntimeWarning)
                raise ValueError("negative")
        with open(self.calls, "a") as file:
            print(len(x), file=file)
        time.sleep({PER_ROW} * len(x))
        return 2 * x[:, 0]
"""


@contextmanager
def slow_model(place: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[tuple[Gunicorn, Any]]:
    """Serve a model that takes 20 ms for a row; yield the server, and a function that lists its calls, in rows."""
    calls = place / "calls"
    (place / "slow_model_of_a_test.py").write_text(SLOW)
    monkeypatch.syspath_prepend(place)
    import slow_model_of_a_test

    joblib.dump(slow_model_of_a_test.Slow(str(calls)).fit([[0.0]]), place / "model.joblib")
    settings = {"model_path": place / "model.joblib", "merge_requests": "always"} | settings
    with gunicorn(place, **settings) as server:
        workers = server.workers()
        loaded = len(calls.read_text().split())
        yield server, lambda: [int(rows) for rows in calls.read_text().split()[loaded:]]
        assert server.workers() == workers, server.log.read_text()


def ask(server: Gunicorn, rows: list[list[float]], user: str = "predict") -> tuple[int, Any, Any, float]:
    """POST rows; return the status, the headers, the decoded answer, and the seconds that it took."""
    began = time.monotonic()
    headers = {"Content_Type": "application/json", "Authorization": basic(user)}
    status, fields, body = server.ask("POST", "/predict", json.dumps({"data": rows}).encode(), **headers)
    return status, fields, json.loads(body), time.monotonic() - began


def in_threads(count: int, function: Any) -> list[threading.Thread]:
    """Start so many threads, and return them."""
    threads = [threading.Thread(target=function, args=(at,), daemon=True) for at in range(count)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("worker_class", [WORKER_CLASS])
def test_overload_is_refused_at_once_and_the_rest_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker_class: str
) -> None:
    answers: list[tuple[int, Any, Any, float]] = []
    with slow_model(tmp_path, monkeypatch, worker_class=worker_class) as (server, calls):
        end = time.monotonic() + 6

        def caller(at: int) -> None:
            while time.monotonic() < end:
                answers.append(ask(server, [[float(at)]]))
                assert answers[-1][0] == 503 or answers[-1][2] == {"prediction": [2.0 * at]}
                time.sleep(1.0)  # as Retry-After asks

        for thread in in_threads(150, caller):
            thread.join(60)
        assert ask(server, [[1.0]])[0] == 200  # and at its end all is well at once
    refused, answered = ([each for each in answers if each[0] == status] for status in (503, 200))
    assert len(refused) + len(answered) == len(answers)
    assert refused
    assert {fields["Retry-After"] for _, fields, _, _ in refused} == {"1"}
    assert max(calls()) <= 4
    assert len(answered) > 60  # of 300 that it can answer; on a busy machine
    # Without the bound each of 150 would wait for 149 others, 3 seconds at least.
    assert sorted(seconds for *_, seconds in answered)[len(answered) // 2] < 2.0
    kinds = {(record["status"], record["error_type"]) for record in records(server.journal_dir)}
    assert kinds == {(200, ""), (503, "overload")}


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_large_request_alone_is_answered_and_lets_others_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker_class: str
) -> None:
    with slow_model(tmp_path, monkeypatch, worker_class=worker_class, predict_timeout=2) as (server, calls):
        found: list[Any] = []
        rows = [[float(at)] for at in range(500)]  # 10 seconds
        (bulk,) = in_threads(1, lambda _: found.append(ask(server, rows)))
        server.wait_until(lambda: calls())
        small = [ask(server, [[7.0]]) for _ in range(10)]
        assert bulk.is_alive()
        bulk.join(60)
        assert found[0][0] == 200
        assert found[0][2] == {"prediction": [2.0 * at for at in range(500)]}
        assert {status for status, *_ in small} == {200}
        assert max(calls()) <= 4


def test_large_call_that_cannot_be_cut_is_no_hanging_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_model(tmp_path, monkeypatch, merge_requests="auto", predict_timeout=1) as (server, calls):
        found: list[Any] = []
        (bulk,) = in_threads(1, lambda _: found.append(ask(server, [[1.0]] * 250)))  # 5 seconds
        server.wait_until(lambda: calls())
        status, *_, seconds = ask(server, [[1.0]])
        assert status == 503
        assert seconds < 3.0
        bulk.join(60)
        assert found[0][0] == 200
        assert calls() == [250]


@pytest.mark.parametrize("how", ["closed", "reset", "half closed"])
@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_nothing_is_predicted_for_callers_that_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, worker_class: str
) -> None:
    body = json.dumps({"data": [[1.0]] * 10}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nAuthorization: {basic('predict')}\r\nContent-Type: application/json"
    with slow_model(tmp_path, monkeypatch, max_wait=60, worker_class=worker_class) as (server, calls):
        (bulk,) = in_threads(1, lambda _: ask(server, [[1.0]] * 100))  # 2 seconds
        server.wait_until(lambda: calls())
        connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        for connection in connections:
            connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.2)
        for connection in connections:
            if how == "half closed":
                connection.shutdown(socket.SHUT_WR)
                continue
            if how == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        assert ask(server, [[1.0]])[0] == 200
        bulk.join(60)
        server.wait_until(lambda: len(records(server.journal_dir)) == 22)
        assert sum(calls()) < 101 + 0.5 * 200  # without that, 301; a piece of each may have begun
        left = [record for record in records(server.journal_dir) if record["status"] != 200]
        assert {(record["status"], record["error_type"]) for record in left} == {(400, "client")}
        assert len(left) >= 10
        for connection in connections:
            connection.close()


def test_rows_that_the_model_refuses_do_not_fill_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_model(tmp_path, monkeypatch) as (server, _):
        before, seconds, count = server.log.stat().st_size, 4.0, [0]
        end = time.monotonic() + seconds

        def caller(at: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            headers = {"Content-Type": "application/json", "Authorization": basic("predict")}
            while time.monotonic() < end:
                connection.request("POST", "/predict", b'{"data": [[-1.0]]}', headers)
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 422
                count[0] += 1
            connection.close()

        for thread in in_threads(8, caller):
            thread.join(60)
        lines = server.log.read_bytes()[before:].decode().splitlines()
    refused = [line for line in lines if "refused its rows" in line]
    warned = [line for line in lines if re.search("RuntimeWarning: a negative number", line)]
    assert count[0] > 100
    assert 10 <= len(refused) <= 20
    assert len(warned) <= 1  # the first may have come before
