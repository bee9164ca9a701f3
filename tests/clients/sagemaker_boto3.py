"""boto3's invoke_endpoint, through a gateway that does what SageMaker does before a container."""

# needs: boto3==1.44.8
# model: iris
# server: EXTENSIONS=+endpoints.sagemaker AUTH=off

import io
import json
import sys
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from gateway import Changed, Gateway

TRUTH = json.loads(Path(sys.argv[2]).read_text())
PREFIX = "x-amzn-sagemaker-"
PASSED = {"content-type", "accept"} | {
    PREFIX + name
    for name in ("custom-attributes", "inference-id", "target-model", "target-variant", "session-id", "explain")
}


def wrapped(answer: Changed) -> Changed:
    """Return an answer as the platform passes it on."""
    status, headers, body = answer
    if status < 400:
        return status, {**headers, "x-Amzn-Invoked-Production-Variant": "blue"}, body
    error = {"Message": "from the container", "OriginalStatusCode": status, "OriginalMessage": body.decode()}
    return 424, {"x-amzn-errortype": "ModelError"}, json.dumps(error).encode()


def main() -> None:
    """Ask in every type."""
    gateway = Gateway(sys.argv[1], {"/endpoints/iris/invocations": "/invocations"}.get, PASSED, wrapped)
    client = boto3.client(
        "sagemaker-runtime",
        endpoint_url=gateway.url,
        region_name="eu-north-1",
        aws_access_key_id="none",
        aws_secret_access_key="none",
        config=Config(retries={"max_attempts": 0}),
    )

    def invoke(body: Any, **options: Any) -> tuple[str, bytes]:
        answer = client.invoke_endpoint(EndpointName="iris", Body=body, **options)
        assert answer["InvokedProductionVariant"] == "blue"
        assert answer.get("CustomAttributes") == options.get("CustomAttributes")
        return answer["ContentType"], answer["Body"].read()

    rows, labels = TRUTH["rows"], TRUTH["predict"]
    csv = "\n".join(",".join(map(repr, row)) for row in rows)
    lines = "\n".join(map(json.dumps, rows))
    as_lines = "\n".join(map(str, labels)).encode()
    assert json.loads(invoke(json.dumps({"data": rows}))[1]) == {"prediction": labels}  # without a type
    assert json.loads(invoke(json.dumps({"instances": rows}), ContentType="application/json")[1]) == {
        "predictions": labels
    }
    for attributes in ({}, {"CustomAttributes": "trace=1"}):
        assert invoke(csv, ContentType="text/csv", **attributes) == ("text/csv", as_lines)
    assert invoke(lines, ContentType="application/jsonlines") == ("application/jsonlines", as_lines)
    found = invoke(csv, ContentType="text/csv", Accept="application/json;q=0.5, application/jsonlines")
    assert found == ("application/jsonlines", as_lines)
    asked = {"data": rows, "method": "predict_proba"}
    proba = json.loads(invoke(json.dumps(asked), ContentType="application/json", Accept="*/*")[1])["prediction"]
    assert proba == TRUTH["predict_proba"]  # to the bit
    for body, content_type, status, words in (
        (csv + "\n1,2", "text/csv", 422, "line 16: 2 values; expected 4"),
        (csv, "application/octet-stream", 415, "text/csv"),
        (io.BytesIO(b""), "text/csv", 400, "the body is empty"),
    ):
        try:
            invoke(body, ContentType=content_type)
        except client.exceptions.ModelError as error:
            assert error.response["OriginalStatusCode"] == status, error.response
            assert words in json.loads(error.response["OriginalMessage"])["detail"], error.response
        else:
            raise AssertionError(f"not refused: {words}")


main()
