"""What log and journal have of a failed request: a line with its cause, and what was wrong, in our words alone."""

import json
import logging
import re
import time
import uuid
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from conftest import Client, basic, gunicorn, records

from operations.failures import MAX_CAUSES, MAX_DETAIL, FailureLog, cause_of, without_names

ROW = {"sepal length (cm)": 5.1, "sepal width (cm)": 3.5, "petal length (cm)": 1.4, "petal width (cm)": 0.2}
SECRET = "JaneDoe"  # stands for what a caller may have as a name
MODULE = """
class Fails:
    n_features_in_ = 1

    def predict(self, rows):
        if rows[0][0] == 7:
            raise OSError("the disk is gone, and it held s3cret")
        if rows[0][0] == 8:
            return {}["s3cret"]
        return [row[0] for row in rows]
"""


def test_failure_has_a_line_with_its_cause_and_each_cause_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fails_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from fails_module import Fails  # type: ignore[import-not-found]  # just written

    joblib.dump(Fails(), tmp_path / "model.joblib")
    with gunicorn(tmp_path, model_path=tmp_path / "model.joblib") as server:
        for value in (7, 7, 8, 7, 8):
            assert server.predict([[value]])[0] == 500
        log, found = server.log.read_text(), records(server.journal_dir)
    causes = {7: "OSError at fails_module.py:7 in predict", 8: "KeyError at fails_module.py:9 in predict"}
    assert [record["detail"] for record in found] == [causes[value] for value in (7, 7, 8, 7, 8)]
    for record in found:
        assert log.count(f"request {record['request_id']}: the model failed: {record['detail']}\n") == 1
    assert len(re.findall(r"Traceback.*\n.*\n.*\n.*\n", log)) >= 2
    assert log.count("OSError: the disk is gone") == log.count("KeyError: 's3cret'") == 1
    assert "s3cret" not in json.dumps(found)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> logging.Logger:
    """A log of its own, whatever other tests have made of the others."""
    found = logging.getLogger(f"test.{uuid.uuid4().hex}")
    caplog.set_level("INFO", found.name)
    found.addHandler(caplog.handler)
    found.propagate = False
    return found


def fail(failures: FailureLog, times: int, error: Exception | None = None) -> None:
    """Log some failures of one cause."""
    try:
        raise error or OSError("gone")
    except Exception as raised:
        for number in range(times):
            failures.error("", "request %s: the %s failed", number, "model", exc_info=raised)


