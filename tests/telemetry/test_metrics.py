"""Metrics: right sums over workers that come, go and are killed, bounded labels, and nothing that a caller sent."""

import _thread
import http.client
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Client, Gunicorn, Load, SmallDisk, basic, free_port, gunicorn, records, write_users
from prometheus_client import Counter, Summary, registry, values
from prometheus_client import metrics as prometheus_metrics
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from monitor import LOSSES, UNWRITABLE, Journal
from settings import Settings
from telemetry import before_fork, report
from telemetry.metrics import AUTH_STATUSES, OUTCOMES, Metrics
from telemetry.shared_counters import FILES, SharedCounters
from worker_slot import WorkerSlot

ROW = [5.1, 3.5, 1.4, 0.2]
SERVED: dict[str, Any] = {"ready": True, "stable": None, "canary": None}
SUCCESS = {"error_type": "", "model_version": "1", "variant": "stable"}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    """Parse an exposition: (name, labels) → value. No pair may appear twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def total(found: Samples, name: str, **labels: str) -> float:
    """Return the sum of the samples that have a name and these labels."""
    return sum(value for (each, have), value in found.items() if each == name and labels.items() <= set(have))


def scraped(server: Gunicorn | Client) -> Samples:
    """Ask a server for its metrics."""
    if isinstance(server, Client):
        answer = server.http.get("/metrics", headers={"Authorization": basic("metrics")})
        assert answer.status_code == 200
        return samples(answer.text)
    status, _, body = server.ask("GET", "/metrics", Authorization=basic("metrics"))
    assert status == 200
    return samples(body.decode())


@pytest.fixture
def iris(serve: Any, iris_file: Path) -> Client:
    """A client of the iris model."""
    client: Client = serve(iris_file)
    return client


# --- what is counted, through the test client


def test_requests_are_counted_by_outcome_version_and_variant(iris: Client, serve: Any, tmp_path: Path) -> None:
    for _ in range(3):
        iris.predict([ROW])
    version = iris.post({"data": [ROW]}).headers["X-Model-Version"]
    assert iris.post({"data": []}).status_code == 422
    assert iris.post(b"{").status_code == 400
    assert iris.http.post("/predict").status_code == 401
    assert iris.post({"data": [ROW]}, Authorization=basic("nobody")).status_code == 403
    found = scraped(iris)
    served = {"model_version": version, "variant": "stable"}
    assert total(found, "prediction_requests_total", outcome="success", **served) == 4
    assert total(found, "prediction_requests_total", outcome="client", **served) == 1
    assert total(found, "prediction_requests_total", outcome="client", model_version="") == 1
    assert total(found, "prediction_requests_total", outcome="auth", model_version="", variant="") == 2
    assert total(found, "prediction_requests_total") == 8
    assert total(found, "prediction_response_time_seconds_count", **served) == 4
    assert 0 < total(found, "prediction_response_time_seconds_sum", **served) < 4
    for outcome in ("success", "client", "auth", "model", "overload", "internal"):  # 0 before it is 1
        assert ("prediction_requests_total", frozenset((served | {"outcome": outcome}).items())) in found
    broken = tmp_path / "broken.joblib"
    broken.write_bytes(b"")
    unready = serve(broken)
    assert unready.post({"data": [ROW]}).status_code == 503
    found = scraped(unready)
    assert total(found, "prediction_requests_total", outcome="model", model_version="") == 1
    assert total(found, "prediction_requests_total") == 1
    assert total(found, "prediction_model_load_failures_total") == 1
    assert total(found, "prediction_ready") == 0
    assert total(found, "prediction_workers_with_error") == 1


def test_versions_are_exposed_with_the_workers_that_serve_them(tmp_path: Path) -> None:
    published = [{"stable": "7", "canary": "8", "error": None}] * 2 + [{"stable": "7", "canary": None, "error": "no"}]
    published += [{"stable": None, "canary": None, "error": None}, {}]  # one still loads, one has published nothing
    slots = [WorkerSlot(tmp_path / "workers") for _ in published]
    for slot, state in zip(slots, published, strict=True):
        slot.publish(state)
    metrics = Metrics(tmp_path)
    stable, canary = ({"version": version, "load_seconds": seconds} for version, seconds in (("7", 0.5), ("8", 2.5)))
    found = samples(metrics.expose("", {"ready": True, "stable": stable, "canary": canary})[0].decode())
    served = {"model_version": "7", "variant": "stable"}, {"model_version": "8", "variant": "canary"}
    assert [total(found, "prediction_model_workers", **labels) for labels in served] == [3, 2]
    assert [total(found, "prediction_model_load_seconds", **labels) for labels in served] == [0.5, 2.5]
    assert total(found, "prediction_workers_with_error") == 1


def test_a_model_that_raises_counts_as_our_fault(serve: Any) -> None:
    client = serve(Raising())
    assert client.post({"data": [[-1.0]]}).status_code == 500
    assert total(scraped(client), "prediction_requests_total", outcome="model", variant="stable") == 1


class Raising:
    """A model that fails on negative rows."""

    n_features_in_ = 1

    def predict(self, rows: Any) -> Any:
        """Return zeros."""
        if np.min(rows) < 0:
            raise RuntimeError("negative")
        return np.zeros(len(rows))


def test_calls_of_the_model_are_counted_with_their_rows_and_waits(iris: Client) -> None:
    iris.predict([ROW] * 3)
    iris.predict([ROW] * 5000)  # in parts of 4096 at most
    found = scraped(iris)
    assert total(found, "prediction_batch_rows_count") == 3
    assert total(found, "prediction_batch_rows_sum") == 5003
    assert [total(found, "prediction_batch_rows_bucket", le=le) for le in ("1.0", "4.0", "1024.0", "4096.0")] == [
        0,
        1,
        2,
        3,
    ]
    assert total(found, "prediction_queue_wait_seconds_count") == 3
    assert 0 < total(found, "prediction_queue_wait_seconds_sum") < 3


def test_what_is_served_and_the_journals_size_are_looked_up(iris: Client) -> None:
    iris.predict([ROW])
    found = scraped(iris)
    version = iris.http.get("/model", headers={"Authorization": basic("admin")}).json["stable"]["version"]
    served = {"model_version": version, "variant": "stable"}
    assert total(found, "prediction_ready") == 1
    assert total(found, "prediction_model_workers", **served) == total(found, "prediction_model_workers") == 1
    assert total(found, "prediction_model_load_seconds", **served) > 0
    assert total(found, "prediction_workers_with_error") == 0
    size = sum(path.stat().st_size for path in iris.journal_dir.glob("*.jsonl"))
    assert total(found, "prediction_journal_bytes") == size > 0
    assert total(found, "prediction_journal_max_bytes") == 10**9
    disk = os.statvfs(iris.journal_dir)
    free = total(found, "prediction_journal_free_bytes")
    assert 0 < free <= disk.f_blocks * disk.f_frsize
    assert free % disk.f_frsize == 0
    assert not any("waiting" in name or "shipped" in name for name, _ in found)  # nobody ships


def test_waiting_records_are_exposed_even_if_no_shipper_could_start(tmp_path: Path) -> None:
    Journal(tmp_path, 2**24).append({"n": 1})
    (record,) = records(tmp_path)
    metrics = Metrics(tmp_path, ships=True)
    found = samples(metrics.expose("", SERVED)[0].decode())
    assert total(found, "prediction_journal_waiting_bytes") == total(found, "prediction_journal_bytes") > 0
    assert total(found, "prediction_journal_oldest_waiting_timestamp_seconds") == record["time"]
    assert found["prediction_records_shipped_total", frozenset()] == 0
    state = {"offsets": {}, "shipped": 7, "refused": 2, "dropped": 0, "error": None}
    (tmp_path / "ship.json").write_text(json.dumps(state))
    found = samples(metrics.expose("", SERVED)[0].decode())
    assert total(found, "prediction_records_shipped_total") == 7
    assert total(found, "prediction_records_refused_total") == 2
    assert total(found, "prediction_refused_records_bytes") == 0
    (tmp_path / "refused.json").write_text("{}\n" * 100)
    (tmp_path / "refused.old.json").write_text("{}\n")
    found = samples(metrics.expose("", SERVED)[0].decode())
    assert total(found, "prediction_refused_records_bytes") == 303


def test_nothing_is_missed_if_sls_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sls.shipper", None)
    Journal(tmp_path, 2**24).append({"n": 1})
    found = samples(Metrics(tmp_path, ships=True).expose("", SERVED)[0].decode())
    assert total(found, "prediction_journal_bytes") > 0
    assert not any("waiting" in name or "shipped" in name for name, _ in found)
    assert report.main(["--dir", str(tmp_path)]) == 0


def test_extension_is_cheap_to_import() -> None:
    code = "import sys, telemetry; sys.exit(bool({'prometheus_client', 'flask'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_lost_records_are_counted_with_their_reason(serve: Any, iris_file: Path, tmp_path: Path) -> None:
    client = serve(iris_file)
    client.service.journal._directory = tmp_path / "a file"
    (tmp_path / "a file").touch()
    client.predict([ROW])
    client.predict([ROW])
    assert total(scraped(client), "prediction_records_dropped_total", reason=UNWRITABLE) == 2
    assert total(scraped(client), "prediction_records_dropped_total") == 2


def test_requests_in_flight_are_counted_while_they_are_handled(iris: Client) -> None:
    entered, leave = threading.Event(), threading.Event()
    ask = iris.service.serving.choose

    def choose(**arguments: Any) -> Any:
        entered.set()
        assert leave.wait(30)
        return ask(**arguments)

    iris.service.serving.choose = choose
    caller = threading.Thread(target=iris.predict, args=([ROW],))
    caller.start()
    assert entered.wait(30)
    assert total(scraped(iris), "prediction_requests_in_flight") == 1
    leave.set()
    caller.join()
    assert total(scraped(iris), "prediction_requests_in_flight") == 0


# --- who may see them, and what they never contain


def test_metrics_need_their_role(iris: Client) -> None:
    assert iris.http.get("/metrics").status_code == 401
    assert iris.http.get("/metrics", headers={"Authorization": basic("metrics", "wrong")}).status_code == 401
    for user in ("predict", "admin", "monitor", "nobody"):
        assert iris.http.get("/metrics", headers={"Authorization": basic(user)}).status_code == 403
    found = scraped(iris)
    assert total(found, "prediction_auth_failures_total", status="401") == 2
    assert total(found, "prediction_auth_failures_total", status="403") == 4
    assert total(found, "prediction_requests_total") == 0  # only those to /predict are counted
    assert all("event" in record for record in records(iris.journal_dir))


def test_metrics_are_open_if_auth_is_off(iris_file: Path, tmp_path: Path) -> None:
    client = Client(Settings(model_path=iris_file, auth="off", journal_dir=tmp_path / "journal"))
    client.headers = {}
    client.predict([ROW])
    answer = client.get("/metrics")
    assert (answer.status_code, answer.content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert total(samples(answer.text), "prediction_requests_total", outcome="success") == 1


def test_openmetrics_format_is_used_if_the_client_accepts_it(iris: Client) -> None:
    iris.predict([ROW])
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
    answer = iris.http.get("/metrics", headers={"Authorization": basic("metrics"), "Accept": accept})
    assert answer.content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in openmetrics.text_string_to_metric_families(answer.text)}
    assert families["prediction_requests"].type == "counter"
    assert families["prediction_response_time_seconds"].type == "histogram"


def test_nothing_that_a_caller_sent_is_in_a_label(iris: Client) -> None:
    odd = {"X-Model-Version": "odd-a", "X-Routing-Key": "odd-b", "X-Request-ID": "odd-c", "User-Agent": "odd-d"}
    assert iris.post({"data": [ROW]}, **odd).status_code == 403
    assert iris.post({"data": [ROW], "method": "odd-e"}, Authorization=basic("odd-f")).status_code == 401
    assert iris.post({"data": [ROW]}, path="/predict/odd-g").status_code == 404
    assert iris.http.open("/predict", method="OPTIONS").status_code == 200
    assert iris.http.open("/predict", method="ODD").status_code == 405
    found = scraped(iris)
    assert "odd" not in str(found).lower()
    values = {value for _, labels in found for name, value in labels if name not in ("le", "model_version")}
    assert values <= {*OUTCOMES.values(), "stable", "", *LOSSES, *AUTH_STATUSES}
    assert total(found, "prediction_requests_total") == 2


# --- the files, in forked processes


@contextmanager
def forked(work: Callable[[], Any]) -> Iterator[int]:
    """Run `work` in a fork of this process, which lives until the block ends and it is killed; yield its pid."""
    for _ in range(3):
        pid, readable = fork_and_work(work)
        if os.read(readable, 1):
            break
        os.close(readable)
        # A thread of another test may have held a lock at the fork, for which the child would wait for ever.
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status), "the child failed"
        assert os.WTERMSIG(status) == signal.SIGALRM
    try:
        yield pid
    finally:
        os.close(readable)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def fork_and_work(work: Callable[[], Any]) -> tuple[int, int]:
    """Fork; return the child's pid, and a descriptor from which a byte can be read when it has done its work."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            work()
            signal.alarm(0)
            os.write(writable, b"1")
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(writable)
    return pid, readable


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The directory of the files."""
    return tmp_path / "metrics"


alive: list[WorkerSlot] = []  # as the slot of a service


def joined(place: Path) -> Metrics:
    """Return the metrics of this process as one of several workers."""
    slot = WorkerSlot(place / "workers")
    slot.take()
    metrics = Metrics(place)
    metrics.join(slot)
    alive.append(slot)
    return metrics


def counting(place: Path, count: int, version: str = "1") -> Callable[[], None]:
    """Return a function that counts so many requests, and another one that stays in flight."""

    def work() -> None:
        metrics = joined(place)
        for _ in range(count):
            metrics.count_request(0.002, SUCCESS | {"model_version": version})
        metrics._in_flight.inc()

    return work


def summed(place: Path) -> Samples:
    """Return the sums, as a process that counts nothing itself exposes them."""
    metrics = Metrics(place)
    metrics.join(WorkerSlot(place / "workers"))  # which has no number
    return samples(metrics.expose("", SERVED)[0].decode())


forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@forks
def test_successor_counts_on_where_a_killed_process_stopped(shared: Path, tmp_path: Path) -> None:
    with forked(counting(tmp_path, 5)), forked(counting(tmp_path, 7, "2")):
        assert total(summed(tmp_path), "prediction_requests_total") == 12
        assert total(summed(tmp_path), "prediction_requests_in_flight") == 2
    files = sorted(path.name for path in shared.iterdir())
    for killed in range(1, 4):
        found = summed(tmp_path)
        assert total(found, "prediction_requests_total") == 12 + 3 * (killed - 1)
        assert total(found, "prediction_requests_in_flight") == 0
        with forked(counting(tmp_path, 3)):
            found = summed(tmp_path)
            assert total(found, "prediction_requests_total") == 12 + 3 * killed
            assert total(found, "prediction_response_time_seconds_count", model_version="1") == 5 + 3 * killed
            assert math.isclose(total(found, "prediction_response_time_seconds_sum"), 0.002 * (12 + 3 * killed))
            assert total(found, "prediction_requests_in_flight") == 1
    assert sorted(path.name for path in shared.iterdir()) == files


@forks
def test_start_begins_from_zero_unless_a_worker_still_lives(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("telemetry._has_workers", False)  # which before_fork sets
    settings = Settings(journal_dir=tmp_path)
    with forked(counting(tmp_path, 5)):
        before_fork(settings)  # another master, as at an upgrade by SIGUSR2
        assert total(summed(tmp_path), "prediction_requests_total") == 5
    (shared / ".counter_7.db-abcd").touch()  # a worker was killed while it made a file
    before_fork(settings)
    assert total(summed(tmp_path), "prediction_requests_total") == 0
    assert list(shared.iterdir()) == []


@forks
def test_fork_of_a_worker_does_not_keep_its_slot(shared: Path, tmp_path: Path) -> None:
    def work() -> None:
        counting(tmp_path, 1)()
        if os.fork() == 0:  # as a library might; it outlives the worker for a moment
            time.sleep(5)
            os._exit(0)

    with forked(work):
        assert total(summed(tmp_path), "prediction_requests_in_flight") == 1
    # The fork lets the slot go as soon as it runs, which may be after the worker's end.
    deadline = time.monotonic() + 3  # it lives for five seconds
    while total(summed(tmp_path), "prediction_requests_in_flight") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert total(summed(tmp_path), "prediction_requests_in_flight") == 0


@forks
def test_versions_without_end_are_bounded_in_bytes_and_series_and_all_are_counted(shared: Path, tmp_path: Path) -> None:
    def work() -> None:
        metrics = joined(tmp_path)
        for variant in "stable", "canary":
            for version in range(200):
                metrics.count_request(0.01, {"error_type": "", "model_version": f"v{version}", "variant": variant})

    for _ in range(2):  # the second one finds the files of the first
        with forked(work):
            pass
    found = summed(tmp_path)
    versions = {dict(labels)["model_version"] for name, labels in found if name == "prediction_requests_total"} - {""}
    assert 30 < len(versions) < 60
    assert total(found, "prediction_requests_total") == 800
    other = [total(found, "prediction_requests_total", model_version="other", variant=v) for v in ("stable", "canary")]
    assert other == [2 * (201 - len(versions)), 400]
    assert {path.name: path.stat().st_size for path in shared.glob("*.db")} == {
        f"{kind}_0.db": size for kind, size in FILES.items()
    }


@forks
def test_files_do_not_grow_whatever_else_is_counted_in_a_worker(shared: Path, tmp_path: Path) -> None:
    def work() -> None:
        joined(tmp_path)
        counter = Counter("mine", "Of an extension, say", ("label",), registry=None)
        for number in range(1000):
            counter.labels(f"value-{number}").inc()
        Summary("mine_too", "Of a kind that has no file", registry=None).observe(1)

    for _ in range(2):
        with forked(work):
            pass
    found = summed(tmp_path)
    assert 200 < len([name for name, _ in found if name == "mine_total"]) < 1000
    assert total(found, "mine_total", label="value-0") == total(found, "mine_total", label="value-100") == 2
    assert {path.name: path.stat().st_size for path in shared.glob("*.db")} == {
        f"{kind}_0.db": size for kind, size in FILES.items()
    }


@forks
def test_process_without_room_for_its_files_lives_and_counts_once_there_is(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, resource.RLIM_INFINITY))  # the same as a disk that is full
        metrics = joined(tmp_path)
        metrics.count_request(0.002, SUCCESS)
        metrics.join(alive[0])
        assert len([each for each in caplog.records if "lacks this worker" in each.message]) == 1
        assert total(summed(tmp_path), "prediction_requests_total") == 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        metrics.join(alive[0])
        metrics.count_request(0.002, SUCCESS)

    with forked(work):
        assert total(summed(tmp_path), "prediction_requests_total", outcome="success") == 1


def test_files_take_their_room_when_they_are_made(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)  # both are set by what follows
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    SharedCounters(shared, 0)
    for path in shared.glob("*.db"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size  # a write to a hole could kill the process later


GEVENT = """
from gevent import monkey

