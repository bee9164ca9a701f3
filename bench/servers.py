"""The servers that are compared: how each is installed, started, asked and understood.

Each serves the same file on 127.0.0.1, without access logs, and with as many workers as it is given. Those that batch
take up to 64 requests, or wait 2 ms.
"""

import hashlib
import json
import netrc
import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS, HOME = ROOT / "bench" / "peers", ROOT / ".bench"
MODELS = [f"{name}{suffix}" for name in ("iris", "hgb", "forest") for suffix in (".joblib", ".onnx")]
Rows = list[list[float]]


@dataclass(frozen=True)
class Server:
    """One that is compared. In its command and its variables {port} … are replaced (running.py)."""

    name: str
    title: str  # for people
    environment: str  # which of bench/requirements it is installed from
    command: str
    variables: Mapping[str, str] = field(default_factory=dict)
    path: str = "/predict"
    wrap: Callable[[Rows], Any] = lambda rows: {"data": rows}
    unwrap: Callable[[Any], Any] = lambda answer: answer["prediction"]
    user: Callable[[Path], str] = lambda place: ""  # and password, with a colon between them
    suffixes: tuple[str, ...] = (".joblib", ".onnx")
    cwd: Path = PEERS
    constant: Any = None  # what it answers to everything, if it serves no model
    is_peer: bool = True

    def body(self, rows: Rows) -> str:
        return json.dumps(self.wrap(rows))

    def headers(self, place: Path) -> dict[str, str]:
        """Return the headers of its requests, given its directory."""
        user = self.user(place)
        basic = {"Authorization": f"Basic {b64encode(user.encode()).decode()}"} if user else {}
        return {"Content-Type": "application/json"} | basic


class Cases:
    """A model's rows, and what it answers to them itself."""

    def __init__(self, model: str) -> None:
        known = json.loads((HOME / "models" / model).with_suffix(".json").read_text())
        self.pairs = list(zip(known["rows"], known["predictions"], strict=True))

    def some(self, count: int, at: int = 0) -> tuple[Rows, list[int]]:
        """Return so many rows from this one on, in a circle, and their predictions."""
        picked = [self.pairs[(at + step) % len(self.pairs)] for step in range(count)]
        return [row for row, _ in picked], [prediction for _, prediction in picked]

    def bodies(self, rows: int = 1) -> list[Rows]:
        """Return the rows of twenty different requests, to be sent in turn."""
        return [self.some(rows, 5 * number)[0] for number in range(20)]


def prepare(environments: set[str], *more: str) -> None:
    """Install the servers and train the models that are not there yet; and those of some other names."""
    for environment in sorted(environments | {"ours"}):
        files = [ROOT / "bench/requirements" / f"{environment}.txt"]
        if environment == "ours":
            files = [ROOT / "requirements.txt", ROOT / "requirements/onnx.txt"]
        wanted = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        stamp = HOME / "venvs" / environment / "installed"
        if stamp.exists() and stamp.read_text() == wanted:
            continue
        print(f"installing {environment}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", stamp.parent], check=True)
        for path in files:  # in separate calls, since hashes are asked for in all of a call or in none
            pip = [stamp.parent / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, "-r", path], check=True)
        stamp.write_text(wanted)
    train = [HOME / "venvs/ours/bin/python", PEERS / "train.py", HOME / "models", "iris", "hgb", "forest", *more]
    subprocess.run(train, cwd=ROOT, check=True)


def _demo_user(place: Path) -> str:
    environ = os.environ | {"USERS_FILE": str(place / "users.json")}
    subprocess.run(
        [HOME / "venvs/ours/bin/python", "-m", "auth", "demo"],
        cwd=ROOT,
        env=environ,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    name, _, password = netrc.netrc(place / "demo.netrc").authenticators("127.0.0.1") or ("", "", "")
    return f"{name}:{password}"


def _tensor(rows: Rows) -> Any:
    """Return rows as the Open Inference Protocol has them."""
    flat = [value for row in rows for value in row]
    return {"inputs": [{"name": "rows", "shape": [len(rows), len(rows[0])], "datatype": "FP64", "data": flat}]}


SETTINGS = {"WEB_CONCURRENCY": "{workers}", "USERS_FILE": "{place}/users.json", "JOURNAL_DIR": "{place}/journal"}
OURS = Server("ours", "this server", "ours", "gunicorn", SETTINGS, user=_demo_user, cwd=ROOT, is_peer=False)
GUNICORN = "gunicorn -b 127.0.0.1:{port} -w {workers} --no-control-socket"
UVICORN = "uvicorn --host 127.0.0.1 --port {port} --workers {workers} --loop uvloop --http httptools --no-access-log"
MLSERVER = {"HOST": "127.0.0.1", "HTTP_PORT": "{port}", "GRPC_PORT": "{port2}", "METRICS_PORT": "{port3}"}
MLSERVER |= {"DEBUG": "false", "PARALLEL_WORKERS": "{more_workers}", "METRICS_DIR": "{place}"}
MLSERVER |= {"MODEL_NAME": "model", "MODEL_URI": "{model}", "MODEL_IMPLEMENTATION": "mlserver_app.Classifier"}
BATCHING = {"MLSERVER_MODEL_MAX_BATCH_SIZE": "64", "MLSERVER_MODEL_MAX_BATCH_TIME": "0.002"}
BENTOML = "bentoml serve bentoml_app:Classifier --host 127.0.0.1 --port {port}"
BENTOML_ENVIRON = {"BENTOML_HOME": "{place}", "BENTOML_DO_NOT_TRACK": "True", "WORKERS": "{workers}"}
MLSERVER = {f"MLSERVER_{name}": value for name, value in MLSERVER.items()}
V2 = {"path": "/v2/models/model/infer", "wrap": _tensor, "unwrap": lambda answer: answer["outputs"][0]["data"]}
NOTHING: dict[str, Any] = {"constant": [0], "is_peer": False}
SAME_WORK: dict[str, Any] = {"variables": {"PASSWORD": "bench", "JOURNAL": "{place}/journal"}}
SAME_WORK |= {"user": lambda place: "bench:bench"}
ALL = [
    OURS,
    Server("floor", "recv and send alone", "ours", f"{GUNICORN} -k floor.Worker floor:app", **NOTHING),
    Server("hello", "a Flask view alone", "ours", f"{GUNICORN} -k gevent floor:app", **NOTHING),
    Server("naive", "the snippet", "ours", f"{GUNICORN} naive:app", suffixes=(".joblib",)),
    Server("fastapi", "FastAPI", "fastapi", f"{UVICORN} fastapi_app:app"),
    Server("fastapi-same", "FastAPI, same work", "fastapi", f"{UVICORN} fastapi_same_work:app", **SAME_WORK),
    Server("mlserver", "MLServer", "mlserver", "mlserver start {place}", MLSERVER, **V2),
    Server("mlserver-batch", "MLServer, batching", "mlserver", "mlserver start {place}", MLSERVER | BATCHING, **V2),
    Server("bentoml", "BentoML, batching", "bentoml", BENTOML, BENTOML_ENVIRON, unwrap=lambda answer: answer),
]
if before := os.environ.get("BENCH_BEFORE"):  # another checkout of this server, to compare two commits in one run
    ALL.append(replace(OURS, name="before", title="this server, before", cwd=Path(before)))
BY_NAME = {server.name: server for server in ALL}
