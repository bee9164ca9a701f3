"""The image in real containers, as docs/containers.md runs it; `.ci/containers` builds it and calls these tests."""

import http.client
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runbook
from conftest import ROOT, free_port
from podman_tools import IMAGE, PASSWORD, STATE, Container, demo_model, podman, running, state_volume, wait_until

from settings import Settings


@pytest.fixture(scope="module")
def volume() -> Iterator[str]:
    """A volume with a user and a model."""
    with state_volume() as name:
        yield name


def test_page_in_a_container_works_word_for_word(tmp_path: Path) -> None:
    """With podman in the place of docker, a port that is free, and a password at the prompt."""
    (block,) = runbook.commands(__file__, "containers.md", "In a container")
    port, volume, name = free_port(), f"test-{free_port()}", f"test-{free_port()}"
    block = block.replace("docker ", "podman ").replace("127.0.0.1:5000:", f"127.0.0.1:{port}:")
    block = block.replace("predictions:/", f"{volume}:/").replace("--name predictions", f"--name {name}")
    block = block.replace("--rm -it", "--rm -i")  # there is no terminal here
    block = block.replace("--log-driver local", "--log-driver k8s-file")  # podman has none of that name
    (tmp_path / "model.joblib").write_bytes(demo_model(tmp_path))
    script = f"set -e\nshopt -s expand_aliases\n{block}"
    try:
        ran = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, input=f"{PASSWORD}\n{PASSWORD}\n", capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        container = Container(name, port)
        wait_until(container.is_healthy)
        assert container.predict() == (200, {"prediction": [0]})
        began = time.monotonic()
        podman("stop", name)
        assert time.monotonic() - began < 15  # of the 70 seconds that it may take
        assert podman("inspect", "--format", "{{.State.ExitCode}}", name).stdout.strip() == "0"
    finally:
        podman("rm", "--force", "--time", "0", "--ignore", name)
        podman("volume", "rm", "--force", volume, check=False)


@pytest.mark.parametrize("user", ["0:0", "10001:10001", "54321:54321"])
def test_serves_read_only_without_network_and_shared_memory_as_any_user(volume: str, user: str) -> None:
    where = ("--network", "none", "--ipc", "none", "--memory", "512m", "--env", "WEB_CONCURRENCY=1")
    model = ("--volume", f"{volume}:/mnt/state:ro", "--env", "MODEL_DIR=/mnt/state/models", "--env", "AUTH=off")
    state = ("--env", "JOURNAL_DIR=/tmp/journal", "--env", "FEEDBACK_KEY_FILE=/tmp/feedback.key")
    if user != "10001:10001":
        # A store that anyone may read, which published ones are not.
        podman("run", "--rm", "--user", "0", "--volume", f"{volume}:{STATE}", IMAGE, "chmod", "-R", "a+rX", STATE)
    with running("", *where, *model, *state, "--user", user, publish=False) as container:
        assert container.ask_inside() == {"prediction": [0]}
        owner = podman("exec", container.name, "stat", "-c", "%u", "/proc/1").stdout.strip()
        assert owner == user.partition(":")[0]
        for path in ("/opt/server/x", "/opt/server/model/x", "/opt/venv/bin/x", "/var/x", "/mnt/state/x"):
            assert podman("exec", container.name, "touch", path, check=False).returncode != 0
        assert podman("exec", container.name, "test", "-e", "/dev/shm", check=False).returncode != 0
        journal = "import pathlib; print(*(p.read_text() for p in pathlib.Path('/tmp/journal').glob('*.jsonl')))"
        assert '"success":true' in podman("exec", container.name, "python", "-c", journal).stdout
        assert "Traceback" not in container.log()
        podman("stop", container.name)
        assert podman("inspect", "--format", "{{.State.ExitCode}}", container.name).stdout.strip() == "0"


def test_serve_is_sagemakers_command_and_is_healthy_on_its_port(volume: str) -> None:
    with running(volume, "--env", "WEB_CONCURRENCY=1", command=("serve",), publish=False) as container:
        assert "platform: sagemaker (PLATFORM): " in container.log()
        ping = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/ping').status)"
        assert podman("exec", container.name, "python", "-c", ping).stdout.strip() == "200"


def test_stop_under_load_loses_no_request(volume: str) -> None:
    """Until its listener is closed, each connection that it took is answered; afterwards they are refused."""
    with running(volume, "--stop-timeout", "70") as container:
        answers: list[Any] = []
        stopping = threading.Event()

        def call() -> None:
            while True:
                was_stopping = stopping.is_set()
                try:
                    answers.append(container.predict()[0])
                except ConnectionRefusedError:
                    return
                except (OSError, http.client.HTTPException) as error:
                    answers.append(repr(error))
                    if was_stopping:
                        return

        callers = [threading.Thread(target=call) for _ in range(8)]
        for caller in callers:
            caller.start()
        time.sleep(3.0)
        assert container.predict()[0] == 200
        # To the server itself: podman takes its port's rule away only when the container is gone.
        stopping.set()
        podman("kill", "--signal", "TERM", container.name)
        for caller in callers:
            caller.join(60)
        assert len(answers) > 100
        assert {each: answers.count(each) for each in set(answers)} == {200: len(answers)}


