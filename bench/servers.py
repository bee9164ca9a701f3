"""The servers that are compared: how each is started, asked and understood.

Each serves the same file on 127.0.0.1, without access logs, and with as many workers as it is told. Those that batch
take up to 64 requests, or wait 2 ms. This server alone checks a password and the rows, and records each request.
"""

import json
import netrc
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"
BATCH, WAIT = 64, 0.002  # requests, seconds
Rows = list[list[float]]


@dataclass(frozen=True)
class Start:
    """What a server is started with."""

    bin: Path  # of its virtual environment
    model: Path
    workers: int
    ports: list[int]  # the first is the one to ask
    place: Path  # a directory of its own

    def python(self, *arguments: str) -> list[str]:
        return [str(self.bin / "python"), *arguments]

    def module(self, name: str, *arguments: str) -> list[str]:
        return self.python("-m", name, *arguments)


@dataclass(frozen=True)
class Server:
    """One that is compared."""

    name: str
    title: str  # for people
    environment: str  # which of bench/requirements it is installed from
    command: Callable[[Start], list[str]]
    path: str = "/predict"
    wrap: Callable[[Rows], Any] = lambda rows: {"data": rows}
    unwrap: Callable[[Any], Any] = lambda answer: answer["prediction"]
    variables: Callable[[Start], dict[str, str]] = lambda start: {}
    headers: Callable[[Start], dict[str, str]] = lambda start: {}
    suffixes: tuple[str, ...] = (".joblib", ".onnx")
    cwd: Path | None = None  # else its place
    constant: Any = None  # what it answers to everything, where it serves no model
    is_peer: bool = True

    def body(self, rows: Rows) -> str:
        return json.dumps(self.wrap(rows))


def _ours(start: Start) -> list[str]:
    settings = {"USERS_FILE": str(start.place / "users.json")}
    subprocess.run(start.module("auth", "demo"), cwd=ROOT, env=os.environ | settings, check=True, capture_output=True)
    return [str(start.bin / "gunicorn")]


def _our_variables(start: Start) -> dict[str, str]:
    found = {"MODEL_PATH": start.model, "PORT": start.ports[0], "WEB_CONCURRENCY": start.workers}
    found |= {"USERS_FILE": start.place / "users.json", "JOURNAL_DIR": start.place / "journal"}
    return {name: str(value) for name, value in found.items()}


def _our_headers(start: Start) -> dict[str, str]:
    from base64 import b64encode

    user, _, password = netrc.netrc(start.place / "demo.netrc").authenticators("127.0.0.1") or ("", "", "")
    return {"Authorization": "Basic " + b64encode(f"{user}:{password}".encode()).decode()}


def _naive(start: Start) -> list[str]:
    bind = f"127.0.0.1:{start.ports[0]}"
    return start.module("gunicorn", "-b", bind, "-w", str(start.workers), "--pythonpath", str(ROOT), "bench.naive:app")


def _fastapi(start: Start) -> list[str]:
    where = ["--host", "127.0.0.1", "--port", str(start.ports[0]), "--workers", str(start.workers)]
    how = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    return start.module("uvicorn", "fastapi_app:app", *where, *how)


def _mlserver(start: Start, batch: bool = False) -> list[str]:
    http, grpc, metrics = start.ports[:3]
    settings = {"debug": False, "host": "127.0.0.1", "http_port": http, "grpc_port": grpc, "metrics_port": metrics}
    settings |= {"metrics_dir": str(start.place), "environments_dir": str(start.place / "environments")}
    settings |= {"parallel_workers": start.workers if start.workers > 1 else 0}  # 0: in the server's own process
    (start.place / "settings.json").write_text(json.dumps(settings))
    runtime = "mlserver_sklearn.SKLearnModel" if start.model.suffix == ".joblib" else "mlserver_onnx.OnnxModel"
    model = {"name": "model", "implementation": runtime, "parameters": {"uri": str(start.model)}}
    model |= {"max_batch_size": BATCH, "max_batch_time": WAIT} if batch else {}
    (start.place / "model-settings.json").write_text(json.dumps(model))
    return [str(start.bin / "mlserver"), "start", str(start.place)]


def _kserve(start: Start) -> list[str]:
    quiet = {
        name: {"handlers": [], "level": "ERROR", "propagate": False} for name in ("kserve.trace", "uvicorn.access")
    }
    log = start.place / "log.json"
    log.write_text(json.dumps({"version": 1, "disable_existing_loggers": False, "loggers": quiet}))
    where = ["--http_port", str(start.ports[0]), "--workers", str(start.workers), "--enable_grpc", "false"]
    how = ["--enable_latency_logging", "false", "--log_config_file", str(log), "--model_name", "model"]
    return start.python("-W", "ignore", str(PEERS / "kserve_app.py"), *where, *how)


def _bentoml(start: Start) -> list[str]:
    where = ["--host", "127.0.0.1", "--port", str(start.ports[0]), "--working-dir", str(PEERS)]
    return [str(start.bin / "bentoml"), "serve", "bentoml_app:Classifier", *where]


def _tensor(rows: Rows) -> Any:
    """Return rows as the Open Inference Protocol has them."""
    flat = [value for row in rows for value in row]
    return {"inputs": [{"name": "rows", "shape": [len(rows), len(rows[0])], "datatype": "FP64", "data": flat}]}


def _mlserver_answer(answer: Any) -> Any:
    return answer["outputs"][0]["data"]


MLSERVER = {"path": "/v2/models/model/infer", "wrap": _tensor, "unwrap": _mlserver_answer}

OURS = Server(
    "ours", "this server", "ours", _ours, variables=_our_variables, headers=_our_headers, cwd=ROOT, is_peer=False
)
ALL = [
    OURS,
    Server("naive", "the snippet (gunicorn sync)", "ours", _naive, suffixes=(".joblib",)),
    Server(
        "hello",
        "Flask's hello on our gunicorn settings",
        "ours",
        lambda start: [str(start.bin / "gunicorn"), "bench.hello:app"],
        variables=lambda start: _our_variables(start) | {"AUTH": "off"},
        unwrap=lambda answer: answer["hello"],
        constant="world",
        cwd=ROOT,
        is_peer=False,
    ),
    Server("fastapi", "FastAPI + uvicorn", "fastapi", _fastapi),
    Server(
        "kserve",
        "KServe",
        "kserve",
        _kserve,
        path="/v1/models/model:predict",
        wrap=lambda rows: {"instances": rows},
        unwrap=lambda answer: answer["predictions"],
    ),
    Server("mlserver", "MLServer", "mlserver", _mlserver, **MLSERVER),
    Server("mlserver-batch", "MLServer, batching", "mlserver", lambda start: _mlserver(start, True), **MLSERVER),
    Server(
        "bentoml",
        "BentoML, batching",
        "bentoml",
        _bentoml,
        unwrap=lambda answer: answer,
        variables=lambda start: {"BENTOML_HOME": str(start.place), "BENTOML_DO_NOT_TRACK": "True"},
    ),
    Server(
        "litserve",
        "LitServe, batching",
        "litserve",
        lambda start: start.python(str(PEERS / "litserve_app.py")),
    ),
]
if before := os.environ.get("BENCH_BEFORE"):  # another checkout of this server, to compare two commits in one run
    ALL.append(replace(OURS, name="before", title="this server, before", cwd=Path(before)))
BY_NAME = {server.name: server for server in ALL}
