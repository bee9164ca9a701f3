"""What recording and shipping cost: the requests, the workers and the shipper.

    python -m bench.shipping [--json FILE] [latency] [record] [shipper] [memory]        all take some seven minutes

`latency`   Response times of /predict without SLS (A) and with one that accepts, reads and never answers (B). Two
            gunicorns with this project's configuration run side by side; one client loads them in turn, a second each,
            in changing order. Its connections, two to each worker, ask again 5 ms after each answer; none is left out,
            however late. A ratio is that of two neighbouring turns. B's shipper runs in A's turns too, so what it takes
            from the cores does not show in the ratio: it is a figure of its own.
`record`    Processor time of `log_monitor` for one request, under gevent's patches: a loop with the call less the same
            loop without. New segments, and dropping the oldest, are in it.
`shipper`   Processor time of `python -m sls ship` for one record: a run with a full journal less one with an empty
            journal. The stand-in for SLS is another process, and must have stored each record once.
`memory`    Resident memory while SLS refuses connections and a million records are written: of the process that writes
            them, and of the shipper; then the shipper's peak while it sends them all.

Processor time is user and system; MB are 10**6 bytes. What the figures do not say: SLS is on loopback, without TLS or
distance; it, the client and all else here compete with ours for the cores; the journal is on whatever TMPDIR is on.
"""

import argparse
import json
import logging
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# For what is measured, the real gunicorn and the loopback SLS.
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/sls")]

from monitor import Journal, log_monitor  # noqa: E402  # found by the line above

BODY, ANSWER = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}', b'\r\n\r\n{"prediction":[0]}\n'
FIELDS = {"status": 200, "path": "/predict", "request_id": "36a875577d420091561796b0b9701ee5", "error_type": ""}
FIELDS |= {"rows": 1, "model_version": "0f3a9c1b2d4e", "user": "predict", "method": "predict"}  # as server.py has them
PAUSE = 0.005  # seconds; without one, connections to the same worker keep it from each other, SLS or not
Figures = Iterator[tuple[Any, ...]]  # what, values, unit and, if there is a limit, the maximum
another_process = multiprocessing.get_context("spawn").Pool  # of one process, so that all calls run in the same


def latency(place: Path, scale: float, workers: int) -> Figures:
    import joblib
    from conftest import basic, gunicorn

    from model.demo import train

    joblib.dump(train()[0], place / "iris.joblib")
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nAuthorization: {basic('predict')}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n"
    request = head.encode() + b"\r\n" + BODY
    turns: dict[str, list[list[float]]] = {"A": [], "B": []}
    connections, shippers = {}, []
    with ExitStack() as stack:
        stack.callback(lambda: [os.kill(pid, signal.SIGKILL) for pid in shippers])  # when no worker starts another
        sls = stack.enter_context(another_process(1))
        for name, settings in ("A", {}), ("B", ask(sls, stand_in, "hang")["environ"]):
            (place / name).mkdir()
            settings |= {"model_path": place / "iris.joblib", "web_concurrency": workers, "graceful_timeout": 1}
            server = stack.enter_context(gunicorn(place / name, **settings))
            connections[name] = connect(server, head, workers)
            load(connections[name], request, 4.0)  # so that the shipper has a batch when it first looks
        children = [path for pid in server.workers() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        shippers += [int(pid) for path in children for pid in path.read_text().split()]
        used, began = usage(shippers[0])[2], time.monotonic()
        for number in range(max(4, round(60 * scale))):
            for name in ("AB", "BA")[number % 2]:
                turns[name].append(load(connections[name], request, 1.0))
        share = (usage(shippers[0])[2] - used) / (time.monotonic() - began)
        outcomes = ask(sls, stand_in, "state")["outcomes"]
        assert set(outcomes) == {"hang"}, f"SLS was to get requests and answer none: {outcomes}"
    for percent in (50, 99):
        a, b = ([statistics.quantiles(times, n=100)[percent - 1] * 1e3 for times in turns[name]] for name in "AB")
        yield f"p{percent} without SLS (A)", a, "ms"
        yield f"p{percent} with a hanging SLS (B)", b, "ms"
        yield f"p{percent} B/A", [y / x for x, y in zip(a, b, strict=True)], ""
    for name, lists in turns.items():
        yield f"slowest of {sum(map(len, lists))} requests ({name})", [max(map(max, lists)) * 1e3], "ms"
    yield "the shipper's share of a core in B", [share * 100], "%"


def connect(server: Any, head: str, workers: int) -> list[socket.socket]:
    """Open two connections to each worker: chance would give A and B different loads on their workers."""
    from conftest import records

    opened: dict[int, list[socket.socket]] = {}
    for number in range(200):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=30.0)
        load([connection], f"{head}X-Request-ID: bench-{number}\r\n\r\n".encode() + BODY, 0.0)
        (pid,) = [entry["pid"] for entry in records(server.journal_dir) if entry.get("request_id") == f"bench-{number}"]
        opened.setdefault(pid, []).append(connection)
        if len(opened) == workers and min(map(len, opened.values())) >= 2:
            return [connection for each in opened.values() for connection in each[:2]]
    raise RuntimeError(f"the workers accept too unevenly: {[len(each) for each in opened.values()]}")


