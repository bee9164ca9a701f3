"""The journal for people: rate, success, response times and errors, and what waits to be shipped.

python -m telemetry.report                    the last hour
python -m telemetry.report --since 15m        s, m, h or d; `all` for the whole journal
"""

import argparse
import math
import os
import re
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from monitor import segments
from sls import Progress


def read(directory: Path, since: float) -> Iterator[dict[str, Any]]:
    """Yield the records of a journal written at or after `since` (seconds since 1970), a torn line as `{"torn": 1}`."""
    for path in segments(directory):
        try:
            if path.stat().st_mtime < since:
                continue
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # being written just now, or cut off by a kill before its request was answered
                    if line == b"\n":
                        continue
                    try:
                        record = orjson.loads(line)
                        if record["time"] >= since:
                            yield record
                    except (ValueError, TypeError, KeyError):
                        yield {"torn": 1}
        except FileNotFoundError:  # shipped, or dropped to make room
            continue


@dataclass
class Summary:
    """What the records of a stretch of time come to."""

    response_times: "array[float]" = field(default_factory=lambda: array("d"))  # seconds
    succeeded: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # "<error_type>: <status> <error>" → requests
    versions: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    events: Counter[str] = field(default_factory=Counter)
    strangers: int = 0  # requests without a valid password
    dropped: int = 0
    torn: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """Count one record; one that lacks something counts as torn."""
        try:
            self._add(record)
        except (KeyError, TypeError):
            self.torn += 1

    def _add(self, record: dict[str, Any]) -> None:
        if "torn" in record:
            self.torn += 1
        elif "dropped" in record:
            self.dropped += record["dropped"]
        elif "event" in record:
            self.events[f"{record['event']} of {record['model_version']}"] += 1
        elif "requests" in record:
            self.strangers += record["requests"]
        else:
            self.response_times.append(record["response_time"])
            self.rows += record["rows"]
            self.versions[record["model_version"] or "none"] += 1
            if record["success"]:
                self.succeeded += 1
            else:
                self.errors[f"{record['error_type']}: {record['status']} {record['error']}"] += 1

    def table(self, seconds: float | None) -> list[tuple[str, str]]:
        """Return the lines of the report, a name and a value each; `seconds` is how long the stretch is, if known."""
        count = len(self.response_times)
        times = sorted(self.response_times)
        lines = [("requests", f"{count}"), ("rows", f"{self.rows}")]
        if seconds:
            lines.insert(1, ("requests/s", f"{count / seconds:.2f}"))
        if count:
            lines.append(("success", f"{100 * self.succeeded / count:.2f} %"))
            lines += [(f"p{q}", f"{1000 * percentile(times, q):.2f} ms") for q in (50, 90, 99)]
        lines += [(f"version {version}", f"{n}") for version, n in self.versions.most_common()]
        lines += [(error, f"{n}") for error, n in self.errors.most_common()]
        lines += [(event, f"{n}") for event, n in self.events.most_common()]
        for name, n in (
            ("without a valid password", self.strangers),
            ("records dropped", self.dropped),
            ("torn lines", self.torn),
        ):
            if n:
                lines.append((name, f"{n}"))
        return lines


def shipping(progress: Progress) -> list[tuple[str, str]]:
    """Return the lines on what waits to be shipped to SLS."""
    lines = [("records shipped", f"{progress.shipped}"), ("bytes waiting", f"{progress.waiting}")]
    if progress.oldest is not None:
        lines.append(("waiting for", f"{max(0.0, time.time() - progress.oldest):.0f} s"))
    if progress.refused:
        lines.append(("records refused by SLS", f"{progress.refused}"))
    if progress.error:
        lines.append(("SLS, last error", progress.error))
    return lines


def percentile(ordered: list[float], q: float) -> float:
    """Return the nearest-rank percentile of ascending values: the smallest that at least q % do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * q / 100) - 1)]


def duration(text: str) -> float | None:
    """Parse `90s`, `15m`, `1h` or `7d` to seconds, and `all` to None."""
    if text == "all":
        return None
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number with s, m, h or d, such as 15m, or all")
    return int(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[found[2]]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m telemetry.report", description="Sum up the journal of prediction requests."
    )
    default = Path(os.environ.get("JOURNAL_DIR") or "var/journal")
    parser.add_argument("--dir", type=Path, default=default, help=f"the journal (default {default}, from JOURNAL_DIR)")
    parser.add_argument(
        "--since", type=duration, default="1h", metavar="TIME", help="how far back: 90s, 15m, 1h (default), 7d or all"
    )
    given = parser.parse_args(arguments)
    given.dir = given.dir.expanduser()
    if not given.dir.is_dir():
        print(f"report: {given.dir} is not a journal: there is no such directory", file=sys.stderr)
        return 1
    summary = Summary()
    for record in read(given.dir, 0.0 if given.since is None else time.time() - given.since):
        summary.add(record)
    progress = Progress.read(given.dir)
    lines = summary.table(given.since) + (shipping(progress) if progress else [])
    width = max(len(name) for name, _ in lines)
    right = max(len(value) for _, value in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value:>{right}}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
