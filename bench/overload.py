"""Five times as many requests as a server can answer: how many does it still answer, and how late?

    python -m bench.overload [--seconds 10] [--connections 256] [--nginx]

Three models: one that takes next to nothing, one that takes 20 ms for a call, and one that takes 20 ms for each row.
Each is first asked on so many connections that it is never idle and refuses nobody: its peak. Then requests come at
five times that rate, each on a free connection; one that finds none is not sent, as a caller that cannot connect. A
latency counts from when it was due. The load has a core of its own, so for the fast model, where server and load take
as much as each other, more than the load can send is not offered. With `--nginx`, requests come through nginx as in
deploy/nginx, on the server's core, without TLS, and without its limits for one address.
"""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import joblib
import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin

from bench.running import SERVER, Running, running
from bench.servers import OURS, ROOT, Rows, prepare

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


@click.command(help=__doc__)
@click.option("--seconds", default=10, show_default=True, help="of each load")
@click.option("--connections", default=256, show_default=True, help="of the overload")
@click.option("--nginx", is_flag=True, help="through nginx")
def main(seconds: int, connections: int, nginx: bool) -> None:
    import bench.overload as module  # whose class, unlike that of __main__, another process can load

    prepare(set())
    server = replace(OURS, variables={**OURS.variables, "MERGE_REQUESTS": "always"})
    print("| model | peak, 1/s | offered, 1/s | answered, 1/s | of the peak | p50, ms | p99, ms | refused | not sent |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (per_call, per_row, at_peak) in MODELS.items():
        with TemporaryDirectory(prefix="bench-") as place:
            model = Path(place) / "model.joblib"
            joblib.dump(module.Slow(per_call, per_row).fit(ROWS), model)
            with running(server, model, first=(ROWS, [3.0])) as run, in_front(run) if nginx else nullcontext():
                run.closed_loop([ROWS], at_peak, 3)  # to warm up
                peak = run.closed_loop([ROWS], at_peak, seconds)["rate"]
                run.settle()
                found = run.open_loop([ROWS], 5 * peak, seconds, "--drop", "--connections", str(connections))
        rate = found["answered_rate"]
        cells = f"{peak:.0f} | {5 * peak:.0f} | {rate:.0f} | {rate / peak:.2f} | {1e3 * found['p50']:.0f}"
        print(f"| {name} | {cells} | {1e3 * found['p99']:.0f} | {found['failed']} | {found['unsent']} |", flush=True)


@contextmanager
def in_front(run: Running) -> Iterator[None]:
    """Put nginx with the files of deploy/ in front of a server: `run.port` is nginx's from now on."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/deploy")]
    from nginx_tools import SHIPPED, nginx

    upstream = (ROOT / "deploy/docker/upstream.conf").read_text().replace("server:5000", f"127.0.0.1:{run.port}")
    limits = re.findall(r"(?m)^ *limit_(?:req|conn) \S.*\n", (SHIPPED / "prediction-server.conf").read_text())
    with nginx(run.place / "nginx", upstream, dict.fromkeys(limits, ""), ["taskset", "-c", SERVER]) as front:
        run.port = front.plain_port
        yield


if __name__ == "__main__":
    main()
