"""The journal: what a record holds, which requests make one, and that none goes missing uncounted."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PASSWORD, ROOT, Client, basic, gunicorn, no_file_beyond, records
from sklearn.base import BaseEstimator

import monitor
import processes
from monitor import Journal, segments
from processes import is_locked

ROWS = [[5.1, 3.5, 1.4, 0.2], [6.7, 3.1, 4.7, 1.5]]
BOUND = 2**16  # bytes; a journal so small drops within a test
SEGMENT = BOUND // 16


class Moody(BaseEstimator):
    """A model of one column that fails on 13 and takes 0.2 s for 7."""

    n_features_in_ = 1

    def predict(self, rows: Any) -> Any:
        if 13 in rows:
            raise RuntimeError("secret-in-a-traceback")
        if 7 in rows:
            time.sleep(0.2)
        return rows[:, 0]


@pytest.fixture
def client(serve: Any) -> Client:
    served: Client = serve(Moody(), max_body_bytes=1000)
    return served


# --- what a record holds


def test_record_holds_what_the_design_lists(serve: Any, iris_file: Path) -> None:
    client = serve(iris_file)
    answer = client.post({"data": ROWS, "method": "predict_proba"}, X_Request_ID="caller-chose:1")
    (record,) = records(client.journal_dir)
    assert abs(time.time() - record.pop("time")) < 60  # seconds since 1970
    assert 0 < record.pop("response_time") < 60
    assert re.fullmatch(r"\S{8,64}", record.pop("record_id"))
    assert record == {
        "pid": os.getpid(),
        "success": True,
        "error": "",
        "error_type": "",
        "status": 200,
        "path": "/predict",
        "protocol": "predict",
        "method": "predict_proba",
        "rows": 2,
        "model_version": answer.headers["X-Model-Version"],
        "variant": "stable",
        "user": "predict",
        "request_id": "caller-chose:1",
    }


def test_response_time_is_in_seconds(client: Client) -> None:
    client.predict([[7]])
    assert 0.2 <= records(client.journal_dir)[0]["response_time"] < 10


def test_request_id_that_is_not_sane_is_replaced_in_record_and_answer(client: Client) -> None:
    answer = client.post({"data": [[1]]}, X_Request_ID="x" * 200)
    assert records(client.journal_dir)[0]["request_id"] == answer.headers["X-Request-ID"] != "x" * 200


# --- which requests make one


def not_json(client: Client) -> Any:
    return client.post(b"{")


def no_rows(client: Client) -> Any:
    return client.post({"data": []})


def too_large(client: Client) -> Any:
    return client.post(b" " * 1001)


def not_said_to_be_json(client: Client) -> Any:
    return client.post({"data": [[1]]}, Content_Type="text/plain")


def without_the_role(client: Client) -> Any:
    return client.post({"data": [[1]]}, Authorization=basic("admin"))


def on_which_the_model_fails(client: Client) -> Any:
    return client.post({"data": [[13]]})


def on_which_the_server_fails(client: Client) -> Any:
    client.service.serving.choose = lambda: 1 / 0
    return client.post({"data": [[1]]})


@pytest.mark.parametrize(
    ("request_", "status", "error_type", "error"),
    [
        (not_json, 400, "client", "Bad Request"),
        (no_rows, 422, "client", "Unprocessable Entity"),
        (too_large, 413, "client", "Request Entity Too Large"),
        (not_said_to_be_json, 415, "client", "Unsupported Media Type"),
        (without_the_role, 403, "auth", "Forbidden"),
        (on_which_the_model_fails, 500, "model", "Internal Server Error"),
        (on_which_the_server_fails, 500, "internal", "Internal Server Error"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_failed_request_is_one_record(
    client: Client, request_: Callable[[Client], Any], status: int, error_type: str, error: str
) -> None:
    answer = request_(client)
    assert answer.status_code == status
    (record,) = records(client.journal_dir)
    wanted = {"status": status, "error_type": error_type, "error": error, "success": False}
    wanted["request_id"] = answer.headers["X-Request-ID"]
    assert {name: record[name] for name in wanted} == wanted


@pytest.mark.parametrize(("wanted", "status"), [("", 503), ("502", 502), ("200", 503)])
def test_request_before_the_model_is_ready_is_one_record(wanted: str, status: int, serve: Any, tmp_path: Path) -> None:
    """With the status that a proxy wants, if that makes it ask another worker."""
    broken = tmp_path / "broken.joblib"
    broken.write_bytes(b"no model")
    client = serve(broken)
    answer = client.post({"data": [[1]]}, X_Not_Ready_Status=wanted)
    assert (answer.status_code, answer.json["status"], answer.headers["Retry-After"]) == (status, status, "5")
    (record,) = records(client.journal_dir)
    assert (record["status"], record["error_type"], record["model_version"]) == (status, "model", "")


def test_other_endpoints_make_no_record(client: Client) -> None:
    for path in ("/healthz", "/readyz", "/model", "/predict", "/nowhere"):
        client.get(path)
    assert records(client.journal_dir) == []


def test_strangers_are_one_record_with_their_number(serve: Any, iris_file: Path) -> None:
    client: Client = serve(iris_file, extensions=("-operations.wrong_passwords",))  # which records single ones
    for n in range(12):  # the last two are throttled: 429
        client.post({"data": [[1]]}, Authorization=basic("predict", f"wrong {n}"))
    client.http.post("/predict", json={"data": [[1]]})
    assert records(client.journal_dir) == []
    client.service.request_log.summarise()
    client.service.request_log.summarise()  # nobody came since
    (record,) = records(client.journal_dir)
    assert {name: record[name] for name in ("requests", "success", "error_type", "status", "user")} == {
        "requests": 13,
        "success": False,
        "error_type": "auth",
        "status": 401,
        "user": "",
    }
    client.http.post("/predict", json={"data": [[1]]})
    client.service.request_log.summarise()
    assert [record["requests"] for record in records(client.journal_dir)] == [13, 1]


def test_journal_holds_no_password_no_header_and_no_body(client: Client) -> None:
    client.post({"data": [[98765.4321]]})
    client.post({"data": [["secret-value"]]})
    client.post({"data": [[13]], "method": "predict"})
    client.post({"secret-key": 1})
    client.post(b"secret-not-json")
    client.post({"data": [[1]]}, Authorization=basic("predict", "secret-wrong"))
    client.post({"data": [[1]]}, Authorization=basic("secret-user"))
    client.post({"data": [[1]]}, X_Request_ID="secret id", Cookie="secret-cookie")
    client.http.post("/predict?secret-query=1", json={"data": [[1]]}, headers=client.headers)
    client.service.request_log.summarise()
    written = b"".join(path.read_bytes() for path in segments(client.journal_dir)).decode()
    assert sum("event" not in record for record in records(client.journal_dir)) == 8
    for secret in ("secret", "98765", PASSWORD, basic("predict"), basic("predict").split()[1]):
        assert secret not in written


# --- segments


class Account:
    """What a journal holds and what it says it lost."""

    def __init__(self, directory: Path) -> None:
        self.present: list[dict[str, Any]] = []
        self.dropped = self.torn = self.size = 0
        for path in segments(directory):
            content = path.read_bytes()
            assert content.endswith(b"\n") or not content, "a last line that is not whole"
            self.size += len(content)
            for line in content.splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    self.torn += 1
                    continue
                if "dropped" in record:
                    assert set(record) >= {"reason", "time", "record_id", "pid"}
                    self.dropped += record["dropped"]
                else:
                    self.present.append(record)

    @property
    def total(self) -> int:
        return len(self.present) + self.dropped


def test_segment_is_named_by_time_and_process(tmp_path: Path) -> None:
    before = time.time_ns()
    Journal(tmp_path, BOUND).append({})
    (path,) = segments(tmp_path)
    opened, pid = re.fullmatch(r"(\d{20})-(\d+)\.jsonl", path.name).groups()  # type: ignore[union-attr]
    assert before <= int(opened) <= time.time_ns()
    assert int(pid) == os.getpid()
    assert path.stat().st_mode & 0o007 == 0, "open to everybody"


def test_no_segment_is_opened_before_the_first_record(tmp_path: Path) -> None:
    Journal(tmp_path / "journal", BOUND)
    assert not (tmp_path / "journal").exists()


def test_journal_keeps_within_its_bound_drops_the_oldest_and_counts_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, BOUND)
    losses: list[int] = []
    journal.on_loss.append(lambda _, count: losses.append(count))
    longest = 0
    for n in range(5000):  # about nine times the bound, so that counts of counts are dropped as well
        journal.append({"n": n})
        if n % 100 == 0:
            account = Account(tmp_path)
            assert account.size <= BOUND + SEGMENT
            assert account.total == n + 1
            longest = max(longest, account.size)
    assert longest > BOUND - 2 * SEGMENT, "drops more than it must"
    account = Account(tmp_path)
    left = len(account.present)
    assert [record["n"] for record in account.present] == list(range(5000 - left, 5000))
    assert all(path.stat().st_size <= SEGMENT + 1000 for path in segments(tmp_path))
    assert "dropped" in caplog.text
    assert sum(losses) == 5000 - left, "what metrics count: each loss once"


def test_clock_that_goes_back_does_not_have_the_newest_records_dropped(tmp_path: Path, clock: SimpleNamespace) -> None:
    journal = Journal(tmp_path, BOUND)
    ahead = 10**18
    clock.time_ns = lambda: time.time_ns() + ahead
    for n in range(5000):
        if n == 2500:
            ahead = 0
        journal.append({"n": n})
        if n % 100 == 0:
            account = Account(tmp_path)
            assert [record["n"] for record in account.present][-1] == n
    account = Account(tmp_path)
    assert [record["n"] for record in account.present] == list(range(5000 - len(account.present), 5000))
    assert account.total == 5000


def test_segment_of_a_live_writer_is_never_dropped(tmp_path: Path) -> None:
    quiet, busy = Journal(tmp_path, BOUND), Journal(tmp_path, BOUND)
    quiet.append({"n": "first"})
    for n in range(3000):
        busy.append({"n": n})
    quiet.append({"n": "last"})
    assert [each["n"] for each in Account(tmp_path).present if isinstance(each["n"], str)] == ["first", "last"]


def test_torn_loss_count_in_an_old_segment_does_not_stop_the_journal(tmp_path: Path) -> None:
    # As a power cut or a full disk leaves it.
    (tmp_path / f"{1:020d}-1.jsonl").write_bytes(b'{"dropped":12,"rea\n{"n":0}\n' + b"x" * SEGMENT + b"\n")
    journal = Journal(tmp_path, BOUND)
    for n in range(3000):
        journal.append({"n": n})
    account = Account(tmp_path)
    assert account.size <= BOUND + SEGMENT
    assert account.total >= 3000


WRITER = """
import sys
from pathlib import Path
from monitor import Journal
journal = Journal(Path(sys.argv[1]), int(sys.argv[2]))
for n in range(int(sys.argv[3])):
    journal.append({"n": n})
    if len(sys.argv) > 4:
        print(n, flush=True)
