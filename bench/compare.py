"""This server and others side by side: `make bench`, or python -m bench.compare [--quick] […]; `--help` has the rest.

Every server is installed into an environment of its own under .bench, serves the same model file, and is asked the same
rows. With one worker the server has one core and the load generator another; with more, all share all cores.
A server's answers, also to many at once, are compared with `model.predict` before it is measured. The order of the
servers rotates from round to round, so that a drift of the machine meets all alike.
"""

import argparse
import hashlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import servers
from bench.load import closed_loop, fixed_rate
from bench.report import offered, report
from bench.running import NotRight, free_ports, running
from bench.servers import ROOT, Server, Start

HOME = ROOT / ".bench"
BODIES = 20  # different requests, sent in turn
MODELS = [f"{name}{suffix}" for name in ("iris", "forest", "hgb") for suffix in (".joblib", ".onnx")]


def main() -> None:
    """Install, train, measure, report."""
    given = arguments()
    if given.report:
        return report([json.loads(line) for path in given.report for line in path.open()], given.chart)
    if not shutil.which("wrk"):
        sys.exit("wrk is missing; install it: sudo apt-get install -y wrk")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("two cores are needed: one for the server and one for the load")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is stopped
    for environment in {"ours": None} | {servers.BY_NAME[name].environment: None for name in given.servers}:
        install(environment)
    subprocess.run([binary("ours", "python"), "-m", "bench.train", HOME / "models"], cwd=ROOT, check=True)
    about = {"commit": commit(), "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    found: list[dict[str, Any]] = []
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a", buffering=1) as out:
        for where, server, rates in turns(given, found):
            for figures in measure(server, where["model"], where["workers"], given, cores, rates):
                found.append(about | where | figures | {"versions": versions(server.environment)})
                out.write(json.dumps(found[-1]) + "\n")
                print(*(f"{name}={show(value)}" for name, value in (where | figures).items()), flush=True)
    report(found, given.chart)
    print(f"\nThe measurements are in {given.out}; --report {given.out} prints these tables again.")


def turns(given: argparse.Namespace, found: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Server, Any]]:
    """Yield what is measured next: first how much each server answers, in rounds; then, in as many, at fixed rates."""
    chosen = [servers.BY_NAME[name] for name in given.servers]
    for kind in ("closed", "offered") if given.offered else ("closed",):
        for number in range(given.rounds):
            for model, workers in itertools.product(given.models, given.workers):
                at = number % len(chosen)
                turned = chosen[at:] + chosen[:at]
                for server in turned[::-1] if number % 2 else turned:
                    fits = model == given.models[0] if server.constant else Path(model).suffix in server.suffixes
                    rates = offered(found, server.name, model, workers) if kind == "offered" else {}
                    if fits and (rates or kind == "closed"):
                        yield (
                            {"server": server.name, "model": model, "workers": workers, "round": number},
                            server,
                            rates,
                        )


def arguments() -> argparse.Namespace:
    def listed(kind: Any) -> Any:
        return lambda text: [kind(each) for each in text.split(",")]

    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="iris alone, 64 connections, one round: minutes")
    parser.add_argument("--servers", type=listed(str), help=f"of {','.join(servers.BY_NAME)}")
    parser.add_argument("--models", type=listed(str), help=f"of {','.join(MODELS)}")
    parser.add_argument("--rows", type=listed(int), metavar="N,…", help="rows in a request")
    parser.add_argument("--connections", type=listed(int), metavar="N,…")
    parser.add_argument("--workers", type=listed(int), metavar="N,…")
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement")
    parser.add_argument("--offered", type=int, help="seconds of each measurement at a fixed rate; 0 for none")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, help="JSON lines file to append to", default=HOME / "results.jsonl")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="only print the tables of these files")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the main figures into this SVG file")
    given = parser.parse_args()
    small = {"models": ["iris.joblib"], "rows": [1], "connections": [64], "workers": [1], "rounds": 1, "offered": 0}
    whole = {"models": MODELS, "rows": [1, 100], "connections": [1, 16, 64, 256], "workers": [1, 2], "rounds": 3}
    whole |= {"offered": 10}
    for name, value in ((small if given.quick else whole) | {"servers": list(servers.BY_NAME)}).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def binary(environment: str, name: str) -> Path:
    return HOME / "venvs" / environment / "bin" / name


def install(environment: str) -> None:
    """Make a server's virtual environment, unless it is there with the same requirements."""
    files = [ROOT / "bench" / "requirements" / f"{environment}.txt"]
    if environment == "ours":
        files = [ROOT / "requirements.txt", ROOT / "requirements-onnx.txt"]
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


def measure(
    server: Server, model: str, workers: int, given: argparse.Namespace, cores: list[int], rates: dict[int, Any]
) -> Iterator[dict[str, Any]]:
    """Start a server once, and yield what is measured of it: at these rates, or without any, all that it answers."""
    known = json.loads((HOME / "models" / model).with_suffix(".json").read_text())
    rows, labels = known["rows"], known["predictions"]

    def case(count: int, at: int) -> tuple[Any, Any]:
        picked = [(at + step) % len(rows) for step in range(count)]
        return [rows[number] for number in picked], [labels[number] for number in picked]

    theirs, loads = ("0", "1") if workers == 1 else ("all", "all")
    names = {"0": str(cores[0]), "1": str(cores[1]), "all": ",".join(map(str, cores))}
    with TemporaryDirectory(prefix="bench-") as place:
        start = Start(
            binary(server.environment, "python").parent, HOME / "models" / model, workers, free_ports(3), Path(place)
        )
        try:
            with running(server, start, names[theirs], case(1, 0)) as (run, seconds):
                for count in given.rows:
                    run.check_together([case(count, at * 7) for at in range(64)])
                most = run.pss()
                for count in given.rows:
                    bodies = [case(count, at * 5)[0] for at in range(BODIES)]
                    closed_loop(run, bodies, max(given.connections), 2, names[loads])  # to warm up
                    for connections in [] if rates else given.connections:
                        run.settle()
                        figures = closed_loop(run, bodies, connections, given.seconds, names[loads])
                        yield {"kind": "closed", "rows": count, "connections": connections} | figures
                        most = max(most, run.pss())
                    for at, rate in rates.get(count, {}).items():
                        run.settle()
                        figures = fixed_rate(run, bodies, rate, given.offered, names[loads])
                        yield {"kind": "offered", "rows": count, "at": at, "rate": rate} | figures
                run.settle()
                run.check(*case(given.rows[0], 3))
                if not rates:
                    yield {"kind": "start", "seconds": seconds, "pss": most}
        except NotRight as error:
            yield {"kind": "failed", "why": str(error), "log": error.log}


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def machine() -> str:
    """Name the processor and the system, not the host."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}, Linux {platform.release()}"


def versions(environment: str) -> dict[str, str]:
    """Return the versions of what decides about speed in an environment."""
    if environment not in _versions:
        code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
        done = subprocess.run([binary(environment, "python"), "-c", code], capture_output=True, text=True, check=True)
        _versions[environment] = {
            name.lower(): version for name, version in json.loads(done.stdout).items() if name.lower() in NAMED
        } | {"python": platform.python_version()}
    return _versions[environment]


_versions: dict[str, dict[str, str]] = {}
NAMED = {"flask", "gunicorn", "gevent", "fastapi", "uvicorn", "uvloop", "httptools", "kserve", "mlserver", "bentoml"}
NAMED |= {"litserve", "scikit-learn", "numpy", "onnxruntime"}


def show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
