"""A Cloud Run service: the image, with the model in a bucket of Cloud Storage.

    pip install google-cloud-run
    python deploy/gcp/cloud_run.py create --project P --region R --image IMAGE --bucket B --model 1/model.joblib
    python deploy/gcp/cloud_run.py update … --model 2/model.joblib --canary 5 --stable REVISION    # 5 % to the new one
    python deploy/gcp/cloud_run.py update … --model 2/model.joblib    # all; or back, with the old model
    python deploy/gcp/cloud_run.py delete --project P --region R

With `--dry-run` each prints its call and the body, and asks nobody. Credentials are Google's own affair (`gcloud auth
application-default login`).

Only callers with the role `roles/run.invoker` reach the container: Cloud Run verifies them, so the container is told
AUTH=off. It costs while it answers requests (by the 100 ms), and all the time for `--min-instances`; the bucket by its
size.
Prices: https://cloud.google.com/run/pricing
"""

import argparse
import json
from typing import Any

Call = tuple[str, dict[str, Any]]  # a method of google.cloud.run_v2.ServicesClient, and its request


def service(options: argparse.Namespace) -> dict[str, Any]:
    """Return the service, as in the API's JSON (https://cloud.google.com/run/docs/reference/rest/v2/projects.locations.services)."""
    settings = {"AUTH": "off", "MODEL_PATH": f"/models/{options.model}", "LOG_FORMAT": "json"}
    container = {
        "image": options.image,
        "ports": [{"containerPort": 8080}],  # Cloud Run sets PORT to it
        "env": [{"name": name, "value": value} for name, value in settings.items()],
        "resources": {"limits": {"cpu": "2", "memory": "2Gi"}},  # the journal is in memory as well
        "volumeMounts": [{"name": "models", "mountPath": "/models"}],
        # Else requests come before the model is loaded. From outside, /healthz never reaches a container here.
        "startupProbe": {"httpGet": {"path": "/readyz"}, "periodSeconds": 2, "failureThreshold": 120},
    }
    template = {
        "containers": [container],
        "volumes": [{"name": "models", "gcs": {"bucket": options.bucket, "readOnly": True}}],
        "scaling": {"minInstanceCount": options.min_instances, "maxInstanceCount": 10},
        "maxInstanceRequestConcurrency": 80,
        "timeout": "300s",  # the server's PREDICT_TIMEOUT there
    }
    latest = {"type": "TRAFFIC_TARGET_ALLOCATION_TYPE_LATEST", "percent": 100}
    if not options.canary:
        return {"template": template, "traffic": [latest]}
    if not options.stable:
        raise SystemExit("--canary: name the revision that serves now, with --stable REVISION")
    revision = {"type": "TRAFFIC_TARGET_ALLOCATION_TYPE_REVISION", "revision": options.stable}
    return {
        "template": template,
        "traffic": [revision | {"percent": 100 - options.canary}, latest | {"percent": options.canary}],
    }


def plan(options: argparse.Namespace) -> list[Call]:
    """Return the calls of a command."""
    parent = f"projects/{options.project}/locations/{options.region}"
    name = f"{parent}/services/{options.name}"
    if options.command == "create":
        return [("create_service", {"parent": parent, "serviceId": options.name, "service": service(options)})]
    if options.command == "update":
        return [("update_service", {"service": {"name": name} | service(options)})]
    return [("delete_service", {"name": name})]


def run(calls: list[Call], client: Any) -> None:
    """Make the calls, and wait until each is done."""
    from google.cloud import run_v2
    from google.protobuf import json_format

    requests = {
        "create_service": run_v2.CreateServiceRequest,
        "update_service": run_v2.UpdateServiceRequest,
        "delete_service": run_v2.DeleteServiceRequest,
    }
    for operation, body in calls:
        request = requests[operation]()
        json_format.ParseDict(body, request._pb)  # refuses names that the API does not know
        print(operation, "…")
        result = getattr(client, operation)(request=request).result()
        print(f"done: {result.uri}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="prediction-server", help="of the service")
    common.add_argument("--project", required=True)
    common.add_argument("--region", required=True)
    common.add_argument("--dry-run", action="store_true", help="print the call and its body; ask nobody")
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("--image", required=True, help="in Artifact Registry, linux/amd64")
    made.add_argument("--bucket", required=True, help="that holds the models")
    made.add_argument("--model", required=True, help="the model's path in the bucket")
    made.add_argument("--min-instances", type=int, default=0, help="0: the first request waits for a start")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("create", parents=[common, made], help="the service").set_defaults(canary=0, stable="")
    update = commands.add_parser("update", parents=[common, made], help="serve another model, or image")
    update.add_argument(
        "--canary", type=int, default=0, choices=range(1, 100), metavar="PERCENT", help="of the requests"
    )
    update.add_argument("--stable", default="", metavar="REVISION", help="that gets the others")
    commands.add_parser("delete", parents=[common], help="the service")
    return parser.parse_args(arguments)


def main() -> None:
    """Run a command."""
    options = parse()
    calls = plan(options)
    if options.dry_run:
        for operation, body in calls:
            print(json.dumps({"call": operation, "body": body}, indent=2))
        return
    from google.cloud import run_v2

    run(calls, run_v2.ServicesClient())


if __name__ == "__main__":
    main()
