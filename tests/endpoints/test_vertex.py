"""Vertex AI's container contract: instances and rawPredict, its routes, and its numbers, which are all floats."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloud_models import BIG, FRAME, FRAME_ROWS, IRIS_ROWS, TEXTS, frame_model, outputs_model, text_model
from conftest import Client, records
from test_sagemaker import CSV, JSON, LINES, NPY, decoded, encoded

from settings import Settings, SettingsError

ON = {"extensions": ("+endpoints.vertex",)}
HEALTH = "/v1/endpoints/123/deployedModels/456"
PREDICT = f"{HEALTH}:predict"


def ask(client: Client, body: Any, path: str = PREDICT, **headers: str) -> Any:
    """POST to the predict route, without Content-Type unless one is given."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.http.post(path, data=data, headers=client.headers | headers)


def as_doubles(value: Any) -> Any:
    """Return a JSON value as the platform's predict passes it on: every number is a float."""
    if isinstance(value, list):
        return [as_doubles(each) for each in value]
    if isinstance(value, dict):
        return {key: as_doubles(each) for key, each in value.items()}
    return float(value) if type(value) is int else value


def test_instances_are_answered_with_predictions(serve: Any, iris_file: Path) -> None:
    client = serve(iris_file, **ON)
    expected = client.predict(IRIS_ROWS)["prediction"]
    for headers in ({}, {"Content-Type": "application/json"}, {"Content-Type": "application/json; charset=utf-8"}):
        assert ask(client, {"instances": IRIS_ROWS}, **headers).json == {"predictions": expected}
    assert ask(client, {"instances": IRIS_ROWS, "parameters": None}).json == {"predictions": expected}
    assert ask(client, {"instances": IRIS_ROWS, "parameters": {}}).json == {"predictions": expected}
    with_method = {"instances": IRIS_ROWS, "parameters": {"method": "predict_proba"}}
    assert ask(client, with_method).json == {"predictions": client.predict(IRIS_ROWS, "predict_proba")["prediction"]}
    assert {(record["protocol"], record["path"]) for record in records(client.journal_dir)[2:4]} == {
        ("vertex", PREDICT)
    }


def test_several_outputs_are_one_prediction_for_each_instance(serve: Any) -> None:
    client = serve(outputs_model(), **ON)
    answer = ask(client, {"instances": IRIS_ROWS, "parameters": {"method": "predict_proba"}}).json
    assert [list(map(len, each)) for each in answer["predictions"]] == [[3, 2]] * len(IRIS_ROWS)


@pytest.mark.parametrize(("make", "rows"), [(frame_model, FRAME_ROWS), (text_model, TEXTS)])
def test_numbers_that_the_platform_made_floats_are_taken(serve: Any, make: Any, rows: list[Any]) -> None:
    client = serve(make(), **ON)
    expected = {"predictions": client.predict(rows)["prediction"]}
    assert ask(client, {"instances": as_doubles(rows)}).json == expected
    if make is frame_model:
        objects = FRAME.astype(object).to_dict("records")
        assert ask(client, {"instances": as_doubles(objects)}).json == expected


