"""The Kubernetes manifests: against the API's schemas, against each other, and against the server that they run.

kubernetes-validate has no schemas of other people's kinds (HTTPRoute, ServiceMonitor, InferenceService): of these the
fields that matter are checked here by hand, and tests/clients/manifests.py has their schemas. kustomize is not needed:
what it would put together is put together here.
"""

import copy
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import runbook
import yaml
from conftest import ROOT, write_users
from flask import Flask
from nginx_tools import substitute
from werkzeug.security import check_password_hash

from auth import ROLES
from server import create_app
from settings import Settings
from sls.client import find_credentials

HERE = ROOT / "deploy/kubernetes"
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
OF_KSERVE = ("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget")  # in a predictor, beside a pod's own fields

Manifest = dict[str, Any]


def read(path: Path) -> Manifest:
    """Read the one document of a file."""
    (document,) = yaml.safe_load_all(path.read_text())
    assert isinstance(document, dict)
    return document


def kustomize(directory: Path) -> list[Manifest]:
    """Put together what a kustomization names; secrets have keys without values."""
    found = []
    given = read(directory / "kustomization.yaml")
    assert given.keys() <= {"apiVersion", "kind", "resources", "secretGenerator"}  # no more is understood here
    for name in given["resources"]:
        path = (directory / name).resolve()
        found += kustomize(path) if path.is_dir() else [read(path)]
    for secret in given.get("secretGenerator", []):
        assert secret["options"] == {"disableNameSuffixHash": True}  # else it is known by another name
        keys = [Path(each).name for each in secret["files"]]
        keys += [each.partition("=")[0] for each in secret.get("literals", [])]
        data = dict.fromkeys(keys, "")
        found.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret["name"]}, "data": data})
    return found


SERVER = {each["kind"]: each for each in kustomize(HERE / "server")}
KSERVE = {each["kind"]: each for each in kustomize(HERE / "kserve")}
PROMETHEUS = {each["kind"]: each for each in kustomize(HERE / "prometheus")}
PUBLISHER, ROLLBACK = read(HERE / "publisher.yaml"), read(HERE / "rollback.yaml")

POD = SERVER["Deployment"]["spec"]["template"]
PREDICTOR = KSERVE["InferenceService"]["spec"]["predictor"]
WRITERS = {"publisher": PUBLISHER["spec"], "rollback": ROLLBACK["spec"]["template"]["spec"]}
PODS = {"server": POD["spec"], "kserve": PREDICTOR} | WRITERS


def container(pod: Manifest) -> Manifest:
    """Return a pod's only container."""
    (only,) = pod["containers"]
    assert isinstance(only, dict)
    return only


def environ(pod: Manifest) -> dict[str, str]:
    """Return the variables of a pod's container."""
    return {each["name"]: each["value"] for each in container(pod)["env"]}


def settings(pod: Manifest) -> Settings:
    """Return the settings that the server in a pod has."""
    return Settings.from_environ(environ(pod))


def inside(path: Path) -> str:
    """Return where a path of the settings is in the image, whose `var` is a link to its volume."""
    (volume,) = re.findall(r"^VOLUME (.+)$", DOCKERFILE, re.MULTILINE)
    return re.sub(r"^var/", f"{volume}/", str(path))


