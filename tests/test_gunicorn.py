"""The server as it runs: real gunicorn, real sockets and signals."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import ROOT, WORKER_CLASSES, Gunicorn, Load, basic, free_port, gunicorn, write_users
from sklearn.datasets import load_iris
from sklearn.ensemble import HistGradientBoostingClassifier

IRIS = [[5.1, 3.5, 1.4, 0.2]]
SLOW_CALL = 0.02  # seconds of a call that runs on a native thread

# A model that takes its time to load, once by sleeping and once by keeping Python busy. For one row it makes a file and
# waits for another; for negative ones it does not return.
SLOW_MODULE = """
import time
from pathlib import Path

class Slow:
    n_features_in_ = 1

    def __init__(self, seconds, busy=False):
        self.seconds, self.busy = seconds, busy

    def __setstate__(self, state):
        self.__dict__.update(state)
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            sum(range(1000)) if self.busy else time.sleep(0.1)

    def predict(self, rows):
        time.sleep(1000 if min(row[0] for row in rows) < 0 else self.predict_seconds)
        if rows[0][0] == 7:
            Path(__file__).with_name("asked").touch()
            while not Path(__file__).with_name("go").exists():
                pass  # gevent's sleep would give way to other requests
        return [row[0] for row in rows]
"""


@pytest.fixture
def slow_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that saves a model whose class stands in a module of its own."""
    (tmp_path / "slow_module.py").write_text(SLOW_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def save(seconds: float, busy: bool = False, predict_seconds: float = 0.0) -> Path:
        from slow_module import Slow  # type: ignore[import-not-found]  # just written

        model = Slow(seconds, busy)
        model.predict_seconds = predict_seconds
        path = tmp_path / "slow.joblib"
        joblib.dump(model, path)
        return path

    yield save
    sys.modules.pop("slow_module", None)


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
@pytest.mark.parametrize("busy", [False, True], ids=["sleeping", "busy"])
def test_worker_that_loads_for_longer_than_the_timeout_is_live_not_ready_and_not_killed(
    tmp_path: Path, slow_model: Any, worker_class: str, busy: bool
) -> None:
    path = slow_model(9, busy)
    with gunicorn(tmp_path, "--timeout", "6", ready=False, model_path=path, worker_class=worker_class) as server:
        server.wait_until(lambda: "Booting worker" in server.log.read_text())
        workers = server.workers()
        while not server.all_ready():
            assert server.ask("GET", "/healthz")[0] == 200
            status, headers, body = server.ask("GET", "/readyz")
            if status == 200:  # it became ready between the two looks
                break
            assert (status, headers["Content-Type"]) == (503, "application/problem+json")
            assert "loading" in json.loads(body)["detail"]
            assert server.predict([[1.0]])[0] in (503, 200)
            time.sleep(0.2)
        server.wait_until(server.is_ready)
        assert server.predict([[1.5]]) == (200, {"prediction": [1.5]})
        assert server.workers() == workers


def test_file_that_does_not_load_leaves_the_worker_live_not_ready_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "broken.joblib"
    path.write_bytes(b"not a model")
    with gunicorn(tmp_path, ready=False, model_path=path) as server:
        server.wait_until(lambda: "NOT READY" in server.log.read_text())
        assert "broken.joblib does not load" in server.log.read_text()
        assert server.ask("GET", "/healthz")[0] == 200
        for status, body in (server.ask("GET", "/readyz")[::2], server.predict(IRIS)):
            assert status == 503
            assert "broken.joblib" not in str(body)  # the way to it and its name are the operator's affair
        status, _, body = server.ask("GET", "/model", Authorization=basic("admin"))
        assert status == 200
        assert "broken.joblib does not load" in json.loads(body)["error"]


def test_preloaded_model_that_uses_openmp_answers_though_the_environment_wants_threads(tmp_path: Path) -> None:
    x, y = load_iris(return_X_y=True)
    model = HistGradientBoostingClassifier(max_iter=5).fit(x, y)
    joblib.dump(model, tmp_path / "model.joblib")
    # Two threads would hang: those that the master started to answer the sample are not in the worker.
    with gunicorn(tmp_path, model_path=tmp_path / "model.joblib", preload=1, omp_num_threads=2) as server:
        server.wait_until(server.is_ready)
        for size in (1, 150):  # the larger on a native thread
            assert server.predict(x[:size].tolist()) == (200, {"prediction": model.predict(x[:size]).tolist()})
        assert "PRELOAD=1: OMP_NUM_THREADS=2 becomes 1" in server.log.read_text()


def test_two_masters_do_not_disturb_each_other(tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with gunicorn(tmp_path / "a", model_path=iris_file) as first:
        with gunicorn(tmp_path / "b", model_path=iris_file) as second:
            assert first.predict(IRIS)[0] == second.predict(IRIS)[0] == 200
            assert second.stop() == 0
        assert first.predict(IRIS)[0] == 200
        first.process.send_signal(signal.SIGHUP)
        first.wait_until(lambda: first.log.read_text().count("serving version") >= 2)
        assert first.predict(IRIS)[0] == 200


def test_files_that_break_while_serving_end_neither_worker_nor_server(tmp_path: Path, iris_file: Path) -> None:
    model = tmp_path / "model.joblib"
    model.write_bytes(iris_file.read_bytes())
    with gunicorn(tmp_path, model_path=model) as server:
        good = (tmp_path / "users.json").read_text()
        (tmp_path / "users.json").write_text("{")
        server.wait_until(lambda: "users stay as they were" in server.log.read_text())
        assert server.predict(IRIS)[0] == 200
        (old,) = server.workers()
        os.kill(old, signal.SIGKILL)
        server.wait_until(lambda: server.log.read_text().count("serving version") >= 2)
        status, answer = server.predict(IRIS)  # nobody is let in on the word of a file that cannot be read
        assert (status, answer["detail"]) == (503, "not ready: there are no users; the server's log says why")
        assert "NOT READY, nobody can log in: " in server.log.read_text()
        model.unlink()
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(lambda: "NOT READY, no model is served" in server.log.read_text())
        (tmp_path / "users.json").write_text(good)
        server.wait_until(lambda: "the model did not load" in server.predict(IRIS)[1].get("detail", ""))
        assert server.ask("GET", "/healthz")[0] == 200


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_requests_in_flight_at_sigterm_are_answered_and_recorded(
    tmp_path: Path, slow_model: Any, worker_class: str
) -> None:
    path = slow_model(0, predict_seconds=SLOW_CALL)
    with gunicorn(tmp_path, model_path=path, worker_class=worker_class) as server:
        answers: list[Any] = []
        caller = threading.Thread(target=lambda: answers.append(server.predict([[7.0]])))
        caller.start()
        server.wait_until((tmp_path / "asked").exists)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        (tmp_path / "go").touch()
        assert server.process.wait(40) == 0
        caller.join()
        assert answers == [(200, {"prediction": [7.0]})]
        assert len(recorded_ids(server)) == 1


def test_slow_predict_does_not_keep_probes_waiting(tmp_path: Path, slow_model: Any) -> None:
    with gunicorn(tmp_path, model_path=slow_model(0, predict_seconds=SLOW_CALL)) as server:
        answers: list[Any] = []
        caller = threading.Thread(target=lambda: answers.append(server.predict([[7.0]])))
        caller.start()
        server.wait_until((tmp_path / "asked").exists)
        assert server.ask("GET", "/healthz")[0] == 200
        assert answers == []  # the probe overtook it
        (tmp_path / "go").touch()
        caller.join()
        assert answers == [(200, {"prediction": [7.0]})]


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_worker_whose_model_hangs_is_replaced_while_the_other_serves_on(
    tmp_path: Path, slow_model: Any, worker_class: str
) -> None:
    path = slow_model(0)
    with gunicorn(tmp_path, model_path=path, worker_class=worker_class, web_concurrency=2, predict_timeout=2) as server:
        before = set(server.workers())
        hung: list[Any] = []

        def ask() -> None:
            try:
                hung.append(server.predict([[-1.0]]))
            except (OSError, http.client.HTTPException) as error:
                hung.append(error)

        caller = threading.Thread(target=ask)
        began = time.monotonic()
        caller.start()
        caller.join(60)
        assert isinstance(hung[0], (OSError, http.client.HTTPException)), hung  # as gunicorn's own time-out ends it
        assert 2.0 < time.monotonic() - began < 25.0  # the caller itself gives up after 30
        assert "the model has been at one call for" in server.log.read_text()
        assert server.predict([[1.0]]) == (200, {"prediction": [1.0]})
        server.wait_until(lambda: server.log.read_text().count("serving version") >= 3)
        after = set(server.workers())
        assert len(after) == 2
        assert len(before & after) == 1  # the other one went on


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_reload_under_load_fails_no_request(tmp_path: Path, iris_file: Path, worker_class: str) -> None:
    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=2, worker_class=worker_class) as server:
        with Load(server) as load:
            server.process.send_signal(signal.SIGHUP)
            server.wait_until(lambda: server.log.read_text().count("serving version") >= 4)
            time.sleep(1.0)
        assert set(load.statuses) == {200}
        assert load.errors == []


@pytest.mark.long
def test_memory_of_a_worker_does_not_grow_with_what_it_answers(tmp_path: Path, iris_file: Path) -> None:
    """The reason for having no max_requests."""
    good = json.dumps({"data": IRIS}).encode()
    large = json.dumps({"data": IRIS * 20_000}).encode()

    def memory() -> float:
        """Return the worker's anonymous memory in MB; its share of mapped files depends on who else maps them."""
        rollup = Path(f"/proc/{worker}/smaps_rollup").read_text()
        return int(re.findall(r"^Anonymous: +(\d+) kB", rollup, re.MULTILINE)[0]) / 1024

    def ask(count: int) -> None:
        connection = server.connect()
        for number in range(count):
            headers = {"Content-Type": "application/json", "Authorization": basic("predict")}
            body = good
            if number % 4 == 1:
                body = b'{"data": [[1, 2, 3, "x%d"]]}' % number
            elif number % 4 == 2:
                headers["X-Request-ID"] = f"id-{number}"
            elif number % 200 == 3:
                headers |= {
                    "Authorization": basic(f"u{number}"),
                    "X-Forwarded-For": f"10.0.{number % 99}.{count % 250}",
                }
            elif number % 500 == 4:
                body = large
            connection.request("POST", "/predict", body, headers)
            answer = connection.getresponse()
            answer.read()
            assert answer.status in (200, 401, 422, 429)
        connection.close()

    with gunicorn(tmp_path, model_path=iris_file, trusted_proxies=1) as server:
        (worker,) = server.workers()
        ask(5_000)
        before = memory()
        ask(15_000)
        assert memory() - before < 5.0
        assert server.workers() == [worker]


def recorded_ids(server: Gunicorn) -> list[str]:
    """Return the request ids in the server's journal."""
    lines = [line for path in server.journal_dir.glob("*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line)["request_id"] for line in lines]


def start_in(place: Path, *command: str, **environ: str) -> Any:
    """Run a command of Python's in another directory until it ends."""
    place.mkdir(exist_ok=True)
    environ = {"PATH": os.environ["PATH"], "PORT": str(free_port())} | environ
    return subprocess.run(
        [sys.executable, *command], cwd=place, env=environ, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "gunicorn", "-c", f"{ROOT}/gunicorn.conf.py"),
        ("-m", "gunicorn", "server:app"),
        ("-m", "flask", "--app", "server", "run"),
    ],
)
def test_start_in_another_directory_is_refused_and_names_both(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = start_in(tmp_path / "elsewhere", *command, PYTHONPATH="" if "-c" in command else str(ROOT))
    assert done.returncode not in (0, None)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("cannot start: ")]
    assert str(ROOT) in line
    assert str(tmp_path / "elsewhere") in line
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_start_in_another_directory_serves_if_all_paths_are_absolute(tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    there = ("env", "-C", str(tmp_path / "elsewhere"))
    with gunicorn(tmp_path, "-c", f"{ROOT}/gunicorn.conf.py", within=there, model_path=iris_file) as server:
        assert server.predict(IRIS) == (200, {"prediction": [0]})
        assert (
            f"the server is in {ROOT}; relative paths, such as var/models, begin at {there[-1]}"
            in server.log.read_text()
        )
    assert not list(Path(there[-1]).iterdir())


def test_server_as_a_script_prints_how_to_start_it_even_without_flask(tmp_path: Path) -> None:
    done = start_in(tmp_path, "-S", str(ROOT / "server.py"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "make run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["-m", "gunicorn", "server:app"], ["-m", "flask", "--app", "server", "run"]])
def test_classic_ways_to_start_it_serve(tmp_path: Path, iris_file: Path, command: list[str]) -> None:
    with gunicorn(tmp_path, model_path=iris_file) as reference:  # for a port that was free and the helper's requests
        port = reference.port
        reference.stop()
        environ = os.environ | {
            "MODEL_PATH": str(iris_file),
            "USERS_FILE": str(write_users(tmp_path / "users.json")),
            "JOURNAL_DIR": str(tmp_path / "classic"),
            "PORT": str(port),
            "WEB_CONCURRENCY": "1",
        }
        arguments = [sys.executable, *command, *(["--port", str(port)] if "flask" in command else [])]
        with subprocess.Popen(
            arguments, cwd=ROOT, env=environ, stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            try:
                deadline = time.monotonic() + 60
                while not reference.is_ready() and time.monotonic() < deadline:
                    time.sleep(0.1)
                assert reference.predict(IRIS) == (200, {"prediction": [0]})
            finally:
                os.killpg(process.pid, signal.SIGKILL)


def test_predictions_of_several_workers_are_the_models_own(tmp_path: Path, iris_file: Path) -> None:
    iris = load_iris(as_frame=True)
    expected = joblib.load(iris_file).predict(iris.data).tolist()
    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=2) as server:
        for _ in range(10):
            assert server.predict(iris.data.to_numpy().tolist()) == (200, {"prediction": expected})
