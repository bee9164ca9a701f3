"""Roll-ups: nothing is counted twice or lost, over workers, kills, compaction and full disks; quantiles within 1 %."""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
from conftest import ROOT, basic, gunicorn, no_file_beyond, records
from hypothesis import example, given, settings
from hypothesis import strategies as st

import monitor
from telemetry import rollup_writer, rollups
from telemetry.rollup_writer import DAYS_KEPT, MAX_PENDING, RollupWriter, compacted
from telemetry.rollups import MAX_NAMES, OTHERS, Sums, bucket_of, day_of, days, read, read_events

NOON = 20_000 * 86_400 + 43_200  # 2024-10-04
ROW = [5.1, 3.5, 1.4, 0.2]
RECORD = {
    "rows": 2,
    "user": "alice",
    "protocol": "predict",
    "model_version": "v1",
    "variant": "stable",
    "status": 200,
    "success": True,
    "error": "",
    "error_type": "",
}
REJECTED = {"status": 422, "success": False, "error": "Unprocessable Entity", "error_type": "client"}


class Clock(SimpleNamespace):
    """The time as the writer sees it; `now` may be set, and sleeping moves it on."""

    def __init__(self) -> None:
        super().__init__(now=float(NOON), monotonic=lambda: self.now, time=lambda: self.now)

    def sleep(self, seconds: float) -> None:
        """Move on."""
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still at noon."""
    clock = Clock()
    monkeypatch.setattr(rollup_writer, "time", clock)
    return clock


def worker(directory: Path) -> RollupWriter:
    """Return what a worker counts with."""
    return RollupWriter(directory, lambda function, *arguments: function(*arguments))


def count(writer: RollupWriter, requests: int = 1, seconds: float = 0.01, **changed: Any) -> None:
    """Count requests."""
    for _ in range(requests):
        writer.count_request(seconds, RECORD | changed)


def total(directory: Path, *key: str, since: float = 0, until: float = 1e11) -> Sums:
    """Return the sums of a version and variant, by default of all, over all time."""
    found = Sums()
    for each, steps in read(directory, since, until, 60).items():
        if not key or each == key:
            for sums in steps.values():
                found.add(sums)
    return found


def lines(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of all files."""
    return [line for path in days(directory).values() for line in rollups.read_file(path)]


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]


# --- quantiles


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e5), min_size=1, max_size=300), st.floats(0, 1))
@example([0.001] * 99 + [2.0], 0.99)
@example([0.001] * 99 + [2.0], 0.991)
def test_quantiles_are_within_one_percent(times: list[float], q: float) -> None:
    sums = Sums(times=Counter(map(bucket_of, times)))
    found, wanted = sums.quantile(q), float(np.quantile(times, q, method="inverted_cdf"))
    assert found is not None
    assert abs(found - wanted) <= 0.0100001 * wanted


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-9])
def test_no_time_at_all_has_a_bucket_too(tmp_path: Path, clock: Clock, seconds: float) -> None:
    writer = worker(tmp_path)
    count(writer, seconds=seconds)
    writer.close()
    assert total(tmp_path).quantile(0.5) == pytest.approx(1e-6, rel=0.01)


def test_no_request_has_no_quantile() -> None:
    assert Sums().quantile(0.5) is None


# --- counting


