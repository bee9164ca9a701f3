"""Each alert is seen to fire and to resolve: by a real Prometheus that scrapes real servers, and what is wrong is real.

The times of the rules are shorter here: a minute of `for` is a tenth of a second, and windows are seconds.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from conftest import Gunicorn, basic, gunicorn
from loopback_sls import LoopbackSLS
from sklearn.dummy import DummyClassifier
from sklearn.tree import DecisionTreeClassifier
from sls_tools import shipping
from test_prometheus import (
    ALERTS,
    BOUND,
    CONFIGURATION,
    NEW_CERTIFICATE,
    Prometheus,
    needs_prometheus,
    prometheus,
    receipt,
    send_truths,
    write_user,
)

import model.__main__
from telemetry.drift_counts import PLACE

USER = CONFIGURATION["scrape_configs"][0]["basic_auth"]["username"]
WINDOWS = {"5m": "5s", "15m": "8s", "30m": "5s", "1h": "8s", "6h": "10s", "1d": "15s"}
SHOWN: set[str] = set()  # the alerts of all tests here

pytestmark = [needs_prometheus, pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")]


def shows(*names: str) -> Callable[[Any], Any]:
    """Mark a test that shows these alerts firing and resolved."""
    SHOWN.update(names)
    return pytest.mark.long


def hurried(rules: str) -> str:
    """Return rules whose windows are seconds."""
    rules = re.sub(r"\[(\w+)\]", lambda window: f"[{WINDOWS[window[1]]}]", rules)
    rules = re.sub(r"offset (\w+)", lambda offset: f"offset {WINDOWS[offset[1]]}", rules)
    return rules.replace("timestamp_seconds > 600", "timestamp_seconds > 4")


@contextmanager
def watched(place: Path, *servers: Gunicorn) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes servers."""
    with prometheus(place / "prometheus", *(server.port for server in servers), change=hurried) as watching:
        watching.wait_until(lambda: watching.value("sum(up)") == len(servers))
        watching.wait_until(lambda: "NoInstanceReady" not in watching.firing())
        yield watching


def fires(watching: Prometheus, *names: str) -> None:
    """Wait until alerts fire."""
    watching.wait_until(lambda: set(names) <= watching.firing())


def resolves(watching: Prometheus, *names: str) -> None:
    """Wait until alerts do not fire any more."""
    watching.wait_until(lambda: not set(names) & watching.firing())


TRIAL_MODULE = """
import time

class Trial:
    n_features_in_ = 1

    def predict(self, rows):
        if any(row[0] == 500.5 for row in rows):
            raise RuntimeError("as it was asked to")
        time.sleep(1.5 if any(row[0] == 1.5 for row in rows) else 0)
        return [0] * len(rows)
"""

# It waits for a file to go before the application is made.
BLOCK = """
import pathlib
import time

def init_app(app, service):
    while pathlib.Path(__file__).with_name("block").exists():
        time.sleep(0.1)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory with users, a model in a file, and modules."""
    (tmp_path / "trial_module.py").write_text(TRIAL_MODULE)
    (tmp_path / "block_module.py").write_text(BLOCK)
    (tmp_path / "bound.py").write_text(BOUND)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the processes in which a version is tried
    from trial_module import Trial  # type: ignore[import-not-found]  # just written

    joblib.dump(Trial(), tmp_path / "trial.joblib")
    write_user(tmp_path / "users.json", USER)
    return tmp_path


def ask(server: Gunicorn, row: list[float], times: int, user: str = "predict", password: str | None = None) -> set[int]:
    """Send a row so many times, thirty at once; return the statuses."""
    authorization = basic(user) if password is None else basic(user, password)
    headers = {"Content-Type": "application/json", "Authorization": authorization}
    body = json.dumps({"data": [row]}).encode()
    with ThreadPoolExecutor(30) as pool:
        return set(pool.map(lambda _: server.ask("POST", "/predict", body, **headers)[0], range(times)))


def test_every_alert_is_shown_here() -> None:
    assert {alert["alert"] for alert in ALERTS} == SHOWN


