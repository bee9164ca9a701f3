"""The guard of a canary: compares it with the stable version, from the journal's records of requests and of feedback.

The rule for requests, evaluated every second while a guarded canary is served, once both have had `MIN_REQUESTS`: the
canary is rolled back

- for errors, if its share of failed requests (`error_type` model, overload or internal, or status 422: rows that it
  does not take) exceeds the stable version's by more than `SIGMAS` standard errors of the difference, and by more than
  1 %;
- for time, if significantly (`SIGMAS` standard errors) more than 1 % of its answers took longer than 1.5 times the
  stable version's p99 plus 5 ms.

Only requests that reached a version by chance are counted: with `X-Routing-Key` or `X-Model-Version` a caller chooses
the version, and one with bad rows could have every canary taken back. `python -m model list` and `GET /model` show how
many were counted.

Both are counted over the same window of time, so that an incident that affects both is held against neither. The window
begins with the last change of the routing, and again once the canary has had `MAX_CANARY_REQUESTS`, or the two together
`MAX_REQUESTS`. Four standard errors, not two, since the rule is evaluated again and again: of 300 canaries equal to
their stable version, each evaluated thirty times, none was rolled back, and one if response times scatter widely (a
log-normal sigma of 2).

The rule for predictions, once both have had `MIN_LABELLED_ROWS` whose truth came (POST /feedback): the canary is rolled
back if its share of wrong rows (of a regression its mean absolute error) exceeds the stable version's by more than
`SIGMAS` standard errors of the difference, and by more than 1 % (of a regression, of the stable version's). Truths come
late, so these rows are counted since the last change of the routing, however many requests there were; rows that were
predicted before it are not counted. Of 4,000 canaries equal to their stable version (errors in 0.1 % to 30 % of rows),
with 5 % to 50 % of 40,000 labelled rows and evaluated two hundred times, none was rolled back; nor of 4,000 regressions
with errors from normal to a Pareto distribution of infinite variance.

A standard error takes the rows to be independent, also those of one entry of feedback. They are so far as callers are:
if one caller sends a thousand rows of one kind to the canary alone, its errors look more certain than they are. A
worker that takes over reads the journal again, but not the records that were shipped and removed meanwhile: it may need
as many labelled rows once more.
"""

import logging
import math
import os
import time
from array import array
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from monitor import read_lines, segments
from processes import is_locked
from shared_files import FileLock, replace_file

from ..formats import ModelLoadError
from ..serving import Routes
from .routing import LOCAL_ROLLBACK, Routing
from .store import Note, Store, StoreError, as_json, unnoted
from .watcher import StoreRoutes

if TYPE_CHECKING:
    from server import Service

log = logging.getLogger(__name__)

LOCK = "guard.lock"  # in JOURNAL_DIR
MIN_REQUESTS = 200  # of each variant
MIN_LABELLED_ROWS = 200  # of each variant
MAX_CANARY_REQUESTS = 2_000  # in one window
MAX_REQUESTS = 200_000  # in one window
SIGMAS = 4.0
FAULTS = ("model", "overload", "internal")
MEASURES = WRONG_ROWS, MEAN_ERROR = "wrong", "abs_error"  # of predictions, as records of feedback name them
UNPROCESSABLE = 422  # rows that do not fit: callers' mistakes affect both variants, a changed signature only the canary


class Tally:
    """The outcomes of one variant's requests."""

    def __init__(self) -> None:
        self.requests = 0
        self.chosen = 0  # other requests, whose caller chose the version
        self.faults = 0
        self.times = array("d")  # seconds, of those that were answered

    def add(self, record: dict[str, Any]) -> None:
        """Count one record of a request. Raises: KeyError, TypeError or ValueError, it is not one."""
        failed = record["error_type"] in FAULTS or record.get("status") == UNPROCESSABLE
        answered, taken = record["success"], float(record["response_time"])
        if record.get("routed_by"):
            self.chosen += 1
            return
        self.requests += 1
        self.faults += failed
        if answered:
            self.times.append(taken)

    @property
    def variance(self) -> float:
        """Return the variance of the share of faults, not 0 if there were none: as in Agresti and Coull's interval."""
        return _variance(self.faults, self.requests)


