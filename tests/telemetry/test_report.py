"""The report: what it counts in a journal, how far back it looks, and damaged journals."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, basic

from endpoints.error_rate import wilson
from telemetry import report
from telemetry.report import percentile


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
    assert run(capsys, "--dir", journal, "--since", "1m") == {
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
    assert {name: value for name, value in found.items() if name.split()[0] not in ("requests", "requests/s")} == {
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
    assert done.stdout.split()[:2] == ["requests", "14"]
    assert done.stderr == ""


def test_command_is_silent_if_nobody_reads_its_output(journal: Path) -> None:
    readable, writable = os.pipe()
    os.close(readable)
    command = [sys.executable, "-m", "telemetry.report", "--dir", str(journal)]
    done = subprocess.run(command, cwd=ROOT, stdout=writable, stderr=subprocess.PIPE, text=True, timeout=30)
    os.close(writable)
    assert (done.returncode, done.stderr) == (1, "")
