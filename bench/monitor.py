"""What the page /monitor costs: itself, and the requests beside it.

    python -m bench.monitor [--turns 10] [--range 30d]                                  some ten minutes

It reads the roll-ups of a month at a hundred requests a second, with two versions, three errors and twenty users.

`page`      Processor time of one page, in a process that does nothing else: the median of 15 (and the quartiles).
`latency`   p99 of /predict in turns of 30 seconds, every other of them with ten readers, whose pages reload every 30
            seconds as browsers do. The client has two connections to each of two workers, and asks again 5 ms after
            each answer. A ratio is that of two neighbouring turns: the median (and the quartiles).
"""

import argparse
import math
import random
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for what is measured, and the real gunicorn

from bench.shipping import BODY, connect, load  # noqa: E402  # found by the line above
from endpoints.monitor_figures import DAY, Span  # noqa: E402
from endpoints.monitor_page import RANGES, Host, render  # noqa: E402
from telemetry.rollups import Sums, bucket_of, day_of  # noqa: E402

READERS, TURN = 10, 30.0  # seconds
ERRORS = ("client 422 Unprocessable Entity", "model 500 Internal Server Error", "overload 503 Service Unavailable")
USERS = [f"user-{number}" for number in range(20)]


def write_month(journal_dir: Path, now: float, rate: float = 100.0) -> None:
    """Write the roll-ups of a month, added up as they are then: hours, five minutes since yesterday, and minutes."""
    dice = random.Random(1)  # noqa: S311  # no secret
    (journal_dir / "rollup").mkdir(parents=True)
    start, yesterday = now // 3600 * 3600 - 30 * DAY, (now // DAY - 1) * DAY
    while start < now:
        span = 3600 if start < yesterday else 300 if start < now - 7200 else 60
        with (journal_dir / "rollup" / f"{day_of(start)}.jsonl").open("ab") as file:
            for version, variant, share, median in ("7", "stable", 0.95, 0.0015), ("8", "canary", 0.05, 0.002):
                requests = int(
                    rate * span * share * (1 + 0.6 * math.sin(start / DAY * math.tau)) * dice.uniform(0.9, 1.1)
                )
                known = sums(dice, requests, median).encode()
                line = {"time": int(start), "span": span, "version": version, "variant": variant} | known
                file.write(orjson.dumps(line) + b"\n")
        start += span


def sums(dice: random.Random, requests: int, median: float) -> Sums:
    """Return what so many requests add up to, with a log-normal response time."""
    errors = Counter({name: round(requests * dice.uniform(0, 0.002)) for name in ERRORS})
    found = Sums(requests, requests - errors.total(), requests, requests * median, errors=+errors)
    for _ in range(300):
        found.times[bucket_of(dice.lognormvariate(math.log(median), 0.5))] += max(1, requests // 300)
    found.users = Counter({user: requests // len(USERS) for user in USERS})
    found.protocols = Counter({"predict": requests})
    rows = requests // 500 + 1
    found.feedback = {"rows": rows, "wrong": round(rows * dice.uniform(0.02, 0.04)), "entries": rows}
    return found


def page(place: Path) -> None:
    """Print what a page costs."""
    write_month(place, time.time())
    for name, seconds in RANGES.items():
        costs = []
        for _ in range(15):
            began = time.process_time()
            text = render(Host(place), Span.last(name, seconds, time.time()))
            costs.append((time.process_time() - began) * 1e3)
        show(f"processor time of /monitor?range={name}, {len(text) / 1e3:.0f} kB", costs, "ms")


def latency(place: Path, turns: int, shown: str) -> None:
    """Print what ten readers cost the requests beside them."""
    import joblib
    from conftest import basic, gunicorn

    from model.demo import train

    joblib.dump(train()[0], place / "iris.joblib")
    write_month(place / "journal", time.time())
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nAuthorization: {basic('predict')}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n"
    with gunicorn(place, model_path=place / "iris.joblib", web_concurrency=2) as server:
        connections, found = connect(server, head, 2), {True: [], False: []}
        load(connections, head.encode() + b"\r\n" + BODY, 5.0)
        for number in range(2 * turns):
            watched = number % 4 in (1, 2)  # left to right: which of the two comes first changes
            readers = [threading.Thread(target=read, args=(server, shown, at)) for at in range(READERS * watched)]
            for reader in readers:
                reader.start()
            found[watched].append(load(connections, head.encode() + b"\r\n" + BODY, TURN))
            for reader in readers:
                reader.join()
    for percent in (50, 99):
        alone, beside = (
            [statistics.quantiles(times, n=100)[percent - 1] for times in found[each]] for each in (False, True)
        )
        show(f"p{percent} of /predict", [value * 1e3 for value in alone], "ms")
        show(f"p{percent} beside ten readers", [value * 1e3 for value in beside], "ms")
        show(f"p{percent}, ratio", [after / before for before, after in zip(alone, beside, strict=True)], "")


def read(server: Any, shown: str, number: int) -> None:
    """Open the page once in the turn, at a time of one's own."""
    from conftest import basic

    time.sleep(TURN * number / READERS)
    status, _, _ = server.ask("GET", f"/monitor?range={shown}", Authorization=basic("monitor"))
    assert status == 200, status


def show(what: str, values: list[float], unit: str) -> None:
    """Print a line of the table."""
    low, middle, high = statistics.quantiles(values, n=4)
    print(f"| {what} | {middle:.2f} {unit} ({low:.2f}–{high:.2f}) |", flush=True)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.monitor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=10, help="pairs of turns")
    parser.add_argument("--range", default="30d", choices=RANGES)
    given = parser.parse_args()
    print("| | measured |\n|---|---|")
    for measure in page, lambda place: latency(place, given.turns, given.range):
        with TemporaryDirectory(prefix="bench-") as place:
            measure(Path(place))


if __name__ == "__main__":
    main()
