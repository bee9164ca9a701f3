"""How fast is this server beside others? `make bench`, or python -m bench.compare [--quick] […]; `--help` has the rest.

With one worker the server has one core and the load generator another; with more, all share all cores. A server's
answers, also to many at once, are compared with `model.predict` before it is measured. The order of the servers rotates
from round to round, so that a drift of the machine meets all alike; a ratio is that of two figures of one round.
"""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click

from bench.running import BOTH, LOAD, SERVER, NotRight, running
from bench.servers import ALL, BY_NAME, HOME, MODELS, OURS, ROOT, Cases, Server, prepare

Found = list[dict[str, Any]]
SHARE = 0.7  # of the best peer's highest rate: what all are offered
README = {"iris.joblib": "logistic regression with a scaler", "hgb.joblib": "histogram gradient boosting"}
README |= {"forest.joblib": "random forest of 100 trees", "iris.onnx": "the logistic regression as ONNX"}
QUICK = {"servers": "ours,fastapi,fastapi-same,mlserver-batch", "models": ",".join(README)}
QUICK |= {"rows": "1", "connections": "64", "workers": "1", "seconds": 3, "rounds": 2, "offered": 0}
WHOLE = {"servers": ",".join(server.name for server in ALL), "models": ",".join(MODELS), "rows": "1"}
WHOLE |= {"connections": "1,64,256", "workers": "1", "seconds": 5, "rounds": 5, "offered": 10}
LIST = {"metavar": "A,B,…"}


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--quick", is_flag=True, help="the README's table in ten minutes; without it, it takes the night")
@click.option("--servers", **LIST, help=f"of {WHOLE['servers']}")
@click.option("--models", **LIST, help=f"of {WHOLE['models']}")
@click.option("--rows", **LIST, help="in a request")
@click.option("--connections", **LIST)
@click.option("--workers", **LIST)
@click.option("--seconds", type=int, help="of each measurement")
@click.option("--offered", type=int, help="seconds of each at a fixed rate; 0 for none")
@click.option("--rounds", type=int)
@click.option("--out", type=Path, default=HOME / "results.jsonl", help="JSON lines file to append to")
@click.option("--report", type=Path, multiple=True, help="only print the tables of such files")
def main(quick: bool, out: Path, report: list[Path], **given: Any) -> None:
    if report:
        return print_tables([json.loads(line) for path in report for line in path.open()])
    if not shutil.which("wrk"):
        sys.exit("wrk is missing; install it: sudo apt-get install -y wrk")
    if LOAD == SERVER:
        sys.exit("two cores are needed: one for the server and one for the load")
    given = (QUICK if quick else WHOLE) | {name: value for name, value in given.items() if value is not None}
    given |= {name: given[name].split(",") for name in ("servers", "models", "rows", "connections", "workers")}
    if unknown := {*given["servers"], *given["models"]} - {*BY_NAME, *MODELS}:
        sys.exit(f"unknown: {', '.join(unknown)}; --help lists what is known")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is stopped
    prepare({BY_NAME[name].environment for name in given["servers"]})
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, text=True)
    about = {"run": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": commit.strip()}
    found: Found = []
    for where, server, rates in turns(given, found):
        for figures in measure(server, where["model"], where["workers"], given, rates):
            found.append(where | figures | about)
            print(line := json.dumps(found[-1]), flush=True)
            with out.open("a") as file:
                file.write(f"{line}\n")
    print_tables(found)
    print(f"\nThe measurements are in {out}; --report {out} prints these tables again.")


def turns(given: dict[str, Any], found: Found) -> Iterator[tuple[dict[str, Any], Server, dict[int, float]]]:
    """Yield what is measured next: first how much each server answers, in rounds; then, in as many, at fixed rates."""
    chosen, rounds = [BY_NAME[name] for name in given["servers"]], range(given["rounds"])
    for offers, number in itertools.product((False, True)[: 1 + bool(given["offered"])], rounds):
        at = number % len(chosen)
        turned = (chosen[at:] + chosen[:at])[:: -1 if number % 2 else 1]
        for model, workers, server in itertools.product(given["models"], map(int, given["workers"]), turned):
            if Path(model).suffix in server.suffixes and not (offers and server.constant):
                where = {"server": server.name, "model": model, "workers": workers, "round": number}
                yield where, server, rates_offered(found, model, workers) if offers else {}


def measure(
    server: Server, model: str, workers: int, given: dict[str, Any], rates: dict[int, float]
) -> Iterator[dict[str, Any]]:
    """Start a server once, and yield what is measured of it: at these rates, or without any, all that it answers."""
    cases, cores, load = Cases(model), *((SERVER, LOAD) if workers == 1 else (BOTH, BOTH))
    connections = [] if rates else [int(each) for each in given["connections"]]
    try:
        with running(server, model, workers, cores) as run:
            run.check_together([cases.some(1, 7 * number) for number in range(64)])
            most = run.memory()
            for rows in map(int, given["rows"]):
                bodies = cases.bodies(rows)
                run.closed_loop(bodies, max(connections, default=64), 2, load)  # to warm up
                for count in connections:
                    run.settle()
                    figures = run.closed_loop(bodies, count, given["seconds"], load)
                    yield {"kind": "closed", "rows": rows, "connections": count} | figures
                    most = max(most, run.memory())
                if rate := rates.get(rows):
                    run.settle()
                    figures = run.open_loop(bodies, rate, given["offered"], cores=load)
                    yield {"kind": "offered", "rows": rows, "rate": rate} | figures
            run.settle()
            run.check(*cases.some(1, 3))
            if not rates:
                yield {"kind": "start", "seconds": run.seconds, "pss": most}
    except NotRight as error:
        yield {"kind": "failed", "why": str(error)}


def rates_offered(found: Found, model: str, workers: int) -> dict[int, float]:
    """Return the rate that all are asked at, for each number of rows."""
    here = [each for each in found if (each["kind"], each["model"], each["workers"]) == ("closed", model, workers)]
    rates: dict[int, float] = {}
    for (rows, _, server), those in grouped(here, "rows", "connections", "server"):
        if BY_NAME[server].is_peer:
            rates[rows] = max(rates.get(rows, 0.0), SHARE * median(each["rate"] for each in those))
    return rates


COLUMNS = {  # of the tables: what is measured, by how much it is multiplied, and in which form
    "closed": {"requests a second": ("rate", 1, ".0f"), "processor time, ms": ("cpu", 1e3, ".2f")},
    "offered": {"p50, ms": ("p50", 1e3, ".1f"), "p99, ms": ("p99", 1e3, ".0f"), "lost": ("unfinished", 1, ".0f")},
    "start": {"seconds to the first right answer": ("seconds", 1, ".1f"), "memory (PSS), MB": ("pss", 1, ".0f")},
}
ABOVE = {"closed": "All that it answers", "offered": "At one rate for all", "start": "Start and memory"}


def print_tables(found: Found) -> None:
    """Print medians of the rounds, a table for each kind of measurement, and the table of the README."""
    for kind, columns in COLUMNS.items():
        keys = ["model", "workers", "rows", {"closed": "connections", "offered": "rate"}.get(kind, "")]
        keys = [key for key in keys if key and kind != "start"] or keys[:2]
        here = [each for each in found if each["kind"] == kind]
        if here:
            print(f"\n{ABOVE[kind]}\n\n| {' | '.join([*keys, 'server', *columns, 'this server / it (quartiles)'])} |")
            print("|" + "---|" * (len(keys) + len(columns) + 2))
        for values, those in grouped(here, *keys):
            for server in ALL:
                if own := [each for each in those if each["server"] == server.name]:
                    cells = [f"{median(e[what] for e in own) * times:{form}}" for what, times, form in columns.values()]
                    quotient = ratio([each for each in those if each["server"] == OURS.name], own, kind)
                    shown = [f"{value:.0f}" if isinstance(value, float) else str(value) for value in values]
                    print(f"| {' | '.join([*shown, server.title, *cells, quotient])} |")
    print_main_figures([each for each in found if (each.get("rows"), each.get("connections")) == (1, 64)])
    if closed := [each for each in found if each["kind"] == "closed"]:
        print("\nNot 2xx, or broken off:", sum(each["not_2xx"] + each["broken"] for each in closed))
    print(*(f"\nFAILED: {each}" for each in found if each["kind"] == "failed"))


def print_main_figures(found: Found) -> None:
    """Print the README's table."""
    print("\n| requests per second | this server | best other model server |\n|---|---|---|")
    for model, title in README.items():
        here = [each for each in found if (each["model"], each["workers"]) == (model, 1)]
        rates = {server: median(each["rate"] for each in own) for (server,), own in grouped(here, "server")}
        peers = [(rate, BY_NAME[name].title) for name, rate in rates.items() if BY_NAME[name].is_peer]
        if OURS.name in rates and peers:
            print(f"| {title} | {rates[OURS.name]:.0f} | {max(peers)[0]:.0f}, {max(peers)[1]} |")


def ratio(ours: Found, own: Found, kind: str) -> str:
    """Return the median and the quartiles of the rounds' ratios, of the main figure of that kind."""
    what = {"closed": "rate", "offered": "p99", "start": "seconds"}[kind]
    figures = {(each["run"], each["round"]): each[what] for each in ours}
    ratios = [figures.get((each["run"], each["round"]), 0) / each[what] for each in own if each[what]]
    low, mid, high = quantiles(ratios * 2, n=4, method="inclusive") if ratios else (0, 0, 0)
    return f"{mid:.2f} ({low:.2f}–{high:.2f})" if ours and ratios and own != ours else ""


def grouped(found: Found, *keys: str) -> list[tuple[tuple[Any, ...], Found]]:
    """Return what was found by the values of these keys."""

    def by(each: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(each[key] for key in keys)

    return [(values, list(those)) for values, those in itertools.groupby(sorted(found, key=by), by)]


if __name__ == "__main__":
    main()
