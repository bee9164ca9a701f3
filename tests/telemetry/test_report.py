"""The report: what it counts in a journal, how far back it looks, and damaged journals."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runbook
from conftest import ROOT, Gunicorn, basic, free_port

from endpoints.error_rate import wilson
from monitor import Journal
from telemetry import report, rollup_writer
from telemetry.report import percentile
from telemetry.rollup_writer import RollupWriter


def record(**changed: Any) -> dict[str, Any]:
    """Return the record of a good request, with some fields changed."""
    fields = {
        "time": time.time() - 10,
        "record_id": "f00-1",
        "pid": 1,
        "response_time": 0.001,
        "success": True,
        "error": "",
        "error_type": "",
        "status": 200,
        "path": "/predict",
        "method": "predict",
        "rows": 1,
        "model_version": "v1",
        "user": "alice",
        "request_id": "r",
    }
    return fields | changed


def failed(status: int, error_type: str, error: str, **changed: Any) -> dict[str, Any]:
    return record(success=False, status=status, error_type=error_type, error=error, **changed)


TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"


def lines(*entries: Any) -> bytes:
    """Encode records as lines of a segment; bytes stay as they are."""
    return b"".join(each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in entries)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal of two segments: ten good requests of 1 to 10 ms, four failed ones, and every other kind of line."""
    (tmp_path / f"{1:020d}-7.jsonl").write_bytes(
        lines(
            *(record(response_time=n / 1000, rows=n) for n in (3, 1, 2, 10, 9)),
            {"dropped": 40, "reason": "the journal was full", "time": time.time() - 10, "record_id": "f00-2", "pid": 7},
            failed(422, "client", "Unprocessable Entity", rows=0, response_time=0.0125),
            failed(422, "client", "Unprocessable Entity", rows=0, response_time=0.0125),
            b'{"time": 17, "record_id": "cut o\n',
        )
    )
    (tmp_path / f"{2:020d}-8.jsonl").write_bytes(
        lines(
            *(record(response_time=n / 1000, rows=n, model_version="v2") for n in (4, 5, 6, 7, 8)),
            failed(500, "model", "Internal Server Error", response_time=2.0),
            failed(503, "model", "Service Unavailable", model_version="", rows=0, response_time=0.0),
            failed(401, "auth", "requests without a valid password", requests=1000, rows=0, response_time=0.0),
            failed(401, "auth", "requests without a valid password", requests=234, rows=0, response_time=0.0),
            {
                "dropped": 2,
                "reason": "the journal could not be written",
                "time": time.time(),
                "record_id": "f00-3",
                "pid": 8,
            },
            b'{"time": 17, "record_id": "being written jus',
        )
    )
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, str]:
    """Run the report, and return its lines by name."""
    assert report.main([str(each) for each in arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    rows = [re.fullmatch(r"(\S.*?) {2,}(\S.*)", line) for line in printed.out.splitlines()]
    assert all(rows), printed.out
    table = {row[1]: row[2] for row in rows if row}
    assert len(table) == len(rows), "a name appears twice"
    return table


def test_report_sums_up_a_journal(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "--dir", journal, "--since", "1m")
    assert found.pop("from") <= found.pop("to")
    assert found == {
        "source": "journal",
        "requests": "14",
        "requests/s": "0.23",  # 14 in 60 s
        "rows": "56",
        "success": "71.43 %",  # 10 of 14
        # Ascending: 0 1 2 3 4 5 6 | 7 8 9 10 12.5 12.5 2000 ms; nearest ranks are ⌈0.5·14⌉ = 7, 13 and 14.
        "p50": "6.00 ms",
        "p90": "12.50 ms",
        "p99": "2000.00 ms",
        "version v1": "8",
        "version v2": "5",
        "version none": "1",
        "client: 422 Unprocessable Entity": "2",
        "model: 500 Internal Server Error": "1",
        "model: 503 Service Unavailable": "1",
        "without a valid password": "1234",
        "records dropped": "42",
        "torn lines": "1",
    }


@pytest.mark.parametrize(
    ("count", "q", "wanted"),
    [
        (1, 50, 1),
        (1, 99, 1),
        (2, 50, 1),
        (2, 51, 2),
        (3, 50, 2),
        (10, 50, 5),
        (10, 90, 9),
        (10, 91, 10),
        (10, 99, 10),
        (100, 50, 50),
        (100, 90, 90),
        (100, 99, 99),
        (101, 99, 100),
        (1000, 99, 990),
        (1000, 29, 290),  # 1000 * 0.29 is 290.00000000000006 as floats go
        (10, 0, 1),
        (10, 100, 10),
    ],
)
def test_percentile_is_the_nearest_rank(count: int, q: float, wanted: float) -> None:
    assert percentile([float(n) for n in range(1, count + 1)], q) == wanted


@pytest.mark.parametrize(
    ("since", "requests"),
    [("20s", 1), ("90s", 2), ("15m", 3), ("1h", 4), ("7h", 5), ("7d", 6), ("999999d", 7), ("all", 7), (None, 4)],
)
def test_since_says_how_far_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], since: str | None, requests: int
) -> None:
    ages = (10, 60, 600, 1800, 6 * 3600, 3 * 86400, 30 * 86400)  # seconds
    now = time.time()
    for age in ages:
        path = tmp_path / f"{int((now - age) * 1e9):020d}-1.jsonl"
        path.write_bytes(lines(record(time=now - age)))
        os.utime(path, (now - age, now - age))
    together = tmp_path / f"{0:020d}-2.jsonl"  # old records in a segment that is still written
    together.write_bytes(lines(*(record(time=now - age) for age in ages)))
    table = run(capsys, "--dir", tmp_path, *(["--since", since] if since else []))
    assert table["requests"] == str(2 * requests)
    assert ("requests/s" in table) == (since != "all")


