"""Where the microseconds of a request go.

    python -m bench.profile [--model iris.joblib] [--rows 1] [--count 5000]

The application is called in this process, under gevent's patches, with requests as gunicorn would hand them over. The
functions that a request goes through are wrapped with a clock; a stage's time is its own, without that of the stages
within it, and less what the clock takes. What gunicorn, the sockets and the kernel take is the processor time of a
request to a real server on one connection, less a call in this process. The clock is wall time on one thread: medians
leave out where another process had the core.
"""

import argparse
import io
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench.environments import HOME, Cases, binary, cores, prepare, start_of
from bench.load import fixed_count
from bench.running import free_ports, running
from bench.servers import OURS, ROOT

FLASK, AUTH, MODEL = (
    "Flask: routing, contexts, request, response",
    "password, role, requests in flight",
    "the model's own predict",
)
# Stages: the module, what in it is wrapped. What is not there (any more) is left out. `inside` wraps those without any.
STAGES = {
    FLASK: [],
    "request id, start of the record": [("server", "Service.begin")],
    AUTH: [],
    "infer: choice of the version, hooks": [
        ("server", "Service.predict"),
        ("server", "Service.infer"),
        ("server", "Service.choose"),
    ],
    "read the body": [("web.body", "BodyReader.read")],
    "decode JSON": [("web.decoding", "Decoder.read_rows"), ("web.decoding", "decode_json")],
    "validate the rows": [("model.signature", "Signature.validate")],
    "queue for the model": [("model.batching", "Batcher.submit"), ("model.loaded", "LoadedModel.predict")],
    "rows to array": [("model.signature", "Signature.assemble")],
    MODEL: [],
    "result to JSON values": [("model.loaded", "LoadedModel._predict_batch"), ("model.loaded", "LoadedModel.call")],
    "encode the answer": [("server", "json_response")],
    "headers of the answer": [("server", "Service.finish"), ("web.body", "BodyReader.finish")],
    "record: a line in the journal": [("monitor", "RequestLog.observe")],
    "metrics": [("telemetry.metrics", "Metrics.count_request"), ("telemetry.metrics", "Metrics.count_batch")],
}


