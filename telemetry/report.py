"""The journal summed up for people: rate, success, response times, errors of requests and of predictions, and what
waits to be shipped.

python -m telemetry.report                    the last hour
python -m telemetry.report --since 15m        s, m, h or d; `all` for the whole journal
"""

import math
import re
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import run
from monitor import read_lines, segments
from telemetry import shipping_progress

if TYPE_CHECKING:
    from telemetry.feedback_report import PredictionErrors


def read(directory: Path, since: float) -> Iterator[dict[str, Any] | None]:
    """Yield the records of a journal written at or after `since` (seconds since 1970), and None for a torn line."""
    for path in segments(directory):
        with suppress(FileNotFoundError):  # shipped meanwhile, or dropped to make room
            if path.stat().st_mtime < since:
                continue
            for _, record in read_lines(path):
                written = record and record.get("time")
                if not isinstance(written, (int, float)):
                    yield None
                elif written >= since:
                    yield record


def _prediction_errors() -> "PredictionErrors | None":
    try:
        from telemetry.feedback_report import PredictionErrors
    except ModuleNotFoundError:  # endpoints/ was removed
        return None
    return PredictionErrors()


@dataclass
class Summary:
    """The sums of the records of some time."""

    response_times: "array[float]" = field(default_factory=lambda: array("d"))  # seconds
    succeeded: int = 0
    rows: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)  # "<error_type>: <status> <error>" → requests
    others: Counter[str] = field(default_factory=Counter)  # what is not a request
    prediction_errors: "PredictionErrors | None" = field(default_factory=_prediction_errors)

    def add(self, record: dict[str, Any] | None) -> None:
        """Count one record. None counts as a torn line, and so does a record that lacks something."""
        try:
            if record is None:
                self.others["torn lines"] += 1
            elif "dropped" in record:
                self.others["records dropped"] += record["dropped"]
            elif record.get("event") == "feedback" and self.prediction_errors:
                self.prediction_errors.add(record)
            elif "event" in record:
                self.others[f"{record['event']} of {record['model_version']}"] += 1
            elif "requests" in record:
                self.others["without a valid password"] += record["requests"]
            else:
                self._add_request(record)
        except (KeyError, TypeError, ValueError):
            self.others["torn lines"] += 1

    def _add_request(self, record: dict[str, Any]) -> None:
        self.response_times.append(record["response_time"])
        self.rows += record["rows"]
        self.versions[f"version {record['model_version'] or 'none'}"] += 1
        if record["success"]:
            self.succeeded += 1
        else:
            self.errors[f"{record['error_type']}: {record['status']} {record['error']}"] += 1

    def table(self, seconds: float) -> list[tuple[str, str]]:
        """Return the lines of the report, a name and a value each, for records of so many seconds (maybe infinite)."""
        count = len(self.response_times)
        times = sorted(self.response_times)
        lines = [("requests", f"{count}"), ("rows", f"{self.rows}")]
        if 0 < seconds < math.inf:
            lines.insert(1, ("requests/s", f"{count / seconds:.2f}"))
        if count:
            lines.append(("success", f"{100 * self.succeeded / count:.2f} %"))
            lines += [(f"p{q}", f"{1000 * percentile(times, q):.2f} ms") for q in (50, 90, 99)]
        for counter in (self.versions, self.errors, self.others):
            lines += [(name, f"{n}") for name, n in counter.most_common() if n]
        return lines


def shipping(directory: Path) -> list[tuple[str, str]]:
    """Return the lines about shipping to SLS, none if it was never on."""
    progress = shipping_progress(directory)
    if progress is None:
        return []
    waiting, oldest = progress.waiting(directory)
    lines = [("records shipped", f"{progress.shipped}"), ("bytes waiting", f"{waiting}")]
    if oldest is not None:
        lines.append(("waiting for", f"{max(0.0, time.time() - oldest):.0f} s"))
    if progress.refused:
        lines.append(("records refused by SLS", f"{progress.refused}"))
    if progress.error:
        lines.append(("SLS, last error", progress.error["message"]))
    return lines


def percentile(ordered: list[float], q: float) -> float:
    """Return the nearest-rank percentile of ascending values: the smallest that at least q % do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * q / 100) - 1)]


def duration(text: str) -> float:
    """Parse `90s`, `15m`, `1h` or `7d` to seconds, and `all` to infinity. Raises: click.BadParameter."""
    if text == "all":
        return math.inf
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if not found:
        raise click.BadParameter(f"{text!r}: expected a number with s, m, h or d, such as 15m, or all")
    return int(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[found[2]]


@click.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    envvar="JOURNAL_DIR",
    default="var/journal",
    show_default=True,
    show_envvar=True,
    help="The journal.",
)
@click.option(
    "--since",
    type=duration,
    default="1h",
    show_default=True,
    metavar="TIME",
    help="How far back: 90s, 15m, 1h, 7d or all.",
)
def report(directory: Path, since: float) -> int:
    """Sum up the journal of prediction requests."""
    directory = directory.expanduser()
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a journal: there is no such directory")
    summary = Summary()
    for record in read(directory, time.time() - since):
        summary.add(record)
    lines = summary.table(since)
    if summary.prediction_errors:
        lines += summary.prediction_errors.table(directory)
    lines += shipping(directory)
    width = max(len(name) for name, _ in lines)
    right = max(len(value) for _, value in lines)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {value:>{right}}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    return run("telemetry.report", report, arguments, NotADirectoryError, status=1)


if __name__ == "__main__":
    sys.exit(main())