@pytest.mark.parametrize("since", ["", "1", "h", "1w", "-1h", "1.5h", " 1h", "1h ", "1H", "1h30m", "yesterday", "1e3s"])
def test_bad_since_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str], since: str) -> None:
    assert report.main(["--dir", str(tmp_path), f"--since={since}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Usage: python -m telemetry.report")
    assert "15m" in printed  # an example of the right form


def test_missing_journal_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--dir", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.parametrize("since", ["1h", "0s", "all"])
def test_empty_journal_has_no_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str], since: str) -> None:
    assert run(capsys, "--dir", tmp_path, "--since", since)["requests"] == "0"
    (tmp_path / f"{1:020d}-1.jsonl").touch()
    assert run(capsys, "--dir", tmp_path, "--since", since)["requests"] == "0"


def test_journal_without_authenticated_requests_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / f"{1:020d}-1.jsonl").write_bytes(lines(failed(401, "auth", "", requests=5)))
    table = run(capsys, "--dir", tmp_path)
    assert (table["requests"], table["without a valid password"]) == ("0", "5")


def test_unknown_fields_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = record(trace_id="00-4bf9", nested={"torn": 1, "dropped": 5}, time=time.time() - 1.5)
    (tmp_path / f"{1:020d}-1.jsonl").write_bytes(lines(later))
    table = run(capsys, "--dir", tmp_path)
    assert table["requests"] == "1"
    assert not {"torn lines", "records dropped"} & set(table)


ODD = {
    "nothing": b"",
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "a string": b'"time"',
    "no field": b"{}",
    "no time": b'{"response_time": 0.1}',
    "a time that is a string": b'{"time": "2026-11-22T10:00:00Z"}',
    "nothing but a time": lines({"time": time.time()}).strip(),
    "null for each field": lines(dict.fromkeys(record()) | {"time": time.time()}).strip(),
    "strings for numbers": lines(record(response_time="1", rows="2")).strip(),
    "lists for strings": lines(record(model_version=["v1"], success=False, error_type=[])).strip(),
    "a loss that is a string": lines({"dropped": "many", "time": time.time()}).strip(),
    "a count that is null": lines({"requests": None, "time": time.time()}).strip(),
    "zeros, as a power cut leaves": b"\0" * 500,
    "bytes that are not UTF-8": b"\xff\xfe{}",
    "a time far off": lines(record(time=1e300)).strip(),
    "nested without an end": b"[" * 100_000,
    "an integer of 100 digits": lines(record(rows=10**100)).strip(),
    "a line of 10 MB": b"x" * 10_000_000,
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_line_that_no_journal_writes_does_not_spoil_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], odd: bytes
) -> None:
    (tmp_path / f"{1:020d}-1.jsonl").write_bytes(lines(record(), odd + b"\n", record()))
    for since in ("1h", "all"):
        # It does not matter whether the odd line counts as a request; the two good ones do.
        assert run(capsys, "--dir", tmp_path, "--since", since)["requests"] in ("2", "3")


