"""deploy/aws/sagemaker.py: its calls are taken by moto's SageMaker, and by botocore's own model of each request."""

# needs: boto3==1.44.8 moto[sagemaker]==5.2.5
import os
import sys
from pathlib import Path
from typing import Any

import boto3
import recorder
from botocore.stub import Stubber
from moto import mock_aws

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy/aws"))
import sagemaker as script

os.environ |= {"AWS_ACCESS_KEY_ID": "fake", "AWS_SECRET_ACCESS_KEY": "fake", "AWS_DEFAULT_REGION": "us-east-1"}
ROLE = "arn:aws:iam::123456789012:role/predictions"
MADE = ["--image", "registry.example.com/prediction-server:1", "--role", ROLE]
CREATE = ["create", "1", "--model-data", "s3://bucket/1.tar.gz", *MADE]
CANARY = ["canary", "2", "--stable", "1", "--weight", "5", "--model-data", "s3://bucket/2.tar.gz", *MADE]


def dry_run(arguments: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return the calls that `--dry-run` prints."""
    return [(each["call"], each["body"]) for each in recorder.dry_run(script, arguments)]


def weights(client: Any) -> dict[str, float]:
    """Return the weight of each variant of the endpoint."""
    found = client.describe_endpoint(EndpointName="prediction-server")["ProductionVariants"]
    return {each["VariantName"]: each["DesiredWeight"] for each in found}


@mock_aws
def test_life_of_an_endpoint() -> None:
    client = boto3.client("sagemaker")
    script.run(dry_run(CREATE), client)
    assert weights(client) == {"stable": 1.0}
    container = client.describe_model(ModelName="prediction-server-1")["PrimaryContainer"]
    assert container["Environment"] == {"AUTH": "off", "MODEL_PATH": "/opt/ml/model/model.joblib"}
    # moto has no update_endpoint: an endpoint with the canary's configuration stands for the one that is updated.
    *made, (operation, update) = dry_run(CANARY)
    assert operation == "update_endpoint"
    script.run([*made, ("delete_endpoint", {"EndpointName": "prediction-server"}), ("create_endpoint", update)], client)
    assert weights(client) == {"stable": 95.0, "canary": 5.0}
    script.run(dry_run(["shift", "25"]), client)
    assert weights(client) == {"stable": 75.0, "canary": 25.0}
    script.run(dry_run(["shift", "0"]), client)
    assert weights(client) == {"stable": 100.0, "canary": 0.0}
    for _ in range(2):  # the second time there is nothing left
        script.run(dry_run(["delete", "1", "2"]), client)
        assert not client.list_endpoints()["Endpoints"]
        assert not client.list_endpoint_configs()["EndpointConfigs"]
        assert not client.list_models()["Models"]


def test_every_body_fits_the_service_s_own_description() -> None:
    commands = [CREATE, CANARY, ["shift", "25"], ["promote", "2"], ["delete", "1", "2"]]
    for command in commands:
        client = boto3.client("sagemaker")
        calls = dry_run(command)
        with Stubber(client) as stub:  # checks names, types and required members, offline
            for operation, body in calls:
                arn = "arn:aws:sagemaker:us-east-1:123456789012:x/prediction-server"
                answers = {"create_model": "ModelArn", "create_endpoint_config": "EndpointConfigArn"}
                has_answer = not operation.startswith("delete_")
                stub.add_response(operation, {answers.get(operation, "EndpointArn"): arn} if has_answer else {}, body)
            script.run(calls, client)
            stub.assert_no_pending_responses()


if __name__ == "__main__":
    test_life_of_an_endpoint()
    test_every_body_fits_the_service_s_own_description()
