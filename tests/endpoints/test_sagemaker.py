"""SageMaker's container contract: every media type in and out, answered as the model itself does, and what is wrong."""

import csv
import io
import json
import math
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cloud_models import (
    BIG,
    FRAME,
    FRAME_ROWS,
    IRIS_ROWS,
    TEXTS,
    OddNumbers,
    frame_model,
    labels_model,
    outputs_model,
    targets_model,
    text_model,
)
from conftest import Client, records

JSON, LINES, CSV, NPY = "application/json", "application/jsonlines", "text/csv", "application/x-npy"
ON = {"extensions": ("+endpoints.sagemaker",)}


def ask(client: Client, body: bytes | str, given: str | None = CSV, accept: str | None = None, **headers: str) -> Any:
    """POST a body to /invocations; without Content-Type or Accept where they are None."""
    named = client.headers | {"Content-Type": given, "Accept": accept} | headers
    data = body.encode() if isinstance(body, str) else body
    return client.http.post("/invocations", data=data, headers={k: v for k, v in named.items() if v is not None})


def npy(array: Any) -> bytes:
    """Return what numpy.save writes."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def encoded(rows: list[Any], media_type: str) -> bytes:
    """Write rows as a caller would: CSV by pandas."""
    if media_type == CSV:
        text: str = pd.DataFrame(rows).to_csv(header=False, index=False)
        return text.encode()
    if media_type == LINES:
        return "\n".join(map(json.dumps, rows)).encode()
    return npy(np.array(rows)) if media_type == NPY else json.dumps(rows).encode()


def decoded(answer: Any) -> list[Any]:
    """Read an answer's predictions, by the type that it names."""
    if answer.mimetype == NPY:
        values: list[Any] = np.load(io.BytesIO(answer.data), allow_pickle=False).tolist()
        return values
    if answer.mimetype == JSON:
        found: list[Any] = json.loads(answer.data)
        return found
    lines = answer.data.decode().split("\n")
    if answer.mimetype == LINES:
        return [json.loads(line) for line in lines]
    rows = [[number(field) for field in row] for row in csv.reader(lines)]
    return rows if len(rows[0]) > 1 else [row[0] for row in rows]


