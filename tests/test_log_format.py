"""The lines of the server's log: JSON or text, priorities for systemd, and nothing of a request's malformed lines."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import joblib
import pytest
from conftest import ROOT, basic, gunicorn

MODULE = """
class Fails:
    n_features_in_ = 1

    def predict(self, rows):
        if rows[0][0] == 7:
            raise OSError("the disk is gone\\n[2026-01-01 00:00:00 +0000] [1] [INFO] forged\\r\\x1b[2Jred\\u202e")
        return [row[0] for row in rows]
"""
SECRET = "it's-a-secret"
MALFORMED = (
    f"Authorization Basic {SECRET}",
    f"Authorization: {SECRET}\0",
    f"Expect: {SECRET}",
    f"Transfer-Encoding: {SECRET}",
    f"Authorization{SECRET} : Basic",
)


def test_every_line_is_an_object_and_a_traceback_is_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from fails_module import Fails  # type: ignore[import-not-found]  # just written

    joblib.dump(Fails(), tmp_path / "model.joblib")
    with gunicorn(tmp_path, log_format="text", model_path=tmp_path / "model.joblib") as running:
        assert running.predict([[7]])[0] == 500
        log = running.log.read_text("utf-8")
    # What the model raised cannot look like a line of the log, nor steer a terminal.
    assert (
        "\n  OSError: the disk is gone\n  [2026-01-01 00:00:00 +0000] [1] [INFO] forged\\r\\x1b[2Jred\\u202e\n" in log
    )
    assert all(character.isprintable() or character == "\n" for character in log)
    with gunicorn(tmp_path, log_format="json", model_path=tmp_path / "model.joblib") as running:
        assert running.predict([[7]])[0] == 500
        assert running.stop() == 0
        lines = [json.loads(line) for line in running.log.read_text().splitlines()]
    assert {type(line) for line in lines} == {dict}
    assert {line["logger"] for line in lines} >= {"gunicorn.error", "model.serving", "server"}
    messages = [line["message"] for line in lines]
    assert messages[0].startswith("Starting gunicorn")
    assert messages.count("Shutting down: Master") == 1
    (failure,) = [line for line in lines if line["severity"] == "ERROR"]
    assert failure["message"].startswith(f"request {failure['request_id']}: the model failed")
    assert failure["traceback"].startswith("Traceback")
    assert "OSError: the disk is gone" in failure["traceback"]
    known = {"time", "severity", "logger", "pid", "message"}
    assert failure.keys() == known | {"request_id", "traceback"}
    assert all(line.keys() == known for line in lines if line is not failure)
    now = datetime.now(UTC)
    assert all(now - timedelta(minutes=5) < datetime.fromisoformat(line["time"]) <= now for line in lines)


# Runs a command whose standard error is what systemd's journal would have opened; "0:1" stands for another stream.
JOURNAL = ["sh", "-c", 'JOURNAL_STREAM=${STREAM:-$(stat -Lc %d:%i /proc/self/fd/2)} exec "$@"', "sh"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_lines_for_systemds_journal_begin_with_their_priority(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fails_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from fails_module import Fails  # just written

    joblib.dump(Fails(), tmp_path / "model.joblib")
    environ = {"log_format": form, "model_path": tmp_path / "model.joblib"}
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with gunicorn(tmp_path, within=JOURNAL, **environ) as running:
        body = b'{"data": [[7]]}'
        sent = {"Authorization": basic("predict"), "Content_Type": "application/json"}
        sent |= {"X_Request_ID": "mine", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
        assert running.ask("POST", "/predict", body, **sent)[0] == 500
        running.raw(b"x / HTTP/1.1\r\n\r\n")
        assert running.stop() == 0
        lines = running.log.read_text("utf-8").splitlines()
    by_priority = {mark: [line[3:] for line in lines if line.startswith(mark)] for mark in ("<3>", "<4>", "<6>")}
    assert sum(map(len, by_priority.values())) == len(lines)
    errors, warnings, others = by_priority.values()
    assert any("Booting worker" in line for line in others)
    assert any("serving version" in line for line in others)
    assert any("Invalid request from ip=127.0.0.1" in line for line in warnings)
    if form == "json":
        (failure,) = map(json.loads, errors)
        assert (failure["request_id"], failure["trace_id"]) == ("mine", trace)
        assert [json.loads(line)["severity"] for line in warnings] == ["WARNING"] * len(warnings)
    else:
        assert errors[0].startswith("[")
        assert "request mine: the model failed" in errors[0]
        assert errors[0].endswith(f"(trace {trace})")
        assert "  Traceback (most recent call last):" in errors
        assert "  OSError: the disk is gone" in errors


def test_another_stream_than_the_journals_has_no_priorities(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, within=JOURNAL, stream="0:1", model_path=iris_file) as running:
        assert "serving version" in running.log.read_text()
        assert not re.search(r"^<", running.log.read_text(), re.MULTILINE)


def test_error_log_in_a_file_has_gunicorns_lines_without_priorities(tmp_path: Path, iris_file: Path) -> None:
    arguments = ("--error-logfile", str(tmp_path / "error.log"))
    with gunicorn(tmp_path, *arguments, within=JOURNAL, model_path=iris_file) as running:
        assert "] [INFO] Booting worker" in (tmp_path / "error.log").read_text()
        assert "Booting worker" not in running.log.read_text()


@pytest.mark.parametrize("form", ["text", "json"])
def test_reason_why_a_start_failed_is_an_error_like_others(tmp_path: Path, iris_file: Path, form: str) -> None:
    settings = {"log_format": form, "max_rows": "none", "model_path": iris_file}
    with gunicorn(tmp_path, ready=False, within=JOURNAL, **settings) as running:
        assert running.process.wait(30) != 0
        (line,) = (line for line in running.log.read_text().splitlines() if "cannot start" in line)
    assert line.startswith("<3>")
    reason = "cannot start: MAX_ROWS='none': expected a whole number of rows"
    assert reason in (json.loads(line[3:])["message"] if form == "json" else line)


BROKEN = """
import os, sys, log_format, logging
log_format.set_up("json")
os.close(2)
print("lost", file=sys.stderr)
logging.getLogger("a").error("lost %s", "too")
print("still here")
"""


def test_standard_error_that_is_closed_ends_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "still here\n"


PROGRESS = """
import sys, log_format
log_format.set_up("json")
for percent in range(3000):
    sys.stderr.write("\\rloading")
