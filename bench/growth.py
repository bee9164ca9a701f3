"""How does cost grow: with connections, workers, versions, users, the journal, the store, and the size of the model?

    python -m bench.growth [NAME …]                                                             some ten minutes

Of each size: seconds to the first right answer; processor time of an idle second, and of a request (median of three
turns); memory of all processes (PSS, MB of 10**6 bytes). `slope` is the largest exponent with which one of them grows
between the last two sizes, if by a tenth at least: 1 is in proportion to the size.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click

from bench.running import BOTH, CORES, SERVER, running
from bench.servers import HOME, OURS, Cases, prepare
from model.versions.publishing import publish
from model.versions.store import Store

COLUMNS = ["start, s", "idle, ms/s", "request, µs", "memory, MB"]
IRIS, NEIGHBOURS, FOREST = "iris.joblib", "large-neighbours.joblib", "large-forest.joblib"
RECORD = {"path": "/predict", "status": 200, "success": True, "error": "", "error_type": "", "user": "demo", "pid": 1}


def users(place: Path, count: int) -> dict[str, Any]:
    known = json.loads((place / "users.json").read_text())
    (user,) = known.values()
    (place / "users.json").write_text(json.dumps(known | {f"user{number}": user for number in range(1, count)}))
    return {}


def journal(place: Path, megabytes: int) -> dict[str, Any]:
    (place / "journal").mkdir()
    lines = [json.dumps(RECORD | {"time": time.time() - 3600, "record_id": str(line)}) for line in range(60_000)]
    segment = "\n".join(lines)[: 8 * 10**6].rpartition("\n")[0] + "\n"
    for number in range(megabytes // 8):
        (place / "journal" / f"{number + 1:020d}-1.jsonl").write_text(segment)
    return {"JOURNAL_MAX_BYTES": 4 * 10**9}


def store(place: Path, versions: int, model: str = IRIS, served: int = 1, preload: int = 0) -> dict[str, Any]:
    found = Store(place / "store")
    publish(found, HOME / "models" / model, "1", Cases(model).some(2)[0])
    for number in range(2, versions + 1):  # as publishing them would leave them
        manifest = Path(shutil.copytree(found.directory / "1", found.directory / str(number)), "manifest.json")
        manifest.chmod(0o600)
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": str(number)}))
    found.promote("1")
    if served == 2:
        found.canary("2", 50.0)
    return {"MODEL_PATH": "", "MODEL_DIR": found.directory, "PRELOAD": preload}


# By name: the sizes, the model, and what is prepared for a server of that size.
GROWTH: dict[str, tuple[list[int], str, Callable[[Path, int], dict[str, Any]]]] = {
    "connections": ([1, 64, 1000, 4000], IRIS, lambda place, _: {}),
    "workers": ([1, 2, max(4, len(CORES))], IRIS, lambda place, _: {}),
    "versions served": ([1, 2], IRIS, lambda place, served: store(place, 2, served=served)),
    "versions in the store": ([1, 50, 500], IRIS, store),
    "users": ([1, 100, 10_000], IRIS, users),
    "journal, MB": ([8, 104, 1000], IRIS, journal),
    "workers, a mapped model": ([1, 3], NEIGHBOURS, lambda place, _: store(place, 1, NEIGHBOURS)),
    "workers, a forest": ([1, 3], FOREST, lambda place, _: store(place, 1, FOREST)),
    "workers, a forest, PRELOAD": ([1, 3], FOREST, lambda place, _: store(place, 1, FOREST, preload=1)),
}


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(list(GROWTH)))
def main(names: list[str]) -> None:
    print(f"| | size | {' | '.join(COLUMNS)} | slope |\n|---|---|{'---|' * len(COLUMNS)}---|")
    for name in names or GROWTH:
        sizes, model, _ = GROWTH[name]
        prepare(set(), *[Path(model).stem] * (model != IRIS))
        costs: list[list[float]] = []
        for size in sizes:
            costs.append(cost(name, size))
            cells = " | ".join(f"{value:.1f}" for value in costs[-1])
            print(f"| {name} | {size:,} | {cells} | {slope(sizes, costs)} |", flush=True)


def cost(name: str, size: int) -> list[float]:
    """Return what a server of that size costs."""
    _, model, prepared = GROWTH[name]
    workers, connections = size if "workers" in name else 1, size if name == "connections" else 64
    cases, cores = Cases(model), BOTH if workers > 1 else SERVER
    with running(OURS, model, workers, cores, prepare=lambda place: prepared(place, size)) as run:
        run.check_together([cases.some(1, number) for number in range(64)])
        run.settle()
        before = run.cpu()
        time.sleep(5)
        idle = (run.cpu() - before) / 5 * 1e3
        seconds = 2 + connections // 250  # so long that opening the connections counts little
        turns = [run.closed_loop(cases.bodies(), connections, seconds)["cpu"] * 1e6 for _ in range(4)]
        return [run.seconds, idle, median(turns[1:]), run.memory()]


def slope(sizes: list[int], costs: list[list[float]]) -> str:
    """Return the largest exponent between the last two sizes, and whose it is."""
    step, two = math.log(sizes[len(costs) - 1] / sizes[len(costs) - 2]), [*costs[:1], *costs][-2:]
    grown = [(math.log(b / a) / step, name) for a, b, name in zip(*two, COLUMNS, strict=True) if b > 1.1 * a > 0]
    return f"{max(grown)[0]:.2f}, {max(grown)[1].partition(',')[0]}" if grown else "0"


if __name__ == "__main__":
    main()
