"""Five times as many requests as a server can answer: how many it still answers, and how late.

    python -m bench.overload [--seconds 10] [--connections 256] [--nginx]

Three models: one that takes next to nothing, one that takes 20 ms for a call, and one that takes 20 ms for each row.
Each is first asked on so many connections that it is never idle and refuses nobody: its peak. Then requests come at
five times that rate, each on a free connection; one that finds none is not sent, as a caller that cannot connect. A
latency counts from the moment when a request is sent. The load has a core of its own, so for the fast model, where
server and load take as much as each other, more than the load can send is not offered. With `--nginx`, requests come
through nginx as in deploy/nginx, on the server's core, without TLS, and without its limits for one address.
"""

import argparse
import json
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import joblib
import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin

from bench.environments import cores, prepare, start_of
from bench.load import closed_loop, more_than_it_can
from bench.nginx import in_front
from bench.running import free_ports, running
from bench.servers import OURS, Rows

ROWS: Rows = [[1.0, 2.0]]
MODELS = {"fast": (0.0, 0.0, 64), "20 ms a call": (0.02, 0.0, 256), "20 ms a row": (0.0, 0.02, 32)}


class Slow(RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Adds up the columns, and takes so many seconds for a call and for each of its rows."""

    def __init__(self, seconds_per_call: float = 0.0, seconds_per_row: float = 0.0) -> None:
        self.seconds_per_call, self.seconds_per_row = seconds_per_call, seconds_per_row

    def fit(self, x: Any, y: Any = None) -> "Slow":
        self.n_features_in_ = np.shape(x)[1]
        return self

    def predict(self, x: Any) -> Any:
        time.sleep(self.seconds_per_call + self.seconds_per_row * len(x))
        return np.asarray(x).sum(axis=1)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=10, help="of each load")
    parser.add_argument("--connections", type=int, default=256, metavar="N", help="of the overload")
    parser.add_argument("--nginx", action="store_true", help="through nginx")
    given = parser.parse_args()
    prepare(set())
    core, other, _ = cores()
    server = replace(OURS, variables=lambda start: OURS.variables(start) | {"MERGE_REQUESTS": "always"})
    print("| model | peak, 1/s | offered, 1/s | answered, 1/s | of the peak | p50, ms | p99, ms | refused | not sent |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (per_call, per_row, connections) in MODELS.items():
        with TemporaryDirectory(prefix="bench-") as place:
            start = replace(start_of(server, "", 1, free_ports(1), place), model=Path(place) / "model.joblib")
            import bench.overload as module  # whose class, unlike that of __main__, another process can load

            joblib.dump(module.Slow(per_call, per_row).fit(ROWS), start.model)
            with running(server, start, core, (ROWS, [3.0])) as (run, _), ExitStack() as stack:
                if given.nginx:
                    stack.enter_context(in_front(run, core))
                closed_loop(run, [ROWS], connections, 3, other)  # to warm up
                peak = closed_loop(run, [ROWS], connections, given.seconds, other)["rate"]
                run.settle()
                found = more_than_it_can(run, [ROWS], 5 * peak, given.seconds, given.connections, other)
        cells = [peak, 5 * peak, found["rate"], found["rate"] / peak, 1e3 * found["p50"], 1e3 * found["p99"]]
        texts = [f"{cell:.2f}" if at == 3 else f"{cell:.0f}" for at, cell in enumerate(cells)]
        print(f"| {name} | {' | '.join(texts)} | {found['failed']} | {found['unsent']} |", flush=True)
        if found["unfinished"]:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