def test_report_of_a_servers_own_journal(serve: Any, iris_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = serve(iris_file)
    client.predict([[5.1, 3.5, 1.4, 0.2]] * 3)
    client.post({"data": []})
    client.post({"data": []}, Authorization=basic("mallory"))
    client.service.request_log.summarise()
    table = run(capsys, "--dir", client.journal_dir)
    assert (table["requests"], table["rows"], table["success"]) == ("2", "3", "50.00 %")
    assert table["client: 422 Unprocessable Entity"] == table["without a valid password"] == "1"


def truth(rows: int = 1, **fields: Any) -> dict[str, Any]:
    """Return the record of an accepted entry of POST /feedback."""
    known = {"event": "feedback", "receipt_id": "00ff", "model_version": "1", "variant": "stable", "rows": rows}
    sums = {"wrong": 0, "unknown_labels": 0, "abs_error": None, "sq_error": None, "signed_error": None}
    return known | sums | {"age": 86_400.0, "user": "alice", "time": time.time() - 10} | fields


def test_prediction_errors_are_shown_with_their_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = {"wrong": None, "unknown_labels": None, "model_version": "2", "variant": "canary", "age": 3 * 86_400}
    (tmp_path / f"{1:020d}-1.jsonl").write_bytes(
        lines(
            truth(100, wrong=12, unknown_labels=2),
            truth(100, wrong=8, age=2 * 86_400),
            truth(0),  # each of its truths was null
            truth(1, model_version="3", age=100),
            truth(1000, time=time.time() - 7200, wrong=1000),
            *[truth(**none, abs_error=abs(off), sq_error=off * off, signed_error=off) for off in (1, 1, -3, 1, 0, 0)],
        )
    )
    found = run(capsys, "--dir", tmp_path, "--since", "1h")
    low, high = wilson(20, 200)
    assert {
        name: value
        for name, value in found.items()
        if name.split()[0] not in ("from", "to", "requests", "requests/s", "source")
    } == {
        "rows": "0",
        "labelled rows, 3 stable": "1",
        "age of the labels, 3 stable": "100 s",
        "prediction errors, 1 stable": f"10.00 % ({100 * low:.2f} to {100 * high:.2f} %)",
        "labels unknown to the model, 1 stable": "2",
        "labelled rows, 1 stable": "200",
        "age of the labels, 1 stable": "32.0 h",
        "mean absolute error, 2 canary": "1 (0.1235 to 1.877)",
        "RMSE, 2 canary": "1.414",
        "bias, 2 canary": "0 (-1.24 to 1.24)",
        "labelled rows, 2 canary": "6",
        "age of the labels, 2 canary": "3.0 days",
    }


@pytest.mark.parametrize(
    "fields",
    [{"rows": None}, {"rows": -1}, {"wrong": 2}, {"wrong": "no"}, {"age": None}, {"age": []}, {"abs_error": "x"}],
)
def test_feedback_that_lacks_something_does_not_spoil_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any]
) -> None:
    bare = {"event": "feedback", "time": time.time()}
    (tmp_path / f"{1:020d}-1.jsonl").write_bytes(lines(truth() | fields, bare, truth(3)))
    found = run(capsys, "--dir", tmp_path)
    assert (found["labelled rows, 1 stable"], found["torn lines"]) == ("3", "2")


def test_report_knows_the_share_of_rows_whose_truth_came(
    serve: Any, iris_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = serve(iris_file)
    version = client.get("/model").json["stable"]["version"]
    client.predict([[5.1, 3.5, 1.4, 0.2]] * 6)
    answer = client.post({"data": [[5.1, 3.5, 1.4, 0.2]] * 2})
    body = {"feedback": [{"receipt": answer.headers["X-Feedback"], "truth": answer.json["prediction"]}]}
    assert client.post(body, "/feedback", Authorization=basic("feedback")).json["accepted"] == 1
    found = run(capsys, "--dir", client.journal_dir)
    assert found[f"labelled rows, {version} stable"] == "2"
    assert found[f"coverage since first served, {version} stable"] == "25.00 %"
    assert found[f"prediction errors, {version} stable"] == f"0.00 % (0.00 to {100 * wilson(0, 2)[1]:.2f} %)"
    assert found[f"age of the labels, {version} stable"] in ("0 s", "1 s", "2 s")


def test_feedback_is_counted_as_an_event_if_endpoints_were_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "endpoints.error_rate", None)
    monkeypatch.delitem(sys.modules, "telemetry.feedback_report", raising=False)
    (tmp_path / f"{1:020d}-1.jsonl").write_bytes(lines(truth(), truth()))
    assert run(capsys, "--dir", tmp_path)["feedback of 1"] == "2"


