"""This server and others side by side: `make bench`, or python -m bench.compare [--quick] […]; `--help` has the rest.

Every server is installed into an environment of its own under .bench, serves the same model file, and is asked the same
rows. With one worker the server has one core and the load generator another; with more, all share all cores. A server's
answers, also to many at once, are compared with `model.predict` before it is measured. The order of the servers rotates
from round to round, so that a drift of the machine meets all alike.
"""

import argparse
import itertools
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.environments import HOME, MODELS, Cases, commit, cores, machine, prepare, start_of, versions
from bench.load import closed_loop, fixed_rate
from bench.report import Found, offered, report
from bench.running import NotRight, free_ports, running
from bench.servers import BY_NAME, Server

QUICK = {"models": MODELS[:1], "rows": [1], "connections": [64], "workers": [1], "rounds": 1, "offered": 0}
WHOLE = {"models": MODELS, "rows": [1, 100], "connections": [1, 16, 64, 256], "workers": [1, 2], "rounds": 3}
WHOLE |= {"offered": 10}


def main() -> None:
    """Install, train, measure, report."""
    given = arguments()
    if given.report:
        return report([json.loads(line) for path in given.report for line in path.open()], given.chart)
    if not shutil.which("wrk"):
        sys.exit("wrk is missing; install it: sudo apt-get install -y wrk")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is stopped
    prepare({BY_NAME[name].environment for name in given.servers})
    about = {"commit": commit(), "machine": machine(), "run": time.strftime("%Y-%m-%d %H:%M:%S")}
    found: Found = []
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a", buffering=1) as out:
        for where, server, rates in turns(given, found):
            for figures in measure(server, where["model"], where["workers"], given, rates):
                about |= {"date": time.strftime("%Y-%m-%d %H:%M"), "versions": versions(server.environment)}
                found.append(where | figures | about)
                out.write(json.dumps(found[-1]) + "\n")
                print(*(f"{name}={show(value)}" for name, value in (where | figures).items()), flush=True)
    report(found, given.chart)
    print(f"\nThe measurements are in {given.out}; --report {given.out} prints these tables again.")


def arguments() -> argparse.Namespace:
    """Read the command line; what is not given is as in `QUICK` or `WHOLE`."""

    def listed(kind: Any) -> Any:
        return lambda text: [kind(each) for each in text.split(",")]

    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="iris alone, 64 connections, one round: minutes")
    parser.add_argument("--servers", type=listed(str), default=list(BY_NAME), help=f"of {','.join(BY_NAME)}")
    parser.add_argument("--models", type=listed(str), help=f"of {','.join(MODELS)}")
    parser.add_argument("--rows", type=listed(int), metavar="N,…", help="in a request")
    parser.add_argument("--connections", type=listed(int), metavar="N,…")
    parser.add_argument("--workers", type=listed(int), metavar="N,…")
    parser.add_argument("--seconds", type=int, default=5, metavar="N", help="of each measurement")
    parser.add_argument("--offered", type=int, metavar="N", help="seconds of each at a fixed rate; 0 for none")
    parser.add_argument("--rounds", type=int, metavar="N")
    parser.add_argument("--out", type=Path, help="JSON lines file to append to", default=HOME / "results.jsonl")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="only print the tables of these files")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the main figures into this SVG file")
    given = parser.parse_args()
    for name, value in (QUICK if given.quick else WHOLE).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    for names, known in ((given.servers, BY_NAME), (given.models, MODELS)):
        if unknown := set(names) - set(known):
            parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    return given


def turns(given: argparse.Namespace, found: Found) -> Iterator[tuple[dict[str, Any], Server, Any]]:
    """Yield what is measured next: first how much each server answers, in rounds; then, in as many, at fixed rates."""
    chosen = [BY_NAME[name] for name in given.servers]
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


def measure(
    server: Server, model: str, workers: int, given: argparse.Namespace, rates: dict[int, dict[str, float]]
) -> Iterator[dict[str, Any]]:
    """Start a server once, and yield what is measured of it: at these rates, or without any, all that it answers."""
    cases = Cases(model)
    first, second, everything = cores()
    theirs, loads = (first, second) if workers == 1 else (everything, everything)
    with TemporaryDirectory(prefix="bench-") as place:
        start = start_of(server, model, workers, free_ports(3), place)
        try:
            with running(server, start, theirs, cases.some(1)) as (run, seconds):
                for rows in given.rows:
                    run.check_together([cases.some(rows, 7 * number) for number in range(64)])
                most = run.pss()
                for rows in given.rows:
                    bodies = cases.bodies(rows)
                    closed_loop(run, bodies, max(given.connections), 2, loads)  # to warm up
                    for connections in [] if rates else given.connections:
                        run.settle()
                        figures = closed_loop(run, bodies, connections, given.seconds, loads)
                        yield {"kind": "closed", "rows": rows, "connections": connections} | figures
                        most = max(most, run.pss())
                    for at, rate in rates.get(rows, {}).items():
                        run.settle()
                        figures = fixed_rate(run, bodies, rate, given.offered, loads)
                        yield {"kind": "offered", "rows": rows, "at": at, "rate": rate} | figures
                run.settle()
                run.check(*cases.some(given.rows[0], 3))
                if not rates:
                    yield {"kind": "start", "seconds": seconds, "pss": most}
        except NotRight as error:
            yield {"kind": "failed", "why": str(error), "log": error.log}


def show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
