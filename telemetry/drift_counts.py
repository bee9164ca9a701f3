"""What drift counts of one version on one day: in a place of a worker's file, and summed over the files of all workers.

    counts = Counts(place, model, reference_of(model.about), lock)    # of this worker
    counts.count(rows, prediction)
    read(directory, since=20_000)                                     # {(version, identity): {day: Sums}}

telemetry/drift.py says what is counted, what it costs, and what the index is.
"""

import math
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.columns import json_form

if TYPE_CHECKING:
    from model.loaded import LoadedModel

PLAIN = {str, int, float, bool}  # the types of labels
COUNTED = ("predicted", "missing", "unknown")
MAX_BINS, MAX_COLUMNS = 64, 200  # the columns beyond are not looked at
VALUES_PER_ROW = 15  # that are looked at; of wider rows only each second, third, … is, at random

PLACE = np.dtype(
    [
        ("day", np.uint64),  # since 1970; 0 if the place is free
        ("version", "S64"),
        ("model", "S16"),  # identifies the model and its reference: a name may be used again
        ("bins", np.uint64),  # 0 without a reference
        ("rows", np.uint64),
        ("examined", np.uint64),  # of these rows, those whose columns were looked at
        ("reference", np.uint64, MAX_BINS),
        ("predicted", np.uint64, MAX_BINS),
        ("missing", np.uint64, MAX_COLUMNS),
        ("unknown", np.uint64, MAX_COLUMNS),
    ]
)


class Counts:
    """Counts what a version predicts, in a place, with the lock of all counters of the process."""

    def __init__(self, place: Any, model: "LoadedModel", reference: dict[str, Any] | None, lock: Any) -> None:
        self._lock = lock
        # As plain memory, which counts one in a fifth of the time that an array takes.
        self._rows, self._examined = memoryview(place["rows"]), memoryview(place["examined"])
        self._predicted, self._missing, self._unknown = (memoryview(place[name][0]) for name in COUNTED)
        self._edges = reference["edges"] if reference else None
        self._other = len(reference["counts"]) - 1 if reference else 0
        self._bins = {label: at for at, label in enumerate(reference["classes"] or ())} if reference else {}
        self._has_reference = reference is not None
        columns = list(enumerate(model.signature.columns or ()))[:MAX_COLUMNS]
        self._may_miss = any(column.nullable for _, column in columns)
        self._known = [
            (at, frozenset([None, *column.learned, *map(json_form, column.learned)]))
            for at, column in columns
            if column.learned and column.kind not in ("boolean", "date")
        ]
        self._step = 1 + (len(columns) * self._may_miss + 4 * len(self._known)) // VALUES_PER_ROW

    def count(self, rows: Any, prediction: Any) -> None:
        """Count the rows of an answer, as `Signature.validate` returned them, and their predictions."""
        bins: Iterable[tuple[int, int]] = ()
        if self._has_reference and len(prediction) == len(rows):
            bins = ((self._bin(prediction[0]), 1),) if len(rows) == 1 else self._count_bins(prediction)
        missing: list[int] = []  # the columns of missing values, a column once for each
        unknown: list[int] = []
        examined = 0
        if self._may_miss or self._known:
            sample = rows if self._step == 1 else rows[int(random.random() * self._step) :: self._step]  # noqa: S311
            if examined := len(sample):
                (self._examine_array if isinstance(rows, np.ndarray) else self._examine)(sample, missing, unknown)
        missing_in, unknown_in = _tally(missing) if missing else (), _tally(unknown) if unknown else ()
        with self._lock:
            self._rows[0] += len(rows)
            self._examined[0] += examined
            for at, number in bins:
                self._predicted[at] += number
            for at, number in missing_in:
                self._missing[at] += number
            for at, number in unknown_in:
                self._unknown[at] += number

    def _bin(self, value: Any) -> int:
        try:
            if self._edges is None:
                return self._bins.get(value, self._other)
            return bisect_right(self._edges, value) if math.isfinite(value) else self._other
        except (TypeError, OverflowError):  # null, or what an extension made of a prediction
            return self._other

    def _count_bins(self, prediction: Any) -> Iterable[tuple[int, int]]:
        if isinstance(prediction, np.ndarray):
            if self._edges is not None and prediction.ndim == 1:
                finite = prediction[np.isfinite(prediction)]
                counts = np.bincount(np.searchsorted(self._edges, finite, side="right"), minlength=self._other + 1)
                counts[self._other] += len(prediction) - len(finite)
                return enumerate(counts.tolist())
            prediction = prediction.tolist()
        if self._edges is not None or any(isinstance(each, (list, dict)) for each in prediction):
            return Counter(map(self._bin, prediction)).items()
        return [(self._bin(value), number) for value, number in Counter(prediction).items()]

    def _examine(self, rows: Any, missing: list[int], unknown: list[int]) -> None:
        if self._may_miss:
            for row in rows:
                if None in row:
                    missing += [at for at, value in enumerate(row[:MAX_COLUMNS]) if value is None]
        for at, known in self._known:
            for row in rows:
                if row[at] not in known:
                    unknown.append(at)

    def _examine_array(self, rows: Any, missing: list[int], unknown: list[int]) -> None:
        # A sum and a minimum are NaN if any value is; of one row the former takes a tenth of the latter's time.
        if self._may_miss and math.isnan(sum(rows[0].tolist()) if len(rows) == 1 else rows.min()):
            for at, number in enumerate(np.isnan(rows[:, :MAX_COLUMNS]).sum(axis=0).tolist()):
                missing += [at] * number
        for at, known in self._known:
            unknown += [at for value in rows[:, at].tolist() if value not in known and value == value]


