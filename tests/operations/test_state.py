"""The state: backed up and restored as docs/operations.md says, gone, on a full disk, under a wrong clock."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runbook
from conftest import ROOT, Gunicorn, Load, SmallDisk, basic, gunicorn, records, write_users

from model.versions.routing import Routing
from monitor import read_lines, segments

pytestmark = pytest.mark.long

BACK_UP, RESTORE = runbook.commands(__file__, "operations.md", "Back up, restore, move")
ROW = [[5.1, 3.5, 1.4, 0.2]]
STAND_INS = """
set -eu
sudo() { if [ "$1" = -u ]; then shift 2; fi; "$@"; }
systemctl() { :; }
curl() { :; }
"""


def run(command: str, state: Path, given: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a command line of the product with the state in a directory."""
    return subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, env=os.environ | environment(state), input=given,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def environment(state: Path) -> dict[str, str]:
    """Return the settings of a server whose state is in a directory."""
    paths = {"MODEL_DIR": "models", "JOURNAL_DIR": "journal", "USERS_FILE": "users.json"}
    return {name: str(state / path) for name, path in ({"FEEDBACK_KEY_FILE": "feedback.key"} | paths).items()}


def serving(state: Path, **settings: Any) -> Any:
    """Run a server of two workers whose state is in a directory."""
    given = {name.lower(): value for name, value in environment(state).items()}
    return gunicorn(state.parent, **{"web_concurrency": 2, "max_wait": 30} | given | settings)


@pytest.fixture
def state(tmp_path: Path, iris_file: Path) -> Path:
    """A state with users and the versions 1, which is stable, and 2."""
    place = tmp_path / "state"
    place.mkdir()
    write_users(place / "users.json")
    (tmp_path / "rows.json").write_text(json.dumps(ROW))
    for version in "12":
        done = run(f"model publish {iris_file} --version {version} --sample {tmp_path / 'rows.json'}", place)
        assert done.returncode == 0, done.stderr
    assert run("model promote 1", place).returncode == 0
    return place


def ask(server: Gunicorn, user: str, path: str, content: Any = None) -> Any:
    """Ask as a user, expect 200; return the receipt of an answer to /predict, and else the decoded answer."""
    body, headers = json.dumps(content).encode() if content else None, {"Authorization": basic(user)}
    headers |= {"Content_Type": "application/json"} if content else {}
    status, told, answer = server.ask("POST" if content else "GET", path, body, **headers)
    assert status == 200, answer
    return told["X-Feedback"] if path == "/predict" else json.loads(answer)


def truths(server: Gunicorn, *receipts: str) -> Any:
    """Send the truth for rows of class 0."""
    return ask(server, "feedback", "/feedback", {"feedback": [{"receipt": each, "truth": [0]} for each in receipts]})


def elsewhere(block: str, state: Path, backup: Path) -> str:
    """Return a block of commands for a state in another place."""
    for there, here in (
        ("/var/lib/prediction-server", str(state)),
        ("/root/state.tar.gz", str(backup)),
        ("predictions:predictions", f"{os.getuid()}:{os.getgid()}"),
        ("deploy/systemd/as_service.py", sys.executable),
    ):
        assert there in BACK_UP + RESTORE
        block = block.replace(there, here)
    return STAND_INS + block


