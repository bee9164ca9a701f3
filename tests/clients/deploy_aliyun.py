"""deploy/aliyun: the real SDKs send just what `--dry-run` prints; the files have only keys that the platforms know."""

# needs: alibabacloud-fc20230330==4.8.3 alibabacloud-eas20210701==7.0.0 alibabacloud-sae20190506==2.11.2 pyyaml
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml
from alibabacloud_fc20230330 import models as fc_models

ALIYUN = Path(__file__).parents[2] / "deploy/aliyun"
sys.path.insert(0, str(ALIYUN))
import recorder  # noqa: E402

import deploy as script  # noqa: E402

FUNCTION = "/2023-03-30/functions/prediction-server"
SERVICES = "/api/v2/services"
APPLICATION = [
    "--namespace",
    "cn-hangzhou",
    "--vpc",
    "vpc-1",
    "--vswitch",
    "vsw-1",
    "--security-group",
    "sg-1",
    "--users-secret",
    "1",
]
# A command, and the method and path of its call.
COMMANDS: list[tuple[list[str], tuple[str, str]]] = [
    (["fc-publish", "--note", "new features"], ("POST", f"{FUNCTION}/versions")),
    (["fc-alias", "1"], ("POST", f"{FUNCTION}/aliases")),
    (["fc-canary", "1", "2", "--weight", "5"], ("PUT", f"{FUNCTION}/aliases/prod")),
    (["fc-canary", "2"], ("PUT", f"{FUNCTION}/aliases/prod")),
    (["fc-delete"], ("DELETE", f"{FUNCTION}/aliases/prod")),
    (["eas-create"], ("POST", SERVICES)),
    (
        ["eas-release", "prediction_server", "--weight", "5"],
        ("PUT", f"{SERVICES}/cn-hangzhou/prediction_server/release"),
    ),
    (["eas-delete", "prediction_server"], ("DELETE", f"{SERVICES}/cn-hangzhou/prediction_server")),
    (["sae-create", "--image", "i", *APPLICATION], ("POST", "/pop/v1/sam/app/createApplication")),
    (["sae-update", "app-1", "--image", "i"], ("POST", "/pop/v1/sam/app/deployApplication")),
    (["sae-delete", "app-1"], ("DELETE", "/pop/v1/sam/app/deleteApplication")),
]


def test_what_is_sent_is_what_is_printed() -> None:
    for command, wanted in COMMANDS:
        (call,) = recorder.dry_run(script, command)
        with recorder.recording(lambda *_: {}) as (port, requests):
            connect = script.connector(
                "cn-hangzhou",
                endpoint=f"127.0.0.1:{port}",
                protocol="HTTP",
                access_key_id="fake",
                access_key_secret="fake",
            )
            product, method = call["call"].split(".")
            script.run([(product, method, call["path"], call["body"])], connect)
        ((verb, path, body),) = requests
        split = urlsplit(path)
        assert (verb, split.path) == wanted, (command, verb, split.path)
        # The API of SAE takes its parameters in the query or as a form.
        form = dict(parse_qsl(split.query)) | dict(parse_qsl(body if isinstance(body, str) else ""))
        printed = call["body"].get("body", call["body"])
        if product == "sae":
            added = {"InitContainersConfig", "SidecarContainersConfig"}  # by the SDK: empty lists
            assert {name: form[name] for name in form.keys() - added} == {name: str(printed[name]) for name in printed}
            assert all(form[name] == "[]" for name in form.keys() & added)
        else:
            assert (body or {}) == (json.loads(printed) if isinstance(printed, str) else printed), body


def without_variables(value: Any) -> Any:
    """Return a part of s.yaml with its variables filled in."""
    if isinstance(value, dict):
        return {name: without_variables(each) for name, each in value.items()}
    return (
        value.replace("${vars.region}", "cn-hangzhou").replace("${vars.image}", "i")
        if isinstance(value, str)
        else value
    )


def test_function_compute_takes_every_property() -> None:
    resources = yaml.safe_load((ALIYUN / "s.yaml").read_text("utf-8"))["resources"]
    assert resources.keys() == {"container", "runtime"}
    for resource in resources.values():
        properties = without_variables(resource["props"])
        # These are the command line's own: where, what to upload, and the triggers, each of which is a call.
        del properties["region"]
        properties.pop("code", None)
        triggers = properties.pop("triggers")
        known = fc_models.CreateFunctionInput().from_map(properties).to_map()
        assert known == properties | {"tags": []}  # nothing is dropped; the empty list is the SDK's
        for trigger in triggers:
            trigger["triggerConfig"] = json.dumps(trigger["triggerConfig"])
            assert fc_models.CreateTriggerInput().from_map(trigger).to_map() == trigger


def test_eas_knows_every_key() -> None:
    service = json.loads((ALIYUN / "service.json").read_text("utf-8"))
    metadata, (container,) = service["metadata"], service["containers"]
    assert service.keys() <= {"metadata", "cloud", "containers", "dockerAuth", "storage", "autoscaler", "options"}
    known = {"name", "instance", "workspace_id", "group", "rolling_strategy", "eas", "rpc"}
    assert metadata.keys() <= known
    assert metadata["rolling_strategy"].keys() <= {"max_surge", "max_unavailable"}
    assert metadata["eas"].keys() <= {"termination_grace_period"}
    assert metadata["rpc"].keys() <= {"keepalive", "enable_sigterm", "max_queue_size"}
    assert container.keys() <= {"image", "command", "script", "port", "env", "startup_check"}
    assert container["port"] not in (8080, 9090)  # the platform's own


if __name__ == "__main__":
    test_what_is_sent_is_what_is_printed()
    test_function_compute_takes_every_property()
    test_eas_knows_every_key()