def _tally(columns: list[int]) -> Iterable[tuple[int, int]]:
    """Return how often each number is there: summed if there are many, for which others would wait at the lock."""
    return Counter(columns).items() if len(columns) > 50 else zip(columns, repeat(1))  # half the time


def psi(reference: Iterable[float], counts: Iterable[float]) -> float:
    """Return the population stability index of counts per bin."""
    p, q = (np.asarray(each, dtype=float) + 0.5 for each in (reference, counts))
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum((q - p) * np.log(q / p)))


@dataclass
class Sums:
    """The sums over all workers of one version's day."""

    rows: int
    examined: int
    reference: Any  # counts per bin, empty without a reference
    predicted: Any
    missing: Any  # by column
    unknown: Any

    @property
    def psi(self) -> float | None:
        """Return the population stability index, None if there is no reference or no prediction."""
        return psi(self.reference, self.predicted) if self.predicted.any() else None

    def describe(self, names: list[str]) -> dict[str, Any]:
        """Return what GET /model shows."""
        shares = {
            kind: {name: count / self.examined for name, count in zip(names, counts.tolist(), strict=False) if count}
            for kind, counts in (("missing", self.missing), ("unknown", self.unknown))
        }
        return {"rows": self.rows, "psi": self.psi} | shares


def read(directory: Path, since: int) -> dict[tuple[str, str], dict[int, Sums]]:
    """Return the sums over the files of all workers, by version and identity, and by day; days are since 1970."""
    found: dict[tuple[str, str], dict[int, Sums]] = {}
    for path in directory.glob("counts-*"):
        with suppress(OSError, ValueError):  # removed just now, or of another form
            places = np.frombuffer(path.read_bytes(), PLACE)
            for place in places[(places["day"] >= since) & (places["day"] > 0)]:
                days = found.setdefault((place["version"].decode(), place["model"].decode()), {})
                _add_place(days, place)
    return found


def _add_place(days: dict[int, Sums], place: Any) -> None:
    bins = min(int(place["bins"]), MAX_BINS)
    sums = days.setdefault(int(place["day"]), Sums(0, 0, place["reference"][:bins], 0, 0, 0))
    sums.rows, sums.examined = sums.rows + int(place["rows"]), sums.examined + int(place["examined"])
    sums.predicted = sums.predicted + place["predicted"][:bins]
    sums.missing, sums.unknown = sums.missing + place["missing"], sums.unknown + place["unknown"]


def reference_of(about: dict[str, Any]) -> dict[str, Any] | None:
    """Return the reference of a version, None if it has none that can be used."""
    found: Any = about.get("reference")
    with suppress(KeyError, TypeError, ValueError, OverflowError):
        counts = [int(count) for count in found["counts"]]
        labels, edges = found.get("classes"), found.get("edges")
        inner, others = (labels, 1) if edges is None else (edges, 2)
        sound = len(counts) == len(inner) + others <= MAX_BINS and min(counts) >= 0 and 0 < sum(counts) < 2**63
        if sound and {*map(type, inner)} <= (PLAIN if edges is None else {int, float}):
            return {"classes": labels, "edges": edges, "counts": counts}
    return None
