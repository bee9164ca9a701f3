"""What metrics cost, in a request and in an answer to Prometheus.

    python -m bench.metrics

`request`   Processor time of the updates of a request that is alone in its call of the model: in flight, outcome,
            response time, rows and waiting time of the call. It is measured in a loop, under gevent's patches, less the
            same loop without them: the median of 21 (and the quartiles).
`/metrics`  Wall time of one exposition, by the processes that count together, each of which has served three versions,
            and by how many were killed before: the median of 30.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

from gevent import monkey

monkey.patch_all()

from telemetry.metrics import Metrics  # noqa: E402
from worker_slot import WorkerSlot  # noqa: E402  # as in a worker, after the patches

COUNT = 20_000  # updates in a loop
SUCCESS = {"error_type": "", "model_version": "1", "variant": "stable"}


def seconds_of(work: Callable[[], object]) -> float:
    """Return the processor time of one call in a loop."""
    began = time.process_time()
    for _ in range(COUNT):
        work()
    return (time.process_time() - began) / COUNT


def joined(place: Path) -> Metrics:
    """Return the metrics of a worker that counts together with the others of a directory."""
    slot = WorkerSlot(place / "workers")
    slot.take()
    metrics = Metrics(place)
    metrics.join(slot)
    return metrics


def request(place: Path) -> None:
    """Print what a request's updates cost."""
    metrics = joined(place)

    def view() -> None:
        pass

    counted = metrics.in_flight(view)

    def with_metrics() -> None:
        counted()
        metrics.count_batch(1, 0.0001)
        metrics.count_request(0.0023, SUCCESS)

    costs = [(seconds_of(with_metrics) - seconds_of(view)) * 1e6 for _ in range(21)]
    low, middle, high = quantiles(costs, n=4)
    print(f"| processor time of a request's metrics | {middle:.1f} µs ({low:.1f}–{high:.1f}) |")


def exposition(place: Path, processes: int, deaths: int) -> None:
    """Print what /metrics takes with so many processes after so many deaths of each of them."""
    for _ in range(deaths + 1):
        pids = [child(place) for _ in range(processes)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    metrics = joined(place)
    served = {"ready": True, "stable": None, "canary": None}
    times = []
    for _ in range(30):
        began = time.perf_counter()
        body, _ = metrics.expose("", served)
        times.append((time.perf_counter() - began) * 1e3)
    lines = body.count(b"\n")
    killed = f", {processes * deaths} were killed before" if deaths else ""
    print(f"| /metrics of {processes} processes{killed}: {lines} lines | {median(times):.1f} ms |")


def child(place: Path) -> int:
    """Start a process that counts for three versions and then waits to be killed; return its pid."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        metrics = joined(place)
        for version in "123":
            metrics.count_request(0.002, SUCCESS | {"model_version": version})
            metrics.count_batch(1, 0.0001)
        os.write(writable, b"1")
        signal.pause()
    os.read(readable, 1)
    os.close(readable)
    os.close(writable)
    return pid


def main() -> None:
    """Measure and print a table."""
    print("| | measured |\n|---|---|", flush=True)
    for processes, deaths in (2, 0), (2, 50), (8, 0), (32, 0):
        with TemporaryDirectory(prefix="bench-") as place:
            exposition(Path(place), processes, deaths)
    with TemporaryDirectory(prefix="bench-") as place:
        request(Path(place))


if __name__ == "__main__":
    main()
