"""A SageMaker endpoint: a stable version of the model, and a canary beside it.

    pip install boto3
    python deploy/aws/sagemaker.py create 1 --image IMAGE --model-data s3://bucket/1.tar.gz --role arn:aws:iam::…
    python deploy/aws/sagemaker.py canary 2 --stable 1 --weight 5 --image IMAGE --model-data s3://… --role …
    python deploy/aws/sagemaker.py shift 25             # 25 % of the requests go to the canary; 0 is the rollback
    python deploy/aws/sagemaker.py promote 2
    python deploy/aws/sagemaker.py delete 1 2           # the endpoint, and what was made for these versions

With `--dry-run` each prints its calls and their bodies, and asks nobody. Region and credentials are boto3's affair.

IMAGE is the Dockerfile's stage `sagemaker` in a registry of ECR; the archive holds the model as `model.joblib`.
SageMaker verifies the caller (IAM) before the container is asked, so the container is told AUTH=off.

It costs: an instance is billed by the second from `create` to `delete`, whether or not anyone asks it; a canary is a
second instance. Prices: https://aws.amazon.com/sagemaker/pricing/
"""

import argparse
import json
from typing import Any

Call = tuple[str, dict[str, Any]]  # a method of boto3's client for SageMaker, and its arguments


def variant(name: str, version: str, weight: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return a production variant that serves a version with a share of the requests."""
    return {
        "VariantName": name,
        "ModelName": f"{options.name}-{version}",
        "InstanceType": options.instance_type,
        "InitialInstanceCount": 1,
        "InitialVariantWeight": weight,
        # Seconds: the model may be slow to load. The platform's own limit is shorter.
        "ContainerStartupHealthCheckTimeoutInSeconds": 600,
    }


def model(version: str, options: argparse.Namespace) -> Call:
    """Return the call that makes a model of an image, an archive in S3 and a version."""
    container = {
        "Image": options.image,
        "ModelDataUrl": options.model_data,
        "Environment": {"AUTH": "off", "MODEL_PATH": "/opt/ml/model/model.joblib"}
        | dict(each.split("=", 1) for each in options.env),
    }
    name = f"{options.name}-{version}"
    return "create_model", {"ModelName": name, "PrimaryContainer": container, "ExecutionRoleArn": options.role}


def configuration(name: str, *variants: dict[str, Any]) -> Call:
    """Return the call that makes an endpoint configuration."""
    return "create_endpoint_config", {"EndpointConfigName": name, "ProductionVariants": list(variants)}


def plan(options: argparse.Namespace) -> list[Call]:
    """Return the calls of a command, in order."""
    endpoint = {"EndpointName": options.name}
    if options.command == "create":
        config = f"{options.name}-{options.version}"
        only = variant("stable", options.version, 1, options)
        return [
            model(options.version, options),
            configuration(config, only),
            ("create_endpoint", endpoint | {"EndpointConfigName": config}),
        ]
    if options.command == "canary":
        config = f"{options.name}-canary-{options.version}"
        stable = variant("stable", options.stable, 100 - options.weight, options)
        canary = variant("canary", options.version, options.weight, options)
        return [
            model(options.version, options),
            configuration(config, stable, canary),
            ("update_endpoint", endpoint | {"EndpointConfigName": config}),
        ]
    if options.command == "shift":
        weights = {"stable": 100 - options.weight, "canary": options.weight}
        wanted = [{"VariantName": name, "DesiredWeight": weight} for name, weight in weights.items()]
        return [("update_endpoint_weights_and_capacities", endpoint | {"DesiredWeightsAndCapacities": wanted})]
    if options.command == "promote":
        config = f"{options.name}-{options.version}"
        only = variant("stable", options.version, 1, options)
        return [configuration(config, only), ("update_endpoint", endpoint | {"EndpointConfigName": config})]
    calls: list[Call] = [("delete_endpoint", endpoint)]
    for version in options.versions:
        for config in (f"{options.name}-{version}", f"{options.name}-canary-{version}"):
            calls.append(("delete_endpoint_config", {"EndpointConfigName": config}))
        calls.append(("delete_model", {"ModelName": f"{options.name}-{version}"}))
    return calls


def run(calls: list[Call], client: Any) -> None:
    """Make the calls.

    To delete what is not there is no error, so a tear-down can be repeated; a configuration that is there is kept, so a
    version can be promoted again.
    """
    for operation, body in calls:
        done = operation
        try:
            getattr(client, operation)(**body)
        except client.exceptions.ClientError as error:
            gone = operation.startswith("delete_") and "Could not find" in str(error)
            kept = operation == "create_endpoint_config" and "already existing" in str(error)
            if not gone and not kept:
                raise
            done = f"{operation} (not needed)"
        print(done, *(value for value in body.values() if isinstance(value, str)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="prediction-server", help="of the endpoint")
    common.add_argument("--dry-run", action="store_true", help="print the calls and their bodies; ask nobody")
    instance = argparse.ArgumentParser(add_help=False)
    instance.add_argument("--instance-type", default="ml.m5.large")
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("--image", required=True, help="in ECR")
    made.add_argument("--model-data", required=True, help="a tar.gz in S3 that holds model.joblib")
    made.add_argument("--role", required=True, help="ARN of the role that SageMaker takes on, to read both")
    made.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a setting of the server")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", parents=[common, instance, made], help="an endpoint with one version")
    canary = commands.add_parser("canary", parents=[common, instance, made], help="a second version beside it")
    canary.add_argument("--stable", required=True, help="the version that serves now")
    canary.add_argument("--weight", type=float, default=5.0, help="percent of the requests that the canary gets")
    shift = commands.add_parser("shift", parents=[common], help="change the canary's share of the requests")
    shift.add_argument("weight", type=float, help="percent of the requests")
    promote = commands.add_parser("promote", parents=[common, instance], help="serve one version alone")
    for each in (create, canary, promote):
        each.add_argument("version")
    commands.add_parser("delete", parents=[common], help="everything").add_argument("versions", nargs="+")
    return parser.parse_args(arguments)


def main() -> None:
    """Run a command."""
    options = parse()
    if "weight" in options and not 0 <= options.weight <= 100:
        raise SystemExit(f"the weight is {options.weight:g}; expected percent of the requests, from 0 to 100")
    calls = plan(options)
    if options.dry_run:
        for operation, body in calls:
            print(json.dumps({"call": operation, "body": body}, indent=2))
        return
    import boto3

    client = boto3.client("sagemaker")
    run(calls, client)
    if options.command != "delete":
        print("waiting until the endpoint is in service …")
        client.get_waiter("endpoint_in_service").wait(EndpointName=options.name)


if __name__ == "__main__":
    main()
