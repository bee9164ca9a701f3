"""What the other files here leave open: canaries on Function Compute, services on PAI-EAS, applications on SAE.

    pip install alibabacloud-fc20230330 alibabacloud-eas20210701 alibabacloud-sae20190506 alibabacloud-credentials
    cd deploy/aliyun
    python deploy.py fc-publish                        # freeze what `s deploy` deployed; prints the version
    python deploy.py fc-alias 1                        # once: the alias `prod`, whose trigger callers use
    python deploy.py fc-canary 1 2 --weight 5          # 5 % go to version 2; --weight 0 is the rollback
    python deploy.py fc-canary 2                       # promote
    python deploy.py fc-delete                         # the alias; `s remove` removes the rest
    python deploy.py eas-create                        # as service.json says
    python deploy.py eas-release NAME --weight 5       # its share in a group of services (metadata.group)
    python deploy.py eas-delete NAME
    python deploy.py sae-create --image IMAGE --namespace N --vpc V --vswitch S --security-group G --users-secret ID
    python deploy.py sae-update APP_ID --image IMAGE   # a tenth of the instances first, then the others
    python deploy.py sae-delete APP_ID

All take `--region` (cn-hangzhou); with `--dry-run` each prints its call and the body, and asks nobody. Credentials come
from the usual places: environment, ~/.aliyun, or the RAM role of an ECS instance.

EAS bills each instance by the hour and SAE by processor and memory, from creation to deletion, asked or not; Function
Compute bills what runs. Prices: https://www.alibabacloud.com/pricing
"""

import argparse
import json
from pathlib import Path
from typing import Any

# Product, method of its client, arguments in the path, and the request's body (or query), as in the API's JSON.
Call = tuple[str, str, list[str], dict[str, Any]]
FUNCTION = "prediction-server"


def plan(options: argparse.Namespace) -> list[Call]:
    """Return the calls of a command."""
    if options.command == "fc-publish":
        return [("fc", "publish_function_version", [FUNCTION], {"body": {"description": options.note}})]
    if options.command == "fc-alias":
        return [("fc", "create_alias", [FUNCTION], {"body": {"aliasName": "prod", "versionId": options.version}})]
    if options.command == "fc-canary":
        if not 0 <= options.weight <= 100:
            raise SystemExit(f"the weight is {options.weight:g}; expected percent of the requests, from 0 to 100")
        share = {options.canary: options.weight / 100} if options.canary and options.weight else {}
        body = {"versionId": options.stable, "additionalVersionWeight": share}
        return [("fc", "update_alias", [FUNCTION, "prod"], {"body": body})]
    if options.command == "fc-delete":
        return [("fc", "delete_alias", [FUNCTION, "prod"], {})]
    if options.command == "eas-create":
        return [("eas", "create_service", [], {"body": Path(options.file).read_text("utf-8")})]
    if options.command == "eas-release":
        body = {"Weight": options.weight, "TrafficState": "grouping"}
        return [("eas", "release_service", [options.region, options.service], body)]
    if options.command == "eas-delete":
        return [("eas", "delete_service", [options.region, options.service], {})]
    if options.command == "sae-create":
        return [("sae", "create_application", [], application(options))]
    if options.command == "sae-update":
        gray = {
            "type": "GrayBatchUpdate",
            "batchUpdate": {"batch": 1, "releaseType": "manual"},
            "grayUpdate": {"gray": 1},
        }
        body = {"AppId": options.app, "ImageUrl": options.image, "UpdateStrategy": json.dumps(gray)}
        return [("sae", "deploy_application", [], body)]
    return [("sae", "delete_application", [], {"AppId": options.app})]


