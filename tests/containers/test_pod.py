"""The Deployment's pod, played by `podman kube play`: its settings, secret, volumes and user as the manifest has them.

What podman 4.3 does not do is done here: without systemd it asks no probe; it leaves a secret's files in base64, and as
they were; it plays no Job.
"""

import base64
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from conftest import CHEAP, ROOT, Server, basic, free_port
from podman_tools import IMAGE, podman, wait_until
from werkzeug.security import generate_password_hash

KUBERNETES = ROOT / "deploy/kubernetes"
STATE = "/var/lib/prediction-server"
NEW_PASSWORD = "battery staple"


def read(name: str) -> dict[str, Any]:
    """Read a manifest."""
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / name).read_text())
    return found


def secret_of(users: str) -> dict[str, str]:
    """Return the secret's files."""
    entry = {"predict": {"password": users, "roles": ["predict"]}}
    return {"users.json": json.dumps(entry), "sls.ini": "", "feedback.key": "a" * 64}


@contextmanager
def played(place: Path, pod: dict[str, Any], *others: dict[str, Any]) -> Iterator[str]:
    """Play a pod with names of its own; yield its container's name, and remove everything in the end."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    claim = name + "-models"
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod}
    (container,) = pod["spec"]["containers"]
    container |= {"image": IMAGE, "imagePullPolicy": "Never"}
    for volume in pod["spec"]["volumes"]:
        if "secret" in volume:  # it panics without `optional`, and names a volume of its own after the secret
            volume["secret"] |= {"optional": False, "secretName": name}
        elif "persistentVolumeClaim" in volume:
            volume["persistentVolumeClaim"]["claimName"] = claim
        else:  # which it names after the volume
            old, volume["name"] = volume["name"], f"{name}-{volume['name']}"
            for mount in container["volumeMounts"]:
                if mount["name"] == old:
                    mount["name"] = volume["name"]
    for other in others:
        other["metadata"]["name"] = name if other["kind"] == "Secret" else claim
    path = place / "pod.yaml"
    path.write_text(yaml.safe_dump_all([*others, pod]))
    try:
        podman("kube", "play", str(path))
        yield f"{name}-{container['name']}"
    except AssertionError:
        print(podman("logs", f"{name}-{container['name']}", check=False))
        raise
    finally:
        podman("pod", "rm", "--force", "--time", "0", "--ignore", name, check=False)
        names = podman("volume", "ls", "--quiet", "--filter", f"name={name}").stdout.split()
        podman("volume", "rm", "--force", *names, check=False)
        podman("secret", "rm", name, check=False)


def test_pod_of_the_deployment_serves_and_a_rollback_job_rolls_back(tmp_path: Path) -> None:
    port = free_port()
    spec = read("server/deployment.yaml")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    container["ports"][0] |= {"hostPort": port, "hostIP": "127.0.0.1"}
    data = {name: base64.b64encode(text.encode()).decode() for name, text in secret_of(CHEAP).items()}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {}, "data": data}
    with played(tmp_path, spec, secret, read("common/models.yaml")) as name:
        server = Server(None, port, tmp_path / "log")  # type: ignore[arg-type]  # podman has the process

        def probe(kind: str) -> int:
            asked = container[kind]["httpGet"]
            try:
                return int(server.ask("GET", asked["path"])[0])
            except OSError:
                return 0

        put_secret(name, CHEAP)
        # Alive, and not ready: there is no model yet.
        wait_until(lambda: probe("startupProbe") == 200)
        assert (probe("livenessProbe"), probe("readinessProbe")) == (200, 503)
        claim = podman("volume", "ls", "--quiet", "--filter", "name=-models").stdout.split()[-1]
        publish(claim, "python -m model.demo")
        wait_until(lambda: probe("readinessProbe") == 200)
        assert server.predict([[5.1, 3.5, 1.4, 0.2]]) == (200, {"prediction": [0]})
        check_isolation(name)

        put_secret(name, generate_password_hash(NEW_PASSWORD))
        wait_until(lambda: ask(server, NEW_PASSWORD) == 200)
        assert ask(server) == 401

        # The Job, on the same claim: there is nothing to go back to, and then there is.
        assert run_job(claim) == (1, "model: there is no canary, and no earlier stable version to return to")
        publish(claim, "python -m model publish var/models/1/*.joblib --version 2 && python -m model promote 2")
        wait_until(lambda: serves(server, NEW_PASSWORD) == "2")
        status, said = run_job(claim)
        assert status == 0, said
        wait_until(lambda: serves(server, NEW_PASSWORD) == "1")

        podman("pod", "stop", "--time", "70", name.removesuffix("-server"))
        assert podman("inspect", "--format", "{{.State.ExitCode}}", name).stdout.strip() == "0"


def put_secret(name: str, password_hash: str) -> None:
    """Replace the secret's files by a rename, as the kubelet does."""
    mounts = json.loads(podman("inspect", "--format", "{{json .Mounts}}", name).stdout)
    (place,) = [Path(each["Source"]) for each in mounts if each["Destination"] == "/etc/prediction-server"]
    for file, text in secret_of(password_hash).items():
        (place / "new").write_text(text)
        (place / "new").rename(place / file)


def ask(server: Server, password: str | None = None) -> int:
    """Predict with a password; return the status."""
    given = basic("predict", password) if password else basic("predict")
    body = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'
    return int(server.ask("POST", "/predict", body, Content_Type="application/json", Authorization=given)[0])


def serves(server: Server, password: str) -> str:
    """Predict; return the version that answered."""
    given = {"Content_Type": "application/json", "Authorization": basic("predict", password)}
    return str(server.ask("POST", "/predict", b'{"data": [[5.1, 3.5, 1.4, 0.2]]}', **given)[1]["X-Model-Version"])


def publish(claim: str, command: str) -> None:
    """Run a command with write access to the version store, as in the publisher."""
    podman("run", "--rm", "--tmpfs", "/tmp", "--volume", f"{claim}:{STATE}/models", IMAGE, "sh", "-c", command)


def check_isolation(name: str) -> None:
    """Check that the container has what the manifest says."""
    (found,) = json.loads(podman("inspect", name).stdout)
    assert found["HostConfig"]["ReadonlyRootfs"]
    assert found["Config"]["User"] == "10001:10001"
    assert found["HostConfig"]["Memory"] == 2**30
    assert found["HostConfig"]["NanoCpus"] == 2 * 10**9
    assert podman("exec", name, "grep", "-E", "^(CapEff|NoNewPrivs)", "/proc/1/status").stdout.split() == [
        *("CapEff:", "0000000000000000"),
        *("NoNewPrivs:", "1"),
    ]
    for path in (f"{STATE}/models/x", "/etc/prediction-server/x", "/opt/server/x"):
        assert podman("exec", name, "touch", path, check=False).returncode != 0
    for path in (f"{STATE}/journal/x", "/tmp/x"):
        podman("exec", name, "touch", path)


def run_job(claim: str) -> tuple[int, str]:
    """Run the container of rollback.yaml as it says, on a claim; return its exit status and the end of its log.

    podman 4.3 plays no Job, and would start its pod again and again.
    """
    spec = read("rollback.yaml")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    arguments = ["--read-only", "--user", "10001:10001", "--cap-drop", "ALL", "--memory", "256m", "--tmpfs", "/tmp"]
    (mount,) = [each["mountPath"] for each in container["volumeMounts"] if each["name"] == "models"]
    ran = podman("run", "--rm", *arguments, "--volume", f"{claim}:{mount}", IMAGE, *container["command"], check=False)
    return ran.returncode, (ran.stdout + ran.stderr).strip().splitlines()[-1]
