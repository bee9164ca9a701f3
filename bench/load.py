"""Load for a server that runs: wrk, which asks again as soon as it is answered; and a fixed rate (bench.openloop)."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from bench.running import TICKS, NotRight, Running
from bench.servers import Rows

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
    rate = found["requests"] / (found.pop("microseconds") / 1e6)
    return found | {"rate": rate, "cpu": spent / max(1, found["requests"]), "others": max(0.0, others)}


def machine_busy() -> float:
    """Return the processor time that all processes of the machine have taken, in seconds."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / TICKS


def children() -> float:
    """Return the processor time of our children that have ended, in seconds."""
    times = os.times()
    return times.children_user + times.children_system
