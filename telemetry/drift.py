"""Drift: whether a version predicts, day by day, what it predicted for its sample when it was published.

    watch(service, slot, metrics.on_expose)    # counts after each prediction, and shows the figures

Counted are, per version and day (UTC), the predictions in each bin of the version's reference (made by `publish
--sample`, model/versions/expectations.py), and in each column the missing values and the unknown categories. No row and
no prediction is kept. A version without a reference has no PSI; models with several outputs have none.

The population stability index is the sum over the bins of (q - p)·ln(q / p), for the shares p in the reference and q
of a day: 0 if they are equal, above 0.1 worth a look, above 0.2 a different population (N. Siddiqi, Credit Risk
Scorecards, 2006). Half a row is added to each bin, so that an empty one counts, and finitely. By chance alone it is
about (bins - 1)·(1 / rows of the sample + 1 / rows of the day): 0.02 for ten bins and a thousand rows each.

Counting costs, per row of a request of one row (of a thousand): 1.0 µs (0.1) for four numbers and three classes, 1.5
(0.2) if they may be missing, 1.7 (0.1) as an array, 1.7 (0.2) for 30 numbers and a regression, 1.7 (0.1) for five
categories, 1.6 (0.2) for 20 numbers and 20 categories, and 3.1 (0.7) if all of 20 values are missing. Of wider rows a
random part is looked at, so that 200 columns cost 1.6 (0.3). 10,000 rows and more are counted on a native thread.
"""

import _thread  # its RLock is native under gevent too, its allocate_lock is not; nothing yields while it is held
import hashlib
import logging
import math
import mmap
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from prometheus_client.core import GaugeMetricFamily, Metric

from processes import LogLimit
from shared_files import FileLock, replace_file
from telemetry.drift_counts import PLACE, Counts, Sums, read, reference_of
from worker_slot import WorkerSlot

if TYPE_CHECKING:
    from model.loaded import Answer, LoadedModel
    from server import Service

DAY = 86_400
KEPT_DAYS = 8
LATE = 5.0  # seconds after midnight until which workers may still count for the day before
PLACES = 32  # days and versions in the file of a worker
LARGE = 10_000  # rows; from here on counting takes milliseconds and goes to a native thread


def watch(service: "Service", slot: WorkerSlot, on_expose: list[Any]) -> None:
    """Count what a service predicts; show the figures in GET /model, in the metrics and, daily, in the journal."""
    drift = Drift(service.settings.journal_dir, slot, service.run_in_thread)
    tick = partial(drift.tick, service.journal.append)
    service.on_start.append(tick)
    service.every_second.append(tick)
    service.on_answer.append(drift.count)
    service.serving.on_update.append(drift.begin_again)
    service.serving.on_describe.append(drift.describe)
    on_expose.append(lambda add: add(drift.families()))