@dataclass
class Labelled:
    """How the rows of one variant turned out whose truth came: each is wrong or right, or has an absolute error."""

    rows: int = 0
    total: float = 0.0  # wrong rows, or the sum of absolute errors
    squares: float = 0.0  # the sum of squared errors

    def add(self, record: dict[str, Any], measure: str) -> None:
        """Count one record of feedback. Raises: KeyError, TypeError or ValueError, it lacks what it should hold."""
        rows, total = int(record["rows"]), float(record[measure])
        squares = float(record["sq_error"]) if measure == MEAN_ERROR else 0.0
        if rows < 1 or not 0 <= total < math.inf or not 0 <= squares < math.inf:
            raise ValueError("not the sums of an entry")
        self.rows, self.total, self.squares = self.rows + rows, self.total + total, self.squares + squares

    @property
    def mean(self) -> float:
        """Return the share of wrong rows, or the mean absolute error."""
        return self.total / self.rows

    def variance(self, measure: str) -> float:
        """Return the variance of the mean."""
        if measure == WRONG_ROWS:
            return _variance(self.total, self.rows)
        return max(0.0, self.squares / self.rows - self.mean**2) / (self.rows - 1)


def _variance(count: float, of: int) -> float:
    share = (count + 1) / (of + 2)
    return share * (1 - share) / of


def judge(stable: Tally, canary: Tally) -> str:
    """Return why the canary should be rolled back, by the rule above, or ""."""
    if min(stable.requests, canary.requests) < MIN_REQUESTS:
        return ""
    failed, expected = canary.faults / canary.requests, stable.faults / stable.requests
    if failed - expected > max(0.01, SIGMAS * math.sqrt(stable.variance + canary.variance)):
        return f"{100 * failed:.1f} % of its {canary.requests} requests failed, of stable's {100 * expected:.1f} %"
    if min(len(stable.times), len(canary.times)) < MIN_REQUESTS:
        return ""
    # Copies: an array cannot grow while numpy has its memory. numpy lets other threads run while it sorts.
    times, at = np.array(stable.times), math.ceil(0.99 * len(stable.times)) - 1
    bound = 1.5 * float(np.partition(times, at)[at]) + 0.005
    slow = float(np.mean(np.array(canary.times) > bound))
    if slow > 0.01 + SIGMAS * math.sqrt(0.01 * 0.99 / len(canary.times)):
        share = f"{100 * slow:.1f} % of its {len(canary.times)} answers"
        return f"{share} took longer than {1000 * bound:.1f} ms, 1.5 times stable's p99 and 5 ms"
    return ""


def _so_far(stable: Tally, canary: Tally) -> str:
    """Return how many requests have been counted, and what they show."""
    counts = f"{canary.requests} requests reached the canary by chance, and {stable.requests} the stable version"
    chosen = stable.chosen + canary.chosen
    if min(stable.requests, canary.requests) >= MIN_REQUESTS:
        shares = (f"{100 * each.faults / each.requests:.1f} %" for each in (canary, stable))
        return f"the canary is no worse so far: {counts}; of these failed {' and '.join(shares)}"
    needed = f"{counts}; {MIN_REQUESTS} of each are needed"
    if chosen < MIN_REQUESTS:
        return f"too early to judge the canary: {needed}"
    return f"cannot judge the canary: {needed}, and {chosen} others came with X-Routing-Key or X-Model-Version"


def judge_predictions(stable: Labelled, canary: Labelled, measure: str) -> str:
    """Return why the canary should be rolled back for its predictions, by the rule above, or "".

    `measure` is what a record of feedback calls it: WRONG_ROWS or MEAN_ERROR.
    """
    if min(stable.rows, canary.rows) < MIN_LABELLED_ROWS:
        return ""
    margin = 0.01 if measure == WRONG_ROWS else 0.01 * stable.mean
    spread = SIGMAS * math.sqrt(stable.variance(measure) + canary.variance(measure))
    if canary.mean - stable.mean <= max(margin, spread):
        return ""
    rows = f"of its {canary.rows} labelled rows"
    if measure == WRONG_ROWS:
        share, expected = f"{100 * canary.mean:.1f} %", f"{100 * stable.mean:.1f} %"
        return f"{share} {rows} were predicted wrongly, of stable's {stable.rows} {expected}"
    return f"the mean absolute error {rows} is {canary.mean:.4g}, of stable's {stable.rows} {stable.mean:.4g}"


