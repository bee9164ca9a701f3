"""Single requests in the journal, a line each: those that failed, all with an id, and new ones as they are written."""

import heapq
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from monitor import read_lines, segments

POLL_SECONDS = 0.3
LATEST_TIME = 1e11  # seconds since 1970: the year 5138
# Of a line, with tabs between them; a request that succeeded has no detail.
FIELDS = "time, request id, user, status, error, version, milliseconds, detail"


class NoSuchRequest(Exception):
    """No record has the id that was asked for. The message is for the operator."""


def read(directory: Path, since: float) -> Iterator[dict[str, Any] | None]:
    """Yield the records of a journal written at or after `since` (seconds since 1970), and None for a torn line."""
    for path in segments(directory):
        with suppress(FileNotFoundError):  # shipped meanwhile, or dropped to make room
            if path.stat().st_mtime < since:
                continue
            for _, record in read_lines(path):
                written = record and record.get("time")
                if not isinstance(written, (int, float)) or written > LATEST_TIME:
                    yield None
                elif written >= since:
                    yield record


def is_request(record: dict[str, Any] | None) -> bool:
    """Return whether a record is that of one request: not of an event, of a loss, or of several requests."""
    return record is not None and not record.keys() & {"event", "dropped", "requests"}


def as_line(record: dict[str, Any]) -> str:
    """Return the line of a request's record, "" for any other record and for one that lacks something."""
    if not is_request(record):
        return ""
    with suppress(KeyError, TypeError, ValueError, OverflowError, OSError):
        at = datetime.fromtimestamp(record["time"], UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        error = f"{record['error_type']}: {record['error']}" if not record["success"] else "-"
        version = f"{record['model_version']} {record.get('variant', '')}".strip() or "-"
        known = at, record["request_id"], record["user"] or "-", record["status"], error, version
        more = (f"{1000 * record['response_time']:.2f}", *filter(None, [record.get("detail")]))
        return "\t".join(map(printable, (*known, *more)))
    return ""


def printable(field: Any) -> str:
    """Return a field that neither ends its line nor moves a terminal's cursor."""
    return "".join(each if each.isprintable() else "?" for each in str(field))


def failures(directory: Path, since: float, limit: int) -> tuple[list[str], int]:
    """Return the lines of the latest failed requests, the newest last, and how many failed altogether."""
    latest: list[tuple[float, str]] = []
    count = 0
    for record in read(directory, since):
        if record and not record.get("success") and (line := as_line(record)):
            heapq.heappush(latest, (record["time"], line))
            count += 1
            if count > limit:
                heapq.heappop(latest)
    return [line for _, line in sorted(latest)], count


def find(directory: Path, request_id: str) -> Iterator[str]:
    """Yield a line for each field of the records with an id, of the request or the trace. Raises: NoSuchRequest."""
    found = [each for each in read(directory, 0.0) if each and request_id in map(each.get, ("request_id", "trace_id"))]
    if not found:
        name = printable(request_id)
        raise NoSuchRequest(
            f"no record in {directory} has the id {name!r}. Look on the other hosts, in the server's log, and, if the "
            f'journal is shipped, in SLS: request_id: "{name}". Only predictions are recorded, and of those without a '
            "valid password the first from each address; of the others only how many there were."
        )
    for number, record in enumerate(found):
        yield from [""] * (number > 0)
        width = max(map(len, record))
        for name, value in record.items():
            yield f"{printable(name):<{width}}  {json.dumps(value)}"


def follow(directory: Path) -> Iterator[tuple[bool, str]]:
    """Yield whether it succeeded, and the line, of each request that is written from now on."""
    offsets = {path.name: _size(path) for path in segments(directory)}
    while True:
        new: list[tuple[float, bool, str]] = []
        paths = segments(directory)
        offsets = {path.name: offsets.get(path.name, 0) for path in paths}
        for path in paths:
            with suppress(FileNotFoundError):  # shipped meanwhile, or dropped to make room
                for offset, record in read_lines(path, offsets[path.name]):
                    offsets[path.name] = offset
                    if record and (line := as_line(record)):
                        new.append((record["time"], bool(record["success"]), line))
        for _, success, line in sorted(new):
            yield success, line
        time.sleep(POLL_SECONDS)


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size  # if it is within a line, the rest of that is no record
    return 0
