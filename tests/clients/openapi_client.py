"""The client that its authors generated from the protocol's OpenAPI file."""

# needs: open-inference-openapi==2.0.0.1
# model: iris
# server: EXTENSIONS=+endpoints.open_inference

import json
import sys
from pathlib import Path

import httpx
from open_inference.openapi.client import OpenInferenceClient
from open_inference.openapi.core import ApiError
from open_inference.openapi.types import InferenceRequest

truth = json.loads(Path(sys.argv[2]).read_text())
auth = httpx.BasicAuth(truth["user"], truth["password"])
client = OpenInferenceClient(base_url=sys.argv[1], httpx_client=httpx.Client(auth=auth))


def request(**changes: object) -> InferenceRequest:
    """Return a request for two outputs."""
    tensor = {"name": "input", "shape": [len(truth["rows"]), 4], "datatype": "FP64", "data": truth["rows"]} | changes
    return InferenceRequest.parse_obj({"inputs": [tensor], "outputs": [{"name": "predict"}, {"name": "predict_proba"}]})


client.check_server_liveness()
client.check_server_readiness()
client.check_model_readiness("model")
assert client.read_server_metadata().name
metadata = client.read_model_metadata("model")
(version,) = metadata.versions
client.check_model_version_readiness("model", version)
assert client.read_model_version_metadata("model", version) == metadata
for answer in (
    client.model_infer("model", request=request()),
    client.model_version_infer("model", version, request=request()),
):
    labels, proba = (json.loads(output.data.json()) for output in answer.outputs)
    assert labels == truth["predict"], labels
    assert proba == [value for row in truth["predict_proba"] for value in row], proba
for name, call, expected in (("other", request(), 404), ("model", request(shape=[1, 4]), 400)):
    try:
        client.model_infer(name, request=call)
    except ApiError as error:
        assert error.status_code == expected, error
        assert "error" in str(error.body), error
    else:
        raise AssertionError(f"not refused: {expected}")
