"""Containers of the image by podman, for the tests here."""

import http.client
import json
import os
import subprocess
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import free_port

IMAGE, STATE = os.environ["TEST_IMAGE"], "/var/lib/prediction-server"
PASSWORD = "correct horse"
AUTHORIZATION = f"Basic {b64encode(f'alice:{PASSWORD}'.encode()).decode()}"
IRIS = [[5.1, 3.5, 1.4, 0.2]]
HARDENED = ("--read-only", "--tmpfs", "/tmp")
# What a caller without a port asks: by Python, since the image has no curl.
ASK = f"""
import json, os, urllib.request as u
headers = {{"Content-Type": "application/json", "Authorization": {AUTHORIZATION!r}}}
body = json.dumps({{"data": {IRIS}}}).encode()
port = os.environ.get("PORT", "5000")
print(u.urlopen(u.Request(f"http://127.0.0.1:{{port}}/predict", body, headers)).read().decode())
"""


def podman(*arguments: str, text: str = "", check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run podman; with `check` it must succeed."""
    ran = subprocess.run(["podman", *arguments], input=text, capture_output=True, text=True, timeout=120)
    assert not check or ran.returncode == 0, ran.stdout + ran.stderr
    return ran


def wait_until(met: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until `met()` is true."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.1)


class Container:
    """A container that runs."""

    def __init__(self, name: str, port: int | None) -> None:
        self.name, self.port = name, port

    def predict(self, rows: Any = IRIS) -> tuple[int, Any]:
        """POST rows to the published port; return status and content."""
        assert self.port is not None
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            headers = {"Content-Type": "application/json", "Authorization": AUTHORIZATION}
            connection.request("POST", "/predict", json.dumps({"data": rows}), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def metrics(self) -> str:
        """Return what /metrics shows."""
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/metrics", headers={"Authorization": AUTHORIZATION}
        )
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return str(answer.read().decode())

    def ask_inside(self) -> Any:
        """Predict from within."""
        return json.loads(podman("exec", self.name, "python", "-c", ASK).stdout)

    def is_healthy(self) -> bool:
        """Run the image's HEALTHCHECK."""
        return podman("healthcheck", "run", self.name, check=False).returncode == 0

    def log(self) -> str:
        """Return what it wrote."""
        ran = podman("logs", self.name)
        return ran.stdout + ran.stderr


@contextmanager
def running(volume: str, *options: str, command: tuple[str, ...] = (), publish: bool = True) -> Iterator[Container]:
    """Run the image until it is healthy; remove it in the end."""
    port = free_port() if publish else None
    published = ("--publish", f"127.0.0.1:{port}:5000") if publish else ()
    mounted = ("--volume", f"{volume}:{STATE}") if volume else ()
    name = podman("run", "--detach", *HARDENED, *published, *mounted, *options, IMAGE, *command).stdout.strip()
    container = Container(name, port)
    try:
        try:
            wait_until(container.is_healthy)
        except AssertionError:
            raise AssertionError(container.log()) from None
        yield container
    finally:
        podman("rm", "--force", "--time", "0", name)


@contextmanager
def state_volume() -> Iterator[str]:
    """A volume with a user and a model."""
    name = podman("volume", "create").stdout.strip()
    inside = ("run", "--rm", "--interactive", *HARDENED, "--volume", f"{name}:{STATE}", IMAGE, "python", "-m")
    podman(*inside, "auth", "add", "alice", "--role", "predict", "--role", "metrics", text=f"{PASSWORD}\n{PASSWORD}\n")
    podman(*inside, "model.demo")
    try:
        yield name
    finally:
        podman("volume", "rm", "--force", name)


def demo_model(tmp_path: Path) -> bytes:
    """Return a model file that the image's scikit-learn made."""
    train = (
        "import joblib; from sklearn.datasets import load_iris; from sklearn.linear_model import LogisticRegression; "
        "joblib.dump(LogisticRegression(max_iter=1000).fit(*load_iris(return_X_y=True)), '/out/model.joblib')"
    )
    podman("run", "--rm", "--user", "0", "--volume", f"{tmp_path}:/out", IMAGE, "python", "-c", train)
    return (tmp_path / "model.joblib").read_bytes()
