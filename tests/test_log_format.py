"""The lines of the server's log: JSON or text, and without what a request's malformed lines hold."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import joblib
import pytest
from conftest import ROOT, gunicorn

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
    assert "Traceback" in failure["message"]
    assert "OSError: the disk is gone" in failure["message"]
    now = datetime.now(UTC)
    assert all(now - timedelta(minutes=5) < datetime.fromisoformat(line["time"]) <= now for line in lines)


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
    log.warning("Worker (pid:%s) was sent SIGKILL!", number) if number < 5 else log.setLevel("INFO")
    log.info("Booting worker with pid: %s", number)
time.sleep(1.1)
log.warning("Invalid request from ip=192.0.2.7: Invalid method")
"""


def test_lines_that_callers_cause_are_limited_and_the_others_counted() -> None:
    command = [sys.executable, "-c", MANY_LINES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    messages = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    counts = [sum(each.startswith(kind) for each in messages) for kind in ("Invalid", "Error", "Worker", "Booting")]
    assert counts[2:] == [5, 50]
    assert counts[0] in range(11, 20)  # ten at once and the last; one more for each second that the loop took
    assert counts[1] in range(10, 19)
    left_out = [int(number) for message in messages for number in re.findall(r"Invalid.*\((\d+) more like", message)]
    assert sum(left_out) == 51 - counts[0]
    assert messages[-1].startswith("Invalid request from ip=192.0.2.7: Invalid method (")


def test_unknown_form_stops_the_start(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, ready=False, log_format="xml", model_path=iris_file) as running:
        assert running.process.wait(30) != 0
        assert running.log.read_text() == "cannot start: LOG_FORMAT='xml': expected text or json\n"
