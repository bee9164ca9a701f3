"""Watches a canary: compares what became of its requests with what became of the stable version's, from the journal.

The rule, looked at every second while a guarded canary is served, once both have had `MINIMUM` requests:

- errors: the canary is taken back when its share of failed requests (`error_type` model, overload or internal, or
  status 422: rows that it does not take) exceeds the stable version's by more than `SIGMAS` standard errors of the
  difference, and by more than one in a hundred;
- time: it is taken back when significantly (`SIGMAS` standard errors) more than one in a hundred of its answers took
  longer than 1.5 times the stable version's p99 plus 5 ms.

Both are counted over the same stretch of time, so that what befalls both is held against neither. It begins with the
last change of the routing, and anew once the canary has had `STRETCH` requests, or the two together `MOST`. Four
standard errors and not two, since it is looked at again and again: of 300 canaries just like their stable version, each
looked at thirty times, none was taken back, and one where response times scatter wildly (a log-normal sigma of 2).
"""

import calendar
import fcntl
import math
import os
import time
from array import array
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from .store import Routing, Store, StoreError, write_json

MINIMUM = 200  # requests of each variant
STRETCH = 2_000  # requests of the canary
MOST = 200_000  # requests of both
SIGMAS = 4.0
FAULTS = ("model", "overload", "internal")
REFUSED = 422  # rows that do not fit the version: callers' mistakes befall both variants, another signature only one
VETO = "guard.json"


class Tally:
    """What became of one variant's requests."""

    def __init__(self) -> None:
        self.requests = 0
        self.faults = 0
        self.times = array("d")  # seconds, of those that were answered

    def add(self, record: dict[str, Any]) -> None:
        """Count one record of a request. Raises: KeyError, TypeError or ValueError, it is none."""
        failed = record["error_type"] in FAULTS or record.get("status") == REFUSED
        answered, taken = record["success"], float(record["response_time"])
        self.requests += 1
        self.faults += failed
        if answered:
            self.times.append(taken)


def judge(stable: Tally, canary: Tally) -> str:
    """Return why the canary is to be taken back, by the rule above; "" while there is no reason."""
    if min(stable.requests, canary.requests) < MINIMUM:
        return ""
    failed, expected = canary.faults / canary.requests, stable.faults / stable.requests
    # Of a share of none the standard error would be none: as in Agresti and Coull's interval, one failure is added.
    error = math.sqrt(sum(_variance(tally.requests, tally.faults) for tally in (stable, canary)))
    if failed - expected > max(0.01, SIGMAS * error):
        return f"{100 * failed:.1f} % of its {canary.requests} requests failed, of stable's {100 * expected:.1f} %"
    if min(len(stable.times), len(canary.times)) < MINIMUM:
        return ""
    # Copies: an array whose memory is looked at cannot grow. numpy lets other threads run while it sorts.
    times, at = np.array(stable.times), math.ceil(0.99 * len(stable.times)) - 1
    bound = 1.5 * float(np.partition(times, at)[at]) + 0.005
    slow = float(np.mean(np.array(canary.times) > bound))
    if slow > 0.01 + SIGMAS * math.sqrt(0.01 * 0.99 / len(canary.times)):
        return (
            f"{100 * slow:.1f} % of its {len(canary.times)} answers took longer than {1000 * bound:.1f} ms, "
            f"1.5 times stable's p99 and 5 ms"
        )
    return ""


def _variance(count: int, faults: int) -> float:
    share = (faults + 1) / (count + 2)
    return share * (1 - share) / count


class Guard:
    """Watches the canary of one host's service. One worker at a time does, the one that has the lock."""

    def __init__(self, directory: Path, store: Path) -> None:
        """Remember where the service's state (the lock, a veto) and the version store lie."""
        self._directory, self._store = directory, Store(store)
        self._lock: int | None = None
        self._watched = ""  # the routing
        self._since = 0.0
        self._tallies: dict[str, Tally] = {}
        os.register_at_fork(after_in_child=self.let_go)

    def has_turn(self) -> bool:
        """Tell whether this process is the one that watches. Raises: OSError, the directory cannot be written."""
        if self._lock is None:
            self._lock = os.open(self._directory / "guard.lock", os.O_RDWR | os.O_CREAT, 0o640)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @staticmethod
    def since(routing: Routing) -> float:
        """Return when the routing was last changed, in seconds since 1970."""
        try:
            return float(calendar.timegm(time.strptime(routing.changed, "%Y-%m-%dT%H:%M:%SZ")))
        except ValueError:
            return 0.0

    def look(self, routing: Routing, records: Iterable[dict[str, Any]]) -> str:
        """Count new records; take the canary back if it is worse, and return why, else "".

        Where the store cannot be written, the veto lies beside the journal and holds for this host.
        """
        if routing.mark != self._watched:
            self._watched = routing.mark
            self._since = self.since(routing)
            self._tallies = {"stable": Tally(), "canary": Tally()}
        names = {"stable": routing.stable, "canary": routing.canary}
        for record in records:
            with suppress(KeyError, TypeError, ValueError):  # what is no request's has not these fields
                variant = record["variant"]
                if record["model_version"] == names[variant] and record["time"] >= self._since:
                    self._tallies[variant].add(record)
        stable, canary = self._tallies["stable"], self._tallies["canary"]
        reason = judge(stable, canary)
        if not reason and (canary.requests >= STRETCH or stable.requests + canary.requests >= MOST):
            self._tallies = {"stable": Tally(), "canary": Tally()}
        if reason:
            try:
                why = f"guard, {reason}"
                if not self._store.rollback(why, only=routing.generation).why.startswith(why):
                    return ""  # somebody has changed the routing meanwhile
            except StoreError:
                veto = {"routing": routing.mark, "canary": routing.canary, "reason": reason}
                write_json(self._directory / VETO, veto)
            self._tallies = {"stable": Tally(), "canary": Tally()}
        return reason

    def let_go(self) -> None:
        """Leave the turn to another process."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def veto(directory: Path) -> tuple[str, str]:
    """Return the mark of the routing whose canary is vetoed on this host, and why; ("", "") where none is."""
    try:
        found = orjson.loads((directory / VETO).read_bytes())
        return str(found["routing"]), str(found["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""
