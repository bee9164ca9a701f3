"""What the comparison needs beside this project: an environment for each server, models, and where it ran."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

from bench.servers import ROOT, Server, Start

HOME = ROOT / ".bench"
MODELS = [f"{name}{suffix}" for name in ("iris", "forest", "hgb") for suffix in (".joblib", ".onnx")]
NAMED = {"flask", "gunicorn", "gevent", "fastapi", "uvicorn", "uvloop", "httptools", "kserve", "mlserver", "bentoml"}
NAMED |= {"litserve", "scikit-learn", "numpy", "onnxruntime"}


def prepare(environments: set[str]) -> None:
    """Install the servers and train the models that are not there yet."""
    for environment in sorted(environments | {"ours"}):
        install(environment)
    subprocess.run([binary("ours", "python"), "-m", "bench.train", HOME / "models"], cwd=ROOT, check=True)


def install(environment: str) -> None:
    """Make a virtual environment, unless it is there with the same requirements."""
    files = [ROOT / "bench" / "requirements" / f"{environment}.txt"]
    if environment == "ours":
        files = [ROOT / "requirements.txt", ROOT / "requirements/onnx.txt"]
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    stamp = HOME / "venvs" / environment / "installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing {environment}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", stamp.parent], check=True)
    for path in files:
        command = [binary(environment, "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*command, "-r", path], check=True)
    stamp.write_text(wanted)


def binary(environment: str, name: str) -> Path:
    """Return the path of a program in an environment."""
    return HOME / "venvs" / environment / "bin" / name


def start_of(server: Server, model: str, workers: int, ports: list[int], place: str) -> Start:
    """Say what a server is started with."""
    return Start(binary(server.environment, "python").parent, HOME / "models" / model, workers, ports, Path(place))


class Cases:
    """A model's rows, and what it answers to them itself."""

    def __init__(self, model: str) -> None:
        known = json.loads((HOME / "models" / model).with_suffix(".json").read_text())
        self.pairs = list(zip(known["rows"], known["predictions"], strict=True))

    def some(self, count: int, at: int = 0) -> tuple[list[list[float]], list[int]]:
        """Return so many rows from this one on, in a circle, and their predictions."""
        picked = [self.pairs[(at + step) % len(self.pairs)] for step in range(count)]
        return [row for row, _ in picked], [prediction for _, prediction in picked]

    def bodies(self, rows: int, count: int = 20) -> list[list[list[float]]]:
        """Return the rows of different requests, to be sent in turn."""
        return [self.some(rows, 5 * number)[0] for number in range(count)]


def cores() -> list[str]:
    """Name the core of the server, that of the load, and all of them, as taskset takes them."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        sys.exit("two cores are needed: one for the server and one for the load")
    return [str(usable[0]), str(usable[1]), ",".join(map(str, usable))]


def commit() -> str:
    """Name the commit that is measured; with -dirty where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    """Name the processor and the system, not the host."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}, Linux {platform.release()}"


@cache
def versions(environment: str) -> dict[str, str]:
    """Return the versions, in an environment, of what decides about speed."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    done = subprocess.run([binary(environment, "python"), "-c", code], capture_output=True, text=True, check=True)
    found = {name.lower(): version for name, version in json.loads(done.stdout).items() if name.lower() in NAMED}
    return {"python": platform.python_version()} | found
