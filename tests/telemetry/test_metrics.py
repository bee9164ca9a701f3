"""Metrics: right sums over workers that come, go and are killed; bounded labels; nothing that a caller wrote."""

import http.client
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Client, Gunicorn, Load, basic, free_port, gunicorn, records, write_users
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from monitor import LOSSES, UNWRITABLE, Journal, is_finished
from settings import Settings
from telemetry import shared_counters as slots
from telemetry.metrics import AUTH_STATUSES, OUTCOMES, Metrics

ROW = [5.1, 3.5, 1.4, 0.2]
SERVED: dict[str, Any] = {"ready": True, "stable": None, "canary": None}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    """Parse an exposition: (name, labels) → value. None stands twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def total(found: Samples, name: str, **labels: str) -> float:
    """Sum the samples of a name that have these labels."""
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
    assert total(found, "prediction_requests_total", outcome="client", **served) == 2
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


def test_versions_are_told_with_the_workers_that_serve_them(tmp_path: Path) -> None:
    workers = [{"stable": "7", "canary": "8", "error": None}] * 2 + [{"stable": "7", "canary": None, "error": "no"}]
    workers.append({"stable": None, "canary": None, "error": None})  # it still loads
    metrics = Metrics(tmp_path, workers=lambda: workers)
    stable, canary = ({"version": version, "load_seconds": seconds} for version, seconds in (("7", 0.5), ("8", 2.5)))
    found = samples(metrics.expose("", {"ready": True, "stable": stable, "canary": canary})[0].decode())
    served = {"model_version": "7", "variant": "stable"}, {"model_version": "8", "variant": "canary"}
    assert [total(found, "prediction_model_workers", **labels) for labels in served] == [3, 2]
    assert [total(found, "prediction_model_load_seconds", **labels) for labels in served] == [0.5, 2.5]
    assert total(found, "prediction_workers_with_error") == 1


def test_a_model_that_raises_counts_as_ours(serve: Any) -> None:
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
    iris.predict([ROW] * 5000)  # in pieces of 4096
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


def test_what_is_served_and_the_journal_are_looked_up(iris: Client) -> None:
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
    assert not any("waiting" in name or "shipped" in name for name, _ in found)  # nobody ships


def test_what_waits_is_told_also_while_no_shipper_could_start(tmp_path: Path) -> None:
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


def test_lost_records_are_counted_with_their_reason(serve: Any, iris_file: Path, tmp_path: Path) -> None:
    client = serve(iris_file)
    client.service.journal._directory = tmp_path / "a file"
    (tmp_path / "a file").touch()
    client.predict([ROW])
    client.predict([ROW])
    assert total(scraped(client), "prediction_records_dropped_total", reason=UNWRITABLE) == 2
    assert total(scraped(client), "prediction_records_dropped_total") == 2


def test_requests_in_flight_are_counted_while_they_are(iris: Client) -> None:
    entered, leave = threading.Event(), threading.Event()
    ask = iris.service.serving.choose

    def choose(*arguments: Any) -> Any:
        entered.set()
        assert leave.wait(30)
        return ask(*arguments)

    iris.service.serving.choose = choose
    caller = threading.Thread(target=iris.predict, args=([ROW],))
    caller.start()
    assert entered.wait(30)
    assert total(scraped(iris), "prediction_requests_in_flight") == 1
    leave.set()
    caller.join()
    assert total(scraped(iris), "prediction_requests_in_flight") == 0


# --- who may see them, and what is never in them


def test_metrics_need_their_role(iris: Client) -> None:
    assert iris.http.get("/metrics").status_code == 401
    assert iris.http.get("/metrics", headers={"Authorization": basic("metrics", "wrong")}).status_code == 401
    for user in ("predict", "admin", "monitor", "nobody"):
        assert iris.http.get("/metrics", headers={"Authorization": basic(user)}).status_code == 403
    found = scraped(iris)
    assert total(found, "prediction_auth_failures_total", status="401") == 2
    assert total(found, "prediction_auth_failures_total", status="403") == 4
    assert total(found, "prediction_requests_total") == 0  # which are those to /predict
    assert records(iris.journal_dir) == []


def test_metrics_are_open_where_auth_is_off(iris_file: Path, tmp_path: Path) -> None:
    client = Client(Settings(model_path=iris_file, auth="off", journal_dir=tmp_path / "journal"))
    client.headers = {}
    client.predict([ROW])
    answer = client.get("/metrics")
    assert (answer.status_code, answer.content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert total(samples(answer.text), "prediction_requests_total", outcome="success") == 1


def test_open_metrics_are_given_to_who_asks_for_them(iris: Client) -> None:
    iris.predict([ROW])
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
    answer = iris.http.get("/metrics", headers={"Authorization": basic("metrics"), "Accept": accept})
    assert answer.content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in openmetrics.text_string_to_metric_families(answer.text)}
    assert families["prediction_requests"].type == "counter"
    assert families["prediction_response_time_seconds"].type == "histogram"


def test_nothing_that_a_caller_wrote_is_in_a_label(iris: Client) -> None:
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


# --- the files, in processes of their own


@contextmanager
def forked(work: Callable[[], Any]) -> Iterator[int]:
    """Run `work` in a fork of this process, which then lives until it is killed with the block; yield its pid."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(writable, b"1")
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(writable)
    try:
        assert os.read(readable, 1) == b"1", "the child failed"
        yield pid
    finally:
        os.close(readable)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The directory of processes that are summed."""
    return tmp_path / "metrics"


def counting(place: Path, count: int, version: str = "1") -> Callable[[], Metrics]:
    """Return what counts so many requests, one of them still in flight."""

    def work() -> Metrics:
        metrics = Metrics(place, shared=place / "metrics")
        metrics.join()
        for _ in range(count):
            metrics.answered(0.002, {"error_type": "", "model_version": version, "variant": "stable"})
        metrics._in_flight.inc()
        return metrics

    return work


def summed(place: Path) -> Samples:
    """Return the sums, as a process that counts nothing itself sees them."""
    return samples(Metrics(place, shared=place / "metrics").expose("", SERVED)[0].decode())


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
def test_start_begins_from_zero_unless_somebody_still_counts(shared: Path, tmp_path: Path) -> None:
    with forked(counting(tmp_path, 5)):
        slots.clear(shared)  # another master, as at an upgrade by SIGUSR2
        assert total(summed(tmp_path), "prediction_requests_total") == 5
    slots.clear(shared)
    assert total(summed(tmp_path), "prediction_requests_total") == 0
    assert list(shared.iterdir()) == []


@forks
def test_fork_of_a_worker_does_not_keep_its_place(shared: Path, tmp_path: Path) -> None:
    def work() -> None:
        counting(tmp_path, 1)()
        if os.fork() == 0:  # as a library might; it outlives the worker for a moment
            time.sleep(5)
            os._exit(0)

    with forked(work):
        assert total(summed(tmp_path), "prediction_requests_in_flight") == 1
    assert total(summed(tmp_path), "prediction_requests_in_flight") == 0


@forks
def test_versions_without_end_are_bounded_in_bytes_and_series_and_all_are_counted(shared: Path, tmp_path: Path) -> None:
    def work() -> None:
        metrics = Metrics(tmp_path, shared=tmp_path / "metrics")
        metrics.join()
        for version in range(200):
            metrics.answered(0.01, {"error_type": "", "model_version": f"v{version}", "variant": "stable"})

    for _ in range(2):  # the second finds the files of the first
        with forked(work):
            pass
    found = summed(tmp_path)
    versions = {dict(labels)["model_version"] for name, labels in found if name == "prediction_requests_total"} - {""}
    assert 30 < len(versions) < 60
    assert total(found, "prediction_requests_total") == 400
    assert total(found, "prediction_requests_total", model_version="other") == 2 * (201 - len(versions))
    assert {path.name: path.stat().st_size for path in shared.glob("*.db")} == {
        f"{kind}_0.db": size for kind, size in slots.FILES.items()
    }


@forks
def test_process_without_room_for_its_files_lives_and_counts_once_there_is(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(tmp_path, shared=tmp_path / "metrics")
    success = {"error_type": "", "model_version": "1", "variant": "stable"}

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, resource.RLIM_INFINITY))  # the same as a disk that is full
        metrics.join()
        metrics.answered(0.002, success)
        metrics.join()
        assert len([each for each in caplog.records if "no metric has" in each.message]) == 1
        assert total(summed(tmp_path), "prediction_requests_total") == 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        metrics.join()
        metrics.answered(0.002, success)

    with forked(work):
        assert total(summed(tmp_path), "prediction_requests_total", outcome="success") == 1


def test_files_take_their_room_when_they_are_made(shared: Path) -> None:
    slot = slots.Slot(shared)
    for path in shared.glob("*.db"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size  # a hole would kill whoever writes into it later
    slot._leave()


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
        for _ in range(4):  # whoever is asked
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
        assert len(list((server.journal_dir / "metrics").glob("slot-*"))) <= 4  # those of the reload beside the old
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
                except (OSError, http.client.HTTPException):  # it was asked of the worker that was killed
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
        # One that was counted may have died before its answer was out.
        assert len(load.statuses) <= counted <= len(load.statuses) + len(load.errors)


def connected(server: Gunicorn) -> socket.socket:
    """Open a bare connection."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def test_requests_that_die_with_their_worker_are_not_in_flight_for_ever(tmp_path: Path, iris_file: Path) -> None:
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
        # The slot last: without it, the worker makes all again that is not there.
        for path in sorted((server.journal_dir / "metrics").iterdir(), key=lambda path: path.name.startswith("slot")):
            path.unlink()
        server.wait_until(lambda: total(scraped(server), "prediction_requests_in_flight") == 0 and _has_slot(server))
        ask_many(server, 2)
        assert total(scraped(server), "prediction_requests_total") == 2