def number(field: str) -> Any:
    """Return the number in a field, or the field."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(field)
    return field


KINDS = {
    "iris": (None, IRIS_ROWS),
    "frame": (frame_model, FRAME_ROWS),
    "text": (text_model, TEXTS),
    "labels": (labels_model, [[0.0], [1.0], [2.0]]),
    "targets": (targets_model, IRIS_ROWS),
}


@pytest.mark.parametrize("accept", [JSON, LINES, CSV, NPY])
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (kind, given)
        for kind in KINDS
        for given in (JSON, LINES, CSV, NPY)
        if given != NPY or kind not in ("frame", "text")
    ],
)
def test_every_type_is_answered_in_every_other_as_the_model_does(
    serve: Any, iris_file: Any, kind: str, given: str, accept: str
) -> None:
    make, rows = KINDS[kind]
    client = serve(make() if make else iris_file, **ON)
    model = client.service.serving.choose()[0].estimator
    expected = model.predict(pd.DataFrame(rows, columns=FRAME.columns) if kind == "frame" else rows).tolist()
    answer = ask(client, encoded(rows, given), given, accept)
    assert (answer.status_code, answer.mimetype) == (200, accept)
    assert decoded(answer) == expected  # to the bit
    if accept in (CSV, LINES):
        assert answer.data.count(b"\n") == len(rows) - 1


def test_json_is_answered_in_the_form_in_which_it_came(serve: Any, iris_file: Any) -> None:
    client = serve(iris_file, **ON)
    for body, expected in (
        ({"data": IRIS_ROWS[:2]}, {"prediction": [0, 0]}),
        ({"instances": IRIS_ROWS[:2]}, {"predictions": [0, 0]}),
        (IRIS_ROWS[:2], [0, 0]),
    ):
        for given in (JSON, None, "application/json; charset=utf-8"):
            assert ask(client, json.dumps(body), given).json == expected
    proba = ask(client, json.dumps({"data": IRIS_ROWS[:1], "method": "predict_proba"}), JSON).json
    assert proba == client.predict(IRIS_ROWS[:1], "predict_proba")
    instances = {"instances": IRIS_ROWS[:1], "parameters": {"method": "predict_proba"}}
    assert ask(client, json.dumps(instances), JSON).json == {"predictions": proba["prediction"]}
    assert ask(client, json.dumps(instances), JSON, CSV).text == ",".join(map(repr, proba["prediction"][0]))


def test_rows_of_objects_are_taken_by_name(serve: Any) -> None:
    client = serve(frame_model(), **ON)
    objects = FRAME.astype(object)[["open", "size", "height", "colour"]].to_dict("records")
    expected = client.predict(FRAME_ROWS)["prediction"]
    assert ask(client, "\n".join(map(json.dumps, objects)), LINES).text == "\n".join(f'"{each}"' for each in expected)
    assert ask(client, json.dumps({"instances": objects}), JSON).json == {"predictions": expected}


def test_several_outputs_are_one_entry_for_each_row(serve: Any) -> None:
    client = serve(outputs_model(), **ON)
    first, second = client.predict(IRIS_ROWS, "predict_proba")["prediction"]
    body = json.dumps({"instances": IRIS_ROWS, "parameters": {"method": "predict_proba"}})
    per_row = [list(pair) for pair in zip(first, second, strict=True)]
    assert ask(client, body, JSON).json == {"predictions": per_row}
    lines = ask(client, body, JSON, CSV).text.split("\n")
    assert [list(map(float, line.split(","))) for line in lines] == [a + b for a, b in per_row]
    assert ask(client, body, JSON, NPY).status_code == 406  # 3 classes and 2 are no array


def test_missing_numbers_are_null_or_nan(serve: Any) -> None:
    client = serve(OddNumbers(), **ON)
    body = "-1\n0\n1"
    assert ask(client, body, accept=JSON).json == [None, None, 0.0]
    assert ask(client, body, accept=LINES).text == "null\nnull\n0.0"
    assert ask(client, body).text == "nan\nnan\n0.0"
    values = decoded(ask(client, body, accept=NPY))
    assert math.isnan(values[0])
    assert values[1:] == [-math.inf, 0.0]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, CSV),
        ("", CSV),
        ("*/*", CSV),
        ("text/*", CSV),
        ("application/json", JSON),
        ("application/json;verbose=true", JSON),
        ("application/*", JSON),
        ("text/csv;q=0.5, application/jsonlines;q=0.8", LINES),
        ("text/csv;q=0, */*;q=0.1", JSON),
        ("image/png, application/x-npy;q=0.2", NPY),
        ("text/html, */*;q=0.1", CSV),
        ("image/png", None),
        ("text/csv;q=0", None),
        ("nonsense", None),
    ],
)
def test_accept_decides_how_it_is_answered(
    serve: Any, iris_file: Any, monkeypatch: pytest.MonkeyPatch, accept: str | None, expected: str | None
) -> None:
    client = serve(iris_file, **ON)
    if expected is None:  # nothing is asked of the model
        monkeypatch.setattr(client.service, "infer", None)
    answer = ask(client, "5.1,3.5,1.4,0.2", CSV, accept)
    assert answer.status_code == (200 if expected else 406)
    assert answer.mimetype == (expected or "application/problem+json")


@pytest.mark.parametrize(
    "body",
    [
        "5.1,3.5,1.4,0.2\n6,3,5,2",
        "5.1,3.5,1.4,0.2\r\n6,3,5,2\r\n",
        "\ufeff5.1,3.5,1.4,0.2\n6,3,5,2\n",
        '"5.1","3.5",1.4,0.2\n"6",3,5,2\n',
        " 5.1, 3.5, 1.4, 0.2\n6., 3, +5, 2 \n",
        "5.1,3.5,1.4,.2\n6.0e0,3E+0,50e-1,02\n",
    ],
)
def test_csv_as_programs_write_it_is_served(serve: Any, iris_file: Any, body: str) -> None:
    client = serve(iris_file, **ON)
    assert ask(client, body).text == "0\n2"
    assert ask(client, body, "text/csv; charset=UTF-8").text == "0\n2"


NAMES = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)"
ROW = "5.1,3.5,1.4,0.2"
WRONG: list[tuple[str, bytes | str, int, str]] = [
    (CSV, "", 400, "empty"),
    (CSV, "\ufeff", 400, "empty"),
    (CSV, f"{NAMES}\n{ROW}", 422, "line 1 is a header"),
    (CSV, f"a,b,c,d\n{ROW}", 422, "line 1, column 'sepal length (cm)': expected a number (is this a header?"),
    (CSV, f"{ROW}\n5.1,3.5,1.4", 422, "line 2: 3 values; expected 4"),
    (CSV, f"{ROW}\n{ROW},1", 422, "line 2: 5 values; expected 4"),
    (CSV, f"{ROW}\n\n{ROW}", 400, "line 2 is empty"),
    (CSV, f"{ROW}\n\n", 400, "line 2 is empty"),
    (CSV, f"\n{ROW}", 400, "line 1 is empty"),
    (CSV, f"{ROW}\r\n\r\n{ROW}", 400, "line 2 is empty"),
    (CSV, f"{ROW}\n5.1,,1.4,0.2", 422, "line 2, column 'sepal width (cm)': empty"),
    (CSV, f"{ROW}\n5.1,3.5,1.4,", 422, "line 2, column 'petal width (cm)': empty"),
    (CSV, f'{ROW}\n5.1,"",1.4,0.2', 422, "line 2, column 'sepal width (cm)': empty"),
    *[
        (CSV, f"{ROW}\n5.1,3.5,{wrong},0.2", 422, "line 2, column 'petal length (cm)': ")
        for wrong in ("nan", "NaN", "inf", "-Infinity", "1_0", "0x1", "1e999", "9" * 5000, "٣", "true", "null", "1 2")
    ],
    (CSV, f'{ROW}\n"5.1,3.5,1.4,0.2', 400, "line 2 is not CSV"),
    (CSV, f'{ROW}\n"5.1"0,3.5,1.4,0.2', 400, "line 2 is not CSV"),
    (CSV, f"{ROW}\r{ROW}", 400, "line 1 is not CSV"),
    (CSV, f"{ROW}\n5.1,3.5,1.4,".encode() + b"\xff", 400, "line 2 is not UTF-8"),
    (CSV, f"{ROW}\n{ROW}".encode("utf-16"), 400, "line 1 is not UTF-8"),
    (f"{CSV}; header=present", f"{NAMES}\n{ROW}", 415, "without a header"),
    (f"{CSV}; charset=latin-1", ROW, 415, "UTF-8"),
    (LINES, "", 400, "empty"),
    (LINES, "\n", 400, "line 1 is empty"),
    (LINES, f"[{ROW}]\n\n[{ROW}]", 400, "line 2 is empty"),
    (LINES, f"[{ROW}]\n[{ROW}", 400, "line 2 is not JSON"),
    (LINES, f"[{ROW}]\n[5.1,3.5,NaN,0.2]", 400, "line 2 is not JSON"),
    (LINES, f"[{ROW}]\n[5.1,3.5,1.4]", 422, "row 1: 3 values; expected 4"),
    (LINES, f'[{ROW}]\n["\udcff"]'.encode("utf-8", "surrogateescape"), 400, "line 2 is not JSON"),
    (LINES, f'{{"data": [[{ROW}]]}}', 422, "row 0"),
    (JSON, "", 400, "empty"),
    (JSON, "{", 400, "not JSON"),
    (JSON, "{}", 422, "data is missing"),
    (JSON, "3", 422, "not an object"),
    (JSON, f'{{"instances": [[{ROW}]], "data": [[{ROW}]]}}', 422, "unknown key 'data'"),
    (JSON, '{"instances": []}', 422, "not a list of rows"),
    (JSON, '{"instances": [[1]], "parameters": {"method": 3}}', 422, "method"),
    (JSON, f'{{"instances": [[{ROW}]], "parameters": {{"method": "fit"}}}}', 422, "no method 'fit'"),
    (NPY, "", 400, "numpy"),
    (NPY, npy(np.array([["a"]], dtype=object)), 422, "numbers"),
    (NPY, npy(np.zeros((1, 3))), 422, "expected (rows, 4)"),
    (NPY, npy(np.zeros((2, 4)))[:-1], 400, "bytes"),
    ("application/x-recordio-protobuf", "x", 415, "application/jsonlines"),
    ("application/octet-stream", ROW, 415, "Content-Type"),
    ("text/plain", ROW, 415, "Content-Type"),
]


@pytest.mark.parametrize(("given", "body", "status", "detail"), WRONG)
def test_wrong_request_is_explained_and_reaches_no_model(
    serve: Any, iris_file: Any, given: str, body: bytes | str, status: int, detail: str
) -> None:
    client = serve(iris_file, **ON)
    calls: list[Any] = []
    client.service.serving.on_batch.append(lambda *batch: calls.append(batch))
    answer = ask(client, body, given)
    assert (answer.status_code, answer.mimetype) == (status, "application/problem+json")
    assert detail in answer.json["detail"]
    assert not calls
    (record,) = records(client.journal_dir)
    assert (record["status"], record["protocol"], record["error_type"]) == (status, "sagemaker", "client")


def test_wrong_field_is_named_with_its_row_and_column(serve: Any, iris_file: Any) -> None:
    answer = ask(serve(iris_file, **ON), f"{ROW}\n5.1,3.5,x,0.2").json
    assert answer["errors"] == [{"row": 1, "column": "petal length (cm)", "detail": "expected a number"}]


def test_quoted_field_over_two_lines_keeps_the_count(serve: Any) -> None:
    client = serve(text_model(), **ON)
    assert ask(client, '"good,\nvery good"\nbad').text == "1\n0"
    assert "line 3: 2 values; expected 1" in ask(client, '"good,\nvery good"\nbad,bad').json["detail"]


def test_field_becomes_what_its_column_takes(serve: Any) -> None:
    client = serve(frame_model(), **ON)
    expected = client.predict(FRAME_ROWS)["prediction"]
    for true, false in (("True", "False"), ("true", "false"), ("1", "0")):
        text = FRAME.assign(open=[true if each else false for each in FRAME["open"]]).to_csv(header=False, index=False)
        assert ask(client, text).text.split("\n") == expected
    for wrong, detail in (("1.5,red,3,", "empty"), ("1.5,red,3,perhaps", "true or false"), ("x,red,3,1", "a number")):
        assert detail in ask(client, wrong).json["detail"]


def test_string_that_looks_like_a_number_stays_a_string(serve: Any) -> None:
    client = serve(text_model(), **ON)
    assert ask(client, "3\n1e5\ntrue\nnan").status_code == 200
    assert [record["rows"] for record in records(client.journal_dir)] == [4]


def test_large_numbers_are_exact(serve: Any) -> None:
    client = serve(labels_model(), **ON)
    for accept in (JSON, LINES, CSV, NPY):
        assert decoded(ask(client, "0\n1\n2", accept=accept)) == [BIG, BIG + 1, -BIG]


def test_no_more_rows_than_allowed_and_no_compressed_body(serve: Any, iris_file: Any) -> None:
    client = serve(iris_file, max_rows=2, max_body_bytes=300, **ON)
    for given in (CSV, LINES, JSON, NPY):
        assert ask(client, encoded([[1, 2, 3, 4]] * 2, given), given).status_code == 200
        assert "3 rows" in ask(client, encoded([[1, 2, 3, 4]] * 3, given), given).json["detail"]
    assert ask(client, "1,2,3,4".ljust(300)).status_code == 200
    assert ask(client, "1,2,3,4".ljust(301)).status_code == 413
    assert ask(client, ROW, **{"Content-Encoding": "gzip"}).status_code == 415


def test_custom_attributes_come_back_or_are_refused(serve: Any, iris_file: Any) -> None:
    client = serve(iris_file, **ON)
    name = "X-Amzn-SageMaker-Custom-Attributes"
    for good in ("", "trace=1; c000b4f9-df62-4c85-a0bf-7c525f9104a4", "x" * 1024):
        answer = ask(client, ROW, **{name: good})
        assert (answer.status_code, answer.headers[name]) == (200, good)
    assert name not in ask(client, ROW).headers
    for bad in ("x" * 1025, "é", "\x00"):
        assert ask(client, ROW, **{name: bad}).status_code == 400
    environ = {"HTTP_X_AMZN_SAGEMAKER_CUSTOM_ATTRIBUTES": "a\r\nSet-Cookie: b"}
    answer = client.http.post("/invocations", data=ROW, headers=client.headers, environ_overrides=environ)
    assert answer.status_code == 400
    assert "Set-Cookie" not in answer.headers


def test_ping_is_readyz_without_a_body(serve: Any, iris_file: Any, tmp_path: Any) -> None:
    client = serve(iris_file, **ON)
    assert (client.http.get("/ping").status_code, client.http.get("/ping").data) == (200, b"")
    broken = tmp_path / "broken.joblib"
    broken.write_bytes(b"no model")
    client = serve(broken, **ON)
    assert client.http.get("/ping").status_code == 503
    assert ask(client, ROW).status_code == 503
    assert client.http.post("/ping").status_code == 405
    assert records(client.journal_dir)[0]["error_type"] == "model"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"web_concurrency": 2}, (2, 1)),  # 100,000 short rows
        ({"web_concurrency": 2, "max_rows": 10**7}, (2, 16)),
        ({"web_concurrency": 8, "max_rows": 10**7, "max_body_bytes": 50 * 2**20}, (2, 50)),
        ({"web_concurrency": 8, "max_rows": 10**7, "max_body_bytes": 2**30}, (1, 95)),
        ({"web_concurrency": 8, "max_body_bytes": 1000}, (8, 1)),
    ],
)
def test_execution_parameters_keep_to_the_settings(
    serve: Any, iris_file: Any, settings: Any, expected: tuple[int, int]
) -> None:
    answer = serve(iris_file, **ON, **settings).http.get("/execution-parameters").json
    assert answer == {
        "MaxConcurrentTransforms": expected[0],
        "BatchStrategy": "MULTI_RECORD",
        "MaxPayloadInMB": expected[1],
    }


def test_password_and_role_are_needed_and_the_record_is_as_of_predict(serve: Any, iris_file: Any) -> None:
    client = serve(iris_file, **ON)
    assert client.http.post("/invocations", data=ROW).status_code == 401
    client.headers = {}
    assert ask(client, ROW).status_code == 401
    open_to_all = serve(iris_file, auth="off", **ON)
    open_to_all.headers = {}
    assert ask(open_to_all, ROW).text == "0"
    (record,) = records(open_to_all.journal_dir)
    known = ("protocol", "path", "method", "rows", "status", "success", "variant", "user")
    assert [record[key] for key in known] == ["sagemaker", "/invocations", "predict", 1, 200, True, "stable", ""]


def test_it_is_off_by_default(serve: Any, iris_file: Any) -> None:
    client = serve(iris_file)
    assert [client.http.get("/ping").status_code, ask(client, ROW).status_code] == [404, 404]
