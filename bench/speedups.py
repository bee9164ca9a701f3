"""What each of the speedups saves: the same with and without it, in turn, as medians of processor time.

    python -m bench.speedups

It needs nothing but this project's own environment, and little of the machine: what slows it down slows both sides.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.running import free_ports
from bench.servers import ROOT

TURNS = 9
SETTINGS = "with", "without"
# Each is run as a process of its own, with `given` from SETTINGS, and prints its figures by their names.
START = """
import io, json, sys, time
from pathlib import Path
from statistics import median

given, began, found = sys.argv[1], time.process_time(), {}

def timed(function, count):
    figures = []
    for _ in range(11):
        began = time.process_time()
        for _ in range(count):
            function()
        figures.append((time.process_time() - began) / count * 1e6)
    return median(figures)
"""
FLASK = """
from flask import Flask, current_app, g
from werkzeug.test import EnvironBuilder

app = Flask(__name__)
if given == "with":
    from speedups.slim_flask import slim
    slim(app)

@app.before_request
def begin():
    g.record = {}

@app.after_request
def finish(response):
    response.headers.add("X-Request-ID", "a" * 32)
    return response

@app.post("/predict")
def predict():
    return current_app.response_class(b'{"prediction": [0]}', content_type="application/json")

environ = EnvironBuilder("/predict", method="POST", json={}).get_environ()

def request():
    body = app(environ | {"wsgi.input": io.BytesIO(b"{}")}, lambda status, headers: None)
    b"".join(body)
    getattr(body, "close", list)()

found["slim_flask: a view with two hooks, µs"] = timed(request, 500)
"""
PREDICT = """
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

x, y = load_iris(return_X_y=True)
for model in make_pipeline(StandardScaler(), LogisticRegression()), RandomForestClassifier(100, n_jobs=1):
    model.fit(x, y)
    if given == "with":
        from speedups.sklearn_checks import skip_validation
        skip_validation(model)
    found[f"sklearn_checks: predict of a row, {type(model).__name__}, µs"] = timed(lambda: model.predict(x[:1]), 20)
"""
IMPORT = """
if given == "with":
    from speedups.lean_imports import import_sklearn
    import_sklearn()
import sklearn.covariance, sklearn.isotonic, sklearn.linear_model, sklearn.model_selection, sklearn.preprocessing
found["lean_imports: ms"] = (time.process_time() - began) * 1e3
lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
found["lean_imports: MB"] = sum(int(line.split()[1]) for line in lines if line.startswith("Private")) * 1024 / 1e6
"""
APPLICATION = """
def app(environ, start_response):
    environ["wsgi.input"].read(2)
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", "2")])
    return [b"{}"]
"""
WORKERS = {"with": "speedups.gevent_worker.Worker", "without": "gevent"}
REQUEST = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def main() -> None:
    """Measure and print a table."""
    print("| | with | without | saved |\n|---|---|---|---|")
    for script in FLASK, PREDICT, IMPORT:
        turns = [{given: run(script, given) for given in SETTINGS[:: -1 if turn % 2 else 1]} for turn in range(TURNS)]
        for name in turns[0]["with"]:
            show(name, [[turn[given][name] for turn in turns] for given in SETTINGS])
    with worker(WORKERS["with"]) as fast, worker(WORKERS["without"]) as slow:
        show(
            "fast_path: a request that does nothing, µs",
            list(zip(*(ask(fast, slow) for _ in range(TURNS)), strict=True)),
        )


def show(name: str, figures: list[list[float]]) -> None:
    """Print a line."""
    with_it, without = map(median, figures)
    print(f"| {name} | {with_it:.0f} | {without:.0f} | {without - with_it:.0f} |", flush=True)


def run(script: str, given: str) -> dict[str, float]:
    """Run one of the scripts; return its figures."""
    command = [sys.executable, "-c", f"{START}{script}\nprint(json.dumps(found))", given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


@contextmanager
def worker(worker_class: str) -> Iterator[tuple[int, int]]:
    """Run gunicorn with a worker of this class and an application that does nothing; yield its port and its pid."""
    port = free_ports(1)[0]
    with TemporaryDirectory() as place:
        Path(place, "nothing.py").write_text(APPLICATION)
        command = [sys.executable, "-m", "gunicorn", "-k", worker_class, "-b", f"127.0.0.1:{port}", "nothing:app"]
        command += ["--keep-alive", "20", "--no-control-socket", "--log-level", "warning"]
        process = subprocess.Popen(command, cwd=place, env=os.environ | {"PYTHONPATH": f"{ROOT}:{place}"})
        try:
            time.sleep(3.0)
            yield port, int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30.0)


def ask(*workers: tuple[int, int], count: int = 2000) -> list[float]:
    """Return the processor time of a request to each worker, in µs."""
    found = []
    for port, pid in workers:
        clock = ~pid << 3 | 2  # as clock_getcpuclockid(3); /proc counts in hundredths
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            before = time.clock_gettime(clock)
            for _ in range(count):
                connection.sendall(REQUEST)
                received = b""
                while not received.endswith(b"\r\n\r\n{}"):
                    received += connection.recv(65536)
            found.append((time.clock_gettime(clock) - before) / count * 1e6)
    return found


if __name__ == "__main__":
    main()
