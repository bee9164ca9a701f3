"""The platforms' endpoints under a real gunicorn: bodies on the wire, health under load, and what is written down."""

import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from conftest import PASSWORD, ROOT, Gunicorn, basic, gunicorn, read_all, records
from slow_steps import Slow

from web.decoding import LARGE_BODY

NAMES = ("open_inference", "sagemaker", "vertex", "function_compute", "eas")
EXTENSIONS = ",".join(f"+endpoints.{name}" for name in NAMES)
LIMIT = 200  # bytes
ROWS = [[5.1, 3.5, 1.4, 0.2], [6.0, 3.0, 5.0, 2.0]]
V2 = {"inputs": [{"name": "input", "shape": [2, 4], "datatype": "FP64", "data": ROWS}]}
# path → a body that it takes, and where its answer has the predictions
BODIES: dict[str, tuple[Any, Any]] = {
    "/predict": ({"data": ROWS}, lambda answer: answer["prediction"]),
    "/": (ROWS, lambda answer: answer),
    "/invoke": ({"data": ROWS}, lambda answer: answer["prediction"]),
    "/invocations": (ROWS, lambda answer: answer),
    "/v1/endpoints/1/deployedModels/2:predict": ({"instances": ROWS}, lambda answer: answer["predictions"]),
    "/v2/models/model/infer": (V2, lambda answer: answer["outputs"][0]["data"]),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, iris_file: Path) -> Iterator[Gunicorn]:
    """A server that speaks every protocol, with a low limit on bodies."""
    place = tmp_path_factory.mktemp("served")
    with gunicorn(place, model_path=iris_file, extensions=EXTENSIONS, max_body_bytes=LIMIT, body_timeout=3) as running:
        yield running


@pytest.mark.parametrize("path", BODIES)
def test_body_may_have_the_limit_and_no_byte_more(server: Gunicorn, path: str) -> None:
    content, predictions = BODIES[path]
    body = json.dumps(content).encode()
    for length, expected in ((LIMIT, 200), (LIMIT + 1, 413)):
        sent = body.ljust(length)
        status, _, answer = server.ask("POST", path, sent, Authorization=basic("predict"))
        assert status == expected
        pieces = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (sent[:7], sent[7:])) + b"0\r\n\r\n"
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nAuthorization: {basic('predict')}\r\nConnection: close\r\n"
        chunked = server.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + pieces)
        assert chunked.split(b" ")[1] == str(expected).encode()
        if expected == 200:
            assert predictions(json.loads(answer)) == [0, 2]
            assert chunked.endswith(answer)


@pytest.mark.parametrize("path", BODIES)
def test_version_that_is_asked_for_is_not_ignored(server: Gunicorn, path: str) -> None:
    headers = {"Authorization": basic("predict"), "Content_Type": "application/json", "X_Model_Version": "7"}
    status, _, answer = server.ask("POST", path, json.dumps(BODIES[path][0]).encode(), **headers)
    assert status == 403
    assert b"needs the role admin" in answer


def test_large_bodies_are_decoded_on_another_thread(tmp_path: Path, iris_file: Path) -> None:
    rows, expected = ROWS * 12_000, [0, 2] * 12_000
    csv = "\n".join(",".join(map(str, row)) for row in rows).encode()
    array = np.array(rows)
    tensor = {"name": "input", "shape": [len(rows), 4], "datatype": "FP64"}
    binary = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": array.nbytes}}]}).encode()
    vertex = "/v1/endpoints/1/deployedModels/2:predict"
    v2 = json.dumps({"inputs": [tensor | {"data": rows}]}).encode()
    with gunicorn(tmp_path, model_path=iris_file, extensions=EXTENSIONS) as server:

        def ask(path: str, body: bytes, content_type: str = "application/json", **headers: str) -> Any:
            assert len(body) > LARGE_BODY
            headers |= {"Authorization": basic("predict"), "Content_Type": content_type}
            status, _, answer = server.ask("POST", path, body, **headers)
            assert status == 200, answer
            return answer

        for path, (_, predictions) in BODIES.items():
            body = {"/": rows, "/invocations": rows, vertex: {"instances": rows}}.get(path, {"data": rows})
            sent = v2 if path.startswith("/v2") else json.dumps(body).encode()
            assert predictions(json.loads(ask(path, sent))) == expected
        for path in ("/invocations", vertex):
            assert ask(path, csv, "text/csv").decode().split("\n") == list(map(str, expected))
        length = {"Inference_Header_Content_Length": str(len(binary))}
        for answer in (ask(vertex, v2), ask(vertex, binary + array.tobytes(), "application/octet-stream", **length)):
            assert json.loads(answer)["outputs"][0]["data"] == expected