class Tail:
    """Reads what is added to a journal by all its writers."""

    def __init__(self, directory: Path, since: float) -> None:
        """Begin with the segments that were written to at or after `since` (seconds since 1970)."""
        self._directory, self._since = directory, since
        self._offsets: dict[str, int] = {}

    def read(self) -> list[dict[str, Any]]:
        """Return the records that came since the last call, 20,000 at most: the next call returns the others."""
        found: list[dict[str, Any]] = []
        offsets = {}
        for path in segments(self._directory):
            with suppress(OSError):  # shipped meanwhile, or dropped to make room
                stat = path.stat()
                skips = path.name not in self._offsets and stat.st_mtime < self._since
                offsets[path.name] = stat.st_size if skips else self._offsets.get(path.name, 0)
                for offset, record in read_lines(path, offsets[path.name]):
                    if len(found) >= 20_000:
                        break
                    offsets[path.name] = offset
                    if record is not None:
                        found.append(record)
        self._offsets = offsets
        return found


class Guard:
    """Guards the canary of one host's service. One worker at a time does, the one that has the lock."""

    def __init__(self, directory: Path, store: Path, note: Note = unnoted) -> None:
        """`directory` is the service's JOURNAL_DIR, with the journal, the lock and a rollback of this host."""
        self._directory, self._store = directory, Store(store, note)
        self.lock = FileLock(directory / LOCK)  # its content: what the guard that holds it has to say
        self._noted = ""
        self._last_verdict = ""  # of the window before
        self._tail: Tail | None = None  # of the journal, while this process guards
        self._window: tuple[str, str] | None = None  # the routing that is evaluated, and the stable version that serves
        self._tallies: dict[tuple[str, str], Tally] = {}  # by variant and version
        self._routing: tuple[str, str] | None = None  # as `_window`, but it only changes with the routing
        self._since = 0.0  # seconds since 1970: when that began
        self._labelled: dict[tuple[str, str, str], Labelled] = {}  # by measure, variant and version

    def watch(self, service: "Service") -> None:
        """Evaluate the canary that a worker serves, if it is this worker's turn. Called once a second."""
        routing = guarded(service.serving.routes)
        if routing is None or routing.local_rollback(self._directory):
            self.lock.release()  # for a worker that serves the canary
            self._tail, self._noted = None, ""
        elif self.lock.acquire():
            tail = self._tail = self._tail or Tail(self._directory, min(changed_at(routing), time.time()))
            reason = service.run_in_thread(lambda: self.evaluate(routing, tail.read()))
            if reason:
                log.warning("the guard rolls back canary %s: %s", routing.canary, reason)
                event = {"event": "rollback", "model_version": routing.canary, "variant": "canary", "reason": reason}
                service.journal.append(event)

    def describe(self, service: "Service", found: dict[str, Any]) -> None:
        """Add to what GET /model shows what the guard of this host has seen of the canary."""
        if routing := guarded(service.serving.routes):
            found["guard"] = _noted(self._directory, routing) or None

    def evaluate(self, routing: Routing, records: Iterable[dict[str, Any]]) -> str:
        """Count new records; roll the canary back if it is worse, and return why, else ""."""
        self._begin(routing)
        since = self._since = min(self._since, time.time())  # a clock that is set back is no reason to wait
        for record in records:
            with suppress(KeyError, TypeError, ValueError):  # another version's, or of something else
                if record.get("event") == "feedback":
                    self._add_feedback(record, since)
                elif record["time"] >= since:
                    self._tallies[record["variant"], record["model_version"]].add(record)
        stable, canary = self._tallies.values()
        so_far = _so_far(stable, canary)
        self._note(routing, f"{so_far}{self._labelled_so_far()}{self._last_verdict}")
        reason = judge(stable, canary) or self._judge_predictions()
        if reason or canary.requests >= MAX_CANARY_REQUESTS or stable.requests + canary.requests >= MAX_REQUESTS:
            self._window = None  # the next evaluation begins another
            self._last_verdict = f". The requests before these: {so_far}"
        return reason if reason and self._roll_back(routing, reason) else ""

    def _note(self, routing: Routing, words: str) -> None:
        """Write what `watching` returns. The old content is written over, and then cut: readers take the first line."""
        line = f"{routing.etag}: {words}"
        if self._noted != line and self.lock.fd is not None:
            with suppress(OSError):  # a full disk is no reason not to judge
                os.pwrite(self.lock.fd, f"{line}\n".encode(), 0)
                os.truncate(self.lock.fd, len(line.encode()) + 1)
                self._noted = line

    def _labelled_so_far(self) -> str:
        counted = {variant: each.rows for (_, variant, _), each in self._labelled.items() if each.rows}
        if not counted:
            return ""
        canary, stable = (counted.get(variant, 0) for variant in ("canary", "stable"))
        return f"; the truth came for {canary} rows of the canary and {stable} of the stable version"

    def _begin(self, routing: Routing) -> None:
        """Count from zero if the routing changed, or the stable version that serves; requests in a new window too."""
        present, variants = (routing.etag, routing.stable), [("stable", routing.stable), ("canary", routing.canary)]
        if self._window != present:
            self._window, self._tallies = present, {variant: Tally() for variant in variants}
        if self._routing != present:
            self._routing, self._last_verdict = present, ""
            self._since = changed_at(routing)
            if (ahead := self._since - time.time()) > 60.0:
                why = "the clock of this host, or of the one that changed it, is wrong"
                log.warning("the routing was changed %d s from now: %s; the guard counts from now on", ahead, why)
            self._labelled = {(measure, *variant): Labelled() for measure in MEASURES for variant in variants}

    def _add_feedback(self, record: dict[str, Any], since: float) -> None:
        """Count an entry of feedback for a prediction made since then, in seconds since 1970. Raises: as `add`."""
        measure = WRONG_ROWS if record["wrong"] is not None else MEAN_ERROR
        labelled = self._labelled[measure, record["variant"], record["model_version"]]
        if record["time"] - record["age"] >= since:
            labelled.add(record, measure)

    def _judge_predictions(self) -> str:
        for measure in MEASURES:
            stable, canary = (labelled for (each, *_), labelled in self._labelled.items() if each == measure)
            if reason := judge_predictions(stable, canary, measure):
                return reason
        return ""

    def _roll_back(self, routing: Routing, reason: str) -> bool:
        """Return whether the canary was rolled back: someone may have changed the routing meanwhile.

        If the store cannot be written, the rollback is written beside the journal, and is one of this host.
        """
        why = f"guard, {reason}"
        try:
            return self._store.rollback(why, only=routing.generation).why.startswith(why)
        except (StoreError, ModelLoadError):
            rollback = {"routing": routing.etag, "canary": routing.canary, "reason": reason}
            replace_file(self._directory / LOCAL_ROLLBACK, as_json(rollback), keep_owner=False)
            self._store.note(why, str(routing), f"canary {routing.canary} rolled back on this host", routing.canary)
            return True


