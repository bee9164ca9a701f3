"""Merges concurrent calls of a model into one: a predict costs about as much for 64 rows as for 1.

    batcher = Batcher()
    batcher.submit(predict_batch, rows, "predict")

What is queued when the model is free goes into one call, as far as that takes 50 ms, or twice as long as one row. There
is no timer, so a lone caller does not wait; and none is admitted whose turn would come too late.
The first caller leads: it lets other ready callers queue up, runs the model for all of them, wakes them with their
results, and wakes the head of those that came in the meantime as the next leader. The batcher has no thread of its own,
and each caller waits on its own lock, so it works the same under gevent, under gthread and in plain threads.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from processes import run_hooks

from .timings import SLOW, Timings

SOLO_THRESHOLD = 8  # calls in a row that no other caller joined
PATIENCE = 0.25  # seconds that a caller waits before it is asked whether it is still there, which costs some 5 µs
SUSPECT_SECONDS = 5.0  # for which a caller whose rows the model refused shares no calls
MAX_SUSPECTS = 1000

Run = Callable[[Sequence[Any], str], list[Any]]


class Overloaded(Exception):
    """The queue for the model is too long."""


def call_directly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Stand for `run_in_thread` where a call is short, or where nothing else has to go on meanwhile."""
    return function(*arguments)


@dataclass(slots=True, eq=False)
class _Call:
    """One caller's rows, and their result."""

    rows: Any
    key: Hashable  # only calls with equal keys are merged
    since: float
    caller: Hashable
    check: Callable[[], Any]
    suspect: bool = False  # it shares no call
    seconds: float = 0.0  # that it adds to the wait of others
    wake: "threading.Lock | None" = None  # that a caller who does not lead waits for
    answered: bool = False
    result: Any = None
    error: Exception | None = None

    def has_left(self) -> bool:
        """Return whether the caller no longer waits for an answer; then its call is over."""
        try:
            self.check()
        except Exception as error:
            self.error, self.answered = error, True
        return self.answered