def test_requests_are_counted_by_minute_version_and_variant(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    count(writer, 3)
    count(writer, 2, variant="canary", model_version="v2", user="bob", protocol="v2", seconds=0.5)
    count(writer, rows=0, **REJECTED)
    clock.now += 60
    writer.tick()
    count(writer)
    writer.close()
    found = read(tmp_path, NOON, NOON + 120, 60)
    assert set(found) == {("v1", "stable"), ("v2", "canary")}
    assert set(found["v1", "stable"]) == {NOON, NOON + 60}
    first, canary = found["v1", "stable"][NOON], found["v2", "canary"][NOON]
    assert (first.requests, first.success, first.rows) == (4, 3, 6)
    assert first.seconds == pytest.approx(0.04)
    assert first.errors == {"client 422 Unprocessable Entity": 1}
    assert (first.users, first.protocols) == ({"alice": 4}, {"predict": 4})
    assert (canary.users, canary.protocols, canary.requests) == ({"bob": 2}, {"v2": 2}, 2)
    assert canary.quantile(0.99) == pytest.approx(0.5, rel=0.01)


def test_steps_begin_at_their_multiples_and_the_first_is_whole(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    for _ in range(120):
        count(writer)
        clock.now += 60
        writer.tick()
    hours = read(tmp_path, NOON + 3700, NOON + 7100, 3600)["v1", "stable"]
    assert {start: sums.requests for start, sums in hours.items()} == {NOON + 3600: 59}
    assert set(read(tmp_path, NOON + 3700, NOON + 4000, 300)["v1", "stable"]) == {NOON + 3600, NOON + 3900}


def test_unauthenticated_requests_have_an_error_and_no_user(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    known = {"user": None, "model_version": "", "variant": "", "rows": 0}
    count(writer, 3, **known, status=401, success=False, error="Unauthorized", error_type="auth")
    count(writer, 2, **known)  # OPTIONS
    writer.close()
    found = total(tmp_path, "", "")
    assert (found.requests, found.success, found.unauthenticated) == (3, 0, 3)
    assert found.errors == {"auth 401 Unauthorized": 3}
    assert not found.users
    assert not found.times


def test_names_are_bounded_in_number_and_length(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    for number in range(3 * MAX_NAMES):
        count(writer, 1 + (number < 10), user=f"{number}" + "é\n<script>" * 1000)
    writer.close()
    users = total(tmp_path).users
    assert len(users) == MAX_NAMES + 1
    assert users.total() == 3 * MAX_NAMES + 10
    assert users[OTHERS] == 2 * MAX_NAMES
    assert max(map(len, users)) <= 100
    (path,) = days(tmp_path).values()
    path.write_bytes(compacted(path, clock.now + 86_400) + path.read_bytes())
    assert total(tmp_path).users.total() == 2 * (3 * MAX_NAMES + 10)


def test_many_versions_are_counted(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    for number in range(1000):
        count(writer, model_version=f"v{number}")
    writer.close()
    assert {key: sums[NOON].requests for key, sums in read(tmp_path, NOON, NOON + 1, 60).items()} == {
        (f"v{number}", "stable"): 1 for number in range(1000)
    }


def test_events_are_kept_and_written_at_once(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    writer.note_event({"event": "rollback", "model_version": "v2", "reason": "worse", "time": NOON + 1})
    writer.note_event({"event": "later", "time": NOON + 2})
    writer.note_event({"event": "wrong_password", "time": NOON + 3})  # of which many may come
    writer.tick()
    assert [event["event"] for event in read_events(tmp_path, NOON)] == ["later", "rollback"]
    assert [event["event"] for event in read_events(tmp_path, NOON, limit=1)] == ["later"]
    assert [event["event"] for event in read_events(tmp_path, NOON + 1.5)] == ["later"]
    assert read(tmp_path, NOON, NOON + 60, 60) == {}


def test_lost_records_are_counted_and_an_event_an_hour(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    for minute in range(61):
        clock.now = NOON + 60 * minute
        writer.tick()
        writer.count_loss("the journal was full", 2)
    writer.close()
    assert total(tmp_path).dropped == {"the journal was full": 122}
    found = read_events(tmp_path, NOON)
    assert [event["dropped"] for event in found] == [2, 120]
    assert found[1] == {"event": "dropped", "dropped": 120, "reason": "the journal was full", "time": NOON + 59 * 60}


def test_feedback_is_added_up(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    known = {"event": "feedback", "model_version": "v1", "variant": "stable", "age": 2.5}
    numbers = {"rows": 3, "wrong": 1, "unknown_labels": None, "abs_error": None, "sq_error": None, "signed_error": None}
    for _ in range(2):
        writer.note_event(known | numbers)
    huge = {"rows": 1, "wrong": None, "unknown_labels": None, "abs_error": 1.0, "sq_error": 1e308, "signed_error": -1.0}
    for _ in range(2):
        writer.note_event(known | huge | {"model_version": "v2"})
    writer.close()
    feedback = total(tmp_path, "v1", "stable").feedback
    assert feedback == {"rows": 6, "wrong": 2, "age": 5, "entries": 2, "regressions": 0} | dict.fromkeys(
        ("unknown_labels", "abs_error", "sq_error", "signed_error"), 0
    )
    regression = total(tmp_path, "v2", "stable").feedback
    assert (regression["rows"], regression["regressions"], regression["signed_error"]) == (2, 2, -2)
    assert regression["sq_error"] == 0  # infinite: as good as unknown, and no reason to lose the rest
    assert read_events(tmp_path, 0) == []


def test_forked_child_counts_from_zero_and_lets_go_of_the_lock(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    count(writer, 5)
    with writer._lock:
        pid = os.fork()
        if pid == 0:
            count(writer, 7)
            writer.close()
            os._exit(0)
    os.waitpid(pid, 0)
    writer.close()
    assert total(tmp_path).requests == 12


@pytest.mark.parametrize(
    "made",
    [
        "telemetry.rollup_writer.RollupWriter(place, print)",
        "telemetry.drift.Drift(place, None, print)",
        "endpoints.row_counts.RowCounts(place / 'rows-0')",
    ],
)
def test_lock_that_native_threads_share_with_the_loop_is_native(tmp_path: Path, made: str) -> None:
    pytest.importorskip("gevent")
    module = made.partition("(")[0].rpartition(".")[0]
    pytest.importorskip(module)
    code = f"from gevent import monkey; monkey.patch_all(); import {module}, pathlib, sys\n"
    code += f"place = pathlib.Path(sys.argv[1]); print(type({made}._lock).__module__)"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert done.stdout == "_thread\n"


# --- times


def test_request_is_written_within_ten_seconds(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    count(writer)
    for _ in range(9):
        clock.now += 1
        writer.tick()
    assert total(tmp_path).requests == 0
    clock.now += 1
    writer.tick()
    assert total(tmp_path).requests == 1


def test_clock_that_goes_back_loses_nothing(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = worker(tmp_path)
    steady = iter(range(10**6))
    monkeypatch.setattr(clock, "monotonic", lambda: float(next(steady)))
    for change in (0, 3600, -90_000, 40 * 86_400, -40 * 86_400, 3 * 86_400 - NOON):
        clock.now += change
        for _ in range(700):  # with compaction in between
            count(writer)
            writer.tick()
    writer.close()
    assert total(tmp_path).requests == 6 * 700
    assert len(days(tmp_path)) == 4


# --- what is in the way


def test_busy_lock_makes_nobody_wait_and_loses_nothing(tmp_path: Path, clock: Clock) -> None:
    writer, other = worker(tmp_path), worker(tmp_path)
    count(writer)
    assert other._file_lock.acquire()
    clock.now += 20
    writer.tick()
    began = time.monotonic()
    writer.close()
    assert time.monotonic() - began < 5
    assert total(tmp_path).requests == 0
    other._file_lock.release()
    clock.now += 1
    writer.tick()
    assert total(tmp_path).requests == 1


def test_removed_directory_is_made_again(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    for _ in range(3):
        count(writer)
        clock.now += 20
        writer.tick()
        assert total(tmp_path).requests == 1
        shutil.rmtree(tmp_path / "rollup")


def test_directory_that_cannot_be_written_is_logged_once_and_nothing_recent_is_lost(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    writer = worker(tmp_path)
    (tmp_path / "rollup").write_text("not a directory")
    for _ in range(10):
        count(writer)
        writer.note_event({"event": "rollback", "time": clock.now})
        clock.now += 30
        writer.tick()
    assert len(errors(caplog)) == 1
    assert str(tmp_path / "rollup") in errors(caplog)[0]
    (tmp_path / "rollup").unlink()
    clock.now += 30
    writer.tick()
    assert total(tmp_path).requests == len(read_events(tmp_path, 0)) == 10
    (tmp_path / "rollup").rename(tmp_path / "before")
    (tmp_path / "rollup").write_text("not a directory")
    for _ in range(2 * MAX_PENDING):
        count(writer)
        clock.now += 60
        writer.tick()
    assert len(errors(caplog)) == 2
    assert len(writer._pending) == MAX_PENDING


@pytest.mark.parametrize("size", range(390, 420))
def test_line_torn_by_a_full_disk_is_written_again_and_counts_once(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    writer = worker(tmp_path)
    with no_file_beyond(size):  # the second or third line is torn, at each of its last bytes
        for _ in range(8):
            count(writer)
            clock.now += 10
            writer.tick()
    assert total(tmp_path).requests < 8
    assert len(errors(caplog)) == 1
    clock.now += 10
    writer.tick()
    assert total(tmp_path).requests == 8
    (path,) = days(tmp_path).values()
    path.write_bytes(compacted(path, clock.now))
    assert total(tmp_path).requests == 8


LINE = {"time": NOON, "span": 60, "version": "v1", "variant": "stable", "requests": 5}
GARBAGE: dict[str, Any] = {
    "nothing": b"",
    "a brace": b"{",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "zeros, as a power cut leaves": b"\0" * 300,
    "bytes that are not UTF-8": b"\xff\xfe{}",
    "nested without an end": b"[" * 100_000,
    "no field": b"{}",
    "nothing but a time": {"time": NOON},
    "a time that is a string": LINE | {"time": "noon"},
    "a time that is null": LINE | {"time": None},
    "a huge time": LINE | {"time": 1e300},
    "a huge time before 1970": LINE | {"time": -1e300},
    "a huge span": LINE | {"span": 1e300},
    "a span that is a list": LINE | {"span": []},
    "no version": {"time": NOON, "span": 60, "requests": 5},
    "requests that are a string": LINE | {"requests": "many"},
    "more requests than there can be": LINE | {"requests": 2**63},
    "fewer rows than there can be": LINE | {"rows": -1e300},
    "a user with more requests than there can be": LINE | {"users": {"alice": 1e300}},
    "requests that are a list": LINE | {"requests": [5]},
    "users without counts": LINE | {"users": ["alice"]},
    "a user whose count is a string": LINE | {"users": {"alice": "x"}},
    "an infinite count": LINE | {"users": {"alice": math.inf}},
    "no bucket": LINE | {"times": []},
    "a bucket that is a string": LINE | {"times": ["0", 1]},
    "a count that is a string": LINE | {"times": [0, "x"]},
    "a bucket above all": LINE | {"times": [10**9, 1]},
    "a bucket below all": LINE | {"times": [-(10**9), 1]},
    "too many buckets": LINE | {"times": [0, *[1] * 5000]},
    "times that are an object": LINE | {"times": {"0": 1}},
    "feedback that is a string": LINE | {"feedback": {"rows": "x"}},
    "feedback that is a number": LINE | {"feedback": 3},
    "a loss that is a string": {"time": NOON, "dropped": {"the journal was full": "many"}},
    "a loss without a reason": {"time": NOON, "dropped": 7},
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_spoils_nothing(tmp_path: Path, clock: Clock, garbage: Any) -> None:
    writer = worker(tmp_path)
    count(writer)
    writer.close()
    path = tmp_path / "rollup" / f"{day_of(NOON)}.jsonl"
    with path.open("ab") as file:
        file.write(garbage if isinstance(garbage, bytes) else json.dumps(garbage).encode())
    count(writer)
    writer.note_event({"event": "rollback", "time": NOON})
    writer.close()
    for _ in range(2):
        assert total(tmp_path).requests == 2
        assert total(tmp_path).quantile(0.5) is not None
        assert [event["event"] for event in read_events(tmp_path, NOON) if event.get("dropped") != 0] == ["rollback"]
        path.write_bytes(compacted(path, NOON))


def test_other_files_are_left_alone(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    count(writer)
    writer.close()
    (tmp_path / "rollup" / "notes.jsonl").write_text("mine")
    (tmp_path / "rollup" / "2024-10-03.jsonl").mkdir()
    (tmp_path / "rollup" / "lock").write_text("garbage")
    clock.now += 3600
    writer.tick()
    assert total(tmp_path).requests == 1
    assert (tmp_path / "rollup" / "notes.jsonl").read_text() == "mine"


# --- compaction

LINES = st.lists(
    st.tuples(
        st.integers(0, 3 * 86_400 - 1),  # seconds after the midnight of the day before yesterday
        st.sampled_from([("v1", "stable"), ("v2", "canary"), ("", "")]),
        st.integers(1, 5),  # requests
        st.floats(1e-5, 10),  # their time
        st.sampled_from(["alice", "bob"]),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=30)
@given(LINES, st.integers(0, 86_399))
def test_sum_of_the_lines_is_the_truth_whatever_was_compacted(
    tmp_path_factory: pytest.TempPathFactory, made: list[Any], today: int
) -> None:
    place = tmp_path_factory.mktemp("rollups")
    (place / "rollup").mkdir()
    begin = NOON - NOON % 86_400
    truth: dict[tuple[str, str], Sums] = {}
    for at, key, requests, seconds, user in made:
        at = begin + at - at % 60
        sums = Sums(requests, requests, 2 * requests, seconds * requests, users=Counter({user: requests}))
        sums.times[bucket_of(seconds)] = requests
        line = {"time": at, "span": 60, "version": key[0], "variant": key[1]} | sums.encode()
        with (place / "rollup" / f"{day_of(at)}.jsonl").open("ab") as file:
            file.write(b"\n" + orjson.dumps(line) + b"\n")
        truth.setdefault(key, Sums()).add(sums)

    def check(step: int) -> None:
        found = read(place, begin, begin + 4 * 86_400, step)
        assert found.keys() == truth.keys()
        for key, steps in found.items():
            summed = Sums()
            for start, sums in steps.items():
                assert start % step == 0
                summed.add(sums)
            assert summed.seconds == pytest.approx(truth[key].seconds)
            summed.seconds = truth[key].seconds
            assert summed == truth[key]

    now = begin + 2 * 86_400 + today
    for later in (0, 0, 600, 86_400):
        check(60)
        check(21_600)
        for path in days(place).values():
            path.write_bytes(compacted(path, now + later))
    spans = {line["span"] for line in lines(place) if line["time"] < begin + 86_400}
    assert spans <= {3600}
    shutil.rmtree(place)


def test_compaction_keeps_minutes_of_two_hours_then_five_minutes_then_hours(tmp_path: Path, clock: Clock) -> None:
    clock.now = NOON - 3 * 86_400
    writer = worker(tmp_path)
    writer._compact_at = NOON + 3600
    while clock.now < NOON:
        count(writer)
        clock.now += 60
        writer.tick()
    clock.now += 3600  # nobody asks
    writer.tick()
    found = lines(tmp_path)
    assert sum(line["requests"] for line in found) == 3 * 24 * 60
    assert Counter(line["span"] for line in found) == {60: 60, 300: (36 - 1) * 12, 3600: 36}
    writer.note_event({"event": "rollback", "time": clock.now})
    clock.now += 700
    writer.tick()
    assert len(read_events(tmp_path, 0)) == 1


def test_days_are_kept_for_35_days(tmp_path: Path, clock: Clock) -> None:
    writer = worker(tmp_path)
    for _ in range(50):
        count(writer)
        clock.now += 86_400
        writer.tick()
        clock.now += 601
        writer.tick()
    assert len(days(tmp_path)) == DAYS_KEPT + 1
    assert max(days(tmp_path)) == day_of(clock.now - 86_400)
    month = read(tmp_path, clock.now - 30 * 86_400, clock.now, 21_600)["v1", "stable"]
    assert len(month) == sum(sums.requests for sums in month.values()) == 29  # one in 87,001 seconds


WRITE = """
import sys, time
from pathlib import Path
from telemetry import rollup_writer
rollup_writer.COMPACT_SECONDS = 0.0
rollup_writer.FLUSH_SECONDS = 0.0
place, name, end = Path(sys.argv[1]), sys.argv[2], time.monotonic() + 1.5
writer = rollup_writer.RollupWriter(place, lambda function, *arguments: function(*arguments))
record = {"rows": 1, "user": name, "protocol": "predict", "model_version": "v1", "variant": "stable", "status": 200}
record |= {"success": True, "error": "", "error_type": ""}
count = 0
while time.monotonic() < end:
    if name != "compacts":
        writer.count_request(0.001, record)
        count += 1
    else:
        writer._compact_at = 0.0
    writer.tick()
    time.sleep(0.0005)
writer.close()
print(count)
"""


def test_compaction_beside_writers_loses_nothing(tmp_path: Path) -> None:
    names = ["a", "b", "c", "compacts"]
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    running = [subprocess.Popen([*command, name], cwd=ROOT, stdout=subprocess.PIPE, text=True) for name in names]
    counts = [int(process.communicate(timeout=120)[0]) for process in running]
    assert min(counts[:3]) > 0
    assert total(tmp_path).users == dict(zip(names[:3], counts[:3], strict=True))
    assert not list((tmp_path / "rollup").glob(".*"))


# --- the whole server


def truth_of(directory: Path) -> tuple[int, int, int]:
    """Return requests, successes and rows, as the journal has them."""
    found = [each for each in records(directory) if "response_time" in each and "requests" not in each]
    return len(found), sum(each["success"] for each in found), sum(each["rows"] for each in found)


def test_service_counts_what_it_records(serve: Any, iris_file: Path) -> None:
    client = serve(iris_file)
    client.predict([ROW] * 3)
    client.post({"data": []})
    client.post({"data": []}, Authorization=basic("mallory"))
    client.service.journal.append({"event": "rollback", "model_version": "2", "reason": "worse"})
    monitor.run_hooks(client.service.on_exit)
    found = total(client.journal_dir)
    counted = (found.requests - found.unauthenticated, found.success, found.rows)
    assert counted == truth_of(client.journal_dir) == (2, 1, 3)
    assert found.unauthenticated == 1
    assert found.errors == {"client 422 Unprocessable Entity": 1, "auth 401 Unauthorized": 1}
    assert found.users == {"predict": 2}
    assert [event["event"] for event in read_events(client.journal_dir, 0)] == ["rollback"]


@pytest.mark.long
def test_stopped_workers_lose_no_count(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, web_concurrency=2, model_path=iris_file) as server:
        for number in range(60):
            server.predict([ROW] * (number % 3))
        assert server.stop() == 0
    found = total(server.journal_dir)
    assert (found.requests, found.success, found.rows) == truth_of(server.journal_dir) == (60, 40, 60)


@pytest.mark.long
def test_killed_worker_loses_only_what_it_had_not_written(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, web_concurrency=2, model_path=iris_file) as server:
        for _ in range(60):
            server.predict([ROW])
        server.wait_until(lambda: total(server.journal_dir).requests == 60, 90)
        for pid in server.workers():
            os.kill(pid, signal.SIGKILL)
        server.wait_until(lambda: server.log.read_text().count("serving version") >= 4)
        for _ in range(60):
            server.predict([ROW])
        assert server.stop() == 0
    assert total(server.journal_dir).requests == 120
    assert truth_of(server.journal_dir)[0] == 120
