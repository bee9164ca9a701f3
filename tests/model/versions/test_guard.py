"""The guard of a canary: its rule, and how it reads the journal."""

import fcntl
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from model.__main__ import main
from model.versions.guard import (
    FAULTS,
    MAX_CANARY_REQUESTS,
    MIN_LABELLED_ROWS,
    MIN_REQUESTS,
    WRONG_ROWS,
    Guard,
    Labelled,
    Tail,
    Tally,
    judge,
    judge_predictions,
    watching,
)
from model.versions.routing import Routing
from model.versions.store import Store, write_json
from model.versions.watcher import StoreRoutes
from monitor import Journal, log_monitor, segments

Answers = tuple[float, float, float]  # the share that fails, the median in seconds, and sigma of a log-normal spread
GOOD: Answers = (0.001, 0.01, 0.5)


def drawn(dice: random.Random, count: int, answers: Answers) -> Iterator[dict[str, Any]]:
    """Draw what a record says of so many requests."""
    share, median, sigma = answers
    for _ in range(count):
        failed = dice.random() < share
        taken = dice.lognormvariate(math.log(median), sigma)
        yield {"error_type": "model" if failed else "", "success": not failed, "response_time": taken}


def tally(count: int, answers: Answers, seed: int = 0) -> Tally:
    """Return the outcomes of so many requests."""
    found = Tally()
    for record in drawn(random.Random(seed), count, answers):
        found.add(record)
    return found


# --- the rule


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ((0.05, 0.01, 0.5), r"\d\.\d % of its 1000 requests failed, of stable's 0\.\d %"),
        ((0.5, 0.01, 0.5), r"\d\d\.\d % of its 1000 requests failed, of stable's 0\.\d %"),
        ((1.0, 0.01, 0.5), r"100\.0 % of its 1000 requests failed, of stable's 0\.\d %"),
        (
            (0.0, 0.05, 0.5),
            r"\d\d\.\d % of its 1000 answers took longer than \d\d\.\d ms, 1\.5 times stable's p99 and 5 ms",
        ),
        ((0.0, 0.01, 1.5), r"\d+\.\d % of its 1000 answers took longer than"),
    ],
    ids=["fails at times", "fails often", "fails always", "is slow", "is slow at times"],
)
def test_worse_canary_is_found_out(answers: Answers, reason: str) -> None:
    for seed in range(8):
        said = judge(tally(5000, GOOD, seed), tally(1000, answers, 100 + seed))
        assert re.match(reason, said), said


@pytest.mark.parametrize(
    ("stable", "canary"),
    [
        (GOOD, GOOD),
        ((0.0, 0.01, 0.5), (0.009, 0.01, 0.5)),  # no more than one in a hundred
        ((0.3, 0.01, 0.5), (0.001, 0.01, 0.5)),  # better
        ((0.001, 0.1, 0.5), (0.001, 0.01, 0.5)),  # faster
        ((0.001, 0.01, 0.5), (0.001, 0.012, 0.5)),  # a little slower
        ((0.001, 0.0001, 0.5), (0.001, 0.001, 0.5)),  # ten times slower, and nobody notices 1 ms
        ((1.0, 0.01, 0.5), (1.0, 0.01, 0.5)),  # nothing works, which is not the canary's fault
    ],
    ids=str,
)
def test_canary_that_is_no_worse_is_left_alone(stable: Answers, canary: Answers) -> None:
    for seed in range(8):
        assert judge(tally(5000, stable, seed), tally(1000, canary, 100 + seed)) == ""


def test_few_requests_say_nothing() -> None:
    plenty, bad = tally(MIN_REQUESTS, GOOD), (1.0, 1.0, 0.5)
    assert judge(Tally(), Tally()) == ""
    assert judge(plenty, tally(MIN_REQUESTS - 1, bad)) == ""
    assert judge(tally(MIN_REQUESTS - 1, GOOD), tally(MIN_REQUESTS, bad)) == ""
    assert judge(plenty, tally(MIN_REQUESTS, bad)) != ""


def test_times_of_few_answers_say_nothing() -> None:
    slow = (0.5, 1.0, 0.5)
    assert judge(tally(300, (0.5, 0.01, 0.5)), tally(300, slow)) == ""
    assert "took longer" in judge(tally(600, (0.5, 0.01, 0.5)), tally(600, slow))


