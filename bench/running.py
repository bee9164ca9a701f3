"""A server that runs: started, asked, loaded, measured from /proc, and stopped with all its processes."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.servers import HOME, PEERS, ROOT, Cases, Rows, Server

CORES = sorted(os.sched_getaffinity(0))
SERVER, LOAD, BOTH = str(CORES[0]), str(CORES[-1]), ",".join(map(str, CORES))  # as taskset takes them
START_SECONDS = 120.0
LUA = """\
local requests, last = {}, 0
function init()
  for _, body in ipairs(bodies) do requests[#requests + 1] = wrk.format("POST", path, headers, body) end
end
function request()
  last = last % #requests + 1
  return requests[last]
end
function done(all, latency)
  local broken = all.errors.connect + all.errors.read + all.errors.write + all.errors.timeout
  local form = '{"requests": %d, "seconds": %f, "not_2xx": %d, "broken": %d, "p50": %f, "p99": %f}'
  io.write(string.format(form, all.requests, all.duration / 1e6, all.errors.status, broken,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
"""


class NotRight(Exception):
    """A server that does not start, or answers otherwise than the model itself."""


class Running:
    """A server under measurement."""

    process: subprocess.Popen[bytes]
    began = seconds = 0.0  # when it was started, and the time until its first right answer

    def __init__(self, server: Server, place: Path, port: int) -> None:
        self.server, self.place, self.port, self.headers = server, place, port, server.headers(place)

    def post(self, body: str | bytes, timeout: float = 30.0, **headers: str) -> bytes:
        """Return the answer to a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", self.server.path, body, self.headers | headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise NotRight(f"{response.status}: {content[:300]!r}")
        return content

    def check(self, rows: Rows, predictions: list[Any]) -> None:
        """Compare its answer with what the model answers itself."""
        found = self.server.unwrap(json.loads(self.post(self.server.body(rows))))
        if found != (expected := self.server.constant or predictions):
            raise NotRight(f"answered {found!r:.300}, not {expected!r:.300}")

    def check_together(self, cases: list[tuple[Rows, list[Any]]]) -> None:
        """Ask many at once: each must get the answer to its own rows, as soon as all workers are ready."""
        with ThreadPoolExecutor(16) as callers:
            list(callers.map(lambda case: self.wait_for(*case), cases))

    def wait_for(self, rows: Rows, predictions: list[Any]) -> None:
        """Check an answer; if it is wrong, or there is none, again until two minutes after the start."""
        while True:
            try:
                return self.check(rows, predictions)
            except (OSError, http.client.HTTPException, ValueError, LookupError, NotRight) as error:
                if self.process.poll() is not None or time.monotonic() - self.began > START_SECONDS:
                    end = (self.place / "log").read_text(errors="replace")[-2000:].strip()
                    raise NotRight(f"no right answer: {error}; the end of its log: {end}") from error
                time.sleep(0.05)  # asking oftener would slow down those that answer while they load

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

    def memory(self) -> float:
        """Return the proportional set size of its processes, in MB of 10**6 bytes."""
        total = 0
        for pid in self.family():
            with suppress(OSError):
                total += int(Path(f"/proc/{pid}/smaps_rollup").read_text().partition("\nPss:")[2].split()[0])
        return total * 1024 / 1e6

    def settle(self, seconds: float = 15.0) -> None:
        """Wait until it has worked off what the load that was broken off left in its queues."""
        end, before = time.monotonic() + seconds, -1.0
        while time.monotonic() < end and (now := self.cpu()) - before > 0.03:
            before = now
            time.sleep(0.3)

    def closed_loop(self, bodies: list[Rows], connections: int, seconds: float, cores: str = LOAD) -> dict[str, Any]:
        """Let wrk ask on so many connections; each asks again as soon as it is answered. Latencies are in seconds."""
        lines = [f"path, headers = {json.dumps(self.server.path)}, {{}}"]
        lines += [f"headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in self.headers.items()]
        lines += ["bodies = {" + ", ".join(f"[==[{self.server.body(rows)}]==]" for rows in bodies) + "}"]
        script = self.place / "requests.lua"
        script.write_text("\n".join([*lines, LUA]))
        command = ["taskset", "-c", cores, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
        before = self.cpu()
        command += ["-s", str(script), f"http://127.0.0.1:{self.port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
        spent = self.cpu() - before
        if done.returncode or not done.stdout.endswith("}"):
            raise NotRight(f"wrk: {done.stderr[-500:]}{done.stdout[-500:]}")
        found = json.loads(done.stdout[done.stdout.rindex("{") :])
        rate = (found["requests"] - found["not_2xx"]) / found.pop("seconds")  # a refusal is quick
        return found | {"rate": rate, "cpu": spent / max(1, found["requests"])}

    def open_loop(self, bodies: list[Rows], rate: float, seconds: float, *options: str, cores: str = LOAD) -> Any:
        """Ask so many times a second, whatever becomes of it (bench.openloop). Latencies are in seconds."""
        requests = []
        for body in map(self.server.body, bodies):
            headers = {"Host": f"127.0.0.1:{self.port}", "Content-Length": str(len(body))} | self.headers
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            requests.append(f"POST {self.server.path} HTTP/1.1\r\n{head}\r\n{body}")
        command = ["taskset", "-c", cores, sys.executable, "-m", "bench.openloop", str(self.port), str(rate)]
        command += [str(seconds), *options]
        return json.loads(subprocess.check_output(command, cwd=ROOT, input=json.dumps(requests), text=True))

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
def running(
    server: Server, model: str | Path, workers: int = 1, cores: str = SERVER, first: Any = None, prepare: Any = None
) -> Iterator[Running]:
    """Start a server of a model on these cores, yield it when it has answered `first` (rows, predictions), and stop it.

    `prepare` is called with its directory before the start, and returns more variables. Raises: NotRight.
    """
    first, binaries = first or Cases(str(model)).some(1), HOME / "venvs" / server.environment / "bin"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    with ExitStack() as stack:
        place = Path(stack.enter_context(TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)))
        with ExitStack() as held:
            sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            port, port2, port3 = (each.getsockname()[1] for each in sockets)
        run = Running(server, place, port)
        names = {"place": place, "port": port, "port2": port2, "port3": port3, "workers": workers}
        names |= {"model": HOME / "models" / model, "more_workers": workers if workers > 1 else 0}
        variables = {"PORT": "{port}", "MODEL_PATH": "{model}"} | dict(server.variables)
        environ |= {name: value.format(**names) for name, value in variables.items()}
        environ |= {"PATH": f"{binaries}:{environ['PATH']}", "PYTHONPATH": str(PEERS)}
        environ |= {"OMP_NUM_THREADS": str(max(1, len(cores.split(",")) // workers))}
        environ |= {name: str(value) for name, value in (prepare(place) if prepare else {}).items()}
        log = stack.enter_context((place / "log").open("wb"))
        command = ["taskset", "-c", cores, *server.command.format(**names).split()]
        run.began = time.monotonic()
        run.process = subprocess.Popen(
            command, cwd=server.cwd, env=environ, stdout=log, stderr=log, start_new_session=True
        )
        stack.callback(run.stop)
        run.wait_for(*first)
        run.seconds = time.monotonic() - run.began
        yield run
