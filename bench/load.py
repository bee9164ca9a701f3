"""Load for a server that runs: wrk, which asks again as soon as it is answered; and a fixed rate (bench.openloop)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.running import NotRight, Running
from bench.servers import ROOT, Rows

SCRIPT = """\
local headers, requests, last = {}, {}, 0
%s
function init()
  for _, body in ipairs(bodies) do requests[#requests + 1] = wrk.format("POST", path, headers, body) end
end
function request()
  last = last %% #requests + 1
  return requests[last]
end
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %%d, "microseconds": %%d, "not_2xx": %%d, "broken": %%d, "p50": %%f, "p99": %%f}',
    summary.requests, summary.duration, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
"""


def closed_loop(run: Running, bodies: list[Rows], connections: int, seconds: int, cores: str) -> dict[str, Any]:
    """Let wrk ask on so many connections; each asks again as soon as it is answered. Latencies are in seconds."""
    quoted = ", ".join(f"[==[{run.server.body(rows)}]==]" for rows in bodies)
    lines = [f"headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in run.headers.items()]
    lines += [f"local path = {json.dumps(run.server.path)}", f"local bodies = {{{quoted}}}"]
    script = run.start.place / "requests.lua"
    script.write_text(SCRIPT % "\n".join(lines))
    command = ["taskset", "-c", cores, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
    command += ["-s", str(script), f"http://127.0.0.1:{run.port}"]
    began, before, busy, own = time.monotonic(), run.cpu(), machine_busy(), children()
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    spent, elapsed = run.cpu() - before, time.monotonic() - began
    others = (machine_busy() - busy - spent - (children() - own)) / elapsed
    if done.returncode:
        raise NotRight(f"wrk: {done.stderr[-500:]}{done.stdout[-500:]}")
    found = json.loads(done.stdout[done.stdout.rindex("{") :])
    rate = (found["requests"] - found["not_2xx"]) / (found.pop("microseconds") / 1e6)  # a refusal is quick
    return found | {"rate": rate, "cpu": spent / max(1, found["requests"]), "others": max(0.0, others)}


def fixed_rate(run: Running, bodies: list[Rows], rate: float, seconds: float, cores: str) -> dict[str, Any]:
    """Ask so many times a second on 64 connections, whatever becomes of it. Latencies are in seconds."""
    return _open_loop(run, bodies, cores, seconds, "--rate", str(rate), "--seconds", str(seconds))


def more_than_it_can(
    run: Running, bodies: list[Rows], rate: float, seconds: float, connections: int, cores: str
) -> dict[str, Any]:
    """Ask so many times a second, each time on a free connection or not at all. Latencies are those of answers."""
    arguments = ["--rate", str(rate), "--seconds", str(seconds), "--connections", str(connections), "--drop"]
    found = _open_loop(run, bodies, cores, seconds, *arguments)
    answered = found["requests"] - found["failed"] - found["unsent"] - found["unfinished"]
    return found | {"rate": answered / found["elapsed"]}


def fixed_count(run: Running, bodies: list[Rows], count: int, connections: int, cores: str) -> dict[str, Any]:
    """Ask so many times, each connection again as soon as it is answered."""
    found = _open_loop(run, bodies, cores, 60.0, "--count", str(count), "--connections", str(connections))
    if found["failed"] or found["unfinished"]:
        raise NotRight(f"of {count} requests {found['failed']} failed and {found['unfinished']} did not end")
    return found


def _open_loop(run: Running, bodies: list[Rows], cores: str, seconds: float, *arguments: str) -> dict[str, Any]:
    requests = []
    for body in map(run.server.body, bodies):
        headers = {"Host": f"127.0.0.1:{run.port}", "Content-Length": str(len(body))} | run.headers
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        requests.append(f"POST {run.server.path} HTTP/1.1\r\n{head}\r\n{body}")
    command = ["taskset", "-c", cores, sys.executable, "-m", "bench.openloop", str(run.port), *arguments]
    before = run.cpu()
    done = subprocess.run(
        command, cwd=ROOT, input=json.dumps(requests), capture_output=True, text=True, timeout=seconds + 60, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"cpu": (run.cpu() - before) / found["requests"]}


def machine_busy() -> float:
    """Return the processor time that all processes of the machine have taken, in seconds."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def children() -> float:
    """Return the processor time of our children that have ended, in seconds."""
    times = os.times()
    return times.children_user + times.children_system