def test_one_failure_where_there_was_none_is_no_reason() -> None:
    canary = tally(MIN_REQUESTS - 1, (0.0, 0.01, 0.5))
    canary.add({"error_type": "internal", "success": False, "response_time": 0.01})
    assert judge(tally(20_000, (0.0, 0.01, 0.5)), canary) == ""


def test_incident_that_befalls_both_is_held_against_neither(guard: Guard, store: Store) -> None:
    routing = store.canary("2", 5, guard=True)
    incident = (0.1, 0.01, 0.5)
    for turn in range(90):
        answers = incident if turn < 20 else GOOD
        records = requests("stable", 950 + turn, answers) + requests("canary", 50 + turn % 7, answers)
        assert guard.evaluate(routing, records) == "", f"at evaluation {turn}"


def test_canary_that_turns_bad_late_is_found(guard: Guard, store: Store) -> None:
    routing = store.canary("2", 5, guard=True)
    for _ in range(60):
        assert guard.evaluate(routing, requests("stable", 950) + requests("canary", 50)) == ""
    turns = 0
    while not guard.evaluate(routing, requests("stable", 950) + requests("canary", 50, BAD)):
        turns += 1
        assert turns < 2 * MAX_CANARY_REQUESTS / 50


@pytest.mark.parametrize("error_type", ["client", "auth", "", "model", "overload", "internal"])
def test_faults_are_ours_and_not_the_callers(error_type: str) -> None:
    found = Tally()
    found.add({"error_type": error_type, "success": False, "response_time": 0.01})
    assert found.faults == (1 if error_type in FAULTS else 0)
    assert list(found.times) == []


