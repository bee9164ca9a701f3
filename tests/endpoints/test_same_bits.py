"""The same rows, of the same type of number, are answered with the same bits whatever the protocol."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Client
from test_sagemaker import CSV, JSON, LINES, NPY, encoded, npy

NAMES = ("open_inference", "sagemaker", "vertex", "function_compute", "eas")
ALL = {"extensions": tuple(f"+endpoints.{name}" for name in NAMES)}
VERTEX = "/v1/endpoints/1/deployedModels/2:predict"
V2 = "/v2/models/model/infer"
METHOD = "predict_proba"


def answers(client: Client, rows: Any) -> dict[str, Any]:
    """Ask for probabilities of an array's rows in every protocol that can ask for them; return what each answered."""
    as_lists, parameters = rows.tolist(), {"parameters": {"method": METHOD}}
    datatype = {"float64": "FP64", "float32": "FP32"}[rows.dtype.name]
    tensor = {"name": "input", "shape": list(rows.shape), "datatype": datatype}
    outputs = [{"name": METHOD, "parameters": {"binary_data": True}}]
    binary = tensor | {"parameters": {"binary_data_size": rows.nbytes}}
    head = json.dumps({"inputs": [binary], "outputs": outputs}).encode()
    length = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}

    def ask(path: str, body: Any, **headers: str) -> Any:
        answer = client.post(body, path, **headers)
        assert answer.status_code == 200, answer.text
        return answer

    def tensor_of(answer: Any) -> Any:
        at = int(answer.headers["Inference-Header-Content-Length"])
        return np.frombuffer(answer.data[at:]).reshape(len(rows), -1).tolist()

    found = {
        "array": ask(f"/predict?method={METHOD}", npy(rows), Content_Type=NPY).json["prediction"],
        "v2": np.reshape(
            ask(V2, {"inputs": [tensor | {"data": as_lists}], "outputs": [{"name": METHOD}]}).json["outputs"][0][
                "data"
            ],
            (len(rows), -1),
        ).tolist(),
        "v2, bytes": tensor_of(ask(V2, head + rows.tobytes(), **length)),
        "v2 by Vertex AI": tensor_of(ask(VERTEX, head + rows.tobytes(), **length)),
    }
    if datatype == "FP64":  # JSON's numbers
        call = {"data": as_lists, "method": METHOD}
        for path in ("/predict", "/invoke", "/", "/invocations"):
            found[path] = ask(path, call).json["prediction"]
        found["vertex"] = ask(VERTEX, {"instances": as_lists} | parameters).json["predictions"]
        body = {"instances": as_lists} | parameters
        found["lines"] = list(map(json.loads, ask("/invocations", body, Accept=LINES).text.split("\n")))
        found["csv"] = [
            list(map(float, line.split(","))) for line in ask("/invocations", body, Accept=CSV).text.split("\n")
        ]
        found["npy"] = np.load(io.BytesIO(ask("/invocations", body, Accept=NPY).data)).tolist()
    return found


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_answers_are_the_same_to_the_bit(serve: Any, iris_file: Path, dtype: str) -> None:
    client = serve(iris_file, **ALL)
    rows = (np.random.default_rng(0).random((50, 4)) * 7).astype(dtype)
    model = client.service.serving.choose()[0].estimator
    expected = model.predict_proba(rows.astype("float64")).tolist()
    for protocol, found in answers(client, rows).items():
        assert found == expected, protocol


@pytest.mark.parametrize("path", ["/invocations", VERTEX])
def test_rows_of_every_type_are_read_to_the_bit(serve: Any, path: str) -> None:
    client = serve(Same(), **ALL)
    edges = [5e-324, -0.0, 0.1, 1 / 3, 2**53 + 2.0, 1.7976931348623157e308, -1e-7, 123456789.123456789]
    rows = [[value] for value in edges]
    expected = np.array(edges).tobytes()
    for given in (JSON, LINES, CSV, NPY):
        body = encoded(rows, given)
        if given == JSON and path == VERTEX:
            body = json.dumps({"instances": rows}).encode()
        answer = client.post(body, path, Content_Type=given, Accept=NPY)
        assert np.load(io.BytesIO(answer.data)).tobytes() == expected, given
    whole = [[2**53 + 1], [2**63 - 1], [-(2**63)]]  # as float() of the text, not by way of another number
    text = "\n".join(str(value) for (value,) in whole)
    answer = client.post(text.encode(), path, Content_Type=CSV, Accept=NPY)
    assert np.load(io.BytesIO(answer.data)).tolist() == [float(value) for (value,) in whole]


class Same:
    """Answers a row's number."""

    n_features_in_ = 1

    def predict(self, rows: Any) -> Any:
        """Return the numbers."""
        return rows[:, 0]
