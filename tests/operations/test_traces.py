"""The header traceparent: which are valid, and where the trace's id is then."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Client, gunicorn, records
from flask import Flask

from operations.traces import note

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ROW = [5.1, 3.5, 1.4, 0.2]


@pytest.mark.parametrize(
    ("header", "is_valid"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-ff", True),
        (f"01-{TRACE}-{SPAN}-00", True),
        (f"cc-{TRACE}-{SPAN}-00-what-will-be", True),
        (f"cc-{TRACE}-{SPAN}-00-", True),
        (f"cc-{TRACE}-{SPAN}-00what-will-be", False),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"00-{TRACE}-{SPAN}-01-", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{TRACE}-{SPAN}-1", False),
        (f"00-{TRACE}-{SPAN}", False),
        (f"0-{TRACE}-{SPAN}-01", False),
        (f"00-{TRACE[1:]}-{SPAN}-01", False),
        (f"00-{TRACE}-{SPAN}-01,00-{TRACE}-{SPAN}-01", False),
        (f" 00-{TRACE}-{SPAN}-01", False),
        (f"00-{TRACE}-{SPAN}-01\n", False),
        (f"cc-{TRACE}-{SPAN}-00-\n", False),
        ("", False),
    ],
)
def test_header_is_read_as_the_standard_says(header: str, is_valid: bool) -> None:
    record: dict[str, Any] = {}
    with Flask(__name__).test_request_context():
        note(header, record)
    assert record == ({"trace_id": TRACE} if is_valid else {})


def test_trace_is_in_answers_errors_and_records(serve: Any, iris_file: Path) -> None:
    client: Client = serve(iris_file, extensions=("+endpoints.open_inference",))
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    answers = [client.post(body, **headers) for body in ({"data": [ROW]}, {"data": []})]
    answers += [client.post({}, "/v2/models/model/infer", **headers), client.post({}, "/nowhere", **headers)]
    assert [answer.status_code for answer in answers] == [200, 422, 400, 404]
    assert [answer.headers.getlist("X-Trace-ID") for answer in answers] == [[TRACE]] * 4
    assert answers[1].json["trace_id"] == answers[3].json["trace_id"] == TRACE
    others = [client.post({"data": []}), client.post({"data": []}, traceparent="00-x")]
    for answer in others:
        assert "X-Trace-ID" not in answer.headers
        assert "trace_id" not in answer.json
    assert [record.get("trace_id") for record in records(client.journal_dir)] == [TRACE] * 3 + [None] * 2


@pytest.mark.parametrize("fast_path", [0, 1])
def test_trace_arrives_through_gunicorn(tmp_path: Path, iris_file: Path, fast_path: int) -> None:
    with gunicorn(tmp_path, model_path=iris_file, fast_path=fast_path) as server:
        status, headers, _ = server.ask("POST", "/predict", b"{}", traceparent=f"00-{TRACE}-{SPAN}-01")
        assert (status, headers.get_all("X-Trace-ID")) == (401, [TRACE])
        status, headers, _ = server.ask("GET", "/healthz")
        assert (status, headers["X-Trace-ID"]) == (200, None)