def load(connections: list[socket.socket], request: bytes, seconds: float) -> list[float]:
    """Ask on each connection until the time is over, once at least; return the response times in seconds."""
    times, end = [], time.perf_counter() + seconds

    def call(connection: socket.socket) -> None:
        while True:
            answer, began = b"", time.perf_counter()
            connection.sendall(request)
            while not answer.endswith(ANSWER):
                chunk = connection.recv(65536)
                assert chunk, f"closed after {answer!r}"
                answer += chunk
            times.append(time.perf_counter() - began)
            time.sleep(PAUSE)
            if time.perf_counter() >= end:
                return

    with ThreadPoolExecutor(len(connections)) as callers:
        list(callers.map(call, connections))  # as a list, so that it raises what they raise
    return times


def record(place: Path, scale: float, workers: int) -> Figures:
    with another_process(1) as process:
        yield "log_monitor", ask(process, compare_loops, place, max(1000, round(20_000 * scale))), "µs", 15.0


def compare_loops(directory: Path, count: int) -> list[float]:
    """Return what a call costs (µs) in each of 41 pairs of loops."""
    from gevent import monkey

    monkey.patch_thread()  # the journal's lock, as in a worker
    logging.disable()  # it would log that it is full
    journal = Journal(directory, 2**27)  # segments are as large as by default, and it is full after the first half

    def loop(calls: bool) -> float:
        began = time.process_time()
        for _ in range(count):
            if calls:
                log_monitor(0.0021, True, "", journal=journal, **FIELDS)
        return (time.process_time() - began) / count * 1e6

    loop(True)
    # Left to right: which of the two comes first changes.
    return [loop(True) - loop(False) if number % 2 else -loop(False) + loop(True) for number in range(41)]


def shipper(place: Path, scale: float, workers: int) -> Figures:
    count, costs, starts = max(5000, round(100_000 * scale)), [], []
    with another_process(1) as sls:
        environ = ask(sls, stand_in, "ok")["environ"]
        for number in range(1, 6):
            fill_journal(place / "full", count)
            used = {}
            for name in ("full", "empty") if number % 2 else ("empty", "full"):
                before = sum(os.times()[2:4])  # user and system time of children that have ended
                subprocess.run(**ship(place / name, environ), timeout=600.0, check=True)  # no worker serves, so it ends
                used[name] = sum(os.times()[2:4]) - before
            assert ask(sls, stand_in, "state")["stored"] == [number * count] * 2, "not each record once"
            costs.append((used["full"] - used["empty"]) / count * 1e6)
            starts.append(used["empty"] * 1e3)
    yield "a record", costs, "µs", 30.0
    yield "start and end, without a record", starts, "ms"


