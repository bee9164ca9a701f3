"""Vertex AI's client: its LocalEndpoint, which asks a container, and its predict, through a gateway."""

# needs: google-cloud-aiplatform[prediction]==2.7.0
# model: iris
# server: EXTENSIONS=+endpoints.vertex AUTH=off AIP_PREDICT_ROUTE=/predict AIP_HEALTH_ROUTE=/health

import json
import sys
from pathlib import Path

from gateway import Changed, Gateway
from google.api_core.exceptions import GoogleAPICallError
from google.auth.credentials import AnonymousCredentials
from google.cloud.aiplatform.prediction import LocalEndpoint
from google.cloud.aiplatform_v1.services.prediction_service import PredictionServiceClient
from google.cloud.aiplatform_v1.services.prediction_service.transports import PredictionServiceRestTransport
from google.protobuf import json_format, struct_pb2

TRUTH = json.loads(Path(sys.argv[2]).read_text())
ENDPOINT = "projects/p/locations/l/endpoints/1"


def local() -> None:
    """Ask as LocalEndpoint does; its own routes are /predict and /health."""
    endpoint = LocalEndpoint("image")  # serve() would start it by Docker
    endpoint.container_is_running, endpoint.assigned_host_port = True, int(sys.argv[1].rpartition(":")[2])
    assert endpoint.run_health_check().status_code == 200
    body = json.dumps({"instances": TRUTH["rows"]})
    for headers in (None, {"Content-Type": "application/json"}):
        answer = endpoint.predict(request=body, headers=headers)
        assert answer.json() == {"predictions": TRUTH["predict"]}, answer.text
    answer = endpoint.predict(request=json.dumps({"data": TRUTH["rows"]}))
    assert (answer.status_code, "predictions" in answer.json()) == (422, False)
    endpoint.container_is_running = False


def completed(answer: Changed) -> Changed:
    """Return an answer to predict as the platform passes it on."""
    status, headers, body = answer
    if status >= 400:
        error = {"code": status, "message": body.decode(), "status": "FAILED_PRECONDITION"}
        return status, {"Content-Type": "application/json"}, json.dumps({"error": error}).encode()
    return status, headers, json.dumps(json.loads(body) | {"deployedModelId": "2"}).encode()


def remote() -> None:
    """Ask as Endpoint.predict does: every number becomes a double."""
    path = f"/v1/{ENDPOINT}:predict"
    gateway = Gateway(
        sys.argv[1],
        lambda asked: "/predict" if asked.partition("?")[0] == path else None,
        {"content-type"},
        completed,
    )
    transport = PredictionServiceRestTransport(
        host=gateway.url.removeprefix("http://"), url_scheme="http", credentials=AnonymousCredentials()
    )
    client = PredictionServiceClient(transport=transport)

    instances = [message(row) for row in TRUTH["rows"]]
    answer = client.predict(endpoint=ENDPOINT, instances=instances)
    assert (list(answer.predictions), answer.deployed_model_id) == (list(map(float, TRUTH["predict"])), "2")
    answer = client.predict(endpoint=ENDPOINT, instances=instances, parameters=message({"method": "predict_proba"}))
    assert [list(row) for row in answer.predictions] == TRUTH["predict_proba"]  # to the bit
    try:
        client.predict(endpoint=ENDPOINT, instances=[message([1, 2])])
    except GoogleAPICallError as error:
        assert "2 values; expected 4" in str(error)
    else:
        raise AssertionError("rows of another width are not refused")


def message(content: object) -> struct_pb2.Value:
    """Return a JSON value as the message that holds it."""
    return json_format.Parse(json.dumps(content), struct_pb2.Value())


local()
remote()