def test_whole_numbers_written_as_floats_go_into_columns_of_integers(serve: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -r requirements/onnx.txt")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -r requirements/onnx.txt")
    helper, whole = onnx.helper, onnx.TensorProto.INT64
    given, answered = (helper.make_tensor_value_info(name, whole, ["n", 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [given], [answered])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    client = serve(path, **ON)
    assert ask(client, {"instances": [[3.0, -4.0], [5, 2.0**53]]}).json == {"predictions": [[-3, 4], [-5, -(2**53)]]}
    assert client.http.post(PREDICT, data="3.0,4\n5,6e0", headers=client.headers | {"Content-Type": CSV}).text == (
        "-3,-4\n-5,-6"
    )
    assert ask(client, {"instances": [[BIG, 0]]}).json == {"predictions": [[-BIG, 0]]}  # by rawPredict
    for wrong in (3.5, float(2**60)):  # the last may have been another number before it was rounded
        assert ask(client, {"instances": [[wrong, 1.0]]}).status_code == 422
    assert client.post({"data": [[3.0, 4.0]]}).status_code == 422  # only here


@pytest.mark.parametrize("given", [LINES, CSV, NPY])
def test_raw_predict_takes_other_types(serve: Any, iris_file: Path, given: str) -> None:
    client = serve(iris_file, **ON)
    answer = ask(client, encoded(IRIS_ROWS, given), **{"Content-Type": given})
    assert (answer.mimetype, decoded(answer)) == (given, client.predict(IRIS_ROWS)["prediction"])
    assert ask(client, encoded(IRIS_ROWS, given), **{"Content-Type": given, "Accept": JSON}).mimetype == JSON


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_raw_predict_takes_the_open_inference_protocol(
    serve: Any, iris_file: Path, binary: bool, compressed: bool
) -> None:
    client = serve(iris_file, **ON)
    rows = np.array(IRIS_ROWS, "float32")
    tensor = {"name": "input", "shape": list(rows.shape), "datatype": "FP32"}
    headers = {"Content-Type": "application/octet-stream" if binary else "application/json"}
    if binary:
        head = json.dumps({"id": "1", "inputs": [tensor | {"parameters": {"binary_data_size": rows.nbytes}}]}).encode()
        body, headers["Inference-Header-Content-Length"] = head + rows.tobytes(), str(len(head))
    else:
        body = json.dumps({"id": "1", "inputs": [tensor | {"data": rows.tolist()}]}).encode()
    if compressed:
        body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
    answer = ask(client, body, **headers)
    if compressed and not binary:  # nothing shows that it is of this protocol
        assert answer.status_code == 415
        return
    (output,) = answer.json["outputs"]
    assert (output["name"], output["data"], answer.json["id"]) == ("predict", [0, 0, 1, 1, 2], "1")
    assert [record["protocol"] for record in records(client.journal_dir)] == ["vertex"]
    assert ask(client, {"inputs": []}).mimetype == "application/problem+json"


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"", 400, "empty"),
        (b"{", 400, "not JSON"),
        (b'{"instances": [[NaN]]}', 400, "not JSON"),
        ({}, 422, "instances is missing"),
        ([[1, 2, 3, 4]], 422, "instances is missing"),
        ({"data": [[1, 2, 3, 4]]}, 422, "instances is missing"),
        ({"instances": {}}, 422, "not a list"),
        ({"instances": "x"}, 422, "not a list"),
        ({"instances": None}, 422, "not a list"),
        ({"instances": []}, 422, "not a list of rows"),
        ({"instances": [[1, 2, 3, 4]], "more": 1}, 422, "unknown key 'more'"),
        ({"instances": [[1, 2, 3, 4]], "parameters": {"temperature": 1}}, 422, "parameters"),
        ({"instances": [[1, 2, 3, 4]], "parameters": [1]}, 422, "parameters"),
        ({"instances": [[1, 2, 3, 4]], "parameters": {"method": None}}, 422, "method"),
        ({"instances": [[1, 2, 3, 4]], "parameters": {"method": "__init__"}}, 422, "no method"),
        ({"instances": [[1, 2, 3]]}, 422, "3 values; expected 4"),
        ({"instances": [[1, 2, 3, 4], [1]]}, 422, "row 1"),
        ({"instances": [1, 2, 3, 4]}, 422, "two brackets"),
        ({"instances": [["1", 2, 3, 4]]}, 422, "a string; expected a number"),
    ],
)
def test_wrong_request_is_never_answered_with_predictions(
    serve: Any, iris_file: Path, body: Any, status: int, detail: str
) -> None:
    client = serve(iris_file, **ON)
    calls: list[Any] = []
    client.service.serving.on_batch.append(lambda *batch: calls.append(batch))
    answer = ask(client, body)
    assert (answer.status_code, answer.mimetype) == (status, "application/problem+json")
    assert detail in answer.json["detail"]
    assert "predictions" not in answer.json
    assert not calls


@pytest.mark.parametrize("predict", [PREDICT, "/predict", "/", "/predictions:now"])
@pytest.mark.parametrize("health", [HEALTH, "/healthz", "/readyz", "/", "/health"])
def test_routes_are_those_that_the_platform_sets(
    serve: Any, iris_file: Path, tmp_path: Path, predict: str, health: str
) -> None:
    routes = {"aip_predict_route": "" if predict == PREDICT else predict}
    routes["aip_health_route"] = "" if health == HEALTH else health
    client = serve(iris_file, **routes, **ON)
    assert ask(client, {"instances": IRIS_ROWS[:1]}, predict).json == {"predictions": [0]}
    assert [record["protocol"] for record in records(client.journal_dir)] == ["vertex"]
    assert (client.http.get(health).status_code, client.http.get(health).data) == (200, b"")
    client.headers = {}
    assert ask(client, {"instances": IRIS_ROWS[:1]}, predict).status_code == 401
    broken = tmp_path / "broken.joblib"
    broken.write_bytes(b"no model")
    client = serve(broken, **routes, **ON)
    assert client.http.get(health).status_code == 503
    assert ask(client, {"instances": IRIS_ROWS[:1]}, predict).status_code == 503


def test_no_more_rows_than_allowed(serve: Any, iris_file: Path) -> None:
    client = serve(iris_file, max_rows=2, **ON)
    assert ask(client, {"instances": IRIS_ROWS[:2]}).status_code == 200
    assert "3 rows" in ask(client, {"instances": IRIS_ROWS[:3]}).json["detail"]


@pytest.mark.parametrize("route", ["predict", "/a b", "/<x>", "/a?b", "/a\n"])
def test_route_that_is_no_path_stops_the_start(route: str) -> None:
    with pytest.raises(SettingsError, match=r"AIP_PREDICT_ROUTE=.*expected a path"):
        Settings.from_environ({"AIP_PREDICT_ROUTE": route})


def test_it_is_off_by_default(serve: Any, iris_file: Path) -> None:
    client = serve(iris_file, aip_predict_route="/other")
    assert [ask(client, {}, path).status_code for path in (PREDICT, "/other")] == [404, 404]
    assert client.http.get(HEALTH).status_code == 404
