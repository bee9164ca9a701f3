"""The journal summed up for people: rate, success, response times, errors of requests and of predictions, and what
waits to be shipped.

python -m telemetry.report                    the last hour
python -m telemetry.report --since 15m        s, m, h or d; `all` for everything
python -m telemetry.report --by user          or version, error
python -m telemetry.report --errors           the latest failed requests, a line each
python -m telemetry.report --request ID       all that the journal has of a request
python -m telemetry.report --follow           new requests as they are written
python -m telemetry.report --html FILE        the page of GET /monitor

The journal is read if it has all requests of that time; if some were shipped or dropped, the roll-ups.
"""

import math
import shutil
import sys
import time
from array import array
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

import cli
from shared_files import replace_file
from telemetry import rollups, shipping_progress
from telemetry.rollups import Sums
from telemetry.single_requests import FIELDS, NoSuchRequest, failures, find, follow, is_request, printable, read

LATEST = 50  # failed requests
FULL = 2**16  # bytes that are free on a disk, with which records are lost


def _feedback_report() -> Any:
    with suppress(ModuleNotFoundError):  # endpoints/ was removed
        return import_module("telemetry.feedback_report")
    return None


@dataclass
class Summary:
    """What happened in some time, from the journal or from roll-ups."""

    source: str = "journal"
    sums: dict[tuple[str, str], Sums] = field(default_factory=dict)  # by version and variant
    # Each response time (seconds), by the same; none from roll-ups, which only count them.
    times: "dict[tuple[str, str], array[float]]" = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    torn: int = 0  # lines
    first: float = math.inf  # when the first and the last request were (seconds since 1970)
    last: float = 0.0

    def add(self, record: dict[str, Any] | None) -> None:
        """Count one record. None counts as a torn line, and so does a record that lacks something."""
        try:
            if record is None:
                self.torn += 1
            elif "dropped" in record:
                self._of().dropped[record["reason"]] += record["dropped"]
            elif record.get("event") == "feedback" and _feedback_report():
                self._of(record["model_version"], record["variant"]).add_feedback(record)
            elif record.get("event") == "wrong_password":
                pass  # it is among the requests without a valid password
            elif record.get("event") == "change":  # of a version, a user, …: not by what was changed
                self.events["changes (python -m model history)"] += 1
            elif "event" in record:
                what = f" of {version}" if (version := record.get("model_version")) else f" {record.get('reason', '')}"
                self.events[(record["event"] + what).rstrip()] += 1
            elif "requests" in record:
                sums, count = self._of(), record["requests"] + 0
                sums.requests, sums.unauthenticated = sums.requests + count, sums.unauthenticated + count
            else:
                self._add_request(record)
        except (KeyError, TypeError, ValueError, OverflowError):
            self.torn += 1

    def _of(self, version: str = "", variant: str = "") -> Sums:
        return self.sums.setdefault((version, variant), Sums())

    def _add_request(self, record: dict[str, Any]) -> None:
        key, rows = (record["model_version"], record.get("variant", "")), record["rows"] + 0
        error, sums = f"{record['error_type']} {record['status']} {record['error']}", self._of(*key)
        self.times.setdefault(key, array("d")).append(record["response_time"])
        sums.rows += rows
        sums.requests += 1
        sums.users[record["user"]] += 1
        if record["success"]:
            sums.success += 1
        else:
            sums.errors[error] += 1
        self.first, self.last = min(self.first, record["time"]), max(self.last, record["time"])

    def total(self) -> Sums:
        """Return the sums of all versions."""
        total = Sums()
        for sums in self.sums.values():
            total.add(sums)
        return total

    def percentiles(self, *qs: int, of: tuple[str, str] | None = None) -> list[str]:
        """Return percentiles of the response times, of a version and variant or of all."""
        sums = self.total() if of is None else self.sums[of]
        times = sorted(time for key, times in self.times.items() if of in (None, key) for time in times)
        found = [percentile(times, q) if times else sums.quantile(q / 100) for q in qs]
        return ["–" if each is None else f"{1000 * each:.2f} ms" for each in found]

    def table(self, seconds: float) -> list[tuple[str, ...]]:
        """Return the lines of the report, a name and a value each, for records of so many seconds (maybe infinite)."""
        total, times = self.total(), [("from", self.first), ("to", self.last)] if self.last else []
        lines = [(name, utc(at)) for name, at in times]
        lines += [("source", self.source), ("requests", f"{authenticated(total)}")]
        if 0 < seconds < math.inf:
            lines.append(("requests/s", f"{authenticated(total) / seconds:.2f}"))
        lines.append(("rows", f"{total.rows}"))
        if authenticated(total):
            lines += [("success", share(total.success, authenticated(total)))]
            lines += zip(("p50", "p90", "p99"), self.percentiles(50, 90, 99), strict=True)
        versions = Counter[str]()
        for (version, _), sums in self.sums.items():
            versions[f"version {version or 'none'}"] += authenticated(sums)
        others = Counter({"without a valid password": total.unauthenticated, "torn lines": self.torn})
        others["records dropped"] = total.dropped.total()
        for counter in (versions, errors_of(total), others + self.events):
            lines += [(name, f"{n}") for name, n in counter.most_common() if n]
        return [*lines]

    def table_by(self, by: str) -> list[tuple[str, ...]]:
        """Return a line for each version, user or error, below one with the names of the columns."""
        total = self.total()
        if by == "version":
            lines = []
            for key, sums in sorted(self.sums.items(), key=lambda item: -authenticated(item[1])):
                if n := authenticated(sums):
                    name = " ".join(filter(None, key)) or "none"
                    lines.append((name, f"{n}", share(sums.success, n), *self.percentiles(50, 99, of=key)))
            return [(by, "requests", "success", "p50", "p99"), *lines]
        counter = total.users if by == "user" else errors_of(total)
        found = [(name or "none", f"{n}", share(n, authenticated(total))) for name, n in counter.most_common()]
        return [(by, "requests", "share"), *found]


