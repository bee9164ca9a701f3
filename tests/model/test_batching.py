"""Concurrent calls are merged, each caller gets its own rows' answers, and nobody hurts anybody else."""

import gc
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.batching import MAX_SUSPECTS, PATIENCE, SUSPECT_SECONDS, Batcher, Overloaded
from model.timings import MAX_BATCH_ROWS, SLOW, Timings


class Model:
    """Squares numbers, cubes them by another method, and refuses a call with a negative one in it."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.seconds_per_row = seconds, 0.0
        self.gate: Callable[[], object] = lambda: True  # a call goes on once it is true
        self.sizes: list[int] = []  # of the calls, in rows
        self.running = 0
        self.may_overlap = False  # a killed leader's call goes on beside that of its heir

    def __call__(self, parts: Sequence[Any], method: str) -> list[Any]:
        self.running += 1
        assert self.running == 1 or self.may_overlap, "two calls at once"
        self.sizes.append(sum(map(len, parts)))
        until(self.gate)
        if seconds := self.seconds + self.seconds_per_row * self.sizes[-1]:
            time.sleep(seconds)
        self.running -= 1
        if any(row < 0 for part in parts for row in part):
            raise ValueError("negative")
        return [[row ** (2 if method == "square" else 3) for row in part] for part in parts]


def until(met: Callable[[], object]) -> None:
    """Wait until `met()` is true."""
    deadline = time.monotonic() + 30
    while not met():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Make calls in threads of their own; return their results, or what they raised, in order."""
    results: list[Any] = [None] * len(calls)

    def make(at: int) -> None:
        try:
            results[at] = calls[at]()
        except Exception as error:
            results[at] = error

    threads = [threading.Thread(target=make, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "hung"
    return results


def meanwhile(model: Model, call: Callable[[], Any]) -> Callable[[], Any]:
    """Make a call once the model is at another."""

    def wait_and_call() -> Any:
        until(lambda: model.sizes)
        return call()

    return wait_and_call


def know(batcher: Batcher, rows: int, seconds: float, method: str = "square") -> None:
    """Have the batcher know what a call of so many rows takes."""
    batcher.timings.note(method, rows, seconds)


def hold(model: Model, batcher: Batcher, callers: int) -> None:
    """Keep the model at its first call until so many others wait."""
    model.gate = lambda: len(model.sizes) > 1 or len(batcher._queue) == callers


def assert_idle(batcher: Batcher) -> None:
    """Nothing waits, and nothing that does not wait is counted."""
    assert (batcher._leader, list(batcher._queue), dict(batcher._open)) == (None, [], {})
    assert batcher._expected == pytest.approx(0.0, abs=1e-6)


def test_lone_caller_is_answered_at_once() -> None:
    model, batcher = Model(), Batcher()
    assert batcher.submit(model, [2, 3], "square") == [4, 9]
    assert model.sizes == [2]


def test_what_waits_while_the_model_is_busy_goes_in_as_one_call() -> None:
    model, batcher = Model(), Batcher()
    know(batcher, 4096, 0.01)
    hold(model, batcher, 20)
    calls = [lambda: batcher.submit(model, [0], "square")]
    calls += [meanwhile(model, lambda n=n: batcher.submit(model, [n] * 2, "square")) for n in range(20)]  # type: ignore[misc]
    assert at_once(*calls) == [[0]] + [[n * n] * 2 for n in range(20)]
    assert model.sizes == [1, 40]


@pytest.mark.parametrize("seed", range(4))
def test_each_of_many_callers_gets_the_answers_to_its_rows(seed: int) -> None:
    model, batcher = Model(), Batcher()
    wrong: list[Any] = []

    def caller(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        for _ in range(100):
            rows: Any = [chance.randrange(1000) for _ in range(chance.choice((1, 1, 1, 3, 50, 1500)))]
            method = chance.choice(("square", "cube"))
            refused = chance.random() < 0.03
            if refused:
                rows[-1] = -1
            shape = None
            if chance.random() < 0.2:
                rows, shape = np.array(rows), "array"
            try:
                found = batcher.submit(model, rows, method, shape)
                if refused or list(found) != [row ** (2 if method == "square" else 3) for row in rows]:
                    wrong.append((rows, method, found))
            except ValueError:
                if not refused:
                    wrong.append((rows, method, "refused"))

    assert at_once(*(lambda n=n: caller(n) for n in range(32))) == [None] * 32  # type: ignore[misc]
    assert wrong == []
    assert max(model.sizes) <= MAX_BATCH_ROWS
    assert_idle(batcher)


def test_only_rows_of_one_method_and_shape_are_merged() -> None:
    model, batcher = Model(), Batcher()
    know(batcher, 64, 0.001)
    hold(model, batcher, 4)
    calls = [
        lambda: batcher.submit(model, [1], "square"),
        meanwhile(model, lambda: batcher.submit(model, [2], "square")),
        meanwhile(model, lambda: batcher.submit(model, [3], "cube")),
        meanwhile(model, lambda: batcher.submit(model, [4], "square", shape=(1,))),
        meanwhile(model, lambda: batcher.submit(model, [5], "square")),
    ]
    assert at_once(*calls) == [[1], [4], [27], [16], [25]]
    assert sorted(model.sizes) == [1, 1, 1, 2]


def test_a_refused_row_harms_only_its_caller() -> None:
    model, batcher = Model(), Batcher()
    hold(model, batcher, 3)
    calls = [lambda: batcher.submit(model, [1], "square")]
    calls += [meanwhile(model, lambda n=n: batcher.submit(model, [n], "square")) for n in (2, -3, 4)]  # type: ignore[misc]
    first, second, bad, fourth = at_once(*calls)
    assert (first, second, fourth) == ([1], [4], [16])
    assert isinstance(bad, ValueError)


class Rows(list[int]):
    """Rows to which there are weak references."""


def test_refused_rows_are_freed_without_a_collection() -> None:
    rows = Rows([-1])
    alive = weakref.ref(rows)
    gc.disable()
    try:
        with suppress(ValueError):
            Batcher().submit(Model(), rows, "square")
        del rows
        assert alive() is None
    finally:
        gc.enable()


def test_callers_past_the_bound_are_refused_and_those_before_answered() -> None:
    model, batcher = Model(), Batcher(max_wait=1.0)
    know(batcher, 1, 0.1)  # so the first takes 0.1 seconds, and each of the others 0.4
    refused: list[Overloaded] = []
    model.gate = lambda: len(refused) == 2

    def call() -> Any:
        try:
            return batcher.submit(model, [2] * 4, "square")
        except Overloaded as error:
            refused.append(error)
            raise

    results = at_once(lambda: batcher.submit(model, [1], "square"), *[meanwhile(model, call)] * 5)
    assert [type(result) for result in results].count(Overloaded) == 2
    assert results.count([4] * 4) == 3  # the last of them when the others would take 0.9
    know(batcher, 1, 0.1)
    assert batcher.submit(model, [3] * 1000, "square") == [9] * 1000  # it takes longer than that, but nobody waits
    assert_idle(batcher)


@pytest.mark.parametrize("is_first", [True, False])
def test_further_rows_of_a_request_that_was_admitted_are_not_refused(is_first: bool) -> None:
    model, batcher = Model(), Batcher(max_wait=1.0)
    know(batcher, 1, 1.0)  # so the one that waits is expected to take 10 seconds
    refused = threading.Event()
    model.gate = lambda: len(model.sizes) > 1 or refused.is_set() or len(batcher._queue) == 2

    def call() -> Any:
        until(lambda: batcher._queue)
        try:
            return batcher.submit(model, [3], "square", is_first=is_first)
        except Overloaded:
            refused.set()

    waits = meanwhile(model, lambda: batcher.submit(model, [2] * 10, "square"))
    *others, last = at_once(lambda: batcher.submit(model, [1], "square"), waits, meanwhile(model, call))
    assert others == [[1], [4] * 10]
    assert last == (None if is_first else [9])


def test_who_waits_for_one_call_is_not_refused_though_that_takes_longer_than_the_bound() -> None:
    model, batcher = Model(), Batcher(max_wait=1.0)
    know(batcher, 1, 5.0)
    hold(model, batcher, 2)
    call = meanwhile(model, lambda: batcher.submit(model, [2], "square"))
    assert at_once(lambda: batcher.submit(model, [1], "square"), call, call) == [[1], [4], [4]]


def test_a_call_gets_no_more_rows_than_take_50_ms() -> None:
    model, batcher = Model(), Batcher()
    model.seconds_per_row = 0.005
    for rows in (1, 4):
        batcher.submit(model, [1] * rows, "square")
    model.sizes.clear()
    hold(model, batcher, 40)
    calls = [meanwhile(model, lambda: batcher.submit(model, [2], "square"))] * 40
    assert at_once(lambda: batcher.submit(model, [1], "square"), *calls) == [[1], *[[4]] * 40]
    assert max(model.sizes) <= 20  # a busy machine makes them smaller


def test_callers_that_left_are_not_answered_and_nobody_waits_for_them() -> None:
    model, batcher = Model(), Batcher()
    know(batcher, 64, 0.001)
    left = threading.Event()

    def check() -> None:
        if left.is_set():
            raise ConnectionResetError

    def leave() -> bool:
        if len(batcher._queue) < 6:
            return False
        time.sleep(PATIENCE + 0.01)
        left.set()
        return True

    model.gate = lambda: left.is_set() or leave()
    stays = meanwhile(model, lambda: batcher.submit(model, [2], "square"))
    leaves = meanwhile(model, lambda: batcher.submit(model, [3] * 5, "square", check=check))
    first, *others = at_once(lambda: batcher.submit(model, [1], "square", check=check), *[leaves, stays] * 3)
    assert first == [1]  # it was being answered when it left
    assert [type(other) if isinstance(other, Exception) else other for other in others] == [
        ConnectionResetError,
        [4],
    ] * 3
    assert model.sizes == [1, 3]
    assert_idle(batcher)


def test_one_refused_caller_of_many_costs_few_calls() -> None:
    model, batcher = Model(), Batcher()
    know(batcher, 64, 0.001)
    hold(model, batcher, 64)
    calls = [meanwhile(model, lambda n=n: batcher.submit(model, [n], "square")) for n in [-1, *range(1, 64)]]  # type: ignore[misc]
    _, *results = at_once(lambda: batcher.submit(model, [1], "square"), *calls)
    assert isinstance(results[0], ValueError)
    assert results[1:] == [[n * n] for n in range(1, 64)]
    assert len(model.sizes) <= 1 + 1 + 2 * 6


def test_caller_with_refused_rows_shares_no_calls_for_a_while() -> None:
    model, batcher = Model(), Batcher()
    know(batcher, 64, 0.001)
    with pytest.raises(ValueError, match="negative"):
        batcher.submit(model, [-1], "square", caller="bob")
    order: list[str] = []

    def ask(caller: str, n: int) -> Any:
        result = batcher.submit(model, [n], "square", caller=caller)
        order.append(caller)
        return result

    model.sizes.clear()
    model.gate = lambda: len(model.sizes) > 1 or len(batcher._queue) == 8
    first = meanwhile(model, lambda: ask("bob", 2))  # these wait before the others …
    other = meanwhile(model, lambda: until(lambda: len(batcher._queue) >= 5) or ask("alice", 3))
    calls = [lambda: batcher.submit(model, [1], "square"), *[first] * 5, *[other] * 3]
    assert at_once(*calls) == [[1], *[[4]] * 5, *[[9]] * 3]
    assert sorted(model.sizes) == [1, 1, 1, 1, 1, 1, 3]
    assert order.index("alice") <= 2  # … and take turns with them
    batcher._suspects["bob"] -= SUSPECT_SECONDS
    model.sizes.clear()
    hold(model, batcher, 2)
    calls = [meanwhile(model, lambda caller=caller: ask(caller, 2)) for caller in ("bob", "alice")]  # type: ignore[misc]
    assert at_once(lambda: batcher.submit(model, [1], "square"), *calls) == [[1], [4], [4]]
    assert model.sizes == [1, 2]


def test_suspects_are_counted_up_to_a_bound() -> None:
    model, batcher = Model(), Batcher()
    for caller in range(MAX_SUSPECTS + 10):
        with pytest.raises(ValueError, match="negative"):
            batcher.submit(model, [-1], "square", caller=caller)
    assert list(batcher._suspects) == list(range(10, MAX_SUSPECTS + 10))


def test_large_callers_neither_starve_others_nor_are_starved() -> None:
    model, batcher = Model(0.01), Batcher()
    counts = [0] * 8
    stop = threading.Event()

    def large() -> None:
        for piece in range(2000):  # the pieces of one request
            batcher.submit(model, [1] * MAX_BATCH_ROWS, "square")
            if piece >= 4 and min(counts) > 0:
                break
        stop.set()

    def small(number: int) -> None:
        while not stop.is_set():
            batcher.submit(model, [1], "square")
            counts[number] += 1

    assert at_once(large, *(lambda n=n: small(n) for n in range(8))) == [None] * 9  # type: ignore[misc]
    assert min(counts) > 0  # each got turns in between; how many is for the machine to say


def test_slow_calls_are_handed_to_a_native_thread_and_fast_ones_are_not() -> None:
    handed: list[int] = []

    def native(function: Any, run: Any, parts: Any, method: str) -> Any:
        handed.append(sum(map(len, parts)))
        return function(run, parts, method)

    model, batcher = Model(3 * SLOW), Batcher(native)
    batcher.submit(model, [1], "square")
    assert handed == [1]  # nothing is known of it yet
    batcher.submit(model, [1], "square")
    assert handed == [1, 1]
    model.seconds = 0
    for _ in range(30):
        batcher.submit(model, [1], "square")
    assert len(handed) < 30  # it has become fast
    count = len(handed)
    batcher.submit(model, [1], "square")
    assert len(handed) == count
    batcher.submit(model, [1], "cube")
    assert len(handed) == count + 1


def test_timings_follow_what_lasts_and_not_a_disturbance() -> None:
    timings = Timings()
    timings.note("predict", 1, 0.0015)
    for _ in range(2):
        timings.note("predict", 1, 0.003)
    assert timings.expect("predict", 1) < SLOW
    for _ in range(20):
        timings.note("predict", 1, 0.003)
    assert timings.expect("predict", 1) > SLOW
    for _ in range(3):
        timings.note("predict", 1, 0.0015)
    assert timings.expect("predict", 1) < SLOW


def test_timings_expect_the_worst_of_sizes_that_were_not_seen() -> None:
    timings = Timings()
    timings.note("predict", 3, 0.003)
    assert timings.expect("predict", 2) == pytest.approx(0.002)
    assert timings.expect("predict", 1) == float("inf")
    assert timings.expect("predict", 12) == pytest.approx(0.012)
    assert timings.expect("predict_proba", 1) == float("inf")
    timings.note("predict", 1000, 0.0011)
    assert timings.expect("predict", 1000) == pytest.approx(0.0011)
    assert timings.expect("predict", 100) == pytest.approx(0.1)
    assert [each["rows"] for each in timings.describe()] == ["2-3", "512-1023"]
    assert [each["runs_on"] for each in timings.describe()] == ["a native thread", "the worker's loop"]


def test_rows_of_a_call_are_bounded_by_what_they_take() -> None:
    timings = Timings()
    assert timings.bound("predict") == (MAX_BATCH_ROWS, 0.0)  # nothing is known
    timings.note("predict", 1, 0.02)
    assert timings.bound("predict") == (2, 0.02)
    for rows in (4, 16, 64):
        timings.note("predict", rows, 0.02)  # whatever their number
    assert timings.bound("predict")[0] == 160  # those were 0.3 ms each; it will know more when it was called for them
    timings.note("slow", 1, 2.0)
    assert timings.bound("slow") == (2, 2.0)  # twice what one row takes
    timings.note("fast", 1024, 0.001)
    assert timings.bound("fast")[0] == MAX_BATCH_ROWS


def test_one_disturbed_call_bounds_no_further_ones() -> None:
    timings = Timings()
    timings.note("predict", 1, 0.001)
    timings.note("predict", 40, 0.001)
    before = timings.bound("predict")[0]
    timings.note("predict", 1000, 9.0)  # the first of this size
    assert timings.bound("predict")[0] > 0.1 * before
    for _ in range(2):
        rows = timings.bound("predict")[0]
        timings.note("predict", rows, rows * 0.001 / 40)
    assert timings.bound("predict")[0] == pytest.approx(before, rel=0.1)


def test_timings_of_small_calls_follow_those_of_larger_ones_on_a_machine_that_became_slower() -> None:
    timings = Timings()
    timings.note("predict", 1, 0.001)
    for _ in range(50):
        timings.note("predict", 40, 0.4)
    assert timings.expect("predict", 40) == pytest.approx(0.4, rel=0.1)
    for _ in range(10):
        timings.note("predict", 1, 0.001)
    assert timings.expect("predict", 40) == pytest.approx(0.04, rel=0.1)


def test_it_is_told_of_each_call() -> None:
    told: list[tuple[int, float]] = []
    model = Model()

    def observe(rows: int, waited: float) -> None:
        told.append((rows, waited))
        model.seconds = waited + 0.05  # so the second waits for longer than the first

    batcher = Batcher(observers=[observe])
    hold(model, batcher, 1)
    second = meanwhile(model, lambda: batcher.submit(model, [2] * 5, "square"))
    at_once(lambda: batcher.submit(model, [1] * 3, "square"), second)
    assert [rows for rows, _ in told] == [3, 5]
    assert told[0][1] < told[1][1] > 0.02


def test_caller_that_is_killed_hurts_nobody() -> None:
    gevent = pytest.importorskip("gevent")
    from gevent import monkey

    if not monkey.is_module_patched("threading"):
        return  # only a greenlet can be killed; the run below has them
    model, batcher = Model(0.1), Batcher()
    model.may_overlap = True
    for victims in ((0,), (1,), (2,), (0, 1), (1, 3), (0, 1, 2, 3)):
        for delay in (0.0, 0.02, 0.12):
            callers = [gevent.spawn(batcher.submit, model, [n], "square") for n in range(5)]
            gevent.sleep(delay)
            for at in victims:
                callers[at].kill()
            for at, caller in enumerate(callers):
                if at not in victims:
                    assert caller.get(timeout=10) == [at * at], (victims, delay)
            assert_idle(batcher)


@pytest.mark.long
def test_all_of_it_under_gevent() -> None:
    if "UNDER_GEVENT" in os.environ:
        return
    script = (
        "from gevent import monkey; monkey.patch_all(); import sys, pytest; "
        f"sys.exit(pytest.main(['-q', '-n0', '-p', 'no:cacheprovider', {__file__!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"UNDER_GEVENT": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_running_call_is_as_old_as_it_had_ticks() -> None:
    batcher, model = Batcher(), Model()
    ages: list[int] = []
    model.gate = lambda: ages.append(batcher.tick()) or len(ages) == 4
    batcher.tick()
    assert batcher.submit(model, [2], "square") == [4]
    assert ages == [0, 1, 2, 3]  # the first tick may come at once, so it is no second yet
    assert batcher.tick() == 0
    batcher = Batcher()
    know(batcher, 1, 2.0)  # so two rows may take four seconds
    ages.clear()
    model.gate = lambda: ages.append(batcher.tick()) or len(ages) == 8
    assert batcher.submit(model, [2, 3], "square") == [4, 9]
    assert ages == [0, 0, 0, 0, 0, 1, 2, 3]


@pytest.mark.parametrize(("ticks", "noted"), [(0, 2.0), (40, 40.0)])
def test_time_for_which_the_process_was_stopped_is_not_the_models(
    monkeypatch: pytest.MonkeyPatch, ticks: int, noted: float
) -> None:
    batcher = Batcher()

    def run(parts: Any, method: str) -> list[Any]:
        for _ in range(ticks):
            batcher.tick()
        return list(parts)

    monkeypatch.setattr("model.batching._timed", lambda run, parts, method: (run(parts, method), 40.0))
    batcher.submit(run, [[1.0]], "predict")
    assert batcher.timings.expect("predict", 1) == noted