monkey.patch_all()
import sys, threading
from pathlib import Path

from gevent import get_hub

from worker_slot import WorkerSlot
from telemetry.metrics import Metrics

place = Path(sys.argv[1])
slot = WorkerSlot(place / "workers")
slot.take()
metrics = Metrics(place)
metrics.join(slot)
sys.setswitchinterval(1e-6)  # seconds


def count():
    for number in range(5000):
        metrics.count_batch(1, 0.001)
        metrics.count_request(0.001, {"error_type": "", "model_version": str(number % 20), "variant": "stable"})


tasks = [get_hub().threadpool.spawn(count) for _ in range(4)]
count()  # on the loop
for task in tasks:
    task.get()
"""


def test_loop_and_native_threads_count_at_once(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", GEVENT, tmp_path], cwd=ROOT, check=True, timeout=120)
    assert {type(module.Lock()) for module in (prometheus_metrics, registry, values)} == {type(_thread.RLock())}
    found = summed(tmp_path)
    assert total(found, "prediction_requests_total") == total(found, "prediction_batch_rows_count") == 5 * 5000


# --- real gunicorn


def ask_many(server: Gunicorn, count: int) -> None:
    """Send requests one after the other, each on a connection of its own, so that all workers get some."""
    for _ in range(count):
        assert server.predict([ROW])[0] == 200


@pytest.mark.parametrize(
    "setting",
    [{}, pytest.param({"worker_class": "gthread"}, marks=pytest.mark.long), {"preload": 1}],
    ids=["gevent", "gthread", "preload"],
)
def test_sums_are_right_over_several_workers_a_killed_one_and_a_reload(
    tmp_path: Path, iris_file: Path, setting: dict[str, Any]
) -> None:
    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=2, **setting) as server:
        server.wait_until(lambda: total(scraped(server), "prediction_model_workers") == 2)  # a moment after they serve
        with Load(server, callers=8, pause=0.001) as load:
            server.wait_until(lambda: len(load.statuses) > 200)
        sent = len(load.statuses)
        assert load.errors == []
        # Each worker notes once a second what it has in flight.
        server.wait_until(lambda: total(scraped(server), "prediction_requests_in_flight") == 0)
        for _ in range(4):  # any worker may answer
            found = scraped(server)
            assert total(found, "prediction_requests_total", outcome="success") == sent
            assert total(found, "prediction_requests_total") == sent
            assert total(found, "prediction_response_time_seconds_count") == sent
            assert total(found, "prediction_batch_rows_sum") == sent
            assert total(found, "prediction_requests_in_flight") == 0
            assert total(found, "prediction_model_workers") == 2
        highest = 0.0
        for signalled in ("kill", "kill", "reload"):
            before = server.workers()
            if signalled == "kill":
                os.kill(before[0], signal.SIGKILL)
            else:
                server.process.send_signal(signal.SIGHUP)
            server.wait_until(
                lambda old=before, kind=signalled: (
                    len(server.workers()) == 2 and len(set(server.workers()) & set(old)) == (kind == "kill")
                )
            )
            server.wait_until(lambda: total(scraped(server), "prediction_model_workers") == 2)
            ask_many(server, 10)
            sent += 10
            found = scraped(server)
            assert total(found, "prediction_requests_total") == sent >= highest
            assert total(found, "prediction_batch_rows_sum") == sent
            highest = sent
        assert len(list((server.journal_dir / "metrics").glob("counter_*"))) <= 4  # those of the reload beside the old
        assert "Traceback" not in server.log.read_text()


@pytest.mark.long
@pytest.mark.parametrize("worker_class", ["gevent", "gthread"])
def test_no_sum_goes_down_while_workers_die_under_load(tmp_path: Path, iris_file: Path, worker_class: str) -> None:
    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=2, worker_class=worker_class) as server:
        highest: Samples = {}
        scrapes = 0

        def watch(seconds: float) -> None:
            nonlocal scrapes
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                try:
                    found = scraped(server)
                except (OSError, http.client.HTTPException):  # the worker that was asked was killed
                    continue
                scrapes += 1
                for (name, labels), value in highest.items():
                    if name.endswith(("_total", "_count", "_sum", "_bucket")):
                        assert found[name, labels] >= value, (name, labels)
                highest.update(found)

        with Load(server, callers=6, pause=0.001) as load:
            watch(1.0)
            for _ in range(2):
                os.kill(server.workers()[0], signal.SIGKILL)
                watch(2.0)
            server.process.send_signal(signal.SIGHUP)
            watch(4.0)
        assert scrapes > 5
        assert set(load.statuses) == {200}
        counted = total(scraped(server), "prediction_requests_total")
        # A worker may have died after it counted a request and before it answered.
        assert len(load.statuses) <= counted <= len(load.statuses) + len(load.errors)


def connected(server: Gunicorn) -> socket.socket:
    """Open a connection."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def test_requests_that_die_with_their_worker_are_no_longer_in_flight(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=2) as server, connected(server) as connection:
        head = f"POST /predict HTTP/1.1\r\nHost: a\r\nAuthorization: {basic('predict')}\r\nContent-Length: 9\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())  # its body does not come
        server.wait_until(lambda: total(scraped(server), "prediction_requests_in_flight") == 1)
        for worker in server.workers():
            os.kill(worker, signal.SIGKILL)
        server.wait_until(lambda: server.is_ready() and total(scraped(server), "prediction_requests_in_flight") == 0)


