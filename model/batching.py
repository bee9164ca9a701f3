"""Merges concurrent calls of a model into one: a predict costs about as much for 64 rows as for 1.

    batcher = Batcher()
    batcher.submit(predict_batch, rows, "predict")

Everything that is queued when the model is free goes into one call. There is no timer, so a lone caller does not wait.
The first caller leads: it lets other ready callers queue up, runs the model for all of them, wakes them with their
results, and wakes the head of those that came in the meantime as the next leader. The batcher has no thread of its own,
and each caller waits on its own lock, so it works the same under gevent, under gthread and in plain threads.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from processes import run_hooks

from .timings import SLOW, Timings

MAX_BATCH_ROWS = 4096  # of one call of the model; a request with more goes in pieces, with others in between
SOLO_THRESHOLD = 8  # calls in a row that no other caller joined

Run = Callable[[Sequence[Any], str], list[Any]]


class Overloaded(Exception):
    """More rows wait for the model than the bound allows."""


def call_directly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Stand for `run_in_thread` where requests have native threads of their own."""
    return function(*arguments)


@dataclass(slots=True, eq=False)
class _Call:
    """One caller's rows, and their result."""

    rows: Any
    key: Hashable  # only calls with equal keys are merged
    since: float
    wake: "threading.Lock | None" = None  # that a caller who does not lead waits for
    answered: bool = False
    result: Any = None
    error: Exception | None = None


class Batcher:
    """Merges the calls of one model. May be called from any number of threads or greenlets."""

    def __init__(
        self,
        run_in_thread: Callable[..., Any] = call_directly,
        max_waiting: int = 50_000,
        observers: Sequence[Callable[[int, float], None]] = (),
    ) -> None:
        """Make a batcher for one model.

        Args:
            run_in_thread: runs a function on a native thread and returns its result.
            max_waiting: rows that may wait; a further caller is rejected, unless none wait.
            observers: called for each call of the model with its rows, and the seconds that the first of them waited.
        """
        self.timings = Timings()
        self._run_in_thread, self._max_waiting, self._observers = run_in_thread, max_waiting, observers
        self._queue: deque[_Call] = deque()
        self._waiting = 0  # rows in the queue
        self._leader: _Call | None = None
        self._lock = threading.Lock()  # of the three above; never held across a call of the model
        self._seconds = 0  # see `tick`
        self._running_since: int | None = None
        self._alone = 0  # calls in a row that nobody joined

    def submit(self, run: Run, rows: Any, method: str, shape: Hashable = None) -> Any:
        """Return the model's result for these rows, from one call together with the rows of concurrent callers.

        Args:
            run: called with a list of the rows of each caller and their common method; returns one result for each
                caller. If it raises, it is called again for each caller alone.
            rows: a list or array of at most `MAX_BATCH_ROWS` rows.
            method: of the model.
            shape: only rows of the same shape are merged.

        Raises: Overloaded, too many rows wait; or what `run` raised at these rows alone.
        """
        call = _Call(rows, (method, shape), time.perf_counter())
        with self._lock:
            if self._waiting and self._waiting + len(rows) > self._max_waiting:
                raise Overloaded(f"{self._waiting} rows wait for the model")
            self._queue.append(call)
            self._waiting += len(rows)
            if self._leader is None:
                self._leader = call
            else:
                call.wake = threading.Lock()
                call.wake.acquire()
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
                batch = self._take(call)
                self._alone = 0 if len(batch) > 1 else self._alone + 1
                self._answer(run, batch, method)
        finally:  # also if this caller is killed while it waits or leads
            self._leave(call, batch)
        if call.error is not None:
            raise call.error
        return call.result

    def tick(self) -> int:
        """Return for how many whole seconds the present call of the model has been running.

        To be called once a second. The system's clocks go on while a platform has stopped this process; ticks do not.
        """
        self._seconds += 1
        since = self._running_since
        return 0 if since is None else self._seconds - since - 1

    def _take(self, call: _Call) -> list[_Call]:
        """Take this call off the queue, and the others that may go with it."""
        batch, size = [call], len(call.rows)
        with self._lock:
            for other in self._queue:
                if other is not call and other.key == call.key:
                    if size + len(other.rows) > MAX_BATCH_ROWS:
                        break  # in turn: a large request is not overtaken for ever
                    batch.append(other)
                    size += len(other.rows)
            taken = set(batch)
            self._queue = deque(each for each in self._queue if each not in taken)
            self._waiting -= size
        run_hooks(self._observers, size, time.perf_counter() - call.since)
        return batch

    def _answer(self, run: Run, batch: list[_Call], method: str) -> None:
        size = sum(len(each.rows) for each in batch)
        call = self._run_in_thread if self.timings.expect(method, size) > SLOW else call_directly
        self._running_since = self._seconds
        try:
            results, seconds = call(_timed, run, [each.rows for each in batch], method)
        except Exception as error:
            if len(batch) > 1:  # the rows of one caller may have spoiled it for all
                for each in batch:
                    self._answer(run, [each], method)
                return
            batch[0].error = error
        else:
            self.timings.note(method, size, seconds)
            for each, result in zip(batch, results, strict=True):
                each.result = result
        finally:
            self._running_since = None
        for each in batch:
            each.answered = True

    def _leave(self, call: _Call, batch: list[_Call]) -> None:
        """Wake the callers that were answered, and, if this caller led, the next leader."""
        with self._lock:
            if not batch and call in self._queue:  # killed while it waited
                self._queue.remove(call)
                self._waiting -= len(call.rows)
            if self._leader is not call:
                return
            others = [each for each in batch if each is not call]
            again = [each for each in others if not each.answered]  # this caller was killed before it had answered them
            self._queue.extendleft(reversed(again))
            self._waiting += sum(len(each.rows) for each in again)
            self._leader = self._queue[0] if self._queue else None
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
