"""Roll-ups: what the requests of each minute add up to, by version and variant. They stay when segments were shipped.

    found = read(directory, since=now - 86_400, until=now, step=300)      # the last day, in steps of five minutes
    found["v7", "stable"][1_764_399_900].quantile(0.99)                   # seconds

telemetry/rollup_writer.py writes them. Response times are counted in logarithmic buckets, which can be added up, and
give any quantile with a relative error of 1 % at most: C. Masson, J. E. Rim, H. K. Lee, DDSketch: a fast and
fully-mergeable quantile sketch with relative-error guarantees, 2019, https://arxiv.org/abs/1908.10693.

Format: `rollup/<day>.jsonl` beside the journal's segments, a file for each day (UTC). A line is empty, or a JSON
object: a record with `event`, as in the journal; or what the requests of one version and variant add up to, in the
`span` seconds from `time` on (since 1970). Lines of the same time, version and variant add up. Of `times`, the first is
the first bucket, and the others are the requests in it and in those that follow. Any other line was torn by a full
disk, and is skipped.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson

MAX_NAMES, MAX_NAME = 100, 100  # names of a line, and characters of each; the rest are counted together
OTHERS = "(others)"
GAMMA = (1 + 0.01) / (1 - 0.01)  # for the error of 1 %
BUCKETS_PER_E = 1 / math.log(GAMMA)
MAX_BUCKET = 1000  # 15 years
MAX_NUMBER = 10**15  # of a sound line
SPANS = (60, 300, 3600)
FEEDBACK = ("wrong", "unknown_labels", "abs_error", "sq_error", "signed_error")  # null in some records
NUMBERS = ("requests", "success", "rows", "seconds", "unauthenticated")
NAMES = ("errors", "users", "protocols", "dropped")

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Sums:
    """What requests add up to."""

    requests: int = 0
    success: int = 0
    rows: int = 0
    seconds: float = 0.0  # the sum of the response times
    unauthenticated: int = 0  # requests without a valid password; they have an error, and no time, user or version
    times: Counter[int] = field(default_factory=Counter)  # bucket → requests
    errors: Counter[str] = field(default_factory=Counter)  # "<error_type> <status> <error>" → requests
    users: Counter[str] = field(default_factory=Counter)  # name → requests
    protocols: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)  # reason → records that the journal lost; no version
    # Of feedback that came meanwhile: the sums of its records by their names, `age` too, their number as `entries`, and
    # as `regressions` those of a regression; {} if none came.
    feedback: dict[str, float] = field(default_factory=dict)
    first: float = field(default=math.inf, compare=False)  # when the first line of them begins, in seconds since 1970

    def add(self, other: "Sums") -> None:
        """Add what other requests add up to."""
        self.first = min(self.first, other.first)
        for name in NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("times", "feedback", *NAMES):
            _add(getattr(self, name), getattr(other, name))

    def add_feedback(self, record: dict[str, Any]) -> None:
        """Add a record of feedback. Raises: KeyError, TypeError, ValueError, it lacks something."""
        found = {name: (record[name] or 0) + 0 for name in FEEDBACK}
        found |= {"rows": record["rows"] + 0, "age": record["age"] + 0.0}
        if not 0 <= found["wrong"] <= found["rows"]:
            raise ValueError("more rows are wrong than there are")
        _add(self.feedback, found | {"entries": 1, "regressions": int(record["wrong"] is None)})

    def quantile(self, q: float) -> float | None:
        """Return the smallest response time (seconds) that a share q of them do not exceed; None if there is none."""
        rank, seen = max(1, math.ceil(q * self.times.total() - 1e-6)), 0
        for bucket, count in sorted(self.times.items()):
            seen += count
            if seen >= rank:
                return float(2 * GAMMA**bucket / (GAMMA + 1))
        return None

    def encode(self) -> dict[str, Any]:
        """Return what a line has of it, as JSON values. Zeros are left out, but for those of feedback."""
        found: dict[str, Any] = {name: getattr(self, name) for name in (*NUMBERS, "feedback")}
        found |= {name: _bounded(getattr(self, name)) for name in NAMES}
        if buckets := self.times.keys():
            first, last = min(buckets), max(buckets)
            found["times"] = [first, *(self.times[bucket] for bucket in range(first, last + 1))]
        return {name: value for name, value in found.items() if value}


def _add(mine: dict[Any, Any], others: dict[Any, Any]) -> None:
    for key, value in others.items():
        mine[key] = mine.get(key, 0) + value


def _bounded(names: Counter[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for at, (name, count) in enumerate(names.most_common()):
        _add(found, {name[:MAX_NAME] if at < MAX_NAMES else OTHERS: count})
    return found


def bucket_of(seconds: float) -> int:
    """Return the bucket of a response time."""
    return math.ceil(math.log(max(seconds, 1e-6)) * BUCKETS_PER_E)


# --- reading


def read(directory: Path, since: float, until: float, step: int) -> dict[tuple[str, str], dict[int, Sums]]:
    """Return what the requests of some time add up to, by (version, variant) and by the start of each step.

    Args:
        directory: JOURNAL_DIR.
        since, until: seconds since 1970. The step that `since` is in is whole.
        step: seconds; its multiples are the starts of the steps. Single minutes are known of the last two hours, five
            minutes since yesterday (UTC), and hours before that.
    """
    first = int(since // step * step)
    lines = (line for line in _lines(directory, first) if line["time"] < until and _end(line) > first)
    sums = add_up(lines, lambda line: (max(int(line["time"] // step * step), first), name_of(line)))
    found: dict[tuple[str, str], dict[int, Sums]] = {}
    for (start, name), each in sums.items():
        found.setdefault(name, {})[start] = each
    return found


def read_events(directory: Path, since: float, limit: int = 50) -> list[dict[str, Any]]:
    """Return what happened to the service since a time (seconds since 1970), the newest first.

    An event is its record in the journal, such as a rollback's; or `{"event": "dropped", "dropped": 7, "reason": "the
    journal was full", "time": …}` with the records that were lost in an hour.
    """
    found: list[dict[str, Any]] = []
    dropped: dict[tuple[float, str], dict[str, Any]] = {}
    for line in _lines(directory, since, having=(b'"event"', b'"dropped"')):
        if "event" in line:
            found.append(line)
        elif isinstance(line.get("dropped"), dict):
            for reason, number in line["dropped"].items():
                known = {"event": "dropped", "dropped": 0, "reason": reason, "time": 0}
                event = dropped.setdefault((line["time"] // 3600, reason), known)
                event["dropped"] += number if isinstance(number, int) else 0
                event["time"] = max(event["time"], line["time"])
    found = [event for event in (*found, *dropped.values()) if event["time"] >= since]
    return sorted(found, key=lambda event: -event["time"])[:limit]


def add_up(lines: Iterable[dict[str, Any]], key_of: Callable[[dict[str, Any]], Key]) -> dict[Key, Sums]:
    """Return what lines add up to, by the keys that a function returns for them; lines without sums are skipped."""
    found: dict[Key, Sums] = {}
    times: dict[Key, Any] = {}
    for line in lines:
        with suppress(KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
            key, (first, *counts) = key_of(line), line.get("times", (0,))
            begin, end = first + MAX_BUCKET, first + MAX_BUCKET + len(counts)
            numbers = [float(line.get(name, 0)) if name == "seconds" else int(line.get(name, 0)) for name in NUMBERS]
            names: dict[str, Any] = {name: {k: int(n) for k, n in line.get(name, {}).items()} for name in NAMES}
            sizes = [abs(number) for number in (*numbers, *(n for each in names.values() for n in each.values()))]
            names["feedback"] = {k: (value or 0) + 0 for k, value in line.get("feedback", {}).items()}
            if line["span"] not in SPANS or not 0 <= begin <= end <= 2 * MAX_BUCKET or max(sizes) > MAX_NUMBER:
                continue
            if key not in found:
                found[key], times[key] = Sums(), np.zeros(2 * MAX_BUCKET, np.int64)
            times[key][begin:end] += np.array(counts, np.int64)
            sums = found[key]
            sums.first = min(sums.first, line["time"])
            for name, number in zip(NUMBERS, numbers, strict=True):
                setattr(sums, name, getattr(sums, name) + number)
            for name, each in names.items():
                _add(getattr(sums, name), each)
    for key, sums in found.items():
        (buckets,) = times[key].nonzero()
        sums.times = Counter(dict(zip((buckets - MAX_BUCKET).tolist(), times[key][buckets].tolist(), strict=True)))
    return found


def name_of(line: dict[str, Any]) -> tuple[str, str]:
    """Return the version and the variant of a line of sums. Raises: KeyError, there is none."""
    return str(line["version"]), str(line["variant"])


def _end(line: dict[str, Any]) -> float:
    return float(line["time"] + line["span"]) if line.get("span") in SPANS else -math.inf


def days(directory: Path) -> dict[str, Path]:
    """Return the files by their day, such as 2026-11-29, the oldest first."""
    return {path.stem: path for path in sorted((directory / "rollup").glob("????-??-??.jsonl"))}


def day_of(time: float) -> str:
    """Return the day (UTC) of a time in seconds since 1970."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=time)).strftime("%Y-%m-%d")


def read_file(path: Path, having: tuple[bytes, ...] = (b"{",)) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file that are whole, objects with a `time`, and have some bytes."""
    with suppress(FileNotFoundError, IsADirectoryError):  # it was too old, or is not ours
        for text in path.read_bytes().split(b"\n"):
            if any(each in text for each in having):
                with suppress(ValueError):
                    line = orjson.loads(text)
                    known = isinstance(line, dict) and isinstance(line.get("time"), (int, float))
                    if known and 0 <= line["time"] <= MAX_NUMBER:
                        yield line


def _lines(directory: Path, since: float, **having: tuple[bytes, ...]) -> Iterator[dict[str, Any]]:
    for day, path in days(directory).items():
        if day >= day_of(since):
            yield from read_file(path, **having)