@shows("Watchdog", "WorkerDeaths", "WorkersMissing", "InstanceDown", "NoInstanceReady", "NoTraffic")
def test_workers_and_instances(place: Path) -> None:
    given = {"web_concurrency": 2, "extensions": "+block_module"}
    with gunicorn(place, model_path=place / "trial.joblib", **given) as server, watched(place, server) as watching:
        resolves(watching, "WorkersMissing", "WorkerDeaths")
        (place / "block").touch()
        os.kill(server.workers()[0], signal.SIGKILL)
        fires(watching, "Watchdog", "WorkerDeaths", "WorkersMissing")
        (place / "block").unlink()
        resolves(watching, "WorkersMissing", "WorkerDeaths")
        assert ask(server, [0.0], 1) == {200}
        fires(watching, "NoTraffic")

        def traffic_arrives() -> bool:
            assert ask(server, [0.0], 1) == {200}
            return "NoTraffic" not in watching.firing()

        watching.wait_until(traffic_arrives)
        os.killpg(server.process.pid, signal.SIGSTOP)
        fires(watching, "InstanceDown", "NoInstanceReady")
        os.killpg(server.process.pid, signal.SIGCONT)
        resolves(watching, "InstanceDown", "NoInstanceReady")


@shows("ErrorRate", "ErrorBudget", "LatencyBudget", "SlowAnswers", "RowsRejected", "RejectedPasswords")
def test_requests(place: Path) -> None:
    given = {"web_concurrency": 2, "merge_requests": "always", "max_wait": 3600}
    with gunicorn(place, model_path=place / "trial.joblib", **given) as server, watched(place, server) as watching:
        # One first: an increase needs a value before it.
        assert (ask(server, [0.0], 1), ask(server, [500.5], 1)) == ({200}, {500})
        watching.wait_until(lambda: watching.value('prediction_requests_total{outcome="model"}') == 1)
        assert ask(server, [500.5], 60) == {500}
        fires(watching, "ErrorRate", "ErrorBudget")
        resolves(watching, "ErrorRate", "ErrorBudget")

        def is_slow() -> bool:
            assert ask(server, [1.5], 60) == {200}
            return {"LatencyBudget", "SlowAnswers"} <= watching.firing()

        watching.wait_until(is_slow)
        resolves(watching, "LatencyBudget", "SlowAnswers")

        def is_known() -> bool:
            assert ask(server, [0.0], 60) == {200}
            earlier = 'sum(increase(prediction_requests_total{outcome="success"}[15s] offset 8s))'
            return (watching.value(earlier) or 0) > 50

        watching.wait_until(is_known)

        def are_rejected() -> bool:
            assert ask(server, [0.0, 1.0], 60) == {422}
            return "RowsRejected" in watching.firing()

        watching.wait_until(are_rejected)
        resolves(watching, "RowsRejected")
        assert ask(server, [0.0], 150, password="guessed") <= {401, 429, 503}
        fires(watching, "RejectedPasswords")
        resolves(watching, "RejectedPasswords")