def mounted(pod: Manifest, path: Path | str) -> tuple[Manifest, Manifest]:
    """Return the mount and the volume that hold a path."""
    at = inside(Path(path))
    (mount,) = [each for each in container(pod)["volumeMounts"] if Path(at).is_relative_to(each["mountPath"])]
    (volume,) = [each for each in pod["volumes"] if each["name"] == mount["name"]]
    return mount, volume


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Tell whether a selector that is not empty selects what has these labels."""
    return bool(selector) and selector.items() <= labels.items()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Flask:
    """The server, with users and without a model."""
    place = tmp_path_factory.mktemp("app")
    return create_app(
        Settings(
            users_file=write_users(place / "users.json"), model_dir=place / "models", journal_dir=place / "journal"
        )
    )


# --- files


def test_each_manifest_is_listed_and_each_that_is_listed_exists() -> None:
    directories = [path for path in HERE.iterdir() if path.is_dir()]
    assert {path.name for path in directories} == {"common", "server", "kserve", "prometheus"}
    assert sorted(path.name for path in HERE.iterdir() if path.is_file()) == ["publisher.yaml", "rollback.yaml"]
    for directory in directories:
        listed = {name for name in read(directory / "kustomization.yaml")["resources"] if not name.startswith("../")}
        assert listed == {path.name for path in directory.glob("*.yaml")} - {"kustomization.yaml"}


@pytest.mark.parametrize("directory", ["common", "prometheus"])
def test_files_of_secrets_are_ignored_by_git(directory: str) -> None:
    assert "/deploy/kubernetes/*/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    for secret in read(HERE / directory / "kustomization.yaml")["secretGenerator"]:
        assert [name for name in secret["files"] if not name.startswith("secrets/")] == []


def test_commands_make_the_secrets_that_the_kustomization_names(tmp_path: Path) -> None:
    """All that is typed before and between the calls of kubectl, in a copy."""
    (first,) = runbook.commands(__file__, "containers.md", "Deploy")
    (later,) = runbook.commands(__file__, "containers.md", "Change secrets")
    secrets = tmp_path / "deploy/kubernetes/common/secrets"
    secrets.parent.mkdir(parents=True)  # as in a clone
    for typed, password in ((first, "correct horse"), (later, "battery staple")):
        commands = substitute(typed, {".venv/bin/python": sys.executable})
        given = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "input": f"{password}\n{password}\n"}
        subprocess.run(["bash", "-euc", commands], check=True, text=True, capture_output=True, **given)
        found = json.loads((secrets / "users.json").read_text())["alice"]
        assert check_password_hash(found["password"], password)
        assert found["roles"] == ["predict"]
    (named,) = read(HERE / "common/kustomization.yaml")["secretGenerator"]
    assert sorted(f"secrets/{path.name}" for path in secrets.glob("[!.]*")) == sorted(named["files"])


# --- schemas


def is_ours(manifest: Manifest) -> bool:
    """Tell whether a kind belongs to Kubernetes itself."""
    return manifest["kind"] not in ("HTTPRoute", "ServiceMonitor", "InferenceService")


def as_pod(spec: Manifest) -> Manifest:
    """Make a pod of a predictor, most of whose fields are a pod's."""
    own = {name: value for name, value in spec.items() if name not in OF_KSERVE}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": own}


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize(
    "manifest",
    [*filter(is_ours, [*SERVER.values(), *PROMETHEUS.values()]), PUBLISHER, ROLLBACK, as_pod(PREDICTOR)],
    ids=lambda manifest: f"{manifest['kind']} {manifest['metadata'].get('name')}",
)
def test_manifest_is_as_the_api_defines_it(manifest: Manifest, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: pip install it")
    validator.validate(manifest, version, strict=True)
    wrong = copy.deepcopy(manifest) | {"spce": {}}
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, version, strict=True)


# --- ports and routes