class Batcher:
    """Merges the calls of one model. May be called from any number of threads or greenlets."""

    def __init__(
        self,
        run_in_thread: Callable[..., Any] = call_directly,
        max_wait: float = 1.0,
        observers: Sequence[Callable[[int, float], None]] = (),
    ) -> None:
        """Make a batcher for one model.

        Args:
            run_in_thread: runs a function on a native thread and returns its result.
            max_wait: seconds that callers may take together, or two calls; a further one is rejected.
            observers: called for each call of the model with its rows, and the seconds that the first of them waited.
        """
        self.timings = Timings()
        self._run_in_thread, self._max_wait, self._observers = run_in_thread, max_wait, observers
        self._queue: deque[_Call] = deque()
        self._open: dict[Hashable, int] = {}  # callers by their key, of those that wait or are being answered
        self._expected = 0.0  # seconds that all of these will take
        self._suspects: dict[Hashable, float] = {}  # caller → since when, the oldest first
        self._leader: _Call | None = None
        self._lock = threading.Lock()  # of the five above; never held across a call of the model
        self._seconds = 0  # see `tick`
        self._running_since: float | None = None
        self._alone = 0  # calls in a row that nobody joined

    def submit(
        self,
        run: Run,
        rows: Any,
        method: str,
        shape: Hashable = None,
        caller: Hashable = None,
        check: Callable[[], Any] = bool,
        is_first: bool = True,
    ) -> Any:
        """Return the model's result for these rows, from one call together with the rows of concurrent callers.

        Args:
            run: called with a list of the rows of each caller and their common method; returns one result for each
                caller. If it raises, it is called again for each half of the callers.
            rows: a list or array; of at most `timings.bound` rows, if the model can be called for fewer at a time.
            method: of the model.
            shape: only rows of the same shape are merged.
            caller: who asks, if known: after `run` raised at its rows, its next ones share no calls for a while.
            check: raises if the caller no longer waits for an answer; called if its turn did not come at once.
            is_first: false if these are further rows of a request that was admitted.

        Raises: Overloaded; what `check` raised; or what `run` raised at these rows alone.
        """
        call = _Call(rows, (method, shape), time.perf_counter(), caller, check)
        self._enter(call, method, is_first)
        batch: list[_Call] = []
        try:
            if call.wake is not None:
                call.wake.acquire()
            if not call.answered:  # so it leads
                # Other ready callers get as far as the queue. A caller that has been alone yields only now and then,
                # since that costs as much as the rest of this function. By its full name: a `sleep` that was imported
                # before gevent patched it would block.
                if self._alone < SOLO_THRESHOLD or self._alone % SOLO_THRESHOLD == 0:
                    time.sleep(0)
                batch = self._take(call, method)
                self._alone = 0 if len(batch) > 1 else self._alone + 1
                self._answer(run, [each for each in batch if not each.answered], method)
            if call.error is not None:
                raise call.error
            return call.result
        finally:  # also if this caller is killed while it waits or leads
            self._leave(call, batch)
            call.error = None  # whose traceback holds this frame: the two would hold the rows until they are collected

    def _enter(self, call: _Call, method: str, is_first: bool) -> None:
        """Put a call into the queue, and let it lead if there is no leader. Raises: Overloaded."""
        if self._suspects and call.since - self._suspects.get(call.caller, -inf) < SUSPECT_SECONDS:
            call.suspect, call.key = True, object()
        with self._lock:
            if is_first and self._expected > self._max_wait:
                max_rows, seconds_per_row = self.timings.bound(method)
                if self._expected > 2 * max_rows * seconds_per_row:  # one call that is under way, and one that waits
                    raise Overloaded(f"the calls in the queue will take the model {self._expected:.1f} seconds")
            if others := self._open.get(call.key, 0):  # so it needs no call of its own
                call.seconds = len(call.rows) * self.timings.bound(method)[1]
            else:
                call.seconds = self.timings.expect(method, len(call.rows), unknown=0.0)
            self._open[call.key] = others + 1
            self._expected += call.seconds
            self._queue.append(call)
            if self._leader is None:
                self._leader = call
            else:
                call.wake = threading.Lock()
                call.wake.acquire()

    def tick(self) -> int:
        """Return for how many whole seconds the present call of the model has been running, beyond what was expected.

        To be called once a second. The system's clocks go on while a platform has stopped this process; ticks do not.
        """
        self._seconds += 1
        since = self._running_since
        return 0 if since is None else max(0, int(self._seconds - since - 1))

    def _take(self, call: _Call, method: str) -> list[_Call]:
        """Take this call off the queue, the others that may go with it, and those whose callers are gone."""
        batch, size, now = [], 0, time.perf_counter()
        left: deque[_Call] = deque()
        with self._lock:
            max_rows = self.timings.bound(method)[0] if len(self._queue) > 1 else 1
            if self._queue[0] is not call:
                self._queue.remove(call)
                self._queue.appendleft(call)
            for each in self._queue:
                if now - each.since > PATIENCE and each.has_left():
                    batch.append(each)
                elif each.key == call.key and (size + len(each.rows) <= max_rows or not size):
                    batch.append(each)
                    size += len(each.rows)
                else:
                    left.append(each)
                    if each.key == call.key:
                        max_rows = 0  # in turn: a large request is not overtaken for ever
            self._queue = left
        if size:
            run_hooks(self._observers, size, now - call.since)
        return batch

    def _answer(self, run: Run, batch: list[_Call], method: str) -> None:
        if not batch:
            return
        size = sum(len(each.rows) for each in batch)
        expected = self.timings.expect(method, size)
        runner = self._run_in_thread if expected > SLOW else call_directly
        began = self._seconds
        self._running_since = began + (expected if expected < inf else 0.0)
        try:
            results, seconds = runner(_timed, run, [each.rows for each in batch], method)
        except Exception as error:
            if len(batch) > 1:  # the rows of one caller may have spoiled it for all
                half = len(batch) // 2
                self._answer(run, batch[:half], method)
                self._answer(run, batch[half:], method)
                return
            batch[0].error = error
            self._suspect(batch[0].caller)
        else:
            # A platform may have stopped this process meanwhile, which its ticks do not count.
            self.timings.note(method, size, min(seconds, self._seconds - began + 2.0))
            for each, result in zip(batch, results, strict=True):
                each.result = result
        finally:
            self._running_since = None
        for each in batch:
            each.answered = True

    def _suspect(self, caller: Hashable) -> None:
        if caller is not None:
            with self._lock:
                self._suspects.pop(caller, None)
                self._suspects[caller] = time.perf_counter()
                if len(self._suspects) > MAX_SUSPECTS:
                    del self._suspects[next(iter(self._suspects))]

    def _leave(self, call: _Call, batch: list[_Call]) -> None:
        """Wake the callers that were answered, and, if this caller led, the next leader."""
        with self._lock:
            self._expected -= call.seconds
            if others_open := self._open.pop(call.key) - 1:
                self._open[call.key] = others_open
            if not batch and call in self._queue:  # killed while it waited
                self._queue.remove(call)
            if self._leader is not call:
                return
            others = [each for each in batch if each is not call]
            # If this caller was killed before it had answered them, they wait again.
            self._queue.extendleft(reversed([each for each in others if not each.answered]))
            self._leader = self._queue[0] if self._queue else None
            if self._queue and self._suspects:  # those and the others take turns
                self._leader = next((each for each in self._queue if each.suspect != call.suspect), self._queue[0])
            woken = [each for each in others if each.answered]
            if self._leader is not None:
                woken.append(self._leader)
        for each in woken:
            if each.wake is not None:
                each.wake.release()


def _timed(run: Run, parts: Sequence[Any], method: str) -> tuple[list[Any], float]:
    """Return the model's results and the seconds they took, without the hand-over to a thread."""
    began = time.perf_counter()
    return run(parts, method), time.perf_counter() - began