def test_metrics_that_were_removed_begin_again(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file) as server:
        ask_many(server, 3)
        directory = server.journal_dir / "metrics"
        shutil.rmtree(directory)
        server.wait_until(lambda: len(list(directory.glob("*.db"))) == len(FILES))
        server.wait_until(lambda: "prediction_batch_rows_count" in {name for name, _ in scraped(server)})
        ask_many(server, 2)
        assert total(scraped(server), "prediction_requests_total") == 2


def test_start_after_the_whole_server_was_killed_begins_from_zero(tmp_path: Path, iris_file: Path) -> None:
    for _ in range(2):
        with gunicorn(tmp_path, model_path=iris_file) as server:  # the block ends with SIGKILL for all
            ask_many(server, 4)
            assert total(scraped(server), "prediction_requests_total") == 4
        deadline = time.monotonic() + 60
        while WorkerSlot.read(server.journal_dir / "workers"):  # the block did not wait for the workers
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_journal_that_cannot_be_written_stops_neither_serving_nor_metrics(tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "journal").touch()
    with gunicorn(tmp_path, model_path=iris_file) as server:
        ask_many(server, 2)
        assert total(scraped(server), "prediction_ready") == 1
        assert "GET /metrics lacks this worker" in server.log.read_text()


@pytest.mark.long
def test_full_disk_neither_kills_workers_nor_stops_their_counting(
    tmp_path: Path, iris_file: Path, small_disk: SmallDisk
) -> None:
    settings = {
        "model_path": iris_file,
        "journal_dir": small_disk.mount("2500k") / "journal",
        "journal_max_bytes": 2**20,
    }
    with gunicorn(tmp_path, web_concurrency=2, **settings) as server:
        ask_many(server, 10)
        small_disk.fill()
        workers = server.workers()
        ask_many(server, 50)
        found = scraped(server)
        assert server.workers() == workers
        assert total(found, "prediction_requests_total") == 60
        assert total(found, "prediction_records_dropped_total", reason=UNWRITABLE) > 0
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        server.wait_until(lambda: len(server.workers()) == 2 and not {*server.workers()} & {*workers})
        server.wait_until(server.is_ready)
        ask_many(server, 10)  # counted in the files that exist
        assert total(scraped(server), "prediction_requests_total") == 70


def test_flask_run_has_metrics(tmp_path: Path, iris_file: Path) -> None:
    port = free_port()
    environ = os.environ | {
        "MODEL_PATH": str(iris_file),
        "USERS_FILE": str(write_users(tmp_path / "users.json")),
        "JOURNAL_DIR": str(tmp_path / "journal"),
    }
    arguments = [sys.executable, "-m", "flask", "--app", "server", "run", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(arguments, cwd=ROOT, env=environ, stderr=log, stdout=log)
    server = Gunicorn(process, port, tmp_path, tmp_path / "log", 1)
    try:
        server.wait_until(server.is_ready)
        ask_many(server, 3)
        assert total(scraped(server), "prediction_requests_total", outcome="success") == 3
    finally:
        process.kill()
        process.wait()