@pytest.mark.parametrize("path", BODIES)
def test_body_that_is_cut_off_is_a_bad_request(server: Gunicorn, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nAuthorization: {basic('predict')}\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.encode() + b"[[1")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection).split(b" ")[1] == b"400"
    last = records(server.journal_dir)[-1]
    assert (last["path"], last["status"], last["success"]) == (path, 400, False)


def test_secrets_in_headers_reach_no_log(server: Gunicorn) -> None:
    secrets = {
        "x_fc_access_key_id": "SECRET1",
        "x_fc_access_key_secret": "SECRET2",
        "x_fc_security_token": "SECRET3",
        "X_Serverless_Authorization": "Bearer SECRET4",
        "X_Amzn_SageMaker_Session_Id": "SECRET5",
    }
    answers = b""
    for path in (*BODIES, "/nothing"):
        for authorization in (basic("predict"), "EAS SECRET6", "Bearer SECRET7", "Basic SECRET8"):
            for body in (json.dumps(BODIES.get(path, ([],))[0]).encode(), b"", b"[[1]]", b"{"):
                headers = secrets | {"Authorization": authorization}
                status, told, answer = server.ask("POST", path, body, **headers)
                assert status < 500
                answers += answer + str(told).encode()
    journal = b"".join(path.read_bytes() for path in server.journal_dir.rglob("*") if path.is_file())
    assert not re.search(rb"SECRET\d", server.log.read_bytes() + journal + answers)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl: sudo apt install curl")
@pytest.mark.parametrize("section", ["SageMaker", "Vertex AI"])
def test_command_of_the_docs_is_answered_as_shown(server: Gunicorn, section: str) -> None:
    text = (ROOT / "docs/protocols.md").read_text("utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    command, shown = re.findall(r"^```(?:sh|json)?\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    command = command.replace(":5000", f":{server.port}").replace("-u alice", f"-sS -u 'predict:{PASSWORD}'")
    assert subprocess.check_output(command, shell=True, text=True).removesuffix("\n") == shown


@pytest.mark.long
@pytest.mark.parametrize("worker_class", ["gevent", "gthread"])
def test_health_is_answered_while_all_workers_are_busy(tmp_path: Path, worker_class: str) -> None:
    joblib.dump(Slow(), tmp_path / "model.joblib")
    settings: dict[str, Any] = {"model_path": tmp_path / "model.joblib", "pythonpath": Path(__file__).parent}
    settings |= {"web_concurrency": 2, "worker_class": worker_class, "extensions": EXTENSIONS}
    with gunicorn(tmp_path, **settings) as server:
        ending = threading.Event()
        statuses: list[int] = []

        def call() -> None:
            while not ending.is_set():
                statuses.append(server.predict([[0.4]])[0])

        callers = [threading.Thread(target=call) for _ in range(3 * 2)]
        for caller in callers:
            caller.start()
        time.sleep(1)
        try:
            for path in ("/ping", "/readyz", "/v2/health/ready", "/v1/endpoints/1/deployedModels/2"):
                slowest = 0.0
                for _ in range(200):
                    began = time.monotonic()
                    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
                    connection.request("GET", path)
                    assert connection.getresponse().status == 200
                    connection.close()
                    slowest = max(slowest, time.monotonic() - began)
                assert slowest <= 2
        finally:
            ending.set()
            for caller in callers:
                caller.join()
        assert set(statuses) == {200}