def test_command_reads_the_directory_that_the_environment_names(journal: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "JOURNAL_DIR": str(journal)}
    command = [sys.executable, "-m", "telemetry.report"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=30, check=True)
    assert re.search(r"^requests +14$", done.stdout, re.M)
    assert done.stderr == ""


def test_second_server_beside_the_first_has_a_report_of_its_own(tmp_path: Path, copy: Path) -> None:
    """docs/operations.md word for word, but for the port: in a directory whose environment is this one."""
    (block,) = runbook.commands(__file__, "operations.md", "A second server beside the first, without systemd")
    port = free_port()
    make, ask = block.replace("PORT=5105", f"PORT={port}").splitlines()
    shutil.copy(ROOT / "Makefile", copy)
    (copy / ".venv").mkdir()
    for each in Path(sys.prefix).iterdir():
        (copy / ".venv" / each.name).symlink_to(each)
    (copy / ".venv/run.done").unlink(missing_ok=True)
    (copy / ".venv/run.done").touch()  # all is installed
    environ = {"PATH": os.environ["PATH"], "WEB_CONCURRENCY": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", make], cwd=copy, env=environ, stdout=log, stderr=log, start_new_session=True
        )
    server = Gunicorn(process, port, copy, tmp_path / "log", 1)
    try:
        server.wait_until(server.all_ready)
        command = ["curl", "-sf", "--netrc-file", "var/demo.netrc", "-H", "Content-Type: application/json"]
        call = [*command, "-d", '{"data": [[5.1, 3.5, 1.4, 0.2]]}', f"http://127.0.0.1:{port}/predict"]
        assert subprocess.run(call, cwd=copy, capture_output=True, check=True).stdout == b'{"prediction":[0]}\n'
        shown = subprocess.run(["bash", "-c", ask], cwd=copy, env=environ, capture_output=True, text=True, check=True)
        assert re.search(r"^requests +1$", shown.stdout, re.MULTILINE)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_command_is_silent_if_nobody_reads_its_output(journal: Path) -> None:
    readable, writable = os.pipe()
    os.close(readable)
    command = [sys.executable, "-m", "telemetry.report", "--dir", str(journal)]
    done = subprocess.run(command, cwd=ROOT, stdout=writable, stderr=subprocess.PIPE, text=True, timeout=30)
    os.close(writable)
    assert (done.returncode, done.stderr) == (1, "")


# --- roll-ups


NOON = 20_000 * 86_400 + 43_200  # 2024-10-04


