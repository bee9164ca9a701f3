"""Merges concurrent calls of a model into one: a predict costs about as much for 64 rows as for 1.

    batcher = Batcher()
    batcher.call(model.answer, rows, "predict")

What is queued when the model is free goes in as one call. There is no timer, so a lone caller waits for nobody. The
first caller leads: it lets those that are ready queue up, runs the model for all of them, wakes them with their
results, and wakes the head of those that came meanwhile as the next leader. No thread belongs to it, and each caller
waits on a lock of its own, so it is the same under gevent, under gthread and in plain threads.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

MOST_ROWS = 4096  # of one call of the model; who has more asks in pieces, and others get their turn in between
SLOW = 0.002  # seconds of a call; handing it to a native thread costs 0.15 ms
LONELY = 8  # calls without company
# Of the newest call in the moving average. A disturbance only makes a call longer: so it falls fast and rises slowly.
_WEIGHT_OF_LESS, _WEIGHT_OF_MORE = 0.5, 0.1

Run = Callable[[Sequence[Any], str], list[Any]]


class Overloaded(Exception):
    """More rows wait for the model than the bound allows."""


class _Call:
    """One caller's rows, and what became of them."""

    __slots__ = ("answered", "error", "kind", "result", "rows", "since", "wake")

    def __init__(self, rows: Any, kind: Hashable) -> None:
        self.rows, self.kind = rows, kind
        self.since = time.perf_counter()
        self.result: Any = None
        self.error: BaseException | None = None
        self.answered = False
        self.wake: threading.Lock | None = None  # of one who waits


class Batcher:
    """Merges the calls of one model. May be called from any number of threads or greenlets."""

    def __init__(
        self,
        native: Callable[..., Any] = lambda function, *arguments: function(*arguments),
        most_waiting: int = 50_000,
        observe: Callable[[int, float], None] = lambda rows, waited: None,
    ) -> None:
        """Make one for one model.

        Args:
            native: runs a function on a native thread and returns its result, while the caller's event loop goes on.
            most_waiting: rows that may wait; a caller more is refused, unless none wait.
            observe: is told of each call of the model: its rows, and the seconds that the first of them waited.
        """
        self.timings = Timings()
        self._native, self._most_waiting, self._observe = native, most_waiting, observe
        self._queue: deque[_Call] = deque()
        self._waiting = 0  # rows in the queue
        self._leader: _Call | None = None
        self._lock = threading.Lock()  # of the three above; never held across a call of the model
        self._running_since: float | None = None
        self._alone = 0  # calls in a row that nobody joined

    def call(self, run: Run, rows: Any, method: str, shape: Hashable = None) -> Any:
        """Return what the model answers to these rows.

        Args:
            run: called with the rows of each of several callers, and the method they have in common; returns one
                result for each caller. Where it raises, it is called again for each caller alone.
            rows: a list or array of them, `MOST_ROWS` at the most.
            method: of the model.
            shape: only rows of the same shape are merged.

        Raises:
            Overloaded: too many rows wait.
            Exception: what `run` raised at these rows alone.
        """
        call = _Call(rows, (method, shape))
        with self._lock:
            if self._waiting and self._waiting + len(rows) > self._most_waiting:
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
                # Others that are ready get as far as the queue. Who has been alone looks for others now and then only:
                # giving way costs as much as all the rest here. By its full name: one that was bound before gevent
                # patched it would block.
                if self._alone < LONELY or self._alone % LONELY == 0:
                    time.sleep(0)
                batch = self._take(call)
                self._alone = 0 if len(batch) > 1 else self._alone + 1
                self._answer(run, batch, method)
        finally:  # also where this caller is killed while it waits or leads
            self._leave(call, batch)
        if call.error is not None:
            raise call.error
        return call.result

    def running_for(self) -> float:
        """Return the seconds that the model has been at its present call."""
        since = self._running_since
        return 0.0 if since is None else time.perf_counter() - since

    def _take(self, call: _Call) -> list[_Call]:
        """Take this call off the queue, and those that may go with it."""
        batch, size, left = [call], len(call.rows), deque[_Call]()
        with self._lock:
            while self._queue:
                other = self._queue.popleft()
                if other is call:
                    continue
                if size + len(other.rows) > MOST_ROWS:
                    left.append(other)
                    break  # in turn: what is large is not overtaken for ever
                if other.kind == call.kind:
                    batch.append(other)
                    size += len(other.rows)
                else:
                    left.append(other)
            self._queue.extendleft(reversed(left))
            self._waiting -= size
        self._observe(size, time.perf_counter() - call.since)
        return batch

    def _answer(self, run: Run, batch: list[_Call], method: str) -> None:
        size = sum(len(each.rows) for each in batch)
        is_slow = self.timings.expect(method, size) > SLOW
        parts = [each.rows for each in batch]
        self._running_since = time.perf_counter()
        try:
            results, seconds = self._native(_timed, run, parts, method) if is_slow else _timed(run, parts, method)
        except Exception as error:
            if len(batch) > 1:  # one of them may have spoiled it for all
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
        """Wake those who were answered; and where this caller led, who leads next."""
        with self._lock:
            if not batch and call in self._queue:  # killed while it waited
                self._queue.remove(call)
                self._waiting -= len(call.rows)
            if self._leader is not call:
                return
            again = [each for each in batch if each is not call and not each.answered]  # their leader was killed
            self._queue.extendleft(reversed(again))
            self._waiting += sum(len(each.rows) for each in again)
            self._leader = self._queue[0] if self._queue else None
            woken = [each for each in batch if each is not call and each.answered]
            if self._leader is not None:
                woken.append(self._leader)
        for each in woken:
            if each.wake is not None:
                each.wake.release()


def _timed(run: Run, parts: Sequence[Any], method: str) -> tuple[list[Any], float]:
    """Return what the model answers, and the seconds that it took, without those to hand it to a thread and back."""
    began = time.perf_counter()
    return run(parts, method), time.perf_counter() - began


class Timings:
    """How long calls of a model take, by method and by powers of two of their rows: moving averages, in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], float] = {}

    def note(self, method: str, rows: int, seconds: float) -> None:
        """Count a call in."""
        key = method, rows.bit_length()
        before = self._seconds.get(key, seconds)
        self._seconds[key] = before + (_WEIGHT_OF_LESS if seconds < before else _WEIGHT_OF_MORE) * (seconds - before)

    def expect(self, method: str, rows: int) -> float:
        """Return the seconds that a call will take; of sizes not seen yet, what it may take at worst."""
        bits = rows.bit_length()
        if (found := self._seconds.get((method, bits))) is not None:
            return found
        seen = {size: seconds for (name, size), seconds in list(self._seconds.items()) if name == method}
        larger = [seconds for size, seconds in seen.items() if size > bits]
        smaller = [seconds * 2 ** (bits - size) for size, seconds in seen.items() if size < bits]
        return min(larger + smaller, default=float("inf"))

    def describe(self) -> list[dict[str, Any]]:
        """Describe them as JSON values."""
        return [
            {
                "method": method,
                "rows": f"{2 ** (bits - 1)}-{2**bits - 1}" if bits > 1 else "1",
                "seconds": round(seconds, 6),
                "runs_on": "a native thread" if seconds > SLOW else "the worker's loop",
            }
            for (method, bits), seconds in sorted(self._seconds.items())
        ]
