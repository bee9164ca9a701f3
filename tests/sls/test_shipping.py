"""Every answered request is stored in SLS, whatever happens on the way: real gunicorn, real SDK, a loopback SLS."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Gunicorn, Load, free_port, write_users
from loopback_sls import LoopbackSLS
from sls_tools import assert_all_arrive, shippers, shipping, state, stored

from monitor import Journal, segments


@pytest.mark.parametrize(
    ("worker_class", "preload"),
    [
        ("gevent", 0),
        pytest.param("gthread", 0, marks=pytest.mark.long),
        pytest.param("gevent", 1, marks=pytest.mark.long),
        pytest.param("gthread", 1, marks=pytest.mark.long),
    ],
)
def test_records_arrive_as_sls_takes_them_and_segments_that_are_sent_go(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS, worker_class: str, preload: int
) -> None:
    with shipping(tmp_path, iris_file, sls, worker_class=worker_class, preload=preload) as server:
        with Load(server) as load:
            server.wait_until(lambda: len(load.answered) > 20)
        assert_all_arrive(sls, load.answered)
        entry = next(entry for entry in sls.logs if entry["request_id"] == load.answered[0])
        assert entry["__topic__"] == "model_service_monitor"
        assert abs(entry["__time__"] - time.time()) < 120  # seconds, where milliseconds would be in the year 50,000
        assert (entry["success"], entry["error"], entry["status"], entry["user"]) == ("true", "", "200", "predict")
        server.wait_until(lambda: len(segments(server.journal_dir)) <= 2)  # those that the workers still write


def test_records_arrive_from_flask_run(tmp_path: Path, iris_file: Path, sls: LoopbackSLS) -> None:
    port = free_port()
    settings = {
        "MODEL_PATH": str(iris_file),
        "USERS_FILE": str(write_users(tmp_path / "users.json")),
        "JOURNAL_DIR": str(tmp_path / "journal"),
        "GRACEFUL_TIMEOUT": "10",
    }
    command = [sys.executable, "-m", "flask", "--app", "server", "run", "--port", str(port)]
    with (tmp_path / "flask.log").open("wb") as log, ExitStack() as stack:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | settings | sls.environ(), stdout=log, stderr=log, start_new_session=True
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        server = Gunicorn(process, port, tmp_path, tmp_path / "flask.log", 1)
        server.wait_until(server.is_ready)
        with Load(server) as load:
            server.wait_until(lambda: len(load.answered) > 20)
        assert_all_arrive(sls, load.answered)
        process.terminate()
        sls.wait_until(lambda: not shippers(tmp_path / "journal"))


@pytest.mark.long
def test_sls_down_for_the_whole_run_and_back_costs_no_record(tmp_path: Path, iris_file: Path, sls: LoopbackSLS) -> None:
    sls.down()
    with shipping(tmp_path, iris_file, sls) as server:
        with Load(server) as load:
            time.sleep(4)
            server.wait_until(lambda: len(load.answered) > 20)
        sls.up()
        assert_all_arrive(sls, load.answered)


@pytest.mark.long
def test_throttling_for_ten_seconds_costs_no_record(tmp_path: Path, iris_file: Path, sls: LoopbackSLS) -> None:
    with shipping(tmp_path, iris_file, sls) as server, Load(server, callers=1) as load:
        sls.wait_until(lambda: bool(sls.logs))
        sls.mode = "throttled"
        time.sleep(10)
        before = len(sls.logs)
        sls.mode = "ok"
        assert_all_arrive(sls, list(load.answered))
        assert sls.outcomes["ShardWriteQuotaExceed"] < 12, "it backs off"
        assert len(sls.logs) > before


@pytest.mark.long
@pytest.mark.parametrize("mode", ["reset", "lying reset", "lying"])
def test_lost_answers_store_a_record_twice_and_never_not_at_all(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS, mode: str
) -> None:
    with shipping(tmp_path, iris_file, sls) as server:
        with Load(server) as load:
            sls.wait_until(lambda: bool(sls.logs))
            for _ in range(3):
                sls.mode = mode
                time.sleep(0.5)
                seen = sls.outcomes[mode]
                sls.wait_until(lambda seen=seen: sls.outcomes[mode] > seen)  # type: ignore[misc]  # mypy and defaults
                sls.mode = "ok"
                sls.release()
            assert set(load.statuses) == {200}
            assert not load.errors
        assert_all_arrive(sls, load.answered, twice=mode.startswith("lying"))


def test_killed_shipper_is_replaced_and_sends_no_record_twice_but_what_it_had_under_way(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS
) -> None:
    with shipping(tmp_path, iris_file, sls) as server:
        with Load(server) as load:
            server.wait_until(lambda: bool(sls.logs))
            sls.mode = "lying"  # stored and not yet acknowledged: killed between the two
            server.wait_until(lambda: sls.outcomes["lying"] > 0)
            doubtful = set(stored(sls))
            server.wait_until(lambda: len(shippers(server.journal_dir)) == 1)  # each worker may have started one
            (old,) = shippers(server.journal_dir)
            os.kill(old, signal.SIGKILL)
            sls.mode = "ok"
            server.wait_until(lambda: shippers(server.journal_dir) not in ([], [old]))
            time.sleep(1)
        assert_all_arrive(sls, load.answered, twice=True)
    twice = {name for name, count in stored(sls).items() if count > 1}
    assert twice
    assert twice <= doubtful


@pytest.mark.long
def test_everything_killed_at_once_leaves_its_records_to_the_next_start(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS
) -> None:
    sls.down()
    with shipping(tmp_path, iris_file, sls) as server, Load(server) as load:
        time.sleep(3)
        server.wait_until(lambda: len(load.answered) > 20)
        for pid in [*shippers(server.journal_dir), *server.workers(), server.process.pid]:
            os.kill(pid, signal.SIGKILL)
    sls.up()
    with shipping(tmp_path, iris_file, sls):
        assert_all_arrive(sls, load.answered)


@pytest.mark.long
def test_killed_service_leaves_no_shipper_for_longer_than_the_drain_time(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS
) -> None:
    sls.mode = "hang"
    with shipping(tmp_path, iris_file, sls, graceful_timeout=3) as server, Load(server) as load:
        sls.wait_until(lambda: sls.outcomes["hang"] > 0 and len(load.answered) > 20)
        for pid in [server.process.pid, *server.workers()]:
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        sls.wait_until(lambda: not shippers(server.journal_dir))
        assert time.monotonic() - began < 20  # seconds; the drain time is 3, where it is not set 30
    sls.mode = "ok"
    with shipping(tmp_path, iris_file, sls):
        assert_all_arrive(sls, load.answered)


def test_stopped_server_ships_what_it_has_and_its_shipper_ends(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS
) -> None:
    with shipping(tmp_path, iris_file, sls) as server:
        with Load(server) as load:
            server.wait_until(lambda: sls.logs and len(load.answered) > 20)
            assert server.stop() == 0
        sls.wait_until(lambda: not shippers(server.journal_dir))
        assert_all_arrive(sls, load.answered, 0.1)
        assert segments(server.journal_dir) == []


@pytest.mark.long
def test_reload_costs_no_record(tmp_path: Path, iris_file: Path, sls: LoopbackSLS) -> None:
    with shipping(tmp_path, iris_file, sls) as server:
        with Load(server) as load:
            server.wait_until(lambda: len(load.answered) > 20)
            old = set(server.workers())
            server.process.send_signal(signal.SIGHUP)
            server.wait_until(lambda: len(server.workers()) == 2 and not old & set(server.workers()))
            time.sleep(1)
        assert set(load.statuses) == {200}
        assert_all_arrive(sls, load.answered)


@pytest.mark.long
def test_two_services_on_one_host_do_not_mix(tmp_path: Path, iris_file: Path, sls: LoopbackSLS) -> None:
    with LoopbackSLS() as other, ExitStack() as stack:
        loads = []
        for place, target in (tmp_path / "one", sls), (tmp_path / "other", other):
            place.mkdir()
            server = stack.enter_context(shipping(place, iris_file, target, web_concurrency=1))
            loads.append(stack.enter_context(Load(server)))
        sls.wait_until(lambda: all(len(load.answered) > 20 for load in loads))
        assert_all_arrive(sls, list(loads[0].answered))
        assert_all_arrive(other, list(loads[1].answered))
        assert not set(stored(sls)) & set(loads[1].answered)
        assert not set(stored(other)) & set(loads[0].answered)


def test_full_disk_stops_neither_serving_nor_shipping_and_what_it_cost_is_reported(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS
) -> None:
    with shipping(tmp_path, iris_file, sls, web_concurrency=1) as server:
        (worker,) = server.workers()
        with Load(server) as load:
            server.wait_until(lambda: bool(segments(server.journal_dir)))
            size = segments(server.journal_dir)[0].stat().st_size
            # No file of the worker's may grow past that: to it, a disk that is full in the middle of a line.
            resource.prlimit(worker, resource.RLIMIT_FSIZE, (size + 1000, resource.RLIM_INFINITY))
            answered = len(load.answered)
            server.wait_until(lambda: len(load.answered) > answered + 50)
            resource.prlimit(worker, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            answered = len(load.answered)
            server.wait_until(lambda: len(load.answered) > answered + 20)
        assert set(load.statuses) == {200}
        assert not load.errors
        assert server.log.read_text().count("records are being lost") == 1
        with Load(server, callers=1) as last:  # which is journalled after all the others
            server.wait_until(lambda: last.answered)
        sls.wait_until(lambda: last.answered[0] in stored(sls))
        lost = set(load.answered) - set(stored(sls))
        reported = [entry for entry in sls.logs if "dropped" in entry]
        assert lost
        assert sum(int(entry["dropped"]) for entry in reported) == len(lost)
        assert {entry["reason"] for entry in reported} == {"the journal could not be written"}


@pytest.mark.long
def test_journal_that_is_removed_stops_nothing(tmp_path: Path, iris_file: Path, sls: LoopbackSLS) -> None:
    with shipping(tmp_path, iris_file, sls) as server:
        with Load(server) as load:
            sls.wait_until(lambda: bool(sls.logs))
            server.journal_dir.rename(tmp_path / "away")  # at once, since the workers write to it
            server.journal_dir.write_text("in the way")
            shutil.rmtree(tmp_path / "away")
            time.sleep(2)
            server.journal_dir.unlink()
            time.sleep(1)
            answered = len(load.answered)
            server.wait_until(lambda: len(load.answered) > answered + 20)
        assert set(load.statuses) == {200}
        assert not load.errors
        assert_all_arrive(sls, load.answered[answered:])
        server.wait_until(lambda: len(shippers(server.journal_dir)) == 1)


@pytest.mark.long
def test_journal_that_is_full_drops_the_oldest_and_reports_how_many(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS
) -> None:
    sls.down()
    before = Journal(tmp_path / "journal", 2**20, writers=1)  # what an earlier start could not ship
    old = [f"old-{n}" for n in range(3900)]
    for name in old:
        before.append({"request_id": name, "filling": "x" * 150})
    before.close()
    with shipping(tmp_path, iris_file, sls, journal_max_bytes=2**20, web_concurrency=1) as server:
        with Load(server) as load:
            server.wait_until(lambda: "the journal is full" in server.log.read_text())
        sls.up()
        sls.wait_until(lambda: set(load.answered) <= set(stored(sls)))

        def dropped() -> int:
            return sum(int(entry["dropped"]) for entry in list(sls.logs) if "dropped" in entry)

        sls.wait_until(lambda: 0 < dropped() == state(tmp_path).get("dropped"))  # it counts what it has sent
        lost = set(old) - set(stored(sls))
        assert len(lost) <= dropped()  # the shipper still sends the batch that it held when its segment went


def test_keys_appear_nowhere(tmp_path: Path, iris_file: Path, sls: LoopbackSLS) -> None:
    keys = {"key_id": "LTAI-fake-and-easy-to-find", "secret": "a-fake-secret-easy-to-find", "token": "a-fake-token"}
    sls.key_id, sls.secret, sls.token = keys.values()
    wrong = keys["secret"][::-1]
    with shipping(tmp_path, iris_file, sls, ALIBABA_CLOUD_ACCESS_KEY_SECRET=wrong) as server, Load(server, callers=1):
        sls.wait_until(lambda: sls.outcomes["SignatureNotMatch"] > 0)
    with shipping(tmp_path, iris_file, sls) as server, Load(server, callers=1) as load:
        sls.mode = "wrong key"
        # The error of the wrong secret is there until records are taken.
        sls.wait_until(lambda: (state(tmp_path).get("error") or {}).get("code") == "Unauthorized")
        report = subprocess.run(
            [sys.executable, "-m", "telemetry.report", "--dir", str(server.journal_dir)],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "Unauthorized" in report.stdout
        answers: list[Any] = [server.ask("GET", "/model"), server.predict([[1, 2, 3]])]
    assert load.answered
    shown = report.stdout + report.stderr + repr(answers)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            with suppress(FileNotFoundError):  # a shipper that is being killed may still remove or rename it
                shown += path.read_text(errors="replace")
    for key in keys.values():
        assert key not in shown
        assert key[::-1] not in shown
