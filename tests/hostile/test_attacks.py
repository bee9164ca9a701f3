"""Attacks on a running server, and what a good caller notices of them: see docs/security.md."""

import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import PASSWORD, Client, Gunicorn, basic, gunicorn, records, write_users
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from werkzeug.security import generate_password_hash

from model.versions.store import Store
from settings import Settings
from web.body import BodyReader
from web.decoding import Decoder

GOOD = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'
CALL = {"Content-Type": "application/json", "Authorization": basic("predict")}


def filled(part: bytes, size: int) -> bytes:
    """Return `{"data": [part, part, …]}` of about this size in bytes."""
    return b'{"data":[' + b",".join([part] * (size // (len(part) + 1))) + b"]}"


SMALL_PARTS = {
    "empty lists": b"[]",
    "empty objects": b"{}",
    "deep lists": b"[" * 500 + b"]" * 500,
    "deep objects": b'{"a":' * 500 + b"1" + b"}" * 500,
    "numbers in a row": b"[" + b",".join([b"1.5"] * 10_000) + b"]",
    "strings": b'"[{"',
    "lists beside strings": b'"\\\\\\"",[]',
}


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory, iris_file: Path) -> Client:
    """A model behind every protocol."""
    place = tmp_path_factory.mktemp("everywhere")
    names = ("sagemaker", "vertex", "function_compute", "open_inference")
    extensions = tuple(f"+endpoints.{name}" for name in names)
    settings = Settings(model_path=iris_file, users_file=write_users(place / "users.json"), extensions=extensions)
    return Client(replace(settings, journal_dir=place / "journal"))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        *((name, "/predict") for name in SMALL_PARTS),
        *(("empty lists", path) for path in ("/invocations", "/invoke", "/v1/endpoints/1/deployedModels/2:predict")),
    ],
)
def test_json_of_many_small_parts_is_refused_before_it_is_decoded(everywhere: Client, name: str, path: str) -> None:
    body = filled(SMALL_PARTS[name], 2**22)
    if "Model" in path:
        body = body.replace(b'"data"', b'"instances"', 1)
    tracemalloc.start()
    try:
        answer = everywhere.post(body, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.status_code == 422
    assert "the body has more" in answer.json["detail"]
    assert peak < 4 * len(body), "the client has it twice, the server once, and then its pieces"


def test_json_lines_of_many_small_parts_are_refused_as_well(everywhere: Client) -> None:
    for line in (b"[[]]\n", b"[" + b",".join([b"1.5"] * 1000) + b"]\n"):
        answer = everywhere.post(line * (2**20 // len(line)), "/invocations", Content_Type="application/jsonlines")
        assert answer.status_code == 422
        assert "the body has more" in answer.json["detail"]
    rows = b"[5.1, 3.5, 1.4, 0.2]\n" * 20_000
    answer = everywhere.post(rows, "/invocations", Content_Type="application/jsonlines")
    assert answer.data.splitlines() == [b"0"] * 20_000


def test_tensors_and_feedback_of_many_small_parts_are_refused_as_well(everywhere: Client) -> None:
    for body, path, user in (
        (b'{"inputs":' + filled(b"[]", 2**22)[8:], "/v2/models/model/infer", "predict"),
        (b'{"feedback":' + filled(b"[]", 2**20)[8:], "/feedback", "feedback"),
    ):
        answer = everywhere.post(body, path, Authorization=basic(user))
        assert answer.status_code in (400, 422)
        assert "the body has more lists" in answer.text


def test_large_bodies_are_decoded_one_at_a_time() -> None:
    under_way: list[int] = []
    most: list[int] = []

    def run_in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
        under_way.append(1)
        most.append(len(under_way))
        time.sleep(0.01)
        under_way.pop()
        return function(*arguments)

    decoder = Decoder(BodyReader(2**24, 1.0), 100, list, run_in_thread)
    threads = [threading.Thread(target=decoder.decode_large, args=(len, b"")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 8
    assert decoder.limits().rows == 100


def test_record_says_who_chose_the_version(everywhere: Client) -> None:
    everywhere.post(GOOD, X_Routing_Key="a")
    everywhere.post(GOOD)
    assert [record.get("routed_by") for record in records(everywhere.journal_dir)[-2:]] == ["key", None]


# --- with a real server


class GoodCaller:
    """A caller with a verified password that asks one row after the other: how long each answer took, in seconds."""

    def __init__(self, server: Gunicorn, address: str = "192.0.2.1") -> None:
        self.server, self.headers = server, CALL | {"X-Forwarded-For": address}

    def ask(self, seconds: float) -> tuple[list[float], set[int]]:
        """Ask for some time."""
        times, statuses, end = [], set(), time.monotonic() + seconds
        with closing(self.server.connect(60)) as connection:
            while time.monotonic() < end:
                began = time.monotonic()
                connection.request("POST", "/predict", GOOD, self.headers)
                answer = connection.getresponse()
                answer.read()
                statuses.add(answer.status)
                times.append(time.monotonic() - began)
        return sorted(times), statuses


@contextmanager
def attack(count: int, call: Callable[[int], Any]) -> Iterator[list[Any]]:
    """Let so many attackers call again and again until the block ends; yield what they were answered."""
    ending, answers = threading.Event(), []

    def run(number: int) -> None:
        while not ending.is_set():
            with suppress(OSError):
                answers.append(call(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        ending.set()
        for thread in threads:
            thread.join(120)


def memory(pid: int) -> int:
    """Return the bytes that a process has in memory, and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    status = Path(f"/proc/{pid}/status").read_text()
    own = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return max([own, *(memory(int(child)) for child in children)])


@pytest.mark.long
@pytest.mark.parametrize("name", ["empty lists", "numbers in a row", "strings"])
def test_json_of_many_small_parts_keeps_no_good_caller_waiting(tmp_path: Path, iris_file: Path, name: str) -> None:
    body = filled(SMALL_PARTS[name], 2**24 - 100)
    with gunicorn(tmp_path, model_path=iris_file) as server:
        good = GoodCaller(server)
        calm, statuses = good.ask(2.0)
        before = memory(server.process.pid)
        with attack(8, lambda _: server.ask("POST", "/predict", body, **CALL)[0]) as answers:
            times, under_attack = good.ask(10.0)
        grown = memory(server.process.pid) - before
    assert statuses | under_attack == {200}
    assert set(answers) == {422}
    print(name, "calm", calm[len(calm) // 2], "median", times[len(times) // 2], "worst", times[-1], "grown", grown)
    assert times[len(times) // 2] < max(100 * calm[len(calm) // 2], 0.5)
    assert grown < 300e6, "one copy of each body, and little more"


@pytest.mark.long
def test_flood_from_many_addresses_does_not_lock_out_who_was_verified_when_a_worker_is_killed(
    tmp_path: Path, iris_file: Path
) -> None:
    write_users(tmp_path / "users.json", generate_password_hash(PASSWORD))
    with gunicorn(tmp_path, model_path=iris_file, trusted_proxies=1) as server:
        good = GoodCaller(server)
        assert good.ask(0.1)[1] == {200}

        def guess(number: int) -> int:
            wrong = {"Authorization": basic("predict", f"wrong {time.monotonic()}")}
            headers = wrong | {"X_Forwarded_For": f"10.0.{number}.1", "Content_Type": "application/json"}
            return server.ask("POST", "/predict", GOOD, **headers)[0]

        with attack(64, guess) as answers:
            deadline = time.monotonic() + 60
            while 503 not in answers and time.monotonic() < deadline:
                time.sleep(0.1)
            assert 503 in answers, "the queue is meant to be full"
            os.kill(*server.workers(), signal.SIGKILL)
            server.wait_until(lambda: server.log.read_text().count("serving version") == 2)
            assert good.ask(3.0)[1] == {200}
            # Another user at the same address, whose password nobody has verified yet, is checked before strangers.
            headers = CALL | {"X-Forwarded-For": "192.0.2.1", "Authorization": basic("metrics")}
            began = time.monotonic()
            status = server.ask("GET", "/metrics", **{k.replace("-", "_"): v for k, v in headers.items()})[0]
            assert (status, time.monotonic() - began < 15) == (200, True)


HANGS = """
import ctypes
from model.versions.routing import Routing

def init_app(app, service):
    read = Routing.read

    def hang(directory):
        if (directory / "hang").exists():
            ctypes.CDLL(None).sleep(20)  # as a network's file system may: no other greenlet runs meanwhile
        return read(directory)

    Routing.read = hang
"""


@pytest.mark.long
def test_storage_that_hangs_stops_no_answer(tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    iris, store = load_iris(), Store(tmp_path / "models")
    joblib.dump(LogisticRegression(max_iter=500).fit(iris.data, iris.target), tmp_path / "model.joblib")
    with store.new_version(tmp_path / "model.joblib", "1") as manifest:
        rows = iris.data[:2].tolist()
        manifest.about.update(sample=rows, predictions=[0, 0])
    store.promote("1")
    with gunicorn(tmp_path, model_dir=store.directory, extensions="+hangs") as server:
        good = GoodCaller(server)
        assert good.ask(0.1)[1] == {200}
        (store.directory / "hang").touch()
        time.sleep(1.0)  # more than the half second after which it is read again
        times, statuses = good.ask(3.0)
        assert statuses == {200}
        assert times[-1] < 10
        assert "ERROR" not in server.log.read_text(), "it is meant to hang"
        (store.directory / "hang").unlink()
