"""What password, record and metrics cost together: this server against itself without them.

With BENCH_BEFORE=DIRECTORY it is compared with another checkout of itself instead, such as an earlier commit.

    python -m bench.cost [--pairs 15] [--count 3000] [--model iris.joblib]

Both run side by side on one core and are asked in turn, in changing order, from another. What is compared is the
processor time of a request (user and system, of all processes of a server), over so many requests; a ratio is that of
two neighbouring turns.
"""

import argparse
from contextlib import ExitStack
from dataclasses import replace
from statistics import median, quantiles
from tempfile import TemporaryDirectory

from bench.environments import Cases, cores, prepare, start_of
from bench.load import fixed_count
from bench.running import Running, free_ports, running
from bench.servers import BY_NAME, OURS

BARE = replace(
    OURS,
    name="bare",
    command=lambda start: [str(start.bin / "gunicorn"), "bench.bare:app"],
    variables=lambda start: OURS.variables(start) | {"AUTH": "off"},
    headers=lambda start: {},
)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, metavar="N", help="of turns")
    parser.add_argument("--count", type=int, default=3000, metavar="N", help="requests in a turn")
    parser.add_argument("--model", default="iris.joblib")
    given = parser.parse_args()
    prepare(set())
    cases, (core, other, _), against = Cases(given.model), cores(), BY_NAME.get("before", BARE)
    bodies = cases.bodies(1)
    with ExitStack() as stack:
        runs: list[Running] = []
        for server in OURS, against:
            place = stack.enter_context(TemporaryDirectory(prefix="bench-"))
            start = start_of(server, given.model, 1, free_ports(1), place)
            runs.append(stack.enter_context(running(server, start, core, cases.some(1)))[0])
        name = against.name
        print(f"| {given.model}, 1 row | it, µs | {name}, µs | difference, µs | it / {name} (quartiles) |")
        print("|---|---|---|---|---|")
        for connections in 1, 64:
            for run in runs:
                fixed_count(run, bodies, given.count // 3, connections, other)  # to warm up
            pairs = []
            for number in range(given.pairs):
                turn = {}
                for run in runs[:: -1 if number % 2 else 1]:
                    turn[run.server.name] = fixed_count(run, bodies, given.count, connections, other)["cpu"] * 1e6
                pairs.append((turn["ours"], turn[against.name]))
            ratios = [ours / theirs for ours, theirs in pairs]
            low, middle, high = quantiles(ratios, n=4)
            cells = [median(ours for ours, _ in pairs), median(theirs for _, theirs in pairs)]
            cells.append(median(ours - theirs for ours, theirs in pairs))
            print(
                f"| {connections} connection{'s' * (connections > 1)} |" + "".join(f" {cell:.0f} |" for cell in cells),
                end="",
            )
            print(f" {middle:.3f} ({low:.3f}–{high:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