class Clock:
    """Times stages, each without the stages within it."""

    def __init__(self) -> None:
        self.own: dict[str, float] = defaultdict(float)  # seconds, of the request under way
        self._within: list[float] = []  # seconds of the stages within each that is open

    def wrap(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            self._within.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                elapsed = time.perf_counter() - began
                self.own[stage] += elapsed - self._within.pop()
                if self._within:
                    self._within[-1] += elapsed

        timed.__name__ = getattr(function, "__name__", stage)  # Flask names endpoints after it
        return timed


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="iris.joblib")
    parser.add_argument("--rows", type=int, default=1, metavar="N")
    parser.add_argument("--count", type=int, default=5000, metavar="N", help="requests")
    given = parser.parse_args()
    if Path(sys.prefix) != HOME / "venvs" / "ours":
        prepare(set())
        python = str(binary("ours", "python"))
        os.execv(python, [python, "-m", "bench.profile", *sys.argv[1:]])  # noqa: S606  # by its path it knows its place
    with TemporaryDirectory(prefix="bench-") as place:
        start = start_of(OURS, given.model, 1, free_ports(1), place)
        first, second, _ = cores()
        with running(OURS, start, first, Cases(given.model).some(1)) as (run, _):
            bodies = Cases(given.model).bodies(given.rows)
            whole = {}
            for connections in 1, 64:
                fixed_count(run, bodies, given.count // 5, connections, second)
                turns = [fixed_count(run, bodies, given.count, connections, second)["cpu"] for _ in range(3)]
                whole[connections] = median(turns)
        environ = request(OURS.body(Cases(given.model).some(given.rows)[0]).encode(), run.headers)
        os.environ.update(OURS.variables(start))
        plain, stages = inside(environ, given.count)
    print(f"| {given.model}, {given.rows} row{'s' * (given.rows > 1)} | µs | share |\n|---|---|---|")
    stages = {"gunicorn, sockets, kernel": whole[1] - plain} | stages
    for name, seconds in stages.items():
        print(f"| {name} | {seconds * 1e6:.1f} | {seconds / whole[1] * 100:.0f} % |")
    print(f"| **processor time of a request on one connection** | **{whole[1] * 1e6:.0f}** | |")
    print(f"| the same on 64 connections, whose predicts are shared | {whole[64] * 1e6:.0f} | |")


def inside(environ: dict[str, Any], count: int) -> tuple[float, dict[str, float]]:
    """Call the application in this process; return the seconds of a call as it is, and of each stage."""
    from gevent import monkey

    monkey.patch_all()
    sys.path.insert(0, str(ROOT))
    import server
    import telemetry
    from settings import Settings

    telemetry.before_fork(Settings.from_environ(os.environ))  # as gunicorn.conf.py does
    app = server.create_app(Settings.from_environ(os.environ))
    load(app)
    plain = median(call(app, environ) for _ in range(count))
    clock = Clock()
    nothing = clock.wrap("clock", lambda: None)
    for stage, places in STAGES.items():
        for module, name in places:
            wrap_at(clock, stage, module, name)
    app = server.create_app(Settings.from_environ(os.environ))
    estimator = load(app).estimator
    estimator.predict = clock.wrap(MODEL, estimator.predict)
    app.view_functions["predict"] = clock.wrap(AUTH, app.view_functions["predict"])
    app.wsgi_app = clock.wrap(FLASK, app.wsgi_app)
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(count):
        clock.own.clear()
        call(app, environ)
        nothing()
        for stage, seconds in clock.own.items():
            found[stage].append(seconds)
    overhead = median(found.pop("clock"))
    return plain, {stage: median(found[stage]) - overhead for stage in STAGES if stage in found}


def wrap_at(clock: Clock, stage: str, module: str, name: str) -> None:
    """Wrap a function of a module or of a class in it, if it is there."""
    owner = sys.modules.get(module)
    *classes, attribute = name.split(".")
    for each in classes:
        owner = getattr(owner, each, None)
    if hasattr(owner, attribute):
        setattr(owner, attribute, clock.wrap(stage, getattr(owner, attribute)))


def load(app: Any) -> Any:
    """Start the service as a worker does; return its model."""
    service = app.extensions["service"]
    service.start()
    service.serving.finished.wait(60)
    return service.serving.choose()[0]


def call(app: Any, environ: dict[str, Any]) -> float:
    """Send one request through the application; return the seconds it took."""
    given = environ | {"wsgi.input": io.BytesIO(environ["bench.body"])}
    status = []
    began = time.perf_counter()
    answer = app(given, lambda line, headers, *error: status.append(line))
    b"".join(answer)
    if hasattr(answer, "close"):
        answer.close()
    elapsed = time.perf_counter() - began
    assert status == ["200 OK"], status
    return elapsed


def request(body: bytes, headers: dict[str, str]) -> dict[str, Any]:
    """Return a WSGI environ as gunicorn makes it."""
    environ = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()}
    environ |= {"CONTENT_TYPE": environ.pop("HTTP_CONTENT_TYPE"), "CONTENT_LENGTH": str(len(body)), "bench.body": body}
    environ |= {"REQUEST_METHOD": "POST", "PATH_INFO": "/predict", "SCRIPT_NAME": "", "QUERY_STRING": ""}
    environ |= {"SERVER_NAME": "127.0.0.1", "SERVER_PORT": "5000", "SERVER_PROTOCOL": "HTTP/1.1"}
    environ |= {"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "127.0.0.1:5000", "wsgi.url_scheme": "http"}
    return environ | {"wsgi.version": (1, 0), "wsgi.errors": sys.stderr, "wsgi.multithread": True}


if __name__ == "__main__":
    main()