def _has_slot(server: Gunicorn) -> bool:
    return (server.journal_dir / "metrics/histogram_0.db").exists()


def test_start_after_the_whole_server_was_killed_begins_from_zero(tmp_path: Path, iris_file: Path) -> None:
    for _ in range(2):
        with gunicorn(tmp_path, model_path=iris_file) as server:  # the block ends with SIGKILL for all
            ask_many(server, 4)
            assert total(scraped(server), "prediction_requests_total") == 4
        deadline = time.monotonic() + 60
        while not all(map(is_finished, (server.journal_dir / "metrics").glob("slot-*"))):  # workers are not waited for
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_journal_that_cannot_be_written_stops_neither_serving_nor_metrics(tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "journal").touch()
    with gunicorn(tmp_path, model_path=iris_file) as server:
        ask_many(server, 2)
        assert total(scraped(server), "prediction_ready") == 1
        assert "no metric has what this worker does" in server.log.read_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2.5 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", place]).returncode:
        pytest.skip("needs to mount a small disk: root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.long
def test_full_disk_neither_kills_workers_nor_stops_their_counting(
    tmp_path: Path, iris_file: Path, small_disk: Path
) -> None:
    settings = {"model_path": iris_file, "journal_dir": small_disk / "journal", "journal_max_bytes": 2**20}
    with gunicorn(tmp_path, web_concurrency=2, **settings) as server:
        ask_many(server, 10)
        with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1024))
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
        ask_many(server, 10)  # on files that are there
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