@shows("DiskNearlyFull", "CertificateExpires")
def test_disk_and_certificate(place: Path) -> None:
    def certificate(days: int) -> None:
        new = place / "new.pem"
        command = ["openssl", *NEW_CERTIFICATE, "-days", f"{days}", "-out", new]
        subprocess.run(command, check=True, capture_output=True)
        new.rename(place / "certificate.pem")

    certificate(1)
    disk = os.statvfs(place)
    room = disk.f_bavail * disk.f_frsize
    margin = min(2 * 2**30, room // 8)  # more than others write meanwhile
    given = {"certificate_file": place / "certificate.pem", "journal_max_bytes": 5 * (room - margin)}
    with gunicorn(place, model_path=place / "trial.joblib", **given) as server, watched(place, server) as watching:
        fires(watching, "CertificateExpires")
        assert severities(watching, "CertificateExpires") == {"critical"}
        certificate(10)
        watching.wait_until(lambda: severities(watching, "CertificateExpires") == {"warning"})
        certificate(90)
        resolves(watching, "CertificateExpires", "DiskNearlyFull")
        with (place / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 2 * margin)
        fires(watching, "DiskNearlyFull")
        (place / "filler").unlink()
        resolves(watching, "DiskNearlyFull")


def severities(watching: Prometheus, name: str) -> set[str]:
    """Return the severities with which an alert fires."""
    labels = [each["labels"] for each in watching.get("alerts")["alerts"] if each["state"] == "firing"]
    return {each["severity"] for each in labels if each["alertname"] == name}


@shows("JournalNotDraining", "JournalNearlyFull", "RecordsDropped", "RecordsRefused")
def test_shipping(place: Path, sls: LoopbackSLS) -> None:
    with (
        shipping(place, place / "trial.joblib", sls, journal_max_bytes=2**20) as server,
        watched(place, server) as watching,
    ):
        sls.refuse(lambda record: record.get("user") == "admin")
        assert ask(server, [0.0], 1, user="admin") == {403}
        fires(watching, "RecordsRefused")
        (server.journal_dir / "refused.json").unlink()
        resolves(watching, "RecordsRefused")
        watching.wait_until(lambda: watching.value("sum(prediction_records_dropped_total)") == 0)
        sls.down()

        def is_full() -> bool:
            fill(server, 300)
            return {"JournalNearlyFull", "RecordsDropped"} <= watching.firing()

        watching.wait_until(is_full, 300)
        fires(watching, "JournalNotDraining")  # not before: where records are lost, those that wait are the newest
        sls.up()
        resolves(watching, "JournalNotDraining", "JournalNearlyFull", "RecordsDropped")


def fill(server: Gunicorn, count: int) -> None:
    """Send requests with ids that are as long as they may be, on one connection."""
    body = b'{"data": [[0.0]]}'
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    head += f"Authorization: {basic('predict')}\r\nX-Request-ID: {'a' * 128}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        for _ in range(count):
            connection.sendall(head.encode() + body)
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200"), answer


@shows("VersionsDisagree", "VersionNotServed")
def test_versions(place: Path) -> None:
    other = place / "other"
    other.mkdir()
    write_user(other / "users.json", USER)
    joblib.dump(DummyClassifier(strategy="constant", constant=0).fit([[0.0], [1.0]], [0, 1]), other / "model.joblib")
    with (
        gunicorn(place, model_path=place / "trial.joblib") as server,
        gunicorn(other, model_path=other / "model.joblib", pythonpath=place) as second,
        watched(place, server, second) as watching,
    ):
        fires(watching, "VersionsDisagree")
        (other / "model.joblib").write_bytes(b"broken")
        second.process.send_signal(signal.SIGHUP)
        fires(watching, "VersionNotServed")
        shutil.copy(place / "trial.joblib", other / "model.joblib")
        second.process.send_signal(signal.SIGHUP)
        resolves(watching, "VersionsDisagree", "VersionNotServed")


@shows("CanaryWorseThanStable", "PredictionDrift")
def test_canary_and_drift(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_DIR", str(place / "journal"))  # where --wait looks
    rows = np.linspace(-1, 1, 100).reshape(-1, 1)
    joblib.dump(DecisionTreeClassifier().fit(rows, rows[:, 0] > 0), place / "tree.joblib")
    (place / "rows.json").write_text(json.dumps(rows.tolist()))
    (place / "zero.json").write_text("[[0.0]]")

    def command(*words: str) -> None:
        assert model.__main__.main(["--dir", str(place / "models"), *words]) == 0

    command("publish", str(place / "tree.joblib"), "--version", "1", "--sample", str(place / "rows.json"))
    command("publish", str(place / "trial.joblib"), "--version", "2", "--sample", str(place / "zero.json"))
    command("promote", "1")
    with gunicorn(place, model_dir=place / "models") as server, watched(place, server) as watching:
        assert ask(server, [0.9], 1) == {200}
        many(server, 0.9)
        for path in server.place.glob("journal/drift/counts-*"):  # yesterday's, to which the worker goes on to add
            np.memmap(path, PLACE, "r+")["day"] -= np.uint64(1)
        fires(watching, "PredictionDrift")
        many(server, -0.9)
        resolves(watching, "PredictionDrift")
        command("canary", "2", "--weight", "50", "--force", "--wait")

        def is_worse() -> bool:
            assert ask(server, [500.5], 300) == {200, 500}
            return "CanaryWorseThanStable" in watching.firing()

        watching.wait_until(is_worse)
        command("rollback", "--wait")
        resolves(watching, "CanaryWorseThanStable")


def many(server: Gunicorn, value: float) -> None:
    """Send 2,000 rows."""
    assert server.predict([[value]] * 2000)[0] == 200


@shows("PredictionErrorRate", "NoFeedback")
def test_feedback(place: Path) -> None:
    joblib.dump(DummyClassifier(strategy="constant", constant=0).fit([[0.0], [1.0]], [0, 1]), place / "zero.joblib")
    given = {"web_concurrency": 2, "extensions": "+bound"}
    with gunicorn(place, model_path=place / "zero.joblib", **given) as server, watched(place, server) as watching:

        def truths_come(name: str, number: int, wrong: int) -> bool:
            receipts = [receipt(server, rows=10) for _ in range(number)]
            send_truths(server, receipts, [0] * (10 - wrong) + [1] * wrong)
            return name in watching.firing()

        truths_come("", 1, 0)
        watching.wait_until(lambda: watching.value("sum(prediction_feedback_rows_total)") == 10)
        watching.wait_until(lambda: truths_come("PredictionErrorRate", 20, 4))
        resolves(watching, "PredictionErrorRate")
        fires(watching, "NoFeedback")
        watching.wait_until(lambda: not truths_come("NoFeedback", 1, 0))