def authenticated(sums: Sums) -> int:
    """Return the requests that had a valid password."""
    return sums.requests - sums.unauthenticated


def errors_of(sums: Sums) -> Counter[str]:
    """Return their errors, as `<error_type>: <status> <error>` with the number of requests."""
    passed = {name: n for name, n in sums.errors.items() if not name.startswith(("auth 401 ", "auth 429 "))}
    return Counter({name.replace(" ", ": ", 1): n for name, n in passed.items()})


def utc(at: float) -> str:
    """Return a time (seconds since 1970, when the journal is said to begin) as words."""
    return "the beginning" if at == 0 else cli.utc(at)


def share(part: int, whole: int) -> str:
    """Return a part of requests as words."""
    return f"{100 * part / whole:.2f} %"


def rolled_up(directory: Path, since: float, now: float) -> tuple[dict[tuple[str, str], dict[int, Sums]], int]:
    """Return the roll-ups since a time (seconds since 1970), and the first of their steps that begins after it."""
    step = 60 if now - since < 6600 else 300 if since >= (now // 86_400 - 1) * 86_400 else 3600  # see rollups.read
    return rollups.read(directory, since, now, step), math.ceil(since / step) * step


def summarise(directory: Path, since: float, now: float) -> Summary:
    """Return what happened since a time (seconds since 1970), from the journal unless it has fewer requests than the
    roll-ups. They are read first, so that a request that is written meanwhile is not missing in the journal.
    """
    rolled, first = rolled_up(directory, since, now)
    counted = sum(authenticated(sums) for steps in rolled.values() for at, sums in steps.items() if at >= first)
    summary, recorded = Summary(), 0
    for record in read(directory, since):
        summary.add(record)
        recorded += bool(record and is_request(record) and record["time"] >= first)
    if counted <= recorded:
        return summary
    found = Summary("roll-ups, within 1 %", last=now)
    for key, steps in rolled.items():
        for start, sums in steps.items():
            found._of(*key).add(sums)
            found.first = min(found.first, start)
    for event in rollups.read_events(directory, since, limit=10**6):
        if event["event"] != "dropped":
            found.add(event)
    return found


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


def duration(text: str) -> tuple[float, str]:
    """Parse `90s`, `15m`, `1h` or `7d` to seconds, and `all` to infinity. Raises: click.BadParameter."""
    return (math.inf if text == "all" else cli.duration(text)), text


class CannotReport(Exception):
    """What was asked for cannot be reported. The message is for the operator."""


def write_page(file: Path, directory: Path, seconds: float, name: str, now: float) -> None:
    """Write the page of GET /monitor, of the last so many seconds, by their name. Raises: CannotReport."""
    try:
        figures, page = (import_module(f"endpoints.{each}") for each in ("monitor_figures", "monitor_page"))
    except ModuleNotFoundError as error:
        raise CannotReport(f"--html needs the monitor page, and there is no {error.name}") from None
    content: str = page.render(page.Host(directory), figures.Span.last(name, seconds, now), is_file=True)
    try:
        replace_file(file, content.encode(), mode=0o640, durable=False)
    except OSError as error:
        raise CannotReport(f"cannot write {file}: {error.strerror}") from None


def echo_table(lines: list[tuple[str, ...]]) -> None:
    """Print lines in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        values = (f"{value:>{width}}" for value, width in zip(others, widths[1:], strict=True))
        click.echo(printable("  ".join([f"{first:<{widths[0]}}", *values])))


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
@click.option("--by", type=click.Choice(["version", "user", "error"]), help="Requests of each.")
@click.option("--errors", is_flag=True, help=f"The latest {LATEST} failed requests, a line each: {FIELDS}.")
@click.option("--request", metavar="ID", help="All that the journal has of a request, by its X-Request-ID.")
@click.option(
    "--follow", is_flag=True, help="New requests as they are written, until Ctrl-C; with --errors, failed ones."
)
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the page of GET /monitor.")
@click.pass_context
def report(context: click.Context, /, directory: Path, since: tuple[float, str], **chosen: Any) -> None:
    """Sum up prediction requests, from the journal or, if it lacks some of that time, from the roll-ups."""
    directory, now, (seconds, name) = directory.expanduser(), time.time(), since
    begin = max(0.0, now - seconds)
    _check(context, chosen)
    if not directory.is_dir():
        raise CannotReport(f"{directory} is not a journal: there is no such directory")
    if chosen["follow"]:
        for success, line in follow(directory):
            if not (success and chosen["errors"]):
                click.echo(line)
    elif chosen["request"] is not None:
        for line in find(directory, chosen["request"]):
            click.echo(line)
    elif chosen["html"]:
        write_page(chosen["html"].expanduser(), directory, seconds, name, now)
    elif chosen["errors"]:
        echo_failures(directory, begin, now)
    else:
        summary = summarise(directory, begin, now)
        lines = summary.table_by(chosen["by"]) if chosen["by"] else summary.table(seconds)
        if chosen["by"]:
            echo_period(begin, now, summary.source)
        elif not summary.last:
            lines = [("from", utc(begin)), ("to", utc(now)), *lines]
        if not chosen["by"]:
            feedback, module = {key: sums.feedback for key, sums in summary.sums.items()}, _feedback_report()
            lines += module.prediction_errors(feedback, directory) if module else []
            lines += shipping(directory)
        echo_table(lines)
        if shutil.disk_usage(directory).free < FULL:
            click.echo(f"the disk of {directory} is full: requests are missing here", err=True)


def _check(context: click.Context, chosen: dict[str, Any]) -> None:
    """Raise click.UsageError for options that make no sense together."""
    given = [f"--{name}" for name, value in chosen.items() if value not in (None, False)]
    if len(given) > 1 and set(given) != {"--follow", "--errors"}:
        raise click.UsageError(f"{' and '.join(sorted(given))} do not go together", context)
    if context.get_parameter_source("since") is not ParameterSource.DEFAULT:
        for name in {"--follow", "--request"} & set(given):
            why = "follows what comes" if name == "--follow" else "searches the whole journal"
            raise click.UsageError(f"{name} {why}: leave out --since", context)


def echo_period(begin: float, now: float, source: str) -> None:
    """Print on standard error which time was looked at (seconds since 1970), and where."""
    click.echo(f"from {utc(begin)} to {utc(now)}, by the {source}", err=True)


def echo_failures(directory: Path, since: float, now: float) -> None:
    """Print the latest failed requests; on standard error, how many more there were."""
    rolled, first = rolled_up(directory, since, now)
    known = sum(errors_of(sums).total() for steps in rolled.values() for at, sums in steps.items() if at >= first)
    lines, count = failures(directory, since, LATEST)
    echo_period(since, now, "journal")
    for line in lines:
        click.echo(line)
    if count > len(lines):
        click.echo(f"these are the latest {len(lines)} of {count}", err=True)
    if known > count:
        why = "in the journal no longer, which was shipped or was full; --by error counts them too"
        click.echo(f"{known - count} more are {why}", err=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    return cli.run("telemetry.report", report, arguments, CannotReport, NoSuchRequest, OSError, status=1)


if __name__ == "__main__":
    sys.exit(main())