def test_port_is_the_servers() -> None:
    (port,) = container(POD["spec"])["ports"]
    assert (
        port["containerPort"] == settings(POD["spec"]).port == int(re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.M)[0])
    )
    (way_in,) = SERVER["NetworkPolicy"]["spec"]["ingress"]
    assert way_in["ports"] == [{"port": port["name"]}]
    (entrance,) = SERVER["Service"]["spec"]["ports"]
    assert entrance["targetPort"] == port["name"]
    (endpoint,) = PROMETHEUS["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == entrance["name"]
    (backend,) = rule()["backendRefs"]
    assert backend == {"name": SERVER["Service"]["metadata"]["name"], "port": entrance["port"]}


def rule() -> Manifest:
    """Return the route's only rule."""
    (only,) = SERVER["HTTPRoute"]["spec"]["rules"]
    assert isinstance(only, dict)
    return only


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probe_asks_a_route_that_needs_no_password(app: Flask, probe: str) -> None:
    asked = container(POD["spec"])[probe]["httpGet"]
    assert asked["port"] == container(POD["spec"])["ports"][0]["name"]
    answer = app.test_client().get(asked["path"])
    # There is no model: a pod is ready only with one, and alive without.
    assert answer.status_code == (503 if probe == "readinessProbe" else 200)


def test_route_leads_to_what_callers_need_alone(app: Flask) -> None:
    routes = {each.rule for each in app.url_map.iter_rules()}
    shown = [match["path"] for match in rule()["matches"]]
    assert {path["value"] for path in shown} == {"/predict", "/model"} <= routes
    assert {path["type"] for path in shown} == {"Exact"}  # a prefix would show more
    (gateway,) = SERVER["HTTPRoute"]["spec"]["parentRefs"]
    assert gateway["sectionName"] == "https"  # passwords do not come in clear
    (way_in,) = SERVER["NetworkPolicy"]["spec"]["ingress"]
    allowed = [each["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for each in way_in["from"]]
    assert allowed == [gateway["namespace"], "monitoring"]


def test_gateway_waits_longer_than_the_server_and_keeps_connections_for_less() -> None:
    given = settings(POD["spec"])
    seconds = int(rule()["timeouts"]["request"].removesuffix("s"))
    assert seconds > given.body_timeout + given.max_wait + given.predict_timeout
    assert given.keepalive > 3600  # Envoy's
    # Not after 503: that would overload the pods more.
    assert "codes" not in rule().get("retry", {})


# --- who is meant


def test_selectors_select_the_servers_pods() -> None:
    labels = POD["metadata"]["labels"]
    assert matches(SERVER["Deployment"]["spec"]["selector"]["matchLabels"], labels)
    assert matches(SERVER["Service"]["spec"]["selector"], labels)
    assert matches(SERVER["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"], labels)
    assert matches(SERVER["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"], labels)
    (spread,) = POD["spec"]["topologySpreadConstraints"]
    assert matches(spread["labelSelector"]["matchLabels"], labels)
    wanted = PROMETHEUS["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert matches(wanted, SERVER["Service"]["metadata"]["labels"])
    for pod in (PUBLISHER, ROLLBACK["spec"]["template"]):
        assert not matches(labels, pod.get("metadata", {}).get("labels", {}))


def test_autoscaler_scales_the_deployment_and_leaves_what_may_be_taken_away() -> None:
    deployment, scaler = SERVER["Deployment"], SERVER["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]
    assert scaler["minReplicas"] > SERVER["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    # A share of what is requested means nothing where nothing is.
    assert "cpu" in container(POD["spec"])["resources"]["requests"]


# --- settings and files


class Asked(dict[str, str]):
    """An environment in which nothing is set, and which remembers what it was asked for."""

    def get(self, name: str, default: Any = None) -> Any:
        """Note the name."""
        self[name] = ""
        return default


def known_variables() -> set[str]:
    """Return the variables that the server reads: its settings, and where credentials are looked for."""
    asked = Asked()
    find_credentials(asked)
    return {name.upper() for name in Settings.__dataclass_fields__} | asked.keys()


@pytest.mark.parametrize("name", ["server", "kserve"])
def test_variables_are_those_that_the_server_reads_with_values_that_it_takes(name: str) -> None:
    given = environ(PODS[name])
    assert {"USERS_FILE", "ALIBABA_CLOUD_CREDENTIALS_FILE"} < known_variables()
    assert given.keys() - known_variables() == set()
    assert settings(PODS[name]).trusted_proxies == 1
    # To be filled in; until then they count as unset.
    assert {each for each, value in given.items() if not value} == {
        "SLS_ENDPOINT",
        "SLS_PROJECT",
        "SLS_LOGSTORE",
        "SLS_REGION",
    }


def test_secret_holds_the_files_that_the_settings_name() -> None:
    for path in (settings(POD["spec"]).users_file, Path(environ(POD["spec"])["ALIBABA_CLOUD_CREDENTIALS_FILE"])):
        mount, volume = mounted(POD["spec"], path)
        assert volume["secret"]["secretName"] == SERVER["Secret"]["metadata"]["name"]
        assert path.name in SERVER["Secret"]["data"]
        assert path.parent == Path(mount["mountPath"])
        assert "subPath" not in mount  # such a file never changes
        assert volume["secret"]["defaultMode"] & 0o040  # its owner is root; the pod has the group


def test_versions_come_from_the_claim_that_others_write() -> None:
    for pod, is_read_only in ((POD["spec"], True), *((each, False) for each in WRITERS.values())):
        mount, volume = mounted(pod, Settings().model_dir)
        assert mount["mountPath"] == inside(Settings().model_dir)
        assert mount.get("readOnly", False) is is_read_only
        claim = volume["persistentVolumeClaim"]
        assert claim == {"claimName": SERVER["PersistentVolumeClaim"]["metadata"]["name"]}
    assert SERVER["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_journal_has_a_place_that_holds_what_it_may_take() -> None:
    mount, volume = mounted(POD["spec"], settings(POD["spec"]).journal_dir)
    assert mount["mountPath"] == inside(settings(POD["spec"]).journal_dir)
    assert not mount.get("readOnly")
    gigabytes = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    assert gigabytes * 2**30 > settings(POD["spec"]).journal_max_bytes


@pytest.mark.parametrize("name", PODS)
def test_temporary_files_have_a_place(name: str) -> None:
    mount, volume = mounted(PODS[name], "/tmp")
    assert mount["mountPath"] == "/tmp"
    assert volume["emptyDir"].get("medium") == (None if name in WRITERS else "Memory")


# --- how it runs


@pytest.mark.parametrize("name", PODS)
def test_pod_has_no_rights_that_it_does_not_need(name: str) -> None:
    user, group = map(int, re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[0])
    pod = PODS[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": group,
        "fsGroup": group,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container(pod)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_stop_leaves_time_for_requests_and_records() -> None:
    pod, graceful = POD["spec"], settings(POD["spec"]).graceful_timeout
    waits = int(container(pod)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert waits > 0
    assert pod["terminationGracePeriodSeconds"] > waits + graceful + graceful  # workers, then the shipper


def test_liveness_is_slower_than_gunicorn_is_with_a_worker_that_hangs() -> None:
    probe = container(POD["spec"])["livenessProbe"]
    timeout = max(30, settings(POD["spec"]).predict_timeout)  # as gunicorn.conf.py has it
    seconds = probe.get("periodSeconds", 10) * probe["failureThreshold"]
    assert seconds > timeout + 10  # a new worker takes some, too


def test_rollback_runs_once_and_its_log_is_kept() -> None:
    spec = ROLLBACK["spec"]
    assert "name" not in ROLLBACK["metadata"]  # or a second `create` would fail
    assert spec["backoffLimit"] == 0
    assert WRITERS["rollback"]["restartPolicy"] == "Never"
    assert spec["ttlSecondsAfterFinished"] > 86_400
    assert container(WRITERS["rollback"])["command"] == ["python", "-m", "model", "rollback"]


def test_all_run_one_image_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {container(pod)["image"] for pod in PODS.values()}
    assert {image.rpartition(":")[2] for image in images} == {version}
    assert len(images) == 1


# --- other people's kinds


def test_kserve_runs_what_the_deployment_runs() -> None:
    service = KSERVE["InferenceService"]
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert container(PREDICTOR)["name"] == "kserve-container"  # by which KServe knows it
    assert container(PREDICTOR) | {"name": "server"} == container(POD["spec"])
    own = {name: value for name, value in PREDICTOR.items() if name not in (*OF_KSERVE, "containers")}
    left_to_kserve = ("containers", "topologySpreadConstraints")
    assert own == {name: value for name, value in POD["spec"].items() if name not in left_to_kserve}
    scaler = SERVER["HorizontalPodAutoscaler"]["spec"]
    assert (PREDICTOR["minReplicas"], PREDICTOR["maxReplicas"]) == (scaler["minReplicas"], scaler["maxReplicas"])
    (metric,) = scaler["metrics"]
    assert PREDICTOR["scaleMetric"] == metric["resource"]["name"]
    assert PREDICTOR["scaleTarget"] == metric["resource"]["target"]["averageUtilization"]
    assert KSERVE["Secret"] == SERVER["Secret"]
    assert KSERVE["PersistentVolumeClaim"] == SERVER["PersistentVolumeClaim"]


def test_prometheus_asks_as_a_user_with_the_role_metrics() -> None:
    monitor = PROMETHEUS["ServiceMonitor"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["path"] == "/metrics"
    secret = PROMETHEUS["Secret"]
    for part in ("username", "password"):
        assert endpoint["basicAuth"][part]["name"] == secret["metadata"]["name"]
        assert endpoint["basicAuth"][part]["key"] in secret["data"]
    text = (HERE / "prometheus/kustomization.yaml").read_text()
    (literal,) = read(HERE / "prometheus/kustomization.yaml")["secretGenerator"][0]["literals"]
    user, role = re.findall(r"add (\S+) --role (\S+)", text)[0]
    assert literal == f"username={user}"
    assert role == "metrics"
    assert role in ROLES