def application(options: argparse.Namespace) -> dict[str, Any]:
    """Return an application on SAE. Nobody in front of it verifies callers, so users.json comes from a secret."""
    ready = {"httpGet": {"path": "/readyz", "port": 8080, "scheme": "HTTP"}, "timeoutSeconds": 3}
    settings = {"PLATFORM": "sae", "USERS_FILE": "/etc/prediction-server/users.json", "TRUSTED_PROXIES": "1"}
    secret = {"secretId": options.users_secret, "key": "users.json", "mountPath": settings["USERS_FILE"]}
    return {
        "AppName": "prediction-server",
        "NamespaceId": options.namespace,
        "VpcId": options.vpc,
        "VSwitchId": options.vswitch,
        "SecurityGroupId": options.security_group,
        "PackageType": "Image",
        "ImageUrl": options.image,
        "Cpu": 2000,  # thousandths
        "Memory": 4096,  # MB
        "Replicas": 2,
        "Envs": json.dumps([{"name": name, "value": value} for name, value in settings.items()]),
        "SecretMountDesc": json.dumps([secret]),
        "StartupProbe": json.dumps(ready | {"periodSeconds": 2, "failureThreshold": 120}),
        "Readiness": json.dumps(ready | {"periodSeconds": 5}),
        "PreStop": json.dumps({"exec": {"command": ["sleep", "5"]}}),  # until the load balancer sends no more
        "TerminationGracePeriodSeconds": 40,
    }


def run(calls: list[Call], connect: Any) -> None:
    """Make the calls, and print what they return.

    Args:
        calls: what `plan` returned.
        connect: returns the client and the module of models for a product.
    """
    for product, method, path, body in calls:
        client, models = connect(product)
        arguments: list[Any] = list(path)
        if body:
            name = "".join(map(str.capitalize, method.split("_"))) + "Request"
            arguments.append(getattr(models, name)().from_map(body))
        print(method, *path)
        answer = getattr(client, method)(*arguments).to_map()
        print(json.dumps(answer.get("body") or {"statusCode": answer["statusCode"]}))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--region", default="cn-hangzhou")
    common.add_argument("--dry-run", action="store_true", help="print the call and its body; ask nobody")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=text)

    command("fc-publish", "a version of the function").add_argument("--note", default="", help="what is new in it")
    command("fc-alias", "make the alias `prod`").add_argument("version")
    canary = command("fc-canary", "the versions behind the alias")
    canary.add_argument("stable")
    canary.add_argument("canary", nargs="?", default="")
    canary.add_argument("--weight", type=float, default=5.0, metavar="PERCENT", help="of the canary")
    command("fc-delete", "the alias")
    command("eas-create", "a service").add_argument("--file", default=Path(__file__).with_name("service.json"))
    release = command("eas-release", "a service's share in its group")
    release.add_argument("--weight", type=int, required=True, metavar="PERCENT")
    for each in (release, command("eas-delete", "a service")):
        each.add_argument("service")
    create = command("sae-create", "an application")
    for name in ("image", "namespace", "vpc", "vswitch", "security-group", "users-secret"):
        create.add_argument(f"--{name}", required=True)
    update = command("sae-update", "another image")
    update.add_argument("--image", required=True)
    for each in (update, command("sae-delete", "an application")):
        each.add_argument("app")
    return parser.parse_args(arguments)


def connector(region: str, **options: Any) -> Any:
    """Return a function that connects to a product of a region; `options` are those of the SDK's Config."""
    from importlib import import_module

    from alibabacloud_tea_openapi.models import Config

    packages = {"fc": "fc20230330", "eas": "eas20210701", "sae": "sae20190506"}
    hosts = {
        "fc": f"fcv3.{region}.aliyuncs.com",
        "eas": f"pai-eas.{region}.aliyuncs.com",
        "sae": f"sae.{region}.aliyuncs.com",
    }

    def connect(product: str) -> tuple[Any, Any]:
        package = f"alibabacloud_{packages[product]}"
        config = Config(**{"endpoint": hosts[product], "region_id": region} | options)
        return import_module(f"{package}.client").Client(config), import_module(f"{package}.models")

    return connect


def main() -> None:
    """Run a command."""
    options = parse()
    calls = plan(options)
    if options.dry_run:
        for product, method, path, body in calls:
            print(json.dumps({"call": f"{product}.{method}", "path": path, "body": body}, indent=2))
        return
    from alibabacloud_credentials.client import Client as Credentials

    run(calls, connector(options.region, credential=Credentials()))


if __name__ == "__main__":
    main()