def watching(journal_dir: Path, routing: Routing) -> str:
    """Return what the guard of this host has seen of the canary of a routing, in words; "" if it has no guard."""
    if not routing.guard:
        return ""
    try:
        if is_locked(journal_dir / LOCK):
            return _noted(journal_dir, routing) or "it begins to count the requests of the canary"
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"what it has counted cannot be read: {error}"
    return f"NOBODY watches the canary: no worker on this host with JOURNAL_DIR={journal_dir} serves it"


def _noted(journal_dir: Path, routing: Routing) -> str:
    """Return what the guard has noted of a routing, or ""."""
    with suppress(OSError, UnicodeDecodeError):
        line = (journal_dir / LOCK).read_text("utf-8").partition("\n")[0]
        if line.startswith(start := f"{routing.etag}: "):
            return line.removeprefix(start)
    return ""


def guarded(routes: Routes | None) -> Routing | None:
    """Return the routing that is in effect, if its canary is served and guarded."""
    if not isinstance(routes, StoreRoutes) or routes.canary is None or not routes.routing.guard:
        return None
    # The stable version that is served may be an earlier one, if the routing's does not load.
    return replace(routes.routing, stable=routes.stable.version)


def changed_at(routing: Routing) -> float:
    """Return when the routing was last changed, in seconds since 1970; 0 if that is unknown."""
    with suppress(ValueError):
        return datetime.strptime(routing.changed, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return 0.0