def test_backup_of_a_running_server_is_restored_on_another_host(tmp_path: Path, state: Path) -> None:
    other = tmp_path / "other/state"
    other.mkdir(parents=True)
    assert run("model canary 2 --weight 50", state).returncode == 0
    with serving(state) as server:
        counted, late = (ask(server, "predict", "/predict", {"data": ROW}) for _ in range(2))
        assert truths(server, counted)["accepted"] == 1
        served, began = ask(server, "admin", "/model"), time.monotonic()
        while not ask(server, "monitor", "/monitor?format=json")["requests"]:  # written every ten seconds
            assert time.monotonic() - began < 60
            time.sleep(0.5)
        with Load(server) as load:
            server.wait_until(lambda: len(load.answered) > 10)
            backup = elsewhere(BACK_UP, state, tmp_path / "state.tar.gz")
            done = subprocess.run(["bash", "-c", backup], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            server.wait_until(lambda: len(load.answered) > 20)
        assert set(load.statuses) == {200}
    shutil.rmtree(state)

    restore = elsewhere(RESTORE, other, tmp_path / "state.tar.gz")
    environ = os.environ | environment(other)
    done = subprocess.run(["bash", "-c", restore], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as it was published") == 2
    with serving(other) as server:
        now = ask(server, "admin", "/model")
        for variant in "stable", "canary":
            assert now[variant]["sha256"] == served[variant]["sha256"]
        assert now["routing"] == served["routing"]
        assert truths(server, counted, late) == {"accepted": 1, "duplicates": 1, "rejected": []}
        assert ask(server, "monitor", "/monitor?format=json")["requests"] > 0
        assert not list((other / "journal").glob("[0-9]*.jsonl")) or len(records(other / "journal")) < 10


def test_state_that_disappears_while_it_runs_and_comes_back(tmp_path: Path, state: Path) -> None:
    copy = tmp_path / "copy"
    with serving(state) as server, Load(server, callers=1, pause=0.05) as load:
        server.wait_until(lambda: len(load.answered) > 10)
        shutil.copytree(state, copy)
        shutil.rmtree(state)
        before = len(load.answered)
        server.wait_until(lambda: (state / "journal/server.lock").exists() and len(load.answered) > before + 20)
        assert server.ask("GET", "/readyz")[0] == 200
        assert "routing.json" in str(ask(server, "admin", "/model")["error"]) or "no version" in str(
            ask(server, "admin", "/model")["error"]
        )
        for path in (copy / "users.json", copy / "feedback.key"):
            shutil.copy2(path, state)
        shutil.copytree(copy / "models", state / "models")
        server.wait_until(lambda: not ask(server, "admin", "/model")["error"])
        receipts: list[str | None] = [None]
        while not all(receipts):  # until both workers have the key again
            receipts = [ask(server, "predict", "/predict", {"data": ROW}) for _ in range(10)]
            time.sleep(0.5)
        assert truths(server, str(receipts[0]))["accepted"] == 1
        assert records(state / "journal")
    assert set(load.statuses) == {200}
    assert load.errors == []


def whole_records(directory: Path) -> list[dict[str, Any]]:
    """Read the records of a journal, but for lines that a full disk has cut off."""
    return [record for path in segments(directory) for _, record in read_lines(path) if record]


def test_full_disk_stops_no_answer_and_loses_no_state(state: Path, small_disk: SmallDisk) -> None:
    home = small_disk.mount("8m") / "state"
    shutil.copytree(state, home)
    with serving(home, journal_max_bytes=2**21) as server, Load(server, callers=1, pause=0.05) as load:
        server.wait_until(lambda: len(load.answered) > 10)
        receipt = ask(server, "predict", "/predict", {"data": ROW})
        filler = small_disk.fill()
        before = len(load.answered)
        server.wait_until(lambda: len(load.answered) > before + 50)

        routing, users = Routing.read(home / "models"), (home / "users.json").read_bytes()
        for command in (
            "model promote 2",
            "model canary 2 --weight 5",
            "auth remove predict",
            f"model publish {home}/models/1/model.joblib",
        ):
            done = run(command, home)
            assert done.returncode == 1, command
            assert "No space left" in done.stderr, command
            assert "Traceback" not in done.stderr
        assert "is full: requests are missing here" in run("telemetry.report", home).stderr
        done = run("server check", home)
        assert (done.returncode, "No space left" in done.stdout) == (1, True)
        assert (Routing.read(home / "models"), (home / "users.json").read_bytes()) == (routing, users)
        assert not list((home / "models").glob(".*-????????"))
        body = json.dumps({"feedback": [{"receipt": receipt, "truth": [0]}]}).encode()
        headers = {"Content_Type": "application/json", "Authorization": basic("feedback")}
        assert server.ask("POST", "/feedback", body, **headers)[0] == 503
        for worker in server.workers():
            os.kill(worker, signal.SIGKILL)
        server.wait_until(lambda: server.log.read_text().count("serving version") == 4)
        for user, path in (("metrics", "/metrics"), ("monitor", "/monitor"), ("admin", "/model")):
            assert server.ask("GET", path, Authorization=basic(user))[0] == 200
        for _ in range(50):  # the new workers have lost nothing yet, and those that had are gone
            ask(server, "predict", "/predict", {"data": ROW})

        filler.unlink()
        assert run("model promote 2 --wait 60", home).returncode == 0
        assert truths(server, receipt)["accepted"] == 1
        server.wait_until(lambda: any("dropped" in record for record in whole_records(home / "journal")))
    assert set(load.statuses) == {200}


# Moves the clock of each Python process by as many seconds as a file holds.
CLOCK = """
import os, time

real, real_ns, place = time.time, time.time_ns, os.path.dirname(__file__)

def ahead():
    try:
        with open(f"{place}/ahead") as file:
            return int(file.read() or 0)
    except OSError:
        return 0

time.time = lambda: real() + ahead()
time.time_ns = lambda: real_ns() + ahead() * 10**9
"""


def test_clock_that_is_an_hour_ahead_and_then_right_again(tmp_path: Path, state: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    with serving(state, web_concurrency=1) as server:
        receipts = [ask(server, "predict", "/predict", {"data": ROW})]
        for ahead in 3600, 0:
            (tmp_path / "ahead").write_text(str(ahead))
            segment = max(path.name for path in (state / "journal").glob("[0-9]*.jsonl"))
            receipts.append(ask(server, "predict", "/predict", {"data": ROW}))
            os.kill(server.workers()[0], signal.SIGKILL)  # the next one opens a segment
            server.wait_until(lambda: server.is_ready() and server.workers())
            receipts.append(ask(server, "predict", "/predict", {"data": ROW}))
            assert max(path.name for path in (state / "journal").glob("[0-9]*.jsonl")) > segment
        times = [record["time"] for record in records(state / "journal") if "status" in record]
        assert len(times) == 5
        assert max(times) - time.time() > 3000  # the clock was ahead
        assert truths(server, *receipts) == {"accepted": 5, "duplicates": 0, "rejected": []}  # also those of the future
        began = time.monotonic()
        while not ask(server, "monitor", "/monitor?format=json")[
            "requests"
        ]:  # a killed worker's last ten seconds are lost
            assert time.monotonic() - began < 60
            time.sleep(0.5)
        report = run("telemetry.report --since 2h", state)
        assert report.returncode == 0, report.stderr
        ask(server, "admin", "/model")
        assert server.ask("GET", "/metrics", Authorization=basic("metrics"))[0] == 200
        assert "Traceback" not in server.log.read_text()
