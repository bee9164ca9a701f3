"""The journal: one line for each prediction request, written before the first byte of its answer.

    journal = Journal(Path("var/journal"), max_bytes=10**9)
    log_monitor(0.0021, True, "", journal=journal, status=200, rows=1, …)

`python -m telemetry.report` reads it for people, and `python -m sls ship` for Alibaba Cloud's log service.
"""

import errno
import itertools
import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from processes import LogLimit, after_fork, flock, is_locked, run_hooks

log = logging.getLogger(__name__)

LOSSES = FULL, UNWRITABLE = "the journal was full", "the journal could not be written"
# A segment is closed at this size, or earlier, so that the open ones are at most a quarter of the journal's bound.
SEGMENT_BYTES = 8 * 2**20  # small enough to count a dropped one's records in some 20 ms
SUMMARY_SECONDS = 60.0  # between two records that sum up the requests without a valid password
# The fields of a new record; `user` is None until a password was verified.
BLANK: dict[str, Any] = {"rows": 0, "user": None, "protocol": "predict"} | dict.fromkeys(
    ("error", "error_type", "path", "method", "model_version", "variant", "request_id"), ""
)


def log_monitor(response_time: float, success: bool, error: str, *, journal: "Journal", **fields: Any) -> None:
    """Record one prediction request.

    Args:
        response_time: seconds from the request's arrival in the application to its answer.
        success: whether it was answered with a status below 400.
        error: what went wrong, in our own words (never a library's message: it may hold the caller's data); else "".
        journal: the journal that the record is appended to.
        fields: `error_type`, `status`, `path`, `protocol`, `method`, `rows`, `model_version`, `variant`, `user`,
            `request_id`; as JSON values.
    """
    journal.append({"response_time": int(response_time * 1e6) / 1e6, "success": success, "error": error, **fields})


class RequestLog:
    """Records requests; those without a valid password as one summary a minute, or they could push out real records."""

    def __init__(self, journal: "Journal") -> None:
        self._journal = journal
        self._unauthenticated = itertools.count()  # next() is one step, and so safe in threads
        self._summarised = time.monotonic()

    def observe(self, seconds: float, record: dict[str, Any]) -> None:
        """Record a request that took so many seconds."""
        if record["user"] is not None:
            log_monitor(seconds, journal=self._journal, **record)
        elif not record["success"]:  # OPTIONS, which Flask answers, needs no password
            next(self._unauthenticated)

    def tick(self) -> None:
        """Write the summary when it is time. To be called once a second."""
        if time.monotonic() - self._summarised >= SUMMARY_SECONDS:
            self.summarise()

    def summarise(self) -> None:
        """Record the requests that were counted since the last summary."""
        self._summarised = time.monotonic()
        count = next(self._unauthenticated)
        self._unauthenticated = itertools.count()
        if count:
            known = {"success": False, "error": "requests without a valid password", "error_type": "auth"}
            known |= {"status": 401, "path": "/predict", "user": "", "requests": count}
            log_monitor(0.0, journal=self._journal, **BLANK | known)


