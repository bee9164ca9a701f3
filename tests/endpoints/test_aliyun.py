"""Function Compute's and EAS's contracts: what reaches the server besides /predict."""

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from cloud_models import FRAME, FRAME_ROWS, IRIS_ROWS, frame_model
from conftest import Client, basic, gunicorn, records
from slow_steps import Slow

FC = {"extensions": ("+endpoints.function_compute",)}
EAS = {"extensions": ("+endpoints.eas",)}
# What eas-prediction's TFRequest sends for one row of iris.
PROTOBUF = b'\n\x0fserving_default\x12"\n\x06inputs\x12\x18\x08\x01\x12\x04\n\x02\x01\x04*\x10' + b"\x00\x00\xa0@" * 4
TYPES = [None, "application/json", "application/octet-stream", "text/plain", "application/x-www-form-urlencoded"]


def ask(client: Client, path: str, body: Any, content_type: str | None = None) -> Any:
    """POST to a path, without Content-Type unless one is given."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.http.post(path, data=data, headers=client.headers, content_type=content_type)


@pytest.mark.parametrize("content_type", TYPES)
def test_event_is_answered_as_predict_does_whatever_its_type(
    serve: Any, iris_file: Path, content_type: str | None
) -> None:
    client = serve(iris_file, **FC)
    for call in ({"data": IRIS_ROWS}, {"data": IRIS_ROWS, "method": "predict_proba"}, IRIS_ROWS):
        assert ask(client, "/invoke", call, content_type).data == client.post(call).data
    assert [record["protocol"] for record in records(client.journal_dir)] == ["function_compute", "predict"] * 3


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"", 400, "the body is empty"),
        (b"{", 400, "not JSON"),
        (b"\x93NUMPY", 400, "UTF-8"),
        ({"data": [[1]]}, 422, "1 values"),
        ({}, 422, "data is missing"),
    ],
)
@pytest.mark.parametrize(("on", "path"), [(FC, "/invoke"), (EAS, "/"), (EAS, "/predict")])
def test_wrong_event_is_explained(
    serve: Any, iris_file: Path, on: Any, path: str, body: Any, status: int, detail: str
) -> None:
    client = serve(iris_file, **on)
    answer = ask(client, path, body)
    assert (answer.status_code, answer.mimetype) == (status, "application/problem+json")
    assert detail in answer.json["detail"]


@pytest.mark.parametrize(("on", "path"), [(FC, "/invoke"), (EAS, "/"), (EAS, "/predict")])
def test_password_rows_and_bytes_are_checked_as_by_predict(serve: Any, iris_file: Path, on: Any, path: str) -> None:
    client = serve(iris_file, max_rows=2, max_body_bytes=100, **on)
    assert ask(client, path, [[1, 2, 3, 4]] * 2).status_code == 200
    assert "3 rows" in ask(client, path, [[1, 2, 3, 4]] * 3).json["detail"]
    assert ask(client, path, b"[[1, 2, 3, 4]]".ljust(100)).status_code == 200
    assert ask(client, path, b"[[1, 2, 3, 4]]".ljust(101)).status_code == 413
    client.headers |= {"Content-Encoding": "gzip"}
    assert ask(client, path, [[1, 2, 3, 4]]).status_code == 415
    for user, status in ((basic("nobody"), 403), (basic("predict", "wrong"), 401), ("", 401)):
        client.headers = {"Authorization": user} if user else {}
        assert ask(client, path, [[1, 2, 3, 4]]).status_code == status


def test_hooks_are_open_and_take_their_method_only(serve: Any, iris_file: Path, tmp_path: Path) -> None:
    client = serve(iris_file, **FC)
    assert client.http.post("/initialize").status_code == 200
    assert client.http.get("/pre-stop").status_code == 200
    for answer in (client.http.get("/initialize"), client.http.post("/pre-stop")):
        assert answer.status_code == 405
        assert answer.mimetype == "application/problem+json"
    assert client.predict(IRIS_ROWS[:1]) == {"prediction": [0]}  # they change nothing
    broken = tmp_path / "broken.joblib"
    broken.write_bytes(b"no model")
    assert serve(broken, **FC).http.post("/initialize").status_code == 503


@pytest.mark.long
@pytest.mark.parametrize(("worker_class", "preload"), [("gevent", 0), ("gevent", 1), ("gthread", 0)])
def test_pre_stop_waits_for_requests_under_way_in_all_workers(tmp_path: Path, worker_class: str, preload: int) -> None:
    joblib.dump(Slow(), tmp_path / "model.joblib")
    settings: dict[str, Any] = {"model_path": tmp_path / "model.joblib", "pythonpath": Path(__file__).parent}
    settings |= {"web_concurrency": 2, "worker_class": worker_class, "preload": preload}
    settings["extensions"] = "+endpoints.function_compute"
    with gunicorn(tmp_path, **settings) as server:

        def call(seconds: float, answered: list[float]) -> None:
            assert server.predict([[seconds]])[0] == 200
            answered.append(time.monotonic())

        for seconds, longest in ((1.5, 2.5), (7.0, 6.0)):
            answered: list[float] = []
            caller = threading.Thread(target=call, args=(seconds, answered))
            began = time.monotonic()
            caller.start()
            time.sleep(0.4)
            ended = []
            for _ in range(4):  # whichever worker it comes to
                assert server.ask("GET", "/pre-stop")[0] == 200
                ended.append(time.monotonic())
            caller.join()
            if seconds < 5:
                assert min(ended) >= answered[0] - 0.05
            assert ended[0] - began <= longest
        began = time.monotonic()
        assert server.ask("GET", "/pre-stop")[0] == 200
        assert time.monotonic() - began < 1  # nothing is under way any more


def test_initialize_waits_for_the_model(tmp_path: Path) -> None:
    joblib.dump(Slow(loads=2), tmp_path / "model.joblib")
    settings = {"model_path": tmp_path / "model.joblib", "pythonpath": Path(__file__).parent}
    with gunicorn(tmp_path, **settings, extensions="+endpoints.function_compute", ready=False) as server:

        def answers() -> bool:
            try:
                return bool(server.ask("GET", "/healthz")[0] == 200)
            except OSError:
                return False

        server.wait_until(answers)
        assert server.ask("GET", "/readyz")[0] == 503
        assert server.ask("POST", "/initialize")[0] == 200
        assert server.ask("GET", "/readyz")[0] == 200


# --- EAS


@pytest.mark.parametrize("content_type", TYPES)
@pytest.mark.parametrize("path", ["/", "/predict"])
def test_eas_takes_json_of_any_type(serve: Any, iris_file: Path, path: str, content_type: str | None) -> None:
    client = serve(iris_file, **EAS)
    expected = serve(iris_file).predict(IRIS_ROWS)["prediction"]
    assert ask(client, path, {"data": IRIS_ROWS}, content_type).json == {"prediction": expected}
    assert ask(client, path, IRIS_ROWS, content_type).json == expected
    proba = ask(client, path, {"data": IRIS_ROWS, "method": "predict_proba"}, content_type).json
    assert proba == serve(iris_file).predict(IRIS_ROWS, "predict_proba")
    assert {record["protocol"] for record in records(client.journal_dir)} == {"eas"}


def test_eas_answers_a_list_of_objects_with_a_list(serve: Any) -> None:
    client = serve(frame_model(), **EAS)
    expected = ask(client, "/", FRAME_ROWS).json
    assert ask(client, "/", FRAME.astype(object).to_dict("records")).json == expected
    assert len(expected) == len(FRAME)


def test_eas_takes_arrays_at_predict(serve: Any, iris_file: Path) -> None:
    client = serve(iris_file, **EAS)
    file = io.BytesIO()
    np.save(file, np.array(IRIS_ROWS))
    assert ask(client, "/predict", file.getvalue(), "application/x-npy").json == {"prediction": [0, 0, 1, 1, 2]}


@pytest.mark.parametrize("content_type", TYPES)
@pytest.mark.parametrize("path", ["/", "/predict"])
def test_message_of_tfrequest_is_refused_with_the_way_out(
    serve: Any, iris_file: Path, path: str, content_type: str | None
) -> None:
    answer = ask(serve(iris_file, **EAS), path, PROTOBUF, content_type)
    assert answer.status_code == 415
    assert "StringRequest" in answer.json["detail"]


def test_both_are_off_by_default(serve: Any, iris_file: Path) -> None:
    client = serve(iris_file)
    assert [ask(client, path, IRIS_ROWS).status_code for path in ("/invoke", "/", "/predict")] == [404, 405, 415]
    assert client.http.post("/initialize").status_code == 404
    assert client.http.get("/pre-stop").status_code == 404