"""


def test_progress_that_never_ends_its_line_is_logged_and_not_kept() -> None:
    command = [sys.executable, "-c", PROGRESS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lengths = [len(json.loads(line)["message"]) for line in done.stderr.splitlines()]
    assert len(lengths) == 2
    assert max(lengths) < 8300


@pytest.mark.parametrize("form", ["text", "json"])
def test_malformed_line_of_a_request_is_not_logged(tmp_path: Path, iris_file: Path, form: str) -> None:
    with gunicorn(tmp_path, log_format=form, model_path=iris_file) as running:
        for line in MALFORMED:
            answer = running.raw(f"POST /predict HTTP/1.1\r\nHost: a\r\n{line}\r\nContent-Length: 0\r\n\r\n".encode())
            assert answer.split()[1] in (b"400", b"417", b"501")
        running.raw(f"{SECRET} / HTTP/1.1\r\n\r\n".encode())
        assert running.stop() == 0
        log = running.log.read_text()
    assert log.count("Invalid request from ip=127.0.0.1: ") == len(MALFORMED) + 1
    assert "Invalid HTTP Header" in log  # what is wrong
    assert "secret" not in log


MANY_LINES = """
import logging, time, log_format
log_format.set_up("json")
log = logging.getLogger("gunicorn.error")
for number in range(50):
    log.warning(f"Invalid request from ip=192.0.2.{number}: Invalid method")
    log.error("Error handling request %s", number)
    log.warning(f"Worker (pid:{number}) was sent SIGKILL!")
    log.info("Booting worker with pid: %s", number)
time.sleep(1.1)
log.warning("Invalid request from ip=192.0.2.7: Invalid method")
"""


def test_lines_that_callers_cause_are_limited_and_the_others_counted() -> None:
    command = [sys.executable, "-c", MANY_LINES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    messages = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    counts = [sum(each.startswith(kind) for each in messages) for kind in ("Invalid", "Error", "Worker", "Booting")]
    assert counts[3] == 50
    assert counts[0] in range(11, 20)  # ten at once and the last; one more for each second that the loop took
    assert counts[1] in range(10, 19)
    assert counts[2] in range(10, 19)
    left_out = [int(number) for message in messages for number in re.findall(r"Invalid.*\((\d+) more like", message)]
    assert sum(left_out) == 51 - counts[0]
    assert messages[-1].startswith("Invalid request from ip=192.0.2.7: Invalid method (")


def test_unknown_form_stops_the_start(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, ready=False, log_format="xml", model_path=iris_file) as running:
        assert running.process.wait(30) != 0
        assert running.log.read_text() == "cannot start: LOG_FORMAT='xml': expected text or json\n"