sys.stdin.read()
"""


def start(script: str, *arguments: Any) -> "subprocess.Popen[str]":
    """Run a script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def running(script: str, *arguments: Any) -> Iterator["subprocess.Popen[str]"]:
    """Run a script, which ends with the block at the latest."""
    process = start(script, *arguments)
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("writers", "each", "bound"),
    [(2, 5000, BOUND), (6, 2000, BOUND), (6, 700, BOUND // 8)],
    ids=["two", "six", "six with little room"],
)
def test_writers_at_once_lose_no_record_uncounted(tmp_path: Path, writers: int, each: int, bound: int) -> None:
    processes = [start(WRITER, tmp_path, bound, each) for _ in range(writers)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    account = Account(tmp_path)
    assert account.torn == 0
    assert account.total == writers * each
    assert account.size <= bound + writers * (bound // 16)
    ids = [record["record_id"] for record in account.present]
    assert len(set(ids)) == len(ids)


def test_threads_at_once_lose_no_record_uncounted(tmp_path: Path) -> None:
    # WORKER_CLASS=gthread: native threads share a worker's journal.
    journal = Journal(tmp_path, BOUND)
    raised = []

    def write() -> None:
        try:
            for n in range(1500):
                journal.append({"n": n})
        except Exception as error:
            raised.append(error)

    def descriptors() -> int:
        links = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        return sum(link.startswith(str(tmp_path)) for link in links)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # seconds; makes what is rare in production happen here
    try:
        threads = [threading.Thread(target=write) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not raised
    account = Account(tmp_path)
    assert (account.torn, account.total) == (0, 8 * 1500)
    assert descriptors() == 1, "descriptors leak"


# --- writers that end


def test_segment_is_finished_when_its_writer_is_done_or_dead(tmp_path: Path) -> None:
    journal = Journal(tmp_path, BOUND)
    journal.append({})
    (ours,) = segments(tmp_path)
    assert is_locked(ours)
    journal.close()
    assert not is_locked(ours)
    with running(WRITER, tmp_path, BOUND, 1, "tell") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        theirs = segments(tmp_path)[-1]
        assert theirs != ours
        assert is_locked(theirs)
        process.kill()
        process.wait()
        assert not is_locked(theirs)


def test_killed_writer_loses_nothing_that_it_wrote(tmp_path: Path) -> None:
    with running(WRITER, tmp_path, 10**9, 10**9, "tell") as process:
        assert process.stdout is not None
        for _ in range(2000):
            process.stdout.readline()
        process.kill()
        told = 2000 + len(process.stdout.read().split())
    account = Account(tmp_path)
    assert account.torn == 0
    assert len(account.present) in (told, told + 1)  # it may have been killed between writing and telling


FORKER = """
import os, sys
from pathlib import Path
from monitor import Journal
journal = Journal(Path(sys.argv[1]), 10**6)
journal.append({"who": "parent"})
ready, tell = os.pipe()
if os.fork() == 0:
    journal.append({"who": "child"})
    os.write(tell, b".")
    sys.stdin.read()
    os._exit(0)
journal.append({"who": "parent"})
os.read(ready, 1)
print("ready", flush=True)
os.wait()
"""


def test_forked_child_writes_its_own_segment_and_leaves_the_parents_lock(tmp_path: Path) -> None:
    with running(FORKER, tmp_path) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        lines = {path: [json.loads(line) for line in path.read_text().splitlines()] for path in segments(tmp_path)}
        (of_parent,) = (path for path in lines if path.stem.endswith(f"-{parent.pid}"))
        (of_child,) = set(lines) - {of_parent}
        assert [record["who"] for record in lines[of_parent]] == ["parent", "parent"]
        assert [record["who"] for record in lines[of_child]] == ["child"]
        assert lines[of_child][0]["pid"] == int(of_child.stem.split("-")[1]) != parent.pid
        assert len({record["record_id"] for path in lines for record in lines[path]}) == 3
        assert (is_locked(of_parent), is_locked(of_child)) == (True, True)
        parent.kill()
        parent.wait()
        assert (is_locked(of_parent), is_locked(of_child)) == (False, True), "the child holds the parent's lock"


# --- a journal that cannot be written


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The monotonic time as `monitor` sees it; `clock.now` may be set."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now, time=time.time, time_ns=time.time_ns)
    monkeypatch.setattr(monitor, "time", clock)
    monkeypatch.setattr(processes, "time", clock)
    return clock


def complaints(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelno == logging.ERROR and record.name == "monitor" for record in caplog.records)


def test_full_disk_is_survived_counted_and_told_once_a_minute(
    tmp_path: Path, clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, 2**24)
    with no_file_beyond(1000):
        for n in range(100):
            journal.append({"n": n})
        assert complaints(caplog) == 1
        clock.now += 61
        for n in range(100, 200):
            journal.append({"n": n})
        assert complaints(caplog) == 2
    journal.append({"n": 200})
    account = Account(tmp_path)
    assert account.torn == 1, "the limit is meant to cut a line"
    assert account.present[-1]["n"] == 200
    assert account.total == 201


def test_line_torn_by_a_full_disk_is_counted_once_also_when_its_segment_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path, BOUND)
    with no_file_beyond(1000):
        for n in range(20):
            journal.append({"n": n})
    for n in range(20, 3000):
        journal.append({"n": n})
    account = Account(tmp_path)
    assert account.torn == 0, "the torn line's segment is meant to be gone"
    assert account.total == 3000


def test_records_dropped_to_make_room_are_counted_also_when_the_disk_is_full(tmp_path: Path) -> None:
    journal = Journal(tmp_path, BOUND)
    for _ in range(40):
        journal.append({"fills": "x" * SEGMENT})
        with no_file_beyond(0):  # the next record opens a segment and drops the oldest, but nothing can be written
            journal.append({})
    journal.append({})
    assert Account(tmp_path).total == 81


def test_directory_that_is_a_file_is_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "journal"
    directory.write_text("in the way")
    journal = Journal(directory, BOUND)
    for n in range(5):
        journal.append({"n": n})
    assert complaints(caplog) == 1
    assert str(directory) in caplog.text
    directory.unlink()
    journal.append({"n": 5})
    account = Account(directory)
    assert (account.dropped, [record["n"] for record in account.present]) == (5, [5])


def test_directory_without_write_permission_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    # Not in tmp_path, which pytest opens to its own user only.
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "journal"
        directory.mkdir(mode=0o555)
        Path(place).chmod(0o755)
        journal = Journal(directory, BOUND)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # modes do not bind root
        try:
            journal.append({"n": 0})
        finally:
            if root:
                os.seteuid(0)
        assert complaints(caplog) == 1
        directory.chmod(0o755)
        journal.append({"n": 1})
        assert Account(directory).total == 2


def remove_directory(directory: Path) -> None:
    shutil.rmtree(directory)


def remove_segments(directory: Path) -> None:
    for path in segments(directory):
        path.unlink()


@pytest.mark.parametrize("remove", [remove_directory, remove_segments])
def test_journal_that_is_deleted_while_serving_is_begun_anew(client: Client, remove: Callable[[Path], None]) -> None:
    client.predict([[1]])
    remove(client.journal_dir)
    time.sleep(2.2)  # it is looked at once a second
    client.predict([[2], [3]])
    assert [record["rows"] for record in records(client.journal_dir)] == [2], "written to a file that nobody can read"


def test_prediction_is_answered_when_the_journal_cannot_be_written(client: Client) -> None:
    shutil.rmtree(client.journal_dir, ignore_errors=True)  # without any extra, the first record makes it
    client.journal_dir.write_text("in the way")
    assert client.predict([[1]]) == {"prediction": [1.0]}


# --- a real server


def test_killed_worker_loses_no_answered_request(tmp_path: Path, iris_file: Path) -> None:
    body = json.dumps({"data": ROWS}).encode()
    answered: list[str] = []
    stop = threading.Event()

    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=2) as server:

        def load(who: int) -> None:
            for n in range(10**9):
                if stop.is_set():
                    return
                name = f"{who}-{n}"
                with suppress(OSError, HTTPException):  # the killed worker's connections break off
                    status, _, _ = server.ask(
                        "POST",
                        "/predict",
                        body,
                        Content_Type="application/json",
                        Authorization=basic("predict"),
                        X_Request_ID=name,
                    )
                    assert status in (200, 503)  # 503 from the new worker, until it has loaded the model
                    answered.append(name)
                time.sleep(0.01)  # leaves the new worker a core to start on

        threads = [threading.Thread(target=load, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        try:
            server.wait_until(lambda: answered and len(segments(server.journal_dir)) == 2)  # both have had requests
            victim, other = server.workers()
            os.kill(victim, signal.SIGKILL)
            before = len(answered)
            server.wait_until(lambda: len(set(server.workers()) - {victim, other}) == 1)
            server.wait_until(lambda: len(segments(server.journal_dir)) == 3)  # the new one takes its share
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
        server.wait_until(lambda: server.log.read_text().count("serving version") >= 3)
        assert len(answered) > before > 0
        recorded = [record["request_id"] for record in records(server.journal_dir) if "event" not in record]
        assert set(answered) <= set(recorded)
        assert len(set(recorded)) == len(recorded)
        assert len(recorded) - len(answered) <= 4 * 2  # recorded, but the answer was lost with the worker
        assert not is_locked(next(path for path in segments(server.journal_dir) if path.stem.endswith(f"-{victim}")))