class Journal:
    """An append-only log of JSON lines, in segments, bounded in bytes.

    Format: a directory of files `<nanoseconds when opened, 20 digits>-<pid>.jsonl`, so names sort by age; when the
    clock has gone back, the number is one more than the highest. Each line is one JSON object and holds at least `time`
    (seconds since 1970), `record_id` (unique) and `pid`; the line of a request holds what `log_monitor` was given. A
    line with `dropped` instead says how many records were lost and why; one with `event` what happened to the service
    (`rollback`: its guard took a canary back, and the `reason`). A line that does not parse was torn by a full disk or
    a power failure; the next one begins on a line of its own.

    Concurrency: one writer per segment, which holds it with `flock` for as long as it may still write: a segment that
    is not locked is finished. A line is one `write` with O_APPEND, so a killed writer loses nothing that it wrote.
    Not synced to disk: a power failure may lose the last seconds. Past `max_bytes` the oldest finished segments go.

        journal = Journal(Path("var/journal"), max_bytes=10**9)
        journal.append({"event": "rollback", "reason": "…"})
    """

    def __init__(self, directory: Path, max_bytes: int, writers: int = 4) -> None:
        """Open nothing yet; the first record opens a segment.

        Args:
            directory: of the segments.
            max_bytes: of all segments.
            writers: how many there will be, about.
        """
        self._directory, self._max_bytes = directory, max_bytes
        self._segment_bytes = min(SEGMENT_BYTES, max_bytes // (4 * writers))
        self._fd: int | None = None
        self._size = 0
        self._torn = False
        self._lost: Counter[str] = Counter()  # reason → records lost, and not yet reported in the journal
        self._limit = LogLimit(log)
        # Hooks of extensions, called with the reason, one of `LOSSES`, and the number of records that were lost.
        self.on_loss: list[Callable[[str, int], None]] = []
        self.on_event: list[Callable[[dict[str, Any]], None]] = []  # called with each record that has `event`
        self._begin()
        after_fork(self._after_fork)

    def append(self, record: dict[str, Any]) -> None:
        """Append one record of JSON values. A journal that cannot be written stops no request: the loss is counted."""
        with self._lock:
            try:
                if self._fd is None or self._size >= self._segment_bytes:
                    self._open_segment()
                while self._lost:
                    reason, count = next(iter(self._lost.items()))
                    self._write({"dropped": count, "reason": reason})
                    del self._lost[reason]
                self._write(record)
            except OSError as error:
                self._lose(UNWRITABLE, 1)
                message = "records are being lost, the journal in %s cannot be written: %s"
                self._limit.error(UNWRITABLE, message, self._directory, error)
        if "event" in record:
            run_hooks(self.on_event, record)

    def _write(self, record: dict[str, Any]) -> None:
        assert self._fd is not None
        record["time"] = time.time_ns() // 1000 / 1e6  # half of what round() costs
        record["record_id"] = f"{self._prefix}-{next(self._count)}"
        record["pid"] = self._pid
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        if self._torn:
            line = b"\n" + line
        written = os.write(self._fd, line)
        self._size += written
        self._torn = written < len(line)
        if written < len(line) - 1:  # without its last byte a line is still whole
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open_segment(self) -> None:
        self.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        numbers = [path.name[:20] for path in segments(self._directory)]
        opened = max(time.time_ns(), *(int(number) + 1 for number in numbers if number.isdecimal()), 0)
        path = self._directory / f"{opened:020d}-{self._pid}.jsonl"
        new = path.with_suffix(".new")  # until it is locked: a segment that is not locked counts as finished
        fd = os.open(new, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            flock(fd)
            os.rename(new, path)
        except BaseException:
            os.close(fd)
            new.unlink(missing_ok=True)
            raise
        self._fd, self._size, self._torn = fd, 0, False
        self._make_room()

    def _make_room(self) -> None:
        """Remove the oldest finished segments until a new one fits."""
        lost, earlier, sizes = 0, 0, {}
        for path in segments(self._directory):
            with suppress(OSError):  # here and below: another worker makes room as well, and counts
                sizes[path] = path.stat().st_size
        excess = sum(sizes.values()) + self._segment_bytes - self._max_bytes
        for path, size in sizes.items():
            if excess <= 0:
                break
            with suppress(OSError):
                if not is_locked(path):
                    # A torn line was counted as lost by its writer.
                    records = [record for _, record in read_lines(path) if record is not None]
                    counts = [count for record in records if type(count := record.get("dropped")) is int]
                    path.unlink()
                    lost, earlier = lost + len(records) - len(counts), earlier + sum(counts)
                    excess -= size
        if lost or earlier:
            log.warning("the journal is full (%d bytes): dropped its %d oldest records", self._max_bytes, lost)
            self._lose(FULL, lost, earlier)

    def _lose(self, reason: str, count: int, earlier: int = 0) -> None:
        """Count lost records; those lost `earlier`, whose line went as well, only for the line that replaces it."""
        self._lost[reason] += count + earlier
        run_hooks(self.on_loss, reason, count)

    def close_if_removed(self) -> None:
        """Close a segment that was deleted, since what is written to it would be lost. To be called once a second."""
        with self._lock:
            if self._fd is not None and not os.fstat(self._fd).st_nlink:
                self.close()

    def close(self) -> None:
        """Finish the segment."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _after_fork(self) -> None:
        # A child that kept the descriptor, and with it the lock, would keep the segment open after its writer's death,
        # and write under the writer's name. Closing the copy leaves the parent's lock in place.
        self.close()
        self._lost.clear()
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()  # a new one after a fork: a thread of the parent may have held it
        self._pid = os.getpid()
        self._prefix = secrets.token_hex(8)
        self._count = itertools.count()


def segments(directory: Path) -> list[Path]:
    """List a journal's segments, the oldest first."""
    return sorted(directory.glob("[0-9]*.jsonl"))


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Read a segment's lines from an offset on, up to the last whole one.

    Yields:
        The offset after the line (bytes), and its record, None for a line that does not parse.

    Raises:
        OSError: it cannot be read; it may have been shipped, or dropped to make room.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # it is being written, or its writer was killed
            offset += len(line)
            try:
                record = orjson.loads(line)
            except ValueError:
                record = None
            yield offset, record if isinstance(record, dict) else None
