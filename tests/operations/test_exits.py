"""Workers that die are counted by what ended them, with a real gunicorn; those that were asked to end are not."""

import json
import os
import signal
import sys
from collections import Counter
from http.client import HTTPException
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import WORKER_CLASSES, Gunicorn, basic, gunicorn, records
from prometheus_client.parser import text_string_to_metric_families

from operations.exits import REASONS, reason_of
from processes import TIMED_OUT
from telemetry.report import summarise
from telemetry.rollups import read_events

# A model that some rows kill.
DOOMED_MODULE = """
import os
import signal
import time

class Doomed:
    n_features_in_ = 1

    def predict(self, rows):
        for (number,) in rows:
            if number == -9.5:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == -11.5:
                os.kill(os.getpid(), signal.SIGSEGV)
            if number == -5.5:
                os._exit(5)
            time.sleep(1000 if number == -1.5 else 0.02)  # so long that calls run on a native thread
        return [0] * len(rows)
"""


@pytest.fixture
def doomed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the file of a model that some rows kill."""
    (tmp_path / "doomed_module.py").write_text(DOOMED_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from doomed_module import Doomed  # type: ignore[import-not-found]  # just written

    joblib.dump(Doomed(), tmp_path / "doomed.joblib")
    yield tmp_path / "doomed.joblib"
    sys.modules.pop("doomed_module", None)


def metrics(server: Gunicorn) -> dict[str, float]:
    """Return the metrics of workers, those of exits by their reason; {} if no worker answered."""
    try:
        status, _, body = server.ask("GET", "/metrics", Authorization=basic("metrics"))
    except (OSError, HTTPException):  # its worker has just ended
        return {}
    assert status == 200, body
    samples = [sample for family in text_string_to_metric_families(body.decode()) for sample in family.samples]
    return {
        sample.labels.get("reason", sample.name): sample.value
        for sample in samples
        if sample.name.startswith("prediction_worker") and not sample.name.endswith("_created")
    }


def kill(server: Gunicorn, number: float) -> None:
    """Send a row that ends the worker."""
    with pytest.raises((OSError, HTTPException)):
        server.predict([[number]])


def all_serve(server: Gunicorn) -> bool:
    """Return whether there are as many workers as there should be."""
    found = metrics(server)
    return bool(found) and found["prediction_workers_alive"] == found["prediction_workers_configured"] == server.count


@pytest.mark.long
@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_each_death_is_counted_and_recorded_by_its_reason(tmp_path: Path, doomed: Path, worker_class: str) -> None:
    limits = {"predict_timeout": 1, "worker_timeout": 4}
    with gunicorn(tmp_path, model_path=doomed, web_concurrency=2, worker_class=worker_class, **limits) as server:
        server.wait_until(lambda: all_serve(server))
        assert {name: metrics(server)[name] for name in REASONS} == dict.fromkeys(REASONS, 0)
        for number, reason in ((-9.5, "killed"), (-11.5, "crashed"), (-1.5, "predict_timeout"), (-5.5, "error")):
            kill(server, number)
            server.wait_until(lambda name=reason: metrics(server).get(name) == 1)
            server.wait_until(lambda: all_serve(server))
        os.kill(server.workers()[0], signal.SIGSTOP)  # it no longer comes back to its loop
        server.wait_until(lambda: metrics(server).get("hang") == 1)
        server.wait_until(lambda: all_serve(server))
        assert {name: metrics(server)[name] for name in REASONS} == dict.fromkeys(REASONS, 1)

        def events() -> Counter[str]:
            found = [record for record in records(server.journal_dir) if record.get("event") == "worker_exit"]
            return Counter(record["reason"] for record in found)

        server.wait_until(lambda: events() == Counter(REASONS))

        def shown() -> Counter[str]:
            found = read_events(server.journal_dir, 0.0)
            return Counter(event["reason"] for event in found if event["event"] == "worker_exit")

        # On the monitor page: not what a worker noted whose loop was blocked from then on.
        server.wait_until(lambda: shown()["hang"] == 1)
        lines = dict(summarise(server.journal_dir, 0.0, 2e9).table(60.0))
        assert {lines[f"worker_exit {reason}"] for reason in REASONS} == {"1"}
        # These were asked for.
        os.kill(server.workers()[0], signal.SIGTERM)
        booted = server.log.read_text().count("serving version")
        server.wait_until(lambda: server.log.read_text().count("serving version") > booted)
        booted = server.log.read_text().count("serving version")
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(lambda: server.log.read_text().count("serving version") == booted + 2)
        server.wait_until(lambda: all_serve(server))
        server.process.send_signal(signal.SIGTTOU)
        server.wait_until(lambda: metrics(server).get("prediction_workers_configured") == 1)
        server.wait_until(lambda: metrics(server).get("prediction_workers_alive") == 1)
        assert {name: metrics(server)[name] for name in REASONS} == dict.fromkeys(REASONS, 1)
        assert server.stop() == 0
        assert json.loads((server.journal_dir / "workers/exits.json").read_text())["exits"] == dict.fromkeys(REASONS, 1)
        assert events() == Counter(REASONS)


def test_death_by_a_signal_is_an_error_in_the_log(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, log_format="json") as server:

        def errors() -> list[str]:
            lines = [json.loads(line) for line in server.log.read_text().splitlines()]
            return [line["message"] for line in lines if line["severity"] in ("ERROR", "CRITICAL")]

        (pid,) = server.workers()
        os.kill(pid, signal.SIGTERM)  # it is asked to end
        server.wait_until(lambda: server.log.read_text().count("serving version") == 2)
        assert errors() == []
        (pid,) = server.workers()
        os.kill(pid, signal.SIGSEGV)
        server.wait_until(lambda: errors() == [f"worker (pid {pid}) died: crashed"])


def test_directory_that_cannot_be_written_stops_no_server(tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal/workers").write_text("a file in its place")
    with gunicorn(tmp_path, model_path=iris_file) as server:
        assert "GET /metrics lacks workers that ended" in server.log.read_text()
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_until(lambda: server.log.read_text().count("serving version") == 2)
        (tmp_path / "journal/workers").unlink()
        server.wait_until(lambda: metrics(server).get("killed") == 1)  # it is tried again


@pytest.mark.parametrize(
    ("status", "aborted", "reason"),
    [
        (0, False, ""),
        (signal.SIGTERM, False, ""),
        (signal.SIGHUP, False, ""),
        (signal.SIGKILL, False, "killed"),
        (signal.SIGXCPU, False, "killed"),
        (signal.SIGBUS, False, "crashed"),
        (signal.SIGSEGV | 0x80, False, "crashed"),  # with a core dump
        (TIMED_OUT << 8, False, "predict_timeout"),
        (3 << 8, False, "error"),
        (255 << 8, False, "error"),
        (1 << 8, True, "hang"),
        (signal.SIGKILL, True, "hang"),
    ],
)
def test_reason_is_that_of_the_wait_status(status: int, aborted: bool, reason: str) -> None:
    assert reason_of(status, aborted) == reason
