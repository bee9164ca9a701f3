"""functions-framework, as Cloud Run functions start it, with deploy/gcp/main.py."""

# needs: -r requirements.in functions-framework==3.10.2
# model: iris

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

TRUTH = json.loads(Path(sys.argv[2]).read_text())
SOURCE = Path(__file__).parents[2] / "deploy/gcp/main.py"
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]


def ask(path: str, content: Any = None) -> Any:
    """GET a path, or POST JSON to it; return the decoded answer."""
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


environ = os.environ | {"AUTH": "off", "MODEL_PATH": "model.joblib", "K_SERVICE": "iris", "FUNCTION_TARGET": "predict"}
command = [Path(sys.executable).with_name("functions-framework"), "--source", SOURCE, "--target", "predict"]
server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], env=environ)
try:
    for _ in range(300):
        try:
            ask("/readyz")
            break
        except OSError:
            assert server.poll() is None
            time.sleep(0.2)
    assert ask("/predict", {"data": TRUTH["rows"]})["prediction"] == TRUTH["predict"]
    assert ask("/model")["stable"]["estimator"] == "LogisticRegression"
    try:
        ask("/predict", {"data": [[1]]})
        raise AssertionError("a row of the wrong width was answered")
    except urllib.error.HTTPError as error:
        assert (error.code, json.load(error)["status"]) == (422, 422)
    records = [
        json.loads(line) for path in Path("var/journal").glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    assert [record["status"] for record in records] == [200, 422]
finally:
    server.terminate()
    server.wait(10)
