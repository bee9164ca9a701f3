"""Every answered request is stored in SLS, whatever happens on the way: real gunicorn, real SDK, a loopback SLS."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Gunicorn, Load, gunicorn, records
from loopback_sls import LoopbackSLS

from monitor import Journal, segments
from sls.shipper import Shipper


@pytest.fixture
def sls() -> Iterator[LoopbackSLS]:
    with LoopbackSLS() as running:
        yield running


@contextmanager
def shipping(place: Path, model: Path, sls: LoopbackSLS, **settings: Any) -> Iterator[Gunicorn]:
    """Run a gunicorn of two workers that ships to the loopback SLS; its shipper is ended with the block."""
    given = {"model_path": model, "web_concurrency": 2, "graceful_timeout": 10} | sls.environ() | settings
    try:
        with gunicorn(place, **given) as server:
            yield server
    finally:
        for pid in shippers(place / "journal"):
            os.kill(pid, signal.SIGKILL)


def shippers(journal: Path) -> list[int]:
    """Return the pids of the processes that hold the journal's shipper lock open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"\0sls\0ship" in (process / "cmdline").read_bytes() and any(
                os.readlink(fd) == str(journal / "ship.lock") for fd in (process / "fd").iterdir()
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def stored(sls: LoopbackSLS) -> Counter[str]:
    """Count how often each request is stored."""
    return Counter(entry["request_id"] for entry in list(sls.logs) if entry.get("request_id"))


def assert_all_arrive(sls: LoopbackSLS, answered: list[str], seconds: float = 40.0) -> None:
    """Wait until each answered request is stored."""
    sls.wait_until(lambda: set(answered) <= set(stored(sls)), seconds)
    assert len(answered) > 10


def test_records_arrive_as_sls_takes_them_and_segments_that_are_sent_go(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS
) -> None:
    with shipping(tmp_path, iris_file, sls) as server:
        with Load(server) as load:
            time.sleep(2)
        assert_all_arrive(sls, load.answered)
        assert max(stored(sls).values()) == 1
        entry = next(entry for entry in sls.logs if entry["request_id"] == load.answered[0])
        assert entry["__topic__"] == "model_service_monitor"
        assert abs(entry["__time__"] - time.time()) < 120  # seconds, where milliseconds would be in the year 50,000
        assert (entry["success"], entry["error"], entry["status"], entry["user"]) == ("true", "", "200", "predict")
        server.wait_until(lambda: len(segments(server.journal_dir)) <= 2)  # those that the workers still write


@pytest.mark.parametrize(
    "mode", ["throttled", "quota", "error500", "busy", "reset", "wrong key", "no logstore", "skew"]
)
def test_what_sls_does_not_take_waits_until_it_does(tmp_path: Path, sls: LoopbackSLS, mode: str) -> None:
    sls.mode = mode
    journal = Journal(tmp_path / "journal", 10**7)
    for n in range(50):
        journal.append({"request_id": str(n)})
    journal.close()
    with shipper(tmp_path, sls, "--forever"):
        sls.wait_until(lambda: state(tmp_path).get("error") is not None)
        assert not sls.logs
        assert "KEY" not in json.dumps(state(tmp_path)).upper().replace("ACCESS_KEY", "").replace("ACCESSKEY", "")
        if mode in ("wrong key", "no logstore", "skew"):
            return  # tried again after half a minute, when an operator may have acted
        sls.mode = "ok"
        sls.wait_until(lambda: len(stored(sls)) == 50)
        assert max(stored(sls).values()) == 1


def test_sls_down_for_the_whole_run_and_back_costs_no_record(tmp_path: Path, iris_file: Path, sls: LoopbackSLS) -> None:
    sls.down()
    with shipping(tmp_path, iris_file, sls) as server:
        with Load(server) as load:
            time.sleep(4)
        sls.up()
        assert_all_arrive(sls, load.answered)
        assert max(stored(sls).values()) == 1


def test_killed_shipper_is_replaced_and_sends_no_record_twice_but_what_it_had_under_way(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS
) -> None:
    with shipping(tmp_path, iris_file, sls) as server:
        with Load(server) as load:
            server.wait_until(lambda: len(shippers(server.journal_dir)) == 1)
            server.wait_until(lambda: bool(sls.logs))
            for _ in range(2):
                (old,) = shippers(server.journal_dir)
                os.kill(old, signal.SIGKILL)
                server.wait_until(lambda old=old: shippers(server.journal_dir) not in ([], [old]), 15)
                time.sleep(2.5)
        assert_all_arrive(sls, load.answered)
    # What the killed one had under way may be stored twice, under the same record ids: one record id a request.
    pairs = {(entry["request_id"], entry["record_id"]) for entry in sls.logs}
    assert len(pairs) == len(stored(sls))