def memory(place: Path, scale: float, workers: int) -> Figures:
    from sls.shipper import Progress

    count = max(50_000, round(1_000_000 * scale))
    with ExitStack() as stack:
        sls, writer = (stack.enter_context(another_process(1)) for _ in range(2))
        environ = ask(sls, stand_in, "down")["environ"]
        first_of_writer = ask(writer, fill_journal, place, 10_000)[0]
        process = stack.enter_context(subprocess.Popen(**ship(place, environ, "--forever")))
        stack.callback(process.kill)
        wait_until(lambda: (found := Progress.read(place)) and found.error, 30.0)  # its first try, of a whole batch
        first = usage(process.pid)[0]
        peak_of_writer = ask(writer, fill_journal, place, count - 10_000)[1]
        time.sleep(60.0)  # some more tries
        peak = usage(process.pid)[1]
        yield f"writer, from 10,000 records to its peak at {count:,}", [peak_of_writer - first_of_writer], "MB", 20.0
        yield "shipper, after its first try", [first], "MB"
        yield "shipper, from then to its peak", [peak - first], "MB", 20.0
        assert ask(sls, stand_in, "up")["stored"] == [0, 0]
        wait_until(lambda: ask(sls, stand_in, "state")["stored"] == [count, count], 900.0, 1.0)  # none twice
        yield "shipper, its peak when SLS is back and has all", [usage(process.pid)[1]], "MB"


def ship(directory: Path, environ: dict[str, str], *arguments: str) -> dict[str, Any]:
    """Return the arguments with which `subprocess` runs a shipper."""
    environ = {"PATH": os.environ["PATH"], "JOURNAL_DIR": str(directory), "GRACEFUL_TIMEOUT": "600"} | environ
    return {"args": [sys.executable, "-m", "sls", "ship", *arguments], "cwd": ROOT, "env": environ}


def fill_journal(directory: Path, count: int) -> tuple[float, float, float]:
    """Record requests, as a worker does; return this process's usage."""
    journal = Journal(directory, 10**9)
    for _ in range(count):
        log_monitor(0.0021, True, "", journal=journal, **FIELDS)
    journal.close()
    return usage(os.getpid())


@cache
def open_sls() -> tuple[Any, Counter[int]]:
    from loopback_sls import LoopbackSLS

    sls = LoopbackSLS()
    sls.up()
    return sls, Counter()


def stand_in(command: str) -> dict[str, Any]:
    """Switch SLS "up", "down" or to a mode; return its state, and how many records it stored, all and distinct."""
    sls, stored = open_sls()
    if command in ("up", "down"):
        getattr(sls, command)()
    elif command != "state":
        sls.mode = command
    with sls._lock:  # count what came and forget it: a million would take gigabytes
        stored.update(hash(log["record_id"]) for log in sls.logs)
        sls.logs.clear()
    return {"environ": sls.environ(), "outcomes": dict(sls.outcomes), "stored": [stored.total(), len(stored)]}


def ask(process: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    return process.apply_async(function, arguments).get(300.0)


def wait_until(met: Callable[[], Any], seconds: float, pause: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(pause)


def usage(pid: int) -> tuple[float, float, float]:
    """Return a process's resident memory now and at its peak (MB), and its processor time (seconds)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    now, peak = (int(status[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return now, peak, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    measurements = {each.__name__: each for each in (latency, record, shipper, memory)}
    parser = argparse.ArgumentParser(prog="python -m bench.shipping", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*measurements, "all"], default="all", help="what to measure")
    parser.add_argument("--workers", type=int, default=2, help="of each server in `latency`")
    parser.add_argument("--scale", type=float, default=1.0, help="times the records and turns; 0.02 to see it run")
    parser.add_argument("--json", type=argparse.FileType("a"), metavar="FILE", help="where to add the figures")
    given = parser.parse_args()
    for name in measurements if given.names == "all" else given.names:
        print(f"{name:50} {'median':>10} {'quartiles':>19}", flush=True)
        with TemporaryDirectory(ignore_cleanup_errors=True) as place:
            for what, values, unit, *bound in measurements[name](Path(place), given.scale, given.workers):
                low, median, high = statistics.quantiles(values * 3 if len(values) == 1 else values, n=4)
                limit = f" (at most {bound[0]:g}{', EXCEEDED' if median > bound[0] else ''})" if bound else ""
                print(f"{what:50} {median:10.3f} {f'{low:.3f}–{high:.3f}':>19} {unit}{limit}", flush=True)
                if given.json:
                    figure = {"measurement": name, "what": what, "unit": unit, "bound": bound[0] if bound else None}
                    figure |= {"median": median, "low": low, "high": high, "values": values}
                    given.json.write(json.dumps(figure, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
