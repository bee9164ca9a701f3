"""A model on a Vertex AI endpoint: upload, deploy, shift the traffic, tear down.

    pip install google-cloud-aiplatform
    python deploy/gcp/vertex.py upload 1 --project P --region R --image IMAGE       # prints the model's number
    python deploy/gcp/vertex.py endpoint --project P --region R                     # once; prints the endpoint's
    python deploy/gcp/vertex.py deploy MODEL --endpoint E …                         # prints that of the deployed model
    python deploy/gcp/vertex.py deploy MODEL2 --endpoint E --traffic 5 --stable D …
    python deploy/gcp/vertex.py split D=75 D2=25 --endpoint E …                     # 100 and 0 is the rollback
    python deploy/gcp/vertex.py undeploy D --endpoint E …
    python deploy/gcp/vertex.py delete --endpoint E MODEL MODEL2 …

With `--dry-run` each prints its call and the body, and asks nobody. Credentials are Google's own affair.

Vertex AI verifies the caller (IAM), so the container is told AUTH=off. The image copies nothing from a bucket, so
it holds the model (docs/clouds.md, "The image"). It costs by the hour for each replica of each deployed model, asked or
not, until `undeploy`. Prices: https://cloud.google.com/vertex-ai/pricing
"""

import argparse
import json
from typing import Any

Call = tuple[str, dict[str, Any]]  # a method of ModelServiceClient or EndpointServiceClient, and its request


def plan(options: argparse.Namespace) -> list[Call]:
    """Return the calls of a command, as in the API's JSON (https://cloud.google.com/vertex-ai/docs/reference/rest)."""
    parent = f"projects/{options.project}/locations/{options.region}"
    endpoint = f"{parent}/endpoints/{getattr(options, 'endpoint', '')}"
    if options.command == "upload":
        return [("upload_model", {"parent": parent, "model": model(options)})]
    if options.command == "endpoint":
        # Dedicated: 10 MB a body and its own time limit, where shared endpoints take 1.5 MB.
        wanted = {"displayName": options.name, "dedicatedEndpointEnabled": True}
        return [("create_endpoint", {"parent": parent, "endpoint": wanted})]
    if options.command == "deploy":
        traffic = {"0": options.traffic}  # "0" is the model that is deployed by this call
        if options.stable:
            traffic[options.stable] = 100 - options.traffic
        elif options.traffic != 100:
            raise SystemExit("--traffic: name the deployed model that gets the others, with --stable")
        deployed = {
            "model": f"{parent}/models/{options.model}",
            "dedicatedResources": {
                "machineSpec": {"machineType": options.machine_type},
                "minReplicaCount": 1,
                "maxReplicaCount": 3,
            },
        }
        return [("deploy_model", {"endpoint": endpoint, "deployedModel": deployed, "trafficSplit": traffic})]
    if options.command == "split":
        traffic = split(options.shares)
        body = {"endpoint": {"name": endpoint, "trafficSplit": traffic}, "updateMask": "trafficSplit"}
        return [("update_endpoint", body)]
    if options.command == "undeploy":
        return [("undeploy_model", {"endpoint": endpoint, "deployedModelId": options.deployed})]
    deletions: list[Call] = [("delete_endpoint", {"name": endpoint})]
    return deletions + [("delete_model", {"name": f"{parent}/models/{each}"}) for each in options.models]


def split(shares: list[str]) -> dict[str, int]:
    """Return percentages by deployed model, of arguments such as D=75. Raises: SystemExit, they are not 100 in sum."""
    found = dict(each.partition("=")[::2] for each in shares)
    percents = {name: int(percent) for name, percent in found.items() if percent.isdecimal()}
    if len(percents) < len(shares) or sum(percents.values()) != 100:
        raise SystemExit(f"{' '.join(shares)}: expected whole percentages, 100 in sum, such as D=75 D2=25")
    return percents


def model(options: argparse.Namespace) -> dict[str, Any]:
    """Return the model: the image, and how Vertex AI asks it."""
    container = {
        "imageUri": options.image,
        "env": [{"name": "AUTH", "value": "off"}],
        "ports": [{"containerPort": 8080}],
    }
    return {"displayName": f"{options.name}-{options.version}", "containerSpec": container}


def run(calls: list[Call], models: Any, endpoints: Any) -> None:
    """Make the calls, and print what the platform calls the result.

    Args:
        calls: what `plan` returned.
        models, endpoints: a `ModelServiceClient` and an `EndpointServiceClient` of google.cloud.aiplatform_v1.
    """
    from google.cloud import aiplatform_v1
    from google.protobuf import json_format

    for operation, body in calls:
        message = getattr(aiplatform_v1, "".join(map(str.capitalize, operation.split("_"))) + "Request")()
        json_format.ParseDict(body, message._pb)  # refuses names that the API does not know
        client = models if operation in ("upload_model", "delete_model") else endpoints
        print(operation, "…")
        answer = getattr(client, operation)(request=message)
        result = answer.result() if hasattr(answer, "result") else answer
        print(f"done: {json_format.MessageToJson(result._pb if hasattr(result, '_pb') else result, indent=None)}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="prediction-server", help="of the endpoint and the models")
    common.add_argument("--project", required=True)
    common.add_argument("--region", required=True)
    common.add_argument("--dry-run", action="store_true", help="print the call and its body; ask nobody")
    asked = argparse.ArgumentParser(add_help=False)
    asked.add_argument("--endpoint", required=True, metavar="NUMBER", help="of the endpoint")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    upload = commands.add_parser("upload", parents=[common], help="a version of the model")
    upload.add_argument("version")
    upload.add_argument("--image", required=True, help="in Artifact Registry, with the model in it")
    commands.add_parser("endpoint", parents=[common], help="make an endpoint")
    deploy = commands.add_parser("deploy", parents=[common, asked], help="serve a model")
    deploy.add_argument("model", help="the number that upload printed")
    deploy.add_argument(
        "--traffic", type=int, default=100, choices=range(101), metavar="PERCENT", help="of the requests"
    )
    deploy.add_argument("--stable", default="", metavar="DEPLOYED", help="the deployed model that gets the others")
    deploy.add_argument("--machine-type", default="n1-standard-2")
    split = commands.add_parser("split", parents=[common, asked], help="shift the traffic")
    split.add_argument("shares", nargs="+", metavar="DEPLOYED=PERCENT", help="of each deployed model; 100 in sum")
    commands.add_parser("undeploy", parents=[common, asked], help="end a deployed model").add_argument("deployed")
    delete = commands.add_parser("delete", parents=[common, asked], help="the endpoint, and models")
    delete.add_argument("models", nargs="*")
    return parser.parse_args(arguments)


def main() -> None:
    """Run a command."""
    options = parse()
    calls = plan(options)
    if options.dry_run:
        for operation, body in calls:
            print(json.dumps({"call": operation, "body": body}, indent=2))
        return
    from google.cloud import aiplatform_v1

    where = {"api_endpoint": f"{options.region}-aiplatform.googleapis.com"}
    clients = aiplatform_v1.ModelServiceClient, aiplatform_v1.EndpointServiceClient
    run(calls, *(client(client_options=where) for client in clients))


if __name__ == "__main__":
    main()
