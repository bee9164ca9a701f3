"""A server that runs: started, asked, measured from /proc, and stopped with all its processes."""

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.servers import BATCH, PEERS, WAIT, Rows, Server, Start

START_SECONDS = 120.0


class NotRight(Exception):
    """A server that does not start, or answers otherwise than the model itself."""

    log = ""  # its end, of a server that did not start


class Refused(NotRight):
    """An answer other than 200: also of a worker that is not ready yet, where another is."""


class Running:
    """A server under measurement."""

    def __init__(self, server: Server, start: Start, process: subprocess.Popen[bytes]) -> None:
        self.server, self.start, self.process = server, start, process
        self.port = start.ports[0]
        self.headers = {"Content-Type": "application/json"} | server.headers(start)

    def ask(self, rows: Rows, timeout: float = 30.0) -> Any:
        """Return the predictions for rows."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", self.server.path, self.server.body(rows), self.headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise Refused(f"{response.status}: {content[:300]!r}")
        return self.server.unwrap(json.loads(content))

    def check(self, rows: Rows, predictions: list[Any]) -> None:
        """Compare its answer with what the model answers itself."""
        found, expected = self.ask(rows), self.server.constant or predictions
        if found != expected:
            raise NotRight(f"answered {found!r:.300}, not {expected!r:.300}")

    def check_together(self, cases: list[tuple[Rows, list[Any]]]) -> None:
        """Ask many at once: each must get the answer to its own rows, as soon as all workers are ready."""
        end = time.monotonic() + START_SECONDS

        def check(case: tuple[Rows, list[Any]]) -> None:
            while True:
                try:
                    return self.check(*case)
                except Refused:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.1)

        with ThreadPoolExecutor(16) as callers:
            list(callers.map(check, cases))

    def family(self) -> list[int]:
        """List its processes: the one that was started, and all below it."""
        found = [self.process.pid]
        for pid in found:
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                with suppress(OSError):
                    found += map(int, path.read_text().split())
        return found

    def cpu(self) -> float:
        """Return the processor time of its processes, in seconds, user and system."""
        total = 0.0
        for pid in self.family():
            with suppress(OSError):
                total += time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3); /proc counts in hundredths
        return total

    def pss(self) -> float:
        """Return the proportional set size of its processes, in MB of 10**6 bytes."""
        total = 0
        for pid in self.family():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total * 1024 / 1e6

    def settle(self, seconds: float = 15.0) -> None:
        """Wait until it has worked off what the load that was broken off left in its queues."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            before = self.cpu()
            time.sleep(0.3)
            if self.cpu() - before <= 0.03:
                return

    def stop(self) -> None:
        """End it, and what it left behind."""
        family = self.family()
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10.0)
        for pid in family:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10.0)


@contextmanager
def running(server: Server, start: Start, cores: str, first: tuple[Rows, list[Any]]) -> Iterator[tuple[Running, float]]:
    """Start a server on these cores; yield it with the seconds until its first right answer, and stop it.

    Raises:
        NotRight: it ended, or gave no right answer within two minutes.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environ |= {"PATH": f"{start.bin}:{environ['PATH']}", "PYTHONPATH": str(PEERS), "MODEL_PATH": str(start.model)}
    environ |= {"OMP_NUM_THREADS": str(max(1, len(cores.split(",")) // start.workers))}
    environ |= {"PORT": str(start.ports[0]), "WORKERS": str(start.workers), "BATCH": str(BATCH), "WAIT": str(WAIT)}
    environ |= server.variables(start)
    command = ["taskset", "-c", cores, *server.command(start)]
    with ExitStack() as stack:
        log = stack.enter_context((start.place / "log").open("wb"))
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=server.cwd or start.place, env=environ, stdout=log, stderr=log, start_new_session=True
        )
        run = Running(server, start, process)
        stack.callback(run.stop)
        while True:
            try:
                run.check(*first)
                break
            except (OSError, http.client.HTTPException, ValueError, LookupError, NotRight) as error:
                if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                    failure = NotRight(f"did not start: {error}")
                    failure.log = (start.place / "log").read_text(errors="replace")[-2000:].strip()
                    raise failure from error
                time.sleep(0.05)  # asking oftener would slow down those that answer while they load
        yield run, time.monotonic() - began


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on, below those that the kernel gives to connections."""
    with ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            each = stack.enter_context(socket.socket())
            with suppress(OSError):
                each.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_000)))
                found.append(each.getsockname()[1])
        return found