def test_flood_is_bounded_and_each_failure_is_counted(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    failures = FailureLog(log)
    began = time.monotonic()
    fail(failures, 5000)
    failures.count_left_out()
    seconds = time.monotonic() - began
    lines = [record.getMessage() for record in caplog.records]
    assert 51 <= len(lines) - 1 <= 52 + 5 * seconds
    left_out = re.fullmatch(
        r"(\d+) more requests failed, .*: \1 times OSError at test_failures.py:\d+ in fail", lines[-1]
    )
    assert left_out
    assert len(lines) - 1 + int(left_out[1]) == 5000
    failures.count_left_out()
    assert len(caplog.records) == len(lines)


def test_traceback_comes_again_after_a_minute_with_the_number_in_between(
    log: logging.Logger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, now = FailureLog(log), time.monotonic
    fail(failures, 8)
    fail(failures, 1, ValueError())
    monkeypatch.setattr(time, "monotonic", lambda: now() + 61)
    fail(failures, 2)
    with_traceback = [record.getMessage() for record in caplog.records if record.exc_info]
    assert [message.partition(" at ")[0].rpartition(" ")[2] for message in with_traceback] == [
        *("OSError", "ValueError", "OSError")
    ]
    assert with_traceback[-1].endswith("in fail, and 7 more since its last traceback")
    assert len(caplog.records) == 11


def test_causes_are_bounded(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    failures = FailureLog(log)
    for number in range(MAX_CAUSES + 50):
        fail(failures, 1, type(f"Made{number}", (Exception,), {})())
    assert sum(record.exc_info is not None for record in caplog.records) == MAX_CAUSES + 1
    assert "another cause" in caplog.text


def test_cause_is_where_the_first_exception_of_a_chain_was_raised() -> None:
    try:
        try:
            np.zeros(2).reshape(3)
        except ValueError as error:
            raise RuntimeError("s3cret") from error
    except RuntimeError as error:
        assert re.fullmatch(r"ValueError at test_failures.py:\d+ in test_cause_\w+", cause_of(error))
        error.__cause__ = error  # a circle
        assert cause_of(error).startswith("RuntimeError at test_failures.py:")
    assert cause_of(KeyError()) == "KeyError"


# --- details


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (
            {"data": [ROW, ROW | {"petal width (cm)": "x"}]},
            "row 1, column 'petal width (cm)': a string; expected a number",
        ),
        (
            {"data": [[5.1, 3.5, None, 0.2]]},
            "row 0, column 'petal length (cm)': null; this model does not take a missing",
        ),
        ({"data": [[5.1]]}, "row 0: 1 values; expected 4"),
        ({"rows": []}, "unknown key '…'; the body has data and may have method"),
        (b"[1,", "not JSON: it goes wrong at line 1 column "),
        ({"data": [], "method": 1}, 'method is not a string, such as "predict_proba"'),
    ],
    ids=str,
)
def test_record_has_what_the_caller_was_told(body: Any, detail: str, serve: Any, iris_file: Path) -> None:
    client: Client = serve(iris_file)
    answer = client.post(body)
    (record,) = records(client.journal_dir)
    assert record["detail"].startswith(detail)
    assert answer.status_code == record["status"]
    if "…" not in detail:
        assert record["detail"] == answer.json["detail"]


def test_record_of_a_request_that_succeeded_has_no_detail(serve: Any, iris_file: Path) -> None:
    client: Client = serve(iris_file)
    client.predict([ROW])
    assert "detail" not in records(client.journal_dir)[0]


def tensor(**changed: Any) -> dict[str, Any]:
    """Return a request of the Open Inference Protocol with one input."""
    each = {"name": "input", "shape": [1, 4], "datatype": "FP64", "data": [5.1, 3.5, 1.4, 0.2]} | changed
    return {"inputs": [each]}


def requests_with(name: str) -> list[tuple[str, Any, dict[str, str]]]:
    """Return requests that have a name wherever a caller may choose one: path, body, headers."""
    predict, infer, vertex = "/predict", "/v2/models/model/infer", "/v1/models/model:predict"
    good = {"data": [ROW]}
    return [
        *(
            (predict, body, {})
            for body in (good | {name: 1}, good | {"method": name}, {"data": name}, {"data": {name: 1}})
        ),
        *((predict, {"data": [row]}, {}) for row in (ROW | {name: 1}, {name: 1}, [name] * 4, name)),
        (predict, {"data": [ROW | {f"petal width (cm)': {name}": 1}]}, {}),
        (predict, {"data": [[1, 2, 3, 4]], "columns": [name, "b", "c", "d"]}, {}),
        (predict, good, {"X_Model_Version": name}),
        (predict, name.encode(), {}),
        (predict, json.dumps(good).encode(), {"Content_Type": f"text/{name}"}),
        (predict, json.dumps(good).encode(), {"Content_Encoding": name}),
        *((infer, tensor(**{key: name}), {}) for key in ("name", "datatype", "data", "shape")),
        (infer, tensor(name=name, parameters={"binary_data_size": 4}), {}),
        (infer, tensor(name=name, data=[[name]]), {}),
        (infer, {"inputs": tensor()["inputs"] + [{**tensor()["inputs"][0], "name": name}]}, {}),
        (infer, tensor() | {"outputs": [{"name": name}]}, {}),
        (infer, tensor() | {"outputs": [{"name": name, "parameters": {"classification": name}}]}, {}),
        (infer, tensor() | {"id": [name]}, {}),
        (infer, tensor() | {"parameters": {"binary_data_output": name}}, {}),
        (f"/v2/models/{name}/infer", tensor(), {}),
        (f"/v2/models/model/versions/{name}/infer", tensor(), {}),
        ("/invocations", f"{name},1,2,3\n".encode(), {"Content_Type": "text/csv"}),
        ("/invocations", f"{name}\n".encode(), {"Content_Type": "text/csv"}),
        ("/invocations", json.dumps({"instances": [ROW], name: 1}).encode(), {}),
        ("/invocations", name.encode(), {"Content_Type": f"application/{name}"}),
        ("/feedback", {"feedback": [{name: name}]}, {}),
        (vertex, {"instances": [ROW], name: 1}, {}),
    ]


@pytest.mark.parametrize(
    "name",
    [
        SECRET,
        f"it's {SECRET}",
        f"\"{SECRET}'",
        f"\\'{SECRET}\\",
        f"x' {SECRET}",
        "é" * 79 + f"'{SECRET}" * 9,
        f"\0{SECRET}",
    ],
)
def test_names_that_the_caller_chose_are_not_recorded(name: str, serve: Any, iris_file: Path) -> None:
    extensions = ("+endpoints.open_inference", "+endpoints.sagemaker", "+endpoints.vertex")
    client: Client = serve(iris_file, extensions=extensions)
    client.headers = {"Authorization": basic("predict")}
    is_plain = name == SECRET
    for path, body, headers in requests_with(name):
        if is_plain or (SECRET not in path and not headers):
            client.post(body, path, **headers)
    found = records(client.journal_dir)
    failed = [record for record in found if record.get("success") is False]
    assert len(failed) > 20
    assert all(0 < len(record["detail"]) <= MAX_DETAIL for record in failed)
    told = [
        {key: value for key, value in record.items() if key != "path"} for record in found
    ]  # which a caller asks for
    assert SECRET not in json.dumps(told)


@pytest.mark.parametrize(
    ("detail", "recorded"),
    [
        ("row 0, column 'height': missing", "row 0, column 'height': missing"),
        ("row 0, column 'weight': missing", "row 0, column '…': missing"),
        ("row 0, column 'it\\'s': \"so\"", "row 0, column '…': \"…\""),
        ("the model's dates, and others' too", "the model's dates, and others' too"),
        ("cut off within 'a nam", "cut off within '…'"),
        ("cut off within 'a na\\", "cut off within '…'"),
        ('send {"data": [[…], …]}', 'send {"data": [[…], …]}'),
        ("no method 'predict_proba'", "no method 'predict_proba'"),
    ],
)
def test_quoted_words_are_recorded_if_they_are_known(detail: str, recorded: str) -> None:
    assert without_names(detail, {"'height'"}) == recorded