# Makes the kernel prefer a process (the first one, or its first child) when the limit is reached, and reaches it.
HOG = """
import glob, sys
pid = sys.argv[1]
if pid == "worker":
    pid = open("/proc/1/task/1/children").read().split()[0]
open(f"/proc/{pid}/oom_score_adj", "w").write("1000")
kept = []
while True:
    kept.append(bytearray(2**22))
"""


@pytest.mark.parametrize("victim", ["worker", "1"])
def test_what_the_memory_limit_killed_comes_back(volume: str, victim: str) -> None:
    options = ("--memory", "512m", "--memory-swap", "512m", "--restart", "always", "--env", "WEB_CONCURRENCY=1")

    def started(container: Container) -> str:
        times = podman("inspect", "--format", "{{.State.StartedAt}}", container.name).stdout
        return times + podman("exec", container.name, "cat", "/proc/1/task/1/children", check=False).stdout

    with running(volume, *options) as container:
        before = started(container)
        podman("exec", container.name, "python", "-c", HOG, victim, check=False)
        wait_until(lambda: started(container) != before)
        wait_until(container.is_healthy)
        assert container.predict() == (200, {"prediction": [0]})
        assert ("Perhaps out of memory?" in container.log()) == (victim == "worker")
        # A new container counts from zero; its figures show when it started.
        counted = "1.0" if victim == "worker" else "0.0"
        assert f'prediction_worker_exits_total{{reason="killed"}} {counted}' in container.metrics()


def test_image_says_what_the_server_does() -> None:
    (found,) = json.loads(podman("inspect", IMAGE).stdout)
    said = found["Config"]
    assert list(said["ExposedPorts"]) == [f"{Settings().port}/tcp"]
    assert "HOST=0.0.0.0" in said["Env"]  # 127.0.0.1 would be the container's own
    assert said["Cmd"] == ["gunicorn"]  # no shell between Docker's SIGTERM and gunicorn
    assert list(said["Volumes"]) == [STATE]
    assert all(int(each) > 0 for each in said["User"].split(":"))
    size = round(found["Size"] / 1e6)
    (stated,) = re.findall(r"(\d+) MB, ", (ROOT / "docs/containers.md").read_text())
    assert abs(size - int(stated)) < 50, size


# What must not get in, by what it is, and some of what must.
KEPT_OUT = [
    *(".git/config", ".venv/lib/x.py", "var/users.json", "var/models/1/model.joblib", "model.joblib"),
    *("deploy/docker/server.env", "deploy/docker/tls/prediction-server.key"),
    *("deploy/kubernetes/server/secrets/users.json", "tests/conftest.py", "bench/compare.py", "requirements/dev.txt"),
    *("model/__pycache__/guard.cpython-311.pyc", "model/tensors/__pycache__/onnx.cpython-311.pyc"),
]
PACKAGES = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("bench", "tests")]
LET_IN = ["server.py", "model/formats/onnx.py", "deploy/sls/index.json", "requirements.txt"]
LET_IN += [f"{package.name}/__init__.py" for package in PACKAGES]


def test_builder_gets_no_secret_that_lies_in_the_directory(tmp_path: Path) -> None:
    for name in (*KEPT_OUT, *LET_IN):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    (tmp_path / "Dockerfile").write_text(f"FROM {IMAGE}\nCOPY . /context\n")
    name = f"localhost/test-{free_port()}"
    podman("build", "--quiet", "--tag", name, str(tmp_path))
    try:
        listing = podman("run", "--rm", name, "find", "/context", "-type", "f").stdout.split()
    finally:
        podman("rmi", "--force", name)
    assert (
        set(LET_IN) <= {each.removeprefix("/context/") for each in listing} <= {*LET_IN, ".dockerignore", "Dockerfile"}
    )


def test_image_and_its_history_hold_no_secret() -> None:
    shown = podman("history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE).stdout
    (found,) = json.loads(podman("inspect", IMAGE).stdout)
    environ = dict(each.split("=", 1) for each in found["Config"]["Env"])
    assert set(environ) <= {
        "PATH",
        "LOCPATH",
        "HOST",
        "LANG",
        "GPG_KEY",
        "PYTHON_VERSION",
        "PYTHON_SHA256",
        "container",
    }
    for word in ("password", "secret", "ALIBABA", "_KEY="):
        assert word not in shown.replace("GPG_KEY=", "")
    listing = podman("run", "--rm", IMAGE, "find", "/opt/server", "/var/lib/prediction-server", "-type", "f").stdout
    names = [Path(line).name for line in listing.splitlines()]
    code = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in package.rglob("*.py"))]
    wanted = {path.relative_to(ROOT).as_posix() for path in code} | {"gunicorn.conf.py", "deploy/sls/index.json"}
    assert wanted <= {line.removeprefix("/opt/server/") for line in listing.splitlines()}
    for name in ("users.json", "demo.netrc", "feedback.key", "server.env", ".git", "sls.ini"):
        assert name not in names
    assert not [
        line for line in listing.splitlines() if re.search(r"/(\.git|tests|\.venv|secrets)/|\.(pem|key)$", line)
    ]