def test_lost_acknowledgement_stores_a_batch_twice_under_the_same_record_ids(tmp_path: Path, sls: LoopbackSLS) -> None:
    sls.mode = "lying reset"
    journal = Journal(tmp_path / "journal", 10**7)
    for n in range(20):
        journal.append({"request_id": str(n)})
    journal.close()
    with shipper(tmp_path, sls, "--forever"):
        sls.wait_until(lambda: len(sls.logs) >= 20)
        sls.mode = "ok"
        sls.wait_until(lambda: min(stored(sls).values()) >= 2)
    assert len({entry["record_id"] for entry in sls.logs}) == 20


def test_everything_killed_at_once_leaves_its_records_to_the_next_start(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS
) -> None:
    sls.down()
    with shipping(tmp_path, iris_file, sls) as server, Load(server) as load:
        time.sleep(3)
        for pid in [*shippers(server.journal_dir), *server.workers(), server.process.pid]:
            os.kill(pid, signal.SIGKILL)
    sls.up()
    with shipping(tmp_path, iris_file, sls):
        assert_all_arrive(sls, load.answered)


def test_stopped_server_ships_what_it_has_and_its_shipper_ends(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS
) -> None:
    with shipping(tmp_path, iris_file, sls) as server:
        with Load(server) as load:
            time.sleep(3)
        assert server.stop() == 0
        deadline = time.monotonic() + 15
        while shippers(server.journal_dir) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert shippers(server.journal_dir) == []
        assert set(load.answered) <= set(stored(sls))
        assert segments(server.journal_dir) == []


def test_shipper_of_a_server_that_is_gone_gives_up_after_the_drain_time(tmp_path: Path, sls: LoopbackSLS) -> None:
    sls.down()
    Journal(tmp_path / "journal", 10**7).append({"request_id": "kept"})
    with shipper(tmp_path, sls, graceful_timeout="2") as process:
        began = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - began < 15
    assert [record["request_id"] for record in records(tmp_path / "journal")] == ["kept"]


def test_record_that_sls_refuses_for_what_is_in_it_is_set_aside_and_the_others_arrive(
    tmp_path: Path, sls: LoopbackSLS
) -> None:
    sls.refuse(lambda entry: entry["request_id"] == "13")
    journal = Journal(tmp_path / "journal", 10**7)
    for n in range(50):
        journal.append({"request_id": str(n)})
    journal.close()
    with shipper(tmp_path, sls) as process:
        assert process.wait(30) == 0
    assert set(stored(sls)) == {str(n) for n in range(50)} - {"13"}
    report = subprocess.run(
        [sys.executable, "-m", "report", "--dir", str(tmp_path / "journal")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert re.search(r"^records refused by SLS +1$", report, re.MULTILINE)
    refused = json.loads((tmp_path / "journal/refused.json").read_text())
    assert (refused["request_id"], state(tmp_path)["refused"], state(tmp_path)["shipped"]) == ("13", 1, 50)


def test_second_shipper_of_a_journal_ends_at_once(tmp_path: Path, sls: LoopbackSLS) -> None:
    with shipper(tmp_path, sls, "--forever") as first:
        sls.wait_until(lambda: shippers(tmp_path / "journal") == [first.pid])
        with shipper(tmp_path, sls, "--forever") as second:
            assert second.wait(20) == 0
        assert first.poll() is None


def test_torn_line_and_broken_state_stop_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    directory.mkdir()
    (directory / "ship.json").write_text("{")
    (directory / "00000000000000000001-1.jsonl").write_bytes(
        b'{"time":1.5,"n":1}\n{"ti\n\n[1]\n{"time":2.5,"n":2}\n{"time":3'
    )
    sent: list[Any] = []
    Shipper(directory, sent.extend).run()
    assert [record["n"] for record in sent] == [1, 2]
    assert segments(directory) == []


def test_ship_without_settings_says_which(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sls", "ship"], cwd=ROOT, env={}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, "SLS_ENDPOINT" in done.stderr) == (2, True)


@contextmanager
def shipper(place: Path, sls: LoopbackSLS, *arguments: str, graceful_timeout: str = "10") -> Iterator[Any]:
    """Run `python -m sls ship` by hand."""
    environ = {"JOURNAL_DIR": str(place / "journal"), "GRACEFUL_TIMEOUT": graceful_timeout} | sls.environ()
    process = subprocess.Popen(
        [sys.executable, "-m", "sls", "ship", *arguments], cwd=ROOT, env=environ, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def state(place: Path) -> dict[str, Any]:
    """Read what the shipper keeps of its progress."""
    path = place / "journal/ship.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
