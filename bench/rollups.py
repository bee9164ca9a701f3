"""What roll-ups cost: a request, and those who read them.

    python -m bench.rollups

`request`   Processor time to count a request, in a loop, under gevent's patches: the median of 21 (and the quartiles).
`read`      Processor time to read the roll-ups of a time, for a server that answers 10 million requests a day from two
            workers, 5 % of them with a canary, for 36 days: the median of 11. The files are made by the writer itself.
`compact`   Processor time to add up the lines of the present day.
"""

import math
import time
from collections import Counter
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from gevent import monkey

monkey.patch_all()

import numpy as np  # noqa: E402

from bench.metrics import seconds_of  # noqa: E402
from telemetry import rollup_writer, rollups  # noqa: E402  # as in a worker, after the patches
from telemetry.rollup_writer import RollupWriter, compacted  # noqa: E402
from telemetry.rollups import Sums  # noqa: E402

DAY = 86_400
REQUESTS_A_DAY = 10_000_000
NOW = 20_000 * DAY + DAY // 2
RANGES = {"1h": (3600, 60), "24h": (DAY, 300), "7d": (7 * DAY, 3600), "30d": (30 * DAY, 6 * 3600)}  # and its step
RECORD = {"user": "alice", "protocol": "predict", "model_version": "v7", "variant": "stable", "rows": 1}
RECORD |= {"status": 200, "success": True, "error": "", "error_type": ""}


def request(place: Path) -> None:
    """Print what counting a request costs."""
    writer = RollupWriter(place, lambda function, *arguments: function(*arguments))
    costs = [seconds_of(lambda: writer.count_request(0.0023, RECORD)) * 1e6 for _ in range(21)]
    low, middle, high = quantiles(costs, n=4)
    print(f"| processor time to count a request | {middle:.1f} µs ({low:.1f}–{high:.1f}) |")


def sums_of(requests: int, random: np.random.Generator) -> Sums:
    """Make up requests: their times are log-normal, about 4 ms."""
    times = np.exp(random.normal(math.log(0.004), 0.5, requests))
    found = Sums(requests, requests - 3, requests, float(times.sum()))
    found.times = Counter(np.ceil(np.log(times) * rollups.BUCKETS_PER_E).astype(int).tolist())
    found.errors["client 422 Unprocessable Entity"] = 3
    found.protocols["predict"] = requests
    found.users.update({f"user {number}": requests // 10 for number in range(10)})
    return found


def make(place: Path) -> None:
    """Write the roll-ups of 36 days, minute by minute, with compaction once a day and at the end."""
    random = np.random.default_rng(0)
    a_minute = REQUESTS_A_DAY // 1440 // 2
    stable, canary = ([sums_of(int(a_minute * share), random) for _ in range(7)] for share in (0.95, 0.05))
    workers = [RollupWriter(place, lambda function, *arguments: function(*arguments)) for _ in range(2)]
    clock = SimpleNamespace(now=0.0, time=lambda: clock.now, monotonic=lambda: clock.now)
    rollup_writer.time = clock  # type: ignore[assignment]
    for minute in range(NOW - 35 * DAY - DAY // 2, NOW, 60):
        clock.now = minute
        for worker in workers:
            worker._pending = {
                (minute, ("v7", "stable")): stable[minute // 60 % 7],
                (minute, ("v8", "canary")): canary[minute // 60 % 7],
            }
            worker._with_lock(worker._flush)
        if minute % DAY == 0 or minute == NOW - 660:
            workers[0]._with_lock(workers[0]._compact)


def reading(place: Path) -> None:
    """Print what reading takes, and adding up a day."""
    size = sum(path.stat().st_size for path in rollups.days(place).values())
    print(f"| roll-ups of 36 days | {size / 1e6:.1f} MB |")
    for name, (seconds, step) in RANGES.items():
        costs, requests = [], 0
        for _ in range(11):
            began = time.process_time()
            found = rollups.read(place, NOW - seconds, NOW, step)
            costs.append((time.process_time() - began) * 1e3)
            requests = sum(sums.requests for steps in found.values() for sums in steps.values())
        print(f"| read {name}: {requests / 1e6:.1f} million requests | {median(costs):.0f} ms |")
    today = list(rollups.days(place).values())[-1]
    began = time.process_time()
    compacted(today, NOW)
    print(f"| add up the lines of today | {(time.process_time() - began) * 1e3:.0f} ms |")


def main() -> None:
    """Measure and print a table."""
    print("| | measured |\n|---|---|", flush=True)
    with TemporaryDirectory(prefix="bench-") as place:
        request(Path(place))
        make(Path(place))
        reading(Path(place))


if __name__ == "__main__":
    main()