class Drift:
    """What a worker counts, and the figures of all workers of a host.

    Format: `drift/counts-<number>` beside the journal's segments, an array of `PLACES` places of the dtype `PLACE`, in
    the machine's byte order. If there is no free place, the one of the oldest day is used. `drift/reported` holds the
    last day that is in the journal, as records with `event` drift, `model_version`, `day`, `rows` and `psi`.

    Concurrency: only the worker that holds the number (worker_slot.WorkerSlot) writes to its file, and anyone may read.
    A kill loses nothing: what was written to a memory map is the kernel's.
    """

    def __init__(self, journal_dir: Path, slot: WorkerSlot, run_in_thread: Callable[..., Any]) -> None:
        """Remember where to count. Nothing is read or written before `tick`."""
        self._directory, self._slot, self._run_in_thread = journal_dir / "drift", slot, run_in_thread
        self._path = Path()
        self._places: Any = None  # this worker's; None if they cannot be written
        self._counters: dict[str, Counts | None] = {}  # by version
        self._day, self._reported = 0, 0
        self._read: tuple[float, dict[tuple[str, str], dict[int, Sums]]] = (-2.0, {})
        self._lock = _thread.RLock()
        self._trouble = LogLimit(logging.getLogger(__name__), math.inf)

    # --- counting

    def count(self, answer: "Answer", *_: Any) -> None:
        """Count an answer to `predict`."""
        if answer.method != "predict":
            return
        version = answer.model.version
        counter = self._counters.get(version) or self._add(version, answer.model)
        if counter is not None:
            if len(answer.rows) < LARGE:
                counter.count(answer.rows, answer.prediction)
            else:
                self._run_in_thread(counter.count, answer.rows, answer.prediction)

    def _add(self, version: str, model: "LoadedModel") -> "Counts | None":
        """Return the counter of a version for today; None if there is no place for it."""
        counters = self._counters
        with self._lock:
            if version not in counters and self._places is not None:
                reference = reference_of(model.about)
                place = self._place(version.encode(), _identity(model.about).encode(), reference)
                counters[version] = None if place is None else Counts(place, model, reference, self._lock)
        return counters.get(version)

    def _place(self, version: bytes, identity: bytes, reference: dict[str, Any] | None) -> Any:
        """Return the place of a version for today, as an array of one; None if the places of today are all taken."""
        places = self._places
        mine = np.flatnonzero(
            (places["day"] == self._day) & (places["version"] == version) & (places["model"] == identity)
        )
        if len(mine):
            return places[mine[0] : mine[0] + 1]
        at = int(np.argmin(places["day"]))
        place = places[at : at + 1]
        if place["day"][0] == self._day:
            return None
        place["day"] = 0  # until the others are set: a worker may be killed at any moment
        for name in ("rows", "examined", "reference", "predicted", "missing", "unknown"):
            place[name] = 0
        counts = reference["counts"] if reference else []
        place["reference"][0, : len(counts)] = counts
        place["version"], place["model"], place["bins"] = version, identity, len(counts)
        place["day"] = self._day
        return place

    def begin_again(self, *_: Any) -> None:
        """Look for the counters anew: it is another day, or other models are served."""
        self._counters = {}

    # --- beside the requests

    def tick(self, append: Callable[[dict[str, Any]], None]) -> None:
        """Find this worker's place and day, and record the days that are over. Once a second."""
        path = self._directory / f"counts-{self._slot.number}"
        if self._places is None or self._path != path or not path.exists():
            self._join(path)
        if (day := int(time.time() // DAY)) != self._day:
            self._day = day
            self.begin_again()
        try:
            over = int((time.time() - LATE) // DAY) - 1
            if self._places is not None and over != self._reported:
                self._report(over, append)
        except OSError as error:
            self._trouble.error("report", "the drift of yesterday is not recorded: %s", error)

    def _join(self, path: Path) -> None:
        self._path, self._places = path, None
        self.begin_again()
        try:
            if self._slot.number < 0:
                raise OSError("this worker has no slot")
            size = PLACES * PLACE.itemsize
            if not path.exists() or path.stat().st_size != size:
                path.parent.mkdir(parents=True, exist_ok=True)
                # No hole: on a full disk writing to one kills the process.
                replace_file(path, bytes(size), durable=False)
            with path.open("r+b") as file:
                self._places = np.frombuffer(mmap.mmap(file.fileno(), size), PLACE)
        except OSError as error:
            self._trouble.error("join", "drift is not counted, %s cannot be written: %s", path, error)

    def _report(self, over: int, append: Callable[[dict[str, Any]], None]) -> None:
        """Record the days up to this one that are not recorded yet; a worker that is killed here may repeat some."""
        lock, path = FileLock(self._directory / "lock"), self._directory / "reported"
        if lock.acquire():
            try:
                last = 0
                with suppress(FileNotFoundError, ValueError):
                    last = int(path.read_text())
                for version, days in read(self._directory, since=max(last + 1, over - KEPT_DAYS)).items():
                    for day, sums in sorted(days.items()):
                        if day <= over and sums.rows:
                            known = {"event": "drift", "model_version": version[0], "variant": "", "day": _date(day)}
                            append(known | {"rows": sums.rows, "psi": sums.psi})
                replace_file(path, str(over).encode(), durable=False)
                self._reported = over
            finally:
                lock.release()

    # --- figures

    def figures(self) -> dict[tuple[str, str], dict[int, Sums]]:
        """Return what `read` returns; a second old at most."""
        if time.monotonic() - self._read[0] > 1.0:
            since = int(time.time() // DAY) - KEPT_DAYS + 1
            self._read = time.monotonic(), read(self._directory, since)
        return self._read[1]

    def describe(self, served: dict[str, Any]) -> None:
        """Add the figures of each version to what GET /model shows: `drift`, by day, the latest first.

        Of a day: `rows`; `psi`, null without a reference or a prediction; `missing` and `unknown`, the shares of such
        values in the columns that have any.
        """
        for variant in filter(None, (served["stable"], served["canary"])):
            columns = variant["signature"]["columns"] or []
            names = [column["name"] or str(at) for at, column in enumerate(columns)]
            days = self.figures().get((variant["version"], _identity(variant)), {})
            variant["drift"] = {_date(day): days[day].describe(names) for day in sorted(days, reverse=True)}

    def families(self) -> Iterable[Metric]:
        """Yield the metrics of today, and of yesterday, which is a whole day and has the alert."""
        labels = ("model_version", "day")
        text = "Population stability index of the predictions of a day (UTC) against those for the version's sample"
        found = GaugeMetricFamily("prediction_drift_psi", text, labels=labels)
        rows = GaugeMetricFamily("prediction_drift_rows", "Rows that it is made of", labels=labels)
        today, figures = int(time.time() // DAY), self.figures()
        for day, name in ((today, "today"), (today - 1, "yesterday")):
            counted = [(version, days[day]) for (version, _), days in figures.items() if day in days]
            # Of two models that had one name in a day, it is that of the one with more rows.
            for version, sums in dict(sorted(counted, key=lambda each: each[1].rows)).items():
                if sums.psi is not None:
                    found.add_metric((version, name), sums.psi)
                    rows.add_metric((version, name), sums.rows)
        yield found
        yield rows


def _date(day: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)).strftime("%Y-%m-%d")


def _identity(about: dict[str, Any]) -> str:
    content = orjson.dumps([about["sha256"], about.get("reference")])
    return hashlib.blake2b(content, digest_size=8).hexdigest()