@pytest.fixture
def rolled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory without a journal, with the roll-ups of a day until noon, which it is now: a request a minute."""
    clock = SimpleNamespace(now=NOON - 86_400.0)
    clock.time = clock.monotonic = lambda: clock.now
    clock.gmtime, clock.strftime = time.gmtime, time.strftime
    monkeypatch.setattr(rollup_writer, "time", clock)
    monkeypatch.setattr(report, "time", clock)
    writer = RollupWriter(tmp_path, lambda function, *arguments: function(*arguments))
    writer._compact_at = float("inf")
    known = record(protocol="predict", variant="stable")
    for minute in range(24 * 60):
        failed = {"success": False, "status": 422, "error": "Unprocessable Entity", "error_type": "client"}
        user = {"user": "bob"} if minute % 10 == 0 else {}
        writer.count_request(0.001 * (1 + minute % 100), known | (failed if minute % 4 == 0 else {}) | user)
        clock.now += 60
        writer.tick()
    unknown = {"user": None, "status": 401, "success": False, "error": "Unauthorized", "error_type": "auth"}
    writer.count_request(0.001, known | unknown | {"model_version": "", "variant": "", "rows": 0})
    writer.count_loss("the journal was full", 7)
    writer.note_event({"event": "rollback", "model_version": "v2", "reason": "worse", "time": NOON - 60})
    for wrong in (0, 1):
        writer.note_event(truth(wrong=wrong, time=NOON - 60))
    clock.now += 60
    writer.tick()
    return tmp_path


def test_rollups_are_reported_where_the_journal_was_shipped(rolled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "--dir", rolled, "--since", "24h")
    assert found["source"] == "roll-ups, within 1 %"
    assert (found["from"], found["to"]) == ("2024-10-03 12:00:00 UTC", "2024-10-04 12:01:00 UTC")
    assert (found["requests"], found["rows"], found["success"]) == ("1440", "1440", "75.00 %")
    assert (found["version v1"], found["client: 422 Unprocessable Entity"]) == ("1440", "360")
    assert float(found["p50"].removesuffix(" ms")) == pytest.approx(50, rel=0.02)
    assert float(found["p99"].removesuffix(" ms")) == pytest.approx(99, rel=0.02)
    assert (found["without a valid password"], found["records dropped"], found["rollback of v2"]) == ("1", "7", "1")
    assert found["labelled rows, 1 stable"] == "2"
    assert found["prediction errors, 1 stable"].startswith("50.00 %")
    assert run(capsys, "--dir", rolled, "--since", "1h")["requests"] == "59"
    assert run(capsys, "--dir", rolled, "--since", "all")["requests"] == "1440"


def test_journal_is_reported_if_it_has_all_requests(rolled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [record(time=NOON - 60 * minute, response_time=0.0123) for minute in range(1, 1441)]
    path = rolled / f"{1:020d}-1.jsonl"
    path.write_bytes(lines(*made))
    found = run(capsys, "--dir", rolled, "--since", "12h")
    assert (found["source"], found["requests"], found["p50"]) == ("journal", "719", "12.30 ms")
    path.write_bytes(lines(*made[:-800], *made[-799:]))  # one is missing, and it is older
    assert run(capsys, "--dir", rolled, "--since", "1h")["source"] == "journal"
    assert run(capsys, "--dir", rolled, "--since", "12h")["source"] == "roll-ups, within 1 %"


def test_requests_are_reported_by_version_user_and_error(
    rolled: Path, journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def table(*arguments: str | Path) -> list[list[str]]:
        assert report.main([str(each) for each in arguments]) == 0
        return [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]

    for path in journal.glob("*.jsonl"):
        path.unlink()
    head = ["version", "requests", "success", "p50", "p99"]
    names, (name, count, success, *_) = table("--dir", rolled, "--by", "version", "--since", "1d")
    assert (names, name, count, success) == (head, "v1 stable", "1440", "75.00 %")
    users = table("--dir", rolled, "--by", "user", "--since", "1d")
    assert users == [["user", "requests", "share"], ["alice", "1296", "90.00 %"], ["bob", "144", "10.00 %"]]
    assert report.main(["--dir", str(rolled), "--by", "user", "--since", "1d"]) == 0
    assert re.fullmatch(rf"from {TIME} to {TIME}, by the roll-ups, within 1 %\n", capsys.readouterr().err)
    errors = table("--dir", rolled, "--by", "error", "--since", "1d")
    assert errors == [["error", "requests", "share"], ["client: 422 Unprocessable Entity", "360", "25.00 %"]]


def test_journal_is_reported_by_version_user_and_error(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for by, wanted in {
        "version": [["v1", "8", "62.50 %", "9.00 ms", "2000.00 ms"], ["v2", "5", "100.00 %", "6.00 ms", "8.00 ms"]],
        "user": [["alice", "14", "100.00 %"]],
        "error": [["client: 422 Unprocessable Entity", "2", "14.29 %"]],
    }.items():
        assert report.main(["--dir", str(journal), "--by", by]) == 0
        rows = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
        assert rows[0][:2] == [by, "requests"]
        assert rows[1 : 1 + len(wanted)] == wanted


def test_report_is_right_after_the_journal_is_gone(
    serve: Any, iris_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = serve(iris_file)
    for _ in range(5):
        client.predict([[5.1, 3.5, 1.4, 0.2]] * 3)
    client.post({"data": []})
    for hook in client.service.on_exit:
        hook()
    before = run(capsys, "--dir", client.journal_dir)
    for path in client.journal_dir.glob("*.jsonl"):
        path.unlink()
    after = run(capsys, "--dir", client.journal_dir)
    assert (before["source"], after["source"]) == ("journal", "roll-ups, within 1 %")
    for name in ("requests", "rows", "success", "version none", "client: 422 Unprocessable Entity"):
        assert before.get(name) == after.get(name)


# --- single requests


def test_latest_failures_are_listed(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--dir", str(journal), "--errors"]) == 0
    printed = capsys.readouterr()
    fields = [line.split("\t") for line in printed.out.splitlines()]
    assert [each[3:] for each in fields] == [
        ["422", "client: Unprocessable Entity", "v1", "12.50"],
        ["422", "client: Unprocessable Entity", "v1", "12.50"],
        ["500", "model: Internal Server Error", "v1", "2000.00"],
        ["503", "model: Service Unavailable", "-", "0.00"],
    ]
    assert {tuple(each[1:3]) for each in fields} == {("r", "alice")}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", each[0]) for each in fields)
    assert re.fullmatch(rf"from {TIME} to {TIME}, by the journal\n", printed.err)


def test_failure_is_listed_with_what_its_caller_was_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "row 0, column 'a': missing"
    made = failed(422, "client", "x", detail=told), failed(503, "overload", "y"), failed(400, "client", "z", detail=[1])
    (tmp_path / f"{1:020d}-1.jsonl").write_bytes(lines(*made))
    assert report.main(["--dir", str(tmp_path), "--errors"]) == 0
    assert [line.split("\t")[7:] for line in capsys.readouterr().out.splitlines()] == [[told], [], ["[1]"]]


def test_wrong_password_is_found_by_its_id_and_not_counted_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noted = {"event": "wrong_password", "request_id": "w", "address": "192.0.2.1", "time": time.time() - 10}
    summed = failed(401, "auth", "", requests=5, request_id="")
    (tmp_path / f"{1:020d}-1.jsonl").write_bytes(lines(noted, summed))
    table = run(capsys, "--dir", tmp_path)
    assert (table["without a valid password"], table["requests"]) == ("5", "0")
    assert "torn lines" not in table
    assert report.main(["--dir", str(tmp_path), "--request", "w"]) == 0
    assert re.search(r'^address +"192\.0\.2\.1"$', capsys.readouterr().out, re.MULTILINE)


def test_requests_of_a_trace_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    others = record(request_id="c")
    made = record(request_id="a", trace_id=trace), record(request_id="b", trace_id=trace), others
    (tmp_path / f"{1:020d}-1.jsonl").write_bytes(lines(*made))
    assert report.main(["--dir", str(tmp_path), "--request", trace]) == 0
    assert re.findall(r'^request_id +"(.)"$', capsys.readouterr().out, re.MULTILINE) == ["a", "b"]


def test_no_more_than_the_latest_failures_are_listed(rolled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [failed(422, "client", "x", request_id=f"{n}", time=NOON - 2000 + n) for n in range(100)]
    (rolled / f"{1:020d}-1.jsonl").write_bytes(lines(*made[50:], *made[:50]))
    assert report.main(["--dir", str(rolled), "--errors", "--since", "1d"]) == 0
    printed = capsys.readouterr()
    assert [line.split("\t")[1] for line in printed.out.splitlines()] == [f"{n}" for n in range(50, 100)]
    assert "latest 50 of 100" in printed.err
    assert re.search(r"25\d more", printed.err)  # the roll-ups have 360, some of them in the first five minutes


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_line_that_no_journal_writes_is_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], odd: bytes
) -> None:
    (tmp_path / f"{1:020d}-1.jsonl").write_bytes(lines(failed(422, "client", "x"), odd + b"\n"))
    for arguments in (["--errors"], ["--request", "r"], ["--by", "user"], ["--by", "version"], ["--by", "error"]):
        assert report.main(["--dir", str(tmp_path), *arguments]) == 0
        assert "client" in capsys.readouterr().out or arguments[0] == "--by"


def test_what_a_caller_sends_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = "\x1b[2J\u009b2J\n\t\u202e"
    (tmp_path / f"{1:020d}-1.jsonl").write_bytes(
        lines(failed(422, "client", "x", user=odd, path=odd, model_version=odd))
    )
    for arguments in (["--errors"], ["--request", "r"], ["--by", "user"], ["--by", "version"], []):
        assert report.main(["--dir", str(tmp_path), *arguments]) == 0
        printed = capsys.readouterr().out
        assert not set(odd) - {"\n", "\t", *"[2J"} & set(printed), printed
        assert "\n\t" not in printed


def test_request_is_found_by_its_id(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = [record(request_id="mine", rows=5), failed(500, "model", "Internal Server Error", request_id="mine", rows=6)]
    old = record(request_id="old", time=time.time() - 9 * 86_400)
    (journal / f"{3:020d}-9.jsonl").write_bytes(lines(*two, old))
    assert report.main(["--dir", str(journal), "--request", "mine"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert re.search(r"^rows +5$", first, re.M)
    assert re.search(r"^error +\"Internal Server Error\"$", second, re.M)
    assert report.main(["--dir", str(journal), "--request", "old"]) == 0


@pytest.mark.parametrize("name", ["none", "\x1b[2J", ""])
def test_id_that_no_record_has_is_explained(journal: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert report.main(["--dir", str(journal), f"--request={name}"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "request_id:" in printed.err
    assert "\x1b" not in printed.err


def has_printed(process: subprocess.Popen[str]) -> bool:
    """Return whether a process prints something within 0.2 seconds."""
    poll = select.poll()  # select takes no descriptor above 1023
    assert process.stdout
    poll.register(process.stdout, select.POLLIN)
    return bool(poll.poll(200))


def test_new_requests_are_followed_over_segments(tmp_path: Path) -> None:
    before = Journal(tmp_path, 2**24)
    before.append(record(request_id="before"))
    # A process that a shell started in the background ignores Ctrl-C, and so would those that it starts.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from telemetry.report import main; sys.exit(main())"
    command = [sys.executable, "-u", "-c", code, "--dir", str(tmp_path), "--follow"]
    all_, only_errors = (
        subprocess.Popen([*command, *more], cwd=ROOT, stdout=subprocess.PIPE, text=True) for more in ([], ["--errors"])
    )
    deadline = time.monotonic() + 120
    try:
        # Until it follows; from then on each is printed.
        while not (has_printed(all_) and has_printed(only_errors)):
            assert time.monotonic() < deadline
            before.append(failed(422, "client", "Unprocessable Entity", request_id="begin"))
        other = Journal(tmp_path, 2**24)
        for number in range(3):
            before.append(record(request_id=f"a{number}"))
            before.append({"event": "rollback", "model_version": "1"})
            other.append(failed(500, "model", "Internal Server Error", request_id=f"b{number}"))
            before.close()  # the next is in another segment
        other.append(failed(500, "model", "Internal Server Error", request_id="end"))
        found: dict[str, list[str]] = {}
        for name, process, count in (("all", all_, 7), ("errors", only_errors, 4)):
            ids = found[name] = []
            assert process.stdout
            # Not until "end": a segment that is begun while others are read comes a moment later.
            while len(ids) < count:
                ids += [each for each in [process.stdout.readline().split("\t")[1]] if each != "begin"]
    finally:
        for process in (all_, only_errors):
            process.send_signal(signal.SIGINT)
        statuses = [process.communicate(timeout=60) and process.returncode for process in (all_, only_errors)]
    assert statuses == [130, 130]
    assert sorted(found["all"]) == ["a0", "a1", "a2", "b0", "b1", "b2", "end"]
    assert found["errors"] == ["b0", "b1", "b2", "end"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--errors --by user", "--by and --errors"),
        ("--follow --request x", "--follow and --request"),
        ("--follow --errors --by user", "--by and --errors and --follow"),
        ("--html x --errors", "--errors and --html"),
        ("--follow --since 1h", "leave out --since"),
        ("--request x --since 1h", "leave out --since"),
        ("--by hour", "version"),
    ],
)
def test_options_that_do_not_go_together_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    assert report.main(["--dir", str(tmp_path), *arguments.split()]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Usage: python -m telemetry.report")
    assert said in printed


# --- the page


def test_page_is_written_to_a_file(rolled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("endpoints.monitor_page")
    file = rolled / "page.html"
    assert report.main(["--dir", str(rolled), "--since", "24h", "--html", str(file)]) == 0
    assert capsys.readouterr() == ("", "")
    page = file.read_text()
    assert page.startswith("<!doctype html>")
    assert {"v1", "alice", "422"} <= set(re.findall(r"\w+", page))
    assert report.main(["--dir", str(rolled), "--html", str(rolled / "none" / "page.html")]) == 1
    assert "none" in capsys.readouterr().err


def test_page_without_endpoints_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "endpoints.monitor_figures", None)
    monkeypatch.delitem(sys.modules, "endpoints.monitor_page", raising=False)
    assert report.main(["--dir", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 1
    assert "endpoints" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