def test_rows_that_only_the_canary_refuses_count_against_it(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    refused = requests("canary", 300, (0.0, 0.01, 0.5), error_type="client", success=False, status=422)
    assert "requests failed" in guard.evaluate(routing, requests("stable", 1000) + refused)


def test_rows_that_both_refuse_count_against_neither(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    refused = {"error_type": "client", "success": False, "status": 422}
    for _ in range(5):
        records = requests("stable", 200) + requests("stable", 100, **refused)
        records += requests("canary", 100) + requests("canary", 50, **refused)
        assert guard.evaluate(routing, records) == ""


def watch(dice: random.Random, stable: Answers, canary: Answers, rate: int, weight: float, turns: int) -> str:
    """Evaluate a canary again and again, each time after `rate` more requests; return why it was rolled back, or ""."""
    tallies = Tally(), Tally()
    for _ in range(turns):
        share = sum(dice.random() < weight / 100 for _ in range(rate))
        for found, count, answers in zip(tallies, (rate - share, share), (stable, canary), strict=True):
            for record in drawn(dice, count, answers):
                found.add(record)
        if reason := judge(*tallies):
            return reason
    return ""


@pytest.mark.parametrize("watches", [30, pytest.param(300, marks=pytest.mark.long)])
def test_good_canaries_are_left_alone_time_after_time(watches: int) -> None:
    dice, alike = random.Random(5), (0.01, 0.01, 1.0)
    rolled_back = [watch(dice, alike, alike, 100, dice.uniform(5, 50), turns=30) for _ in range(watches)]
    assert [reason for reason in rolled_back if reason] == []


@pytest.mark.parametrize("canary", [(0.05, 0.01, 0.5), (0.001, 0.03, 0.5)], ids=["fails", "slow"])
def test_bad_canaries_are_rolled_back_within_two_thousand_requests(canary: Answers) -> None:
    dice = random.Random(6)
    rolled_back = [watch(dice, GOOD, canary, 100, 50, turns=40) for _ in range(8)]
    assert all(rolled_back)


# --- evaluating records


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with version 1 stable and version 2 its guarded canary."""
    store = Store(tmp_path / "store")
    artifact = tmp_path / "model.joblib"
    artifact.write_bytes(b"not really a model")
    for name in "1", "2":
        with store.new_version(artifact, name) as manifest:
            manifest.about.update(sample=[[1.0]], predictions=[1.0])
    store.promote("1")
    store.canary("2", 5, guard=True)
    return store


@pytest.fixture
def guard(tmp_path: Path, store: Store) -> Guard:
    """The guard of a service, in its directory `state`."""
    (tmp_path / "state").mkdir()
    return Guard(tmp_path / "state", store.directory)


def requests(variant: str, count: int, answers: Answers = GOOD, /, **changes: Any) -> list[dict[str, Any]]:
    """Return records of so many requests, as the journal has them."""
    version = {"stable": "1", "canary": "2"}[variant]
    known = {"variant": variant, "model_version": version, "time": time.time(), "pid": 1, "status": 200} | changes
    return [record | known for record in drawn(random.Random(count), count, answers)]


BAD: Answers = (0.3, 0.01, 0.5)


def test_bad_canary_is_rolled_back_in_the_store(guard: Guard, store: Store, tmp_path: Path) -> None:
    routing = Routing.read(store.directory)
    assert guard.evaluate(routing, requests("stable", 2000)) == ""
    assert guard.evaluate(routing, requests("canary", 100, BAD)) == ""
    reason = guard.evaluate(routing, requests("canary", 300, BAD))
    assert re.fullmatch(r"\d\d\.\d % of its 400 requests failed, of stable's 0\.\d %", reason)
    now = Routing.read(store.directory)
    assert (now.stable, now.canary, now.guard, now.generation) == ("1", "", False, routing.generation + 1)
    assert now.why == f"guard, {reason}: canary 2"
    assert not (tmp_path / "state/guard.json").exists()


def test_full_disk_keeps_the_guard_from_no_verdict(guard: Guard, store: Store, tmp_path: Path) -> None:
    (tmp_path / "state/guard.lock").symlink_to("/dev/full")  # what the guard has seen cannot be written there
    assert guard.lock.acquire()
    routing = Routing.read(store.directory)
    reason = guard.evaluate(routing, requests("stable", 2000) + requests("canary", 400, BAD))
    assert "requests failed" in reason
    assert Routing.read(store.directory).canary == ""


def test_good_canary_stays(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    for _ in range(20):
        assert guard.evaluate(routing, requests("stable", 300) + requests("canary", 100)) == ""
    assert Routing.read(store.directory) == routing


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, True),
        ({"model_version": "3"}, False),
        ({"model_version": "1"}, False),
        ({"model_version": ""}, False),
        ({"variant": "shadow"}, False),
        ({"variant": ""}, False),
        ({"time": 1e9}, False),
        ({"error_type": "client", "success": False}, False),
        ({"routed_by": "key"}, False),  # the caller chose the canary
        ({"routed_by": "version"}, False),
    ],
    ids=str,
)
def test_only_the_canarys_own_records_since_the_change_count(
    guard: Guard, store: Store, changes: Any, counts: bool
) -> None:
    routing = Routing.read(store.directory)
    reason = guard.evaluate(routing, requests("stable", 1000) + requests("canary", 1000, BAD, **changes))
    assert bool(reason) is counts


def test_caller_who_chooses_the_canary_for_bad_rows_does_not_have_it_taken_back(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    chosen = requests("canary", 2000, (1.0, 0.5, 0.5), routed_by="key")
    for _ in range(5):
        assert guard.evaluate(routing, requests("stable", 400) + requests("canary", 50) + chosen) == ""
    reason = guard.evaluate(routing, requests("canary", 400, BAD))  # a canary at fault still goes
    assert re.fullmatch(r"\d\d\.\d % of its 650 requests failed, of stable's 0\.\d %", reason)


def test_guard_says_what_it_has_seen_and_whether_it_can_judge(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    stable, canary = (SimpleNamespace(version=version) for version in ("1", "2"))
    routes = StoreRoutes(stable, canary, routing)  # type: ignore[arg-type]  # of a model only its version is looked at
    service: Any = SimpleNamespace(serving=SimpleNamespace(routes=routes))

    def said(of: Guard) -> Any:
        found: dict[str, Any] = {}
        of.describe(service, found)
        return found.get("guard")

    other = Guard(guard._directory, store.directory)  # another worker's
    assert said(other) is None
    assert watching(guard._directory, routing).startswith("NOBODY watches the canary")
    assert guard.lock.acquire()
    assert watching(guard._directory, routing) == "it begins to count the requests of the canary"
    guard.evaluate(routing, requests("stable", 300) + requests("canary", 30))
    counts = "30 requests reached the canary by chance, and 300 the stable version; 200 of each are needed"
    assert said(other) == watching(guard._directory, routing) == f"too early to judge the canary: {counts}"
    guard.evaluate(routing, requests("canary", 300, routed_by="key"))
    chosen = "and 300 others came with X-Routing-Key or X-Model-Version"
    assert said(other) == f"cannot judge the canary: {counts}, {chosen}"
    guard.evaluate(routing, requests("canary", 300) + feedback("canary", 30, 0.0))
    assert said(other) == (
        "the canary is no worse so far: 330 requests reached the canary by chance, and 300 the stable version; of "
        "these failed 0.3 % and 0.3 %; the truth came for 30 rows of the canary and 0 of the stable version"
    )
    guard.evaluate(routing, requests("canary", MAX_CANARY_REQUESTS))
    guard.evaluate(routing, requests("canary", 1))
    assert said(other).startswith("too early to judge the canary: 1 requests")
    assert ". The requests before these: the canary is no worse so far: 2330 requests" in said(other)
    assert watching(guard._directory, store.canary("2", 6, guard=True)).startswith("it begins to count")
    assert watching(guard._directory, store.canary("2", 6)) == ""


def test_change_of_the_routing_begins_anew(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    assert guard.evaluate(routing, requests("stable", 1000) + requests("canary", 100, BAD)) == ""
    routing = store.canary("2", 10, guard=True)
    assert guard.evaluate(routing, requests("canary", 300, BAD)) == ""  # nothing is known of stable any more
    assert guard.evaluate(routing, requests("stable", 300)) != ""


@pytest.mark.parametrize("when", ["before it begins", "while it guards"])
def test_clock_that_was_an_hour_ahead_keeps_the_guard_from_nothing(
    guard: Guard, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: Any, when: str
) -> None:
    ahead = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))
    routing = replace(Routing.read(store.directory), changed=ahead)
    write_json(store.directory / "routing.json", routing.to_json())
    with monkeypatch.context() as patch:
        if when == "while it guards":  # then the clock is set back
            patch.setattr("model.versions.guard.time", SimpleNamespace(time=lambda: time.time() + 3600))
        assert guard.evaluate(routing, []) == ""
    guard.evaluate(routing, [])
    assert guard.evaluate(routing, requests("stable", 1000) + requests("canary", 1000, BAD)) != ""
    assert ("the guard counts from now on" in caplog.text) is (when == "before it begins")


def test_stable_version_that_comes_back_begins_anew(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    fallback = replace(routing, stable="0")  # serves while version 1 does not load
    old = requests("stable", 1000, model_version="0")
    assert guard.evaluate(fallback, old + requests("canary", 100, BAD)) == ""
    assert guard.evaluate(routing, requests("canary", 300, BAD)) == ""
    assert guard.evaluate(routing, requests("stable", 300)) != ""


def test_routing_that_was_changed_meanwhile_is_left_alone(guard: Guard, store: Store, tmp_path: Path) -> None:
    judged = Routing.read(store.directory)
    for change in range(3):
        now = store.canary("2", 10 + change)
        assert guard.evaluate(judged, requests("stable", 1000) + requests("canary", 1000, BAD)) == ""
        assert Routing.read(store.directory) == now
    assert not (tmp_path / "state/guard.json").exists()


@pytest.mark.parametrize("lock", ["directory", "broken routing"])
def test_guard_that_cannot_write_the_store_rolls_back_on_this_host(
    guard: Guard, store: Store, tmp_path: Path, lock: str
) -> None:
    routing = Routing.read(store.directory)
    if lock == "directory":  # as good as a read-only store, also for root
        (store.directory / ".lock").unlink()
        (store.directory / ".lock").mkdir()
    else:
        (store.directory / "routing.json").write_text("{")
    reason = guard.evaluate(routing, requests("stable", 1000) + requests("canary", 1000, BAD))
    assert "requests failed" in reason
    assert routing.local_rollback(tmp_path / "state") == reason
    assert replace(routing, weight=50).local_rollback(tmp_path / "state") == ""
    known = json.loads((tmp_path / "state/guard.json").read_text())
    assert known == {"routing": routing.etag, "canary": "2", "reason": reason}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "5", "{}", '{"generation": 3}', '{"generation": "x", "reason": ""}', "\xff", "[" * 9999],
)
def test_local_rollback_that_is_not_valid_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "guard.json").write_text(text, "latin-1")
    assert Routing().local_rollback(tmp_path) == ""


def test_list_shows_no_rollback_for_a_routing_written_by_hand(
    store: Store, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    write_json(
        store.directory / "routing.json", {"stable": "1", "canary": {"version": "2", "weight": 5, "guard": False}}
    )
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path))
    assert main(["--dir", str(store.directory), "list"]) == 0
    assert "rolled back" not in capsys.readouterr().out


# --- feedback


def feedback(variant: str, entries: int, wrong: float, each: int = 1, /, **changes: Any) -> list[dict[str, Any]]:
    """Return records of so many entries of feedback, with this share of wrong rows, as the journal has them."""
    dice, version = random.Random(entries), {"stable": "1", "canary": "2"}[variant]
    known = {"event": "feedback", "variant": variant, "model_version": version, "time": time.time() + 60, "age": 1.5}
    known |= {"abs_error": None, "sq_error": None, "signed_error": None, "unknown_labels": 0, "user": "truth"}
    counts = [sum(dice.random() < wrong for _ in range(each)) for _ in range(entries)]
    return [
        known | {"rows": each, "wrong": count, "receipt_id": f"{at:x}"} | changes for at, count in enumerate(counts)
    ]


def measured(variant: str, entries: int, scale: float) -> list[dict[str, Any]]:
    """Return records of so many entries of feedback, with errors of a regression of this scale."""
    dice = random.Random(entries)
    errors = [scale * dice.lognormvariate(0, 1) for _ in range(entries)]
    records = feedback(variant, entries, 0.0, wrong=None, unknown_labels=None)
    return [
        record | {"abs_error": error, "sq_error": error * error, "signed_error": -error}
        for record, error in zip(records, errors, strict=True)
    ]


def test_canary_that_predicts_wrongly_is_rolled_back(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    assert guard.evaluate(routing, feedback("stable", 1000, 0.05)) == ""
    reason = guard.evaluate(routing, feedback("canary", 100, 0.3, 4))
    said = r"[23]\d\.\d % of its 400 labelled rows were predicted wrongly, of stable's 1000 \d\.\d %"
    assert re.fullmatch(said, reason), reason
    assert Routing.read(store.directory).why == f"guard, {reason}: canary 2"


def test_canary_with_larger_errors_is_rolled_back(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    reason = guard.evaluate(routing, measured("stable", 1000, 1.0) + measured("canary", 400, 2.0))
    said = r"the mean absolute error of its 400 labelled rows is 3\.\d+, of stable's 1000 1\.\d+"
    assert re.fullmatch(said, reason), reason


@pytest.mark.parametrize(("stable", "canary"), [(0.05, 0.05), (0.3, 0.05), (0.0, 0.008), (1.0, 1.0)])
def test_canary_that_predicts_no_worse_stays(guard: Guard, store: Store, stable: float, canary: float) -> None:
    routing = Routing.read(store.directory)
    for turn in range(20):
        records = feedback("stable", 500 + turn, stable) + feedback("canary", 100 + turn, canary)
        assert guard.evaluate(routing, records + measured("stable", 100, 1.0) + measured("canary", 50, 1.0)) == ""


def test_few_labelled_rows_say_nothing(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    few = MIN_LABELLED_ROWS - 1
    assert guard.evaluate(routing, feedback("stable", 1000, 0.0) + feedback("canary", few, 1.0)) == ""
    assert guard.evaluate(routing, feedback("canary", 1, 1.0)) != ""
    routing = store.canary("2", 5, guard=True)
    assert guard.evaluate(routing, feedback("stable", few, 0.0) + feedback("canary", 1000, 1.0)) == ""
    assert guard.evaluate(routing, feedback("stable", 1, 0.0)) != ""


def test_labelled_rows_outlast_the_window_of_requests(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    assert guard.evaluate(routing, feedback("stable", 1000, 0.05) + feedback("canary", 150, 0.3)) == ""
    for _ in range(3):
        assert guard.evaluate(routing, requests("stable", 3000) + requests("canary", MAX_CANARY_REQUESTS)) == ""
    assert "of its 300 labelled rows" in guard.evaluate(routing, feedback("canary", 150, 0.3))


def test_change_of_the_routing_forgets_labelled_rows(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    assert guard.evaluate(routing, feedback("stable", 1000, 0.05) + feedback("canary", 150, 0.3)) == ""
    routing = store.canary("2", 10, guard=True)
    assert guard.evaluate(routing, feedback("stable", 1000, 0.05) + feedback("canary", 150, 0.3)) == ""
    assert guard.evaluate(routing, feedback("canary", 150, 0.3)) != ""


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, True),
        ({"age": 0}, True),
        ({"age": 7 * 86_400.0}, False),  # predicted before the canary
        ({"model_version": "3"}, False),
        ({"variant": "stable"}, False),
        ({"rows": 0}, False),
        ({"rows": "x"}, False),
        ({"rows": None}, False),
        ({"wrong": None}, False),
        ({"wrong": -1}, False),
        ({"wrong": "x"}, False),
        ({"age": None}, False),
        ({"age": math.nan}, False),
        ({"time": None}, False),
        ({"event": "other"}, False),
    ],
    ids=str,
)
def test_only_whole_feedback_on_predictions_since_the_change_counts(
    guard: Guard, store: Store, changes: Any, counts: bool
) -> None:
    routing = Routing.read(store.directory)
    reason = guard.evaluate(routing, feedback("stable", 1000, 0.05) + feedback("canary", 1000, 0.5, **changes))
    assert bool(reason) is counts


def test_feedback_is_no_request(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    assert guard.evaluate(routing, requests("stable", 1000) + feedback("canary", 1000, 1.0)) == ""


def test_canaries_with_equal_errors_are_left_alone_time_after_time() -> None:
    draw = np.random.default_rng(7)
    for _ in range(100):
        stable, canary = Labelled(), Labelled()
        for _ in range(60):
            for labelled, rows in (stable, 100), (canary, 50):
                labelled.add({"rows": rows, "wrong": int(draw.binomial(rows, 0.1))}, WRONG_ROWS)
            assert judge_predictions(stable, canary, WRONG_ROWS) == ""


# --- odd records


ODD: list[Any] = [None, True, -1, 1.5, "", "x", "canary", [], {}, [1]]


def test_foreign_and_odd_records_are_skipped(guard: Guard, store: Store) -> None:
    routing = Routing.read(store.directory)
    foreign: list[dict[str, Any]] = [
        {},
        {"dropped": 5, "reason": "the journal was full", "time": time.time()},
        {"requests": 7, "variant": "", "model_version": "", "time": time.time(), "error_type": "auth"},
        {"event": "rollback", "variant": "canary", "model_version": "2", "reason": "slow", "time": time.time()},
    ]
    sound = requests("canary", 1, (0.0, 0.01, 0.5))[0]
    foreign += [{name: value for name, value in sound.items() if name != missing} for missing in sound]
    foreign += [sound | {name: odd} for name in sound for odd in ODD]
    for record in foreign:
        assert guard.evaluate(routing, [record]) == ""
    assert guard.evaluate(routing, foreign * 10) == ""
    assert guard.evaluate(routing, requests("stable", 1000) + requests("canary", 1000, BAD)) != ""


@pytest.mark.parametrize("changed", ["", "yesterday", "2026-13-01T00:00:00Z", "5"])
def test_routing_written_by_hand_is_guarded_as_well(guard: Guard, store: Store, changed: str) -> None:
    canary = {"version": "2", "weight": 5, "guard": True}
    write_json(store.directory / "routing.json", {"stable": "1", "canary": canary, "changed": changed})
    routing = Routing.read(store.directory)
    assert routing.generation == 0
    old = {"time": 1.0}  # nobody knows since when
    assert guard.evaluate(routing, requests("stable", 1000, **old) + requests("canary", 1000, BAD, **old)) != ""
    assert Routing.read(store.directory).canary == ""


# --- one guard at a time


def test_only_one_process_guards(guard: Guard, tmp_path: Path) -> None:
    other = Guard(tmp_path / "state", tmp_path / "store")
    assert guard.lock.acquire()
    assert guard.lock.acquire()
    assert not other.lock.acquire()
    script = (
        "import sys; from pathlib import Path; from model.versions.guard import Tail, Guard; "
        "print(Guard(Path(sys.argv[1]), Path(sys.argv[1])).lock.acquire())"
    )
    asked = [sys.executable, "-c", script, str(tmp_path / "state")]
    assert subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout == "False\n"
    guard.lock.release()  # as the end of its process would
    assert other.lock.acquire()
    assert not guard.lock.acquire()


def test_forked_child_does_not_keep_the_guards_lock(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from model.versions.guard import Guard
guard = Guard(Path(sys.argv[1]), Path(sys.argv[1]))
assert guard.lock.acquire()
out, into = os.pipe()
held, go = os.pipe()
if not os.fork():
    os.close(go)
    os.write(into, b"up")
    os.read(held, 1)  # until the parent ends
    os._exit(0)
os.read(out, 2)
guard.lock.release()
print(Guard(Path(sys.argv[1]), Path(sys.argv[1])).lock.acquire())
"""
    asked = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True\n", "")


# --- the tail of a journal


def test_tail_reads_what_several_writers_add_once_each(tmp_path: Path) -> None:
    tail = Tail(tmp_path, time.time() - 1)
    assert tail.read() == []
    journals = [Journal(tmp_path, max_bytes=10**6) for _ in range(3)]
    seen: list[str] = []
    for turn in range(10):
        for number, journal in enumerate(journals):
            log_monitor(0.01, True, "", journal=journal, request_id=f"{turn}-{number}")
        if turn % 3 == 0:
            seen += [record["request_id"] for record in tail.read()]
    seen += [record["request_id"] for record in tail.read()]
    assert sorted(seen) == sorted(f"{turn}-{number}" for turn in range(10) for number in range(3))
    assert tail.read() == []
    for journal in journals:
        journal.close()


def test_tail_reads_on_over_the_end_of_a_segment(tmp_path: Path) -> None:
    tail = Tail(tmp_path, time.time() - 1)
    journal = Journal(tmp_path, max_bytes=40_000, writers=1)  # a segment holds 10,000 bytes
    seen: list[int] = []
    for number in range(300):
        journal.append({"number": number})
        if number % 17 == 0:
            seen += [record["number"] for record in tail.read()]
    seen += [record["number"] for record in tail.read()]
    assert len(segments(tmp_path)) > 2
    assert seen == list(range(300))
    journal.close()


def test_tail_bears_segments_that_are_removed(tmp_path: Path) -> None:
    tail = Tail(tmp_path, time.time() - 1)
    first, second = (Journal(tmp_path, max_bytes=10**6) for _ in range(2))
    first.append({"number": 1})
    assert [record["number"] for record in tail.read()] == [1]
    second.append({"number": 2})
    segments(tmp_path)[0].unlink()  # shipped
    first.close_if_removed()
    assert [record["number"] for record in tail.read()] == [2]
    first.append({"number": 3})
    second.append({"number": 4})
    assert sorted(record["number"] for record in tail.read()) == [3, 4]
    first.close()
    second.close()


def test_tail_waits_for_the_other_half_of_a_line(tmp_path: Path) -> None:
    tail = Tail(tmp_path, time.time() - 1)
    path = tmp_path / "00000000000000000001-1.jsonl"
    line = b'{"number": 1}\n'
    for end in range(len(line)):
        path.write_bytes(line[:end])
        assert tail.read() == []
    path.write_bytes(line)
    assert tail.read() == [{"number": 1}]
    assert tail.read() == []


def test_tail_passes_over_lines_that_are_no_records(tmp_path: Path) -> None:
    tail = Tail(tmp_path, time.time() - 1)
    lines = [b'{"torn', b"", b"5", b"[]", b"null", b"\xff\xfe", b'{"number": 1}', b"{}" + b" " * 10, b"[" * 5000]
    (tmp_path / "00000000000000000001-1.jsonl").write_bytes(b"\n".join(lines) + b'\n{"number": 2}\n{"num')
    assert tail.read() == [{"number": 1}, {}, {"number": 2}]
    assert tail.read() == []


def test_tail_begins_with_the_segments_written_since(tmp_path: Path) -> None:
    old, new = (tmp_path / f"0000000000000000000{number}-1.jsonl" for number in (1, 2))
    old.write_bytes(b'{"number": 1}\n')
    new.write_bytes(b'{"number": 2}\n')
    os.utime(old, (1000, 1000))
    tail = Tail(tmp_path, time.time() - 60)
    assert tail.read() == [{"number": 2}]
    with old.open("ab") as file:  # its writer was idle
        file.write(b'{"number": 3}\n')
    assert tail.read() == [{"number": 3}]


def test_tail_of_a_journal_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert Tail(tmp_path / "gone", 0.0).read() == []


def test_tail_leaves_the_locks_of_writers_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path, max_bytes=10**6)
    journal.append({"number": 1})
    Tail(tmp_path, 0.0).read()
    with segments(tmp_path)[0].open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    journal.close()
