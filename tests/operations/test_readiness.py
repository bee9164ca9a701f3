"""Ready means every worker, at the first start; and a worker that loads again harms nobody."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import WORKER_CLASSES, basic, gunicorn

ROWS = [[1.0, 2.0]]
# A model that takes its time to load in some workers: in the first that loads it after a file `slow` was made.
MODULE = """
import os, time
from pathlib import Path

HERE = Path(__file__).parent

class Slow:
    n_features_in_ = 2

    def __setstate__(self, state):
        try:
            os.rename(HERE / "slow", HERE / f"loads-{os.getpid()}")
        except FileNotFoundError:
            return
        while not (HERE / "go").exists():
            time.sleep(0.05)

    def __getstate__(self):
        return {"some": "state"}

    def predict(self, rows):
        return [row[0] for row in rows]
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save such a model."""
    (tmp_path / "slow_in_one.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from slow_in_one import Slow  # type: ignore[import-not-found]  # just written

    joblib.dump(Slow(), tmp_path / "slow.joblib")
    return tmp_path / "slow.joblib"


def loading(place: Path) -> list[int]:
    """Return the process ids of the workers that were slow."""
    return [int(path.name.removeprefix("loads-")) for path in place.glob("loads-*")]


def statuses(server: Any, path: str, count: int = 20) -> set[int]:
    """Ask so often that each worker is asked; return the statuses."""
    return {server.ask("GET", path)[0] for _ in range(count)}


def test_server_is_ready_without_a_worker_that_was_taken_away_while_it_loaded(tmp_path: Path, model: Path) -> None:
    (tmp_path / "slow").touch()
    with gunicorn(tmp_path, ready=False, model_path=model, web_concurrency=2) as server:
        server.wait_until(lambda: "serving version" in server.log.read_text() and loading(tmp_path))
        assert server.ask("GET", "/readyz")[0] == 503
        (slow,) = loading(tmp_path)
        while slow in (workers := server.workers()):  # gunicorn ends the one that it started first
            server.process.send_signal(signal.SIGTTIN if len(workers) == 1 else signal.SIGTTOU)
            server.wait_until(lambda before=workers: server.workers() != before)
        server.wait_until(server.is_ready)


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_server_is_ready_once_the_last_worker_is(tmp_path: Path, model: Path, worker_class: str) -> None:
    (tmp_path / "slow").touch()
    given = {"model_path": model, "web_concurrency": 3, "worker_class": worker_class}
    with gunicorn(tmp_path, ready=False, **given) as server:
        server.wait_until(lambda: server.log.read_text().count("serving version") == 2 and loading(tmp_path))
        until = time.monotonic() + 3.0
        seen: set[str] = set()
        while time.monotonic() < until:
            status, _, body = server.ask("GET", "/readyz")
            assert status == 503
            seen.add(body.decode())
            assert server.ask("GET", "/healthz")[0] == 200
        assert any("another worker is still loading" in body for body in seen)  # those that have a model say so
        assert b"\nprediction_ready 0.0" in server.ask("GET", "/metrics", Authorization=basic("metrics"))[2]
        (tmp_path / "go").touch()
        server.wait_until(server.is_ready)
        assert {server.predict(ROWS)[0] for _ in range(60)} == {200}
        assert statuses(server, "/readyz") == {200}
        assert b"\nprediction_ready 1.0" in server.ask("GET", "/metrics", Authorization=basic("metrics"))[2]


def test_server_is_ready_even_if_a_worker_is_gone_before_anyone_asks(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=2) as server:  # begins once both have a model
        server.process.send_signal(signal.SIGTTOU)
        server.wait_until(lambda: len(server.workers()) == 1)
        assert server.ask("GET", "/readyz")[0] == 200


def test_worker_that_dies_while_others_load_does_not_count(tmp_path: Path, model: Path) -> None:
    (tmp_path / "slow").touch()
    with gunicorn(tmp_path, ready=False, model_path=model, web_concurrency=2) as server:
        server.wait_until(lambda: server.log.read_text().count("serving version") == 1 and loading(tmp_path))
        (quick,) = set(server.workers()) - set(loading(tmp_path))
        os.kill(quick, signal.SIGKILL)  # it was ready, and so is the one that replaces it
        server.wait_until(lambda: server.log.read_text().count("serving version") == 2)
        assert statuses(server, "/readyz") == {503}
        (tmp_path / "go").touch()
        server.wait_until(server.is_ready)


@pytest.mark.long
def test_worker_that_loads_again_for_long_is_not_asked_while_another_serves(tmp_path: Path, model: Path) -> None:
    """For longer than the 25 seconds for which one that is alone keeps connections waiting."""
    with gunicorn(tmp_path, model_path=model, web_concurrency=2) as server:
        server.wait_until(server.is_ready)
        (tmp_path / "slow").touch()
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_until(lambda: loading(tmp_path))
        until = time.monotonic() + 32.0
        while time.monotonic() < until:
            assert server.ask("GET", "/readyz")[0] == 200
            assert server.predict(ROWS) == (200, {"prediction": [1.0]})
            time.sleep(0.05)
        assert loading(tmp_path)[0] in server.workers()  # nobody took it for hung
        (tmp_path / "go").touch()
        server.wait_until(lambda: server.log.read_text().count("serving version") == 3)
        assert server.predict(ROWS)[0] == 200


def test_worker_that_waits_for_its_model_ends_when_it_is_asked_to(tmp_path: Path, model: Path) -> None:
    with gunicorn(tmp_path, model_path=model, web_concurrency=2, graceful_timeout=15) as server:
        server.wait_until(server.is_ready)
        (tmp_path / "slow").touch()
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_until(lambda: loading(tmp_path))
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 14.0
