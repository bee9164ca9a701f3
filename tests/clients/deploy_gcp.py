"""deploy/gcp: the real SDKs send just what `--dry-run` prints."""

# needs: google-cloud-aiplatform==2.7.0 google-cloud-run==0.16.2 requests
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy/gcp"))
import cloud_run
import recorder
import vertex
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform_v1, run_v2
from google.cloud.aiplatform_v1.services.endpoint_service.transports import EndpointServiceRestTransport
from google.cloud.aiplatform_v1.services.model_service.transports import ModelServiceRestTransport
from google.cloud.run_v2.services.services.transports import ServicesRestTransport
from google.protobuf import json_format

WHERE = ["--project", "p", "--region", "us-central1"]
PARENT = "/v1/projects/p/locations/us-central1"
MADE = ["--image", "registry.example.com/prediction-server:1", "--bucket", "models", "--model", "1/model.joblib"]
# A command, and the method and path of its calls.
VERTEX: list[tuple[list[str], list[tuple[str, str]]]] = [
    (["upload", "1", "--image", "registry.example.com/prediction-server:1"], [("POST", f"{PARENT}/models:upload")]),
    (["endpoint"], [("POST", f"{PARENT}/endpoints")]),
    (["deploy", "7", "--endpoint", "9"], [("POST", f"{PARENT}/endpoints/9:deployModel")]),
    (
        ["deploy", "8", "--endpoint", "9", "--traffic", "5", "--stable", "77"],
        [("POST", f"{PARENT}/endpoints/9:deployModel")],
    ),
    (["split", "77=75", "88=25", "--endpoint", "9"], [("PATCH", f"{PARENT}/endpoints/9")]),
    (["undeploy", "88", "--endpoint", "9"], [("POST", f"{PARENT}/endpoints/9:undeployModel")]),
    (
        ["delete", "7", "8", "--endpoint", "9"],
        [("DELETE", f"{PARENT}/endpoints/9"), ("DELETE", f"{PARENT}/models/7"), ("DELETE", f"{PARENT}/models/8")],
    ),
]
V2 = PARENT.replace("v1", "v2")
RUN: list[tuple[list[str], list[tuple[str, str]]]] = [
    (["create", *MADE], [("POST", f"{V2}/services")]),
    (
        ["update", *MADE, "--canary", "5", "--stable", "prediction-server-00001-abc"],
        [("PATCH", f"{V2}/services/prediction-server")],
    ),
    (["update", *MADE], [("PATCH", f"{V2}/services/prediction-server")]),
    (["delete"], [("DELETE", f"{V2}/services/prediction-server")]),
]


def answer(method: str, path: str, body: Any) -> Any:
    """Answer as the API does: a long-running operation, which is done already."""
    types = {
        "models:upload": "UploadModelResponse",
        ":deployModel": "DeployModelResponse",
        ":undeployModel": "UndeployModelResponse",
    }
    prefix = "type.googleapis.com/google.cloud.aiplatform.v1."
    if "/v2/" in path:
        return {
            "name": "operations/1",
            "done": True,
            "response": {"@type": "type.googleapis.com/google.cloud.run.v2.Service"},
        }
    if method == "PATCH":
        return {"name": f"{PARENT}/endpoints/9"}
    kind = next((name for end, name in types.items() if path.split("?")[0].endswith(end)), "")
    if method == "DELETE":
        return {
            "name": "operations/1",
            "done": True,
            "response": {"@type": "type.googleapis.com/google.protobuf.Empty"},
        }
    return {"name": "operations/1", "done": True, "response": {"@type": prefix + (kind or "Endpoint")}}


# What the API takes as the body of a method, if not the whole request less what stands in the path.
BODIES = {
    "create_service": "service",
    "update_service": "service",
    "create_endpoint": "endpoint",
    "update_endpoint": "endpoint",
}
IN_PATH = {"upload_model": "parent", "deploy_model": "endpoint", "undeploy_model": "endpoint"}


def check_body(call: dict[str, Any], sent: Any, messages: Any) -> None:
    """Check that the body that was sent is what was printed, less what stands in the path."""
    operation = call["call"]
    request = getattr(messages, "".join(map(str.capitalize, operation.split("_"))) + "Request")()._pb
    json_format.ParseDict(call["body"], request)
    if operation.startswith("delete"):
        assert sent is None
        return
    printed = getattr(request, BODIES[operation]) if operation in BODIES else request
    if operation in IN_PATH:
        printed.ClearField(IN_PATH[operation])
    if operation.startswith("update"):
        printed.ClearField("name")
    taken = json_format.ParseDict(sent, type(printed)())
    assert taken == printed, f"{operation}: sent {taken}, printed {printed}"


def test_vertex() -> None:
    for command, wanted in VERTEX:
        calls = recorder.dry_run(vertex, [*command, *WHERE])
        with recorder.recording(answer) as (port, requests):
            options = {"host": f"127.0.0.1:{port}", "url_scheme": "http", "credentials": AnonymousCredentials()}
            models = aiplatform_v1.ModelServiceClient(transport=ModelServiceRestTransport(**options))
            endpoints = aiplatform_v1.EndpointServiceClient(transport=EndpointServiceRestTransport(**options))
            vertex.run([(call["call"], call["body"]) for call in calls], models, endpoints)
        assert [(method, urlsplit(path).path) for method, path, _ in requests] == wanted, requests
        for call, (_, _, sent) in zip(calls, requests, strict=True):
            check_body(call, sent, aiplatform_v1)


def test_cloud_run() -> None:
    for command, wanted in RUN:
        calls = recorder.dry_run(cloud_run, [*command, *WHERE])
        with recorder.recording(answer) as (port, requests):
            options = {"host": f"127.0.0.1:{port}", "url_scheme": "http", "credentials": AnonymousCredentials()}
            client = run_v2.ServicesClient(transport=ServicesRestTransport(**options))
            cloud_run.run([(call["call"], call["body"]) for call in calls], client)
        assert [(method, urlsplit(path).path) for method, path, _ in requests] == wanted, requests
        for call, (_, _, sent) in zip(calls, requests, strict=True):
            check_body(call, sent, run_v2)


def test_cloud_run_service_has_only_names_that_the_api_knows() -> None:
    (call,) = recorder.dry_run(cloud_run, ["create", *MADE, *WHERE])
    message = json_format.ParseDict(call["body"]["service"], run_v2.Service()._pb)
    assert json_format.MessageToDict(message)["template"]["containers"][0]["startupProbe"]["httpGet"] == {
        "path": "/readyz"
    }


if __name__ == "__main__":
    test_vertex()
    test_cloud_run()
    test_cloud_run_service_has_only_names_that_the_api_knows()
