"""The journal: one line for each prediction request, written before the first byte of its answer.

    journal = Journal(Path("var/journal"), max_bytes=10**9)
    log_monitor(0.0021, True, "", journal=journal, status=200, rows=1, …)

`python -m telemetry.report` reads it for people, and `python -m sls ship` for Alibaba Cloud's log service.
"""

import errno
import fcntl
import itertools
import logging
import os
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

log = logging.getLogger(__name__)

TOPIC = "model_service_monitor"  # in SLS
SEGMENTS = "*.jsonl"
LOSSES = FULL, UNWRITABLE = "the journal was full", "the journal could not be written"
# A segment is closed at this size, or earlier, so that the open ones are at most a quarter of the journal's bound.
SEGMENT_BYTES = 8 * 2**20  # small enough to count a dropped one's records in some 20 ms


def log_monitor(response_time: float, success: bool, error: str, *, journal: "Journal", **fields: Any) -> None:
    """Record one prediction request.

    Args:
        response_time: seconds from the request's arrival in the application to its answer.
        success: whether it was answered with a status below 400.
        error: what went wrong, in our own words (never a library's text: it may hold the caller's data); else "".
        journal: where to.
        fields: `error_type`, `status`, `path`, `method`, `rows`, `model_version`, `variant`, `user`, `request_id`; as
            JSON values.
    """
    journal.append({"response_time": int(response_time * 1e6) / 1e6, "success": success, "error": error, **fields})


class Journal:
    """An append-only log of JSON lines, in segments, bounded in bytes.

    Format: a directory of files `<nanoseconds when opened, 20 digits>-<pid>.jsonl`, so names sort by age. Each line is
    one JSON object and holds at least `time` (seconds since 1970), `record_id` (unique) and `pid`; the line of a
    request holds what `log_monitor` was given. A line with `dropped` instead says how many records were lost and
    why; one with `event` what happened to the service (`rollback`: its guard took a canary back, and the `reason`).
    A line that does not parse was torn by a full disk or a power cut; the next one begins on a line of its own.

    Concurrency: one writer a segment, which holds it with `flock` for as long as it may still write: a segment that
    can be locked is finished. A line is one `write` with O_APPEND, so a killed writer loses nothing that it wrote.
    Not synced to disk: a power cut may lose the last seconds. Past `max_bytes` the oldest finished segments go.
    """

    def __init__(
        self,
        directory: Path,
        max_bytes: int,
        writers: int = 4,
        on_loss: Callable[[str, int], None] = lambda reason, count: None,
    ) -> None:
        """Remember where to write; the first record opens a segment.

        Args:
            directory: where the segments lie.
            max_bytes: of all segments.
            writers: how many there will be, about.
            on_loss: is told why how many records were lost, one of `LOSSES`.
        """
        self._directory, self._max_bytes, self._on_loss = directory, max_bytes, on_loss
        self._segment_bytes = min(SEGMENT_BYTES, max_bytes // (4 * writers))
        self._fd: int | None = None
        self._size = 0
        self._torn = False
        self._lost: Counter[str] = Counter()  # reason → records lost, and not yet reported in the journal
        self._lock = threading.Lock()
        self._complained = -60.0
        self._looked = 0.0
        self._name_writer()
        _journals.add(self)

    def append(self, record: dict[str, Any]) -> None:
        """Append one record of JSON values. A journal that cannot be written stops no request: the loss is counted."""
        with self._lock:
            try:
                if self._fd is None or self._size >= self._segment_bytes or self._is_gone(self._fd):
                    self._open_segment()
                while self._lost:
                    reason, count = next(iter(self._lost.items()))
                    self._write({"dropped": count, "reason": reason})
                    del self._lost[reason]
                self._write(record)
            except OSError as error:
                self._lose(UNWRITABLE, 1)
                if time.monotonic() - self._complained >= 60.0:  # seconds; a full disk would fill the log as well
                    self._complained = time.monotonic()
                    log.error("records are being lost, the journal in %s cannot be written: %s", self._directory, error)

    def _is_gone(self, fd: int) -> bool:
        """Tell whether someone deleted the segment, which still takes writes that nobody would ever read.

        Looked at ten times a second, since it costs a third of the whole record.
        """
        now = time.monotonic()
        if now - self._looked < 0.1:
            return False
        self._looked = now
        return not os.fstat(fd).st_nlink

    def close(self) -> None:
        """Finish the segment."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _after_fork(self) -> None:
        self.close()  # closing the copy leaves the parent's flock in place
        self._lock = threading.Lock()  # a thread of the parent may have held it
        self._lost.clear()
        self._name_writer()

    def _name_writer(self) -> None:
        self._pid = os.getpid()
        self._prefix = secrets.token_hex(8)
        self._count = itertools.count()

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

    def _lose(self, reason: str, count: int) -> None:
        self._lost[reason] += count
        self._on_loss(reason, count)

    def _open_segment(self) -> None:
        self.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{time.time_ns():020d}-{self._pid}.jsonl"
        beside = path.with_suffix(".new")  # until it is locked: others take an unlocked segment for a finished one
        fd = os.open(beside, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.rename(beside, path)
        except BaseException:
            os.close(fd)
            beside.unlink(missing_ok=True)
            raise
        self._fd, self._size, self._torn = fd, 0, False
        lost = self._make_room()
        if lost:
            log.warning("the journal is full (%d bytes): dropped its %d oldest records", self._max_bytes, lost)
            self._lose(FULL, lost)

    def _make_room(self) -> int:
        """Remove the oldest finished segments until a new one fits; return how many records went."""
        lost = 0
        sizes = {}
        for path in segments(self._directory):
            with suppress(OSError):  # here and below: another worker makes room as well, and counts
                sizes[path] = path.stat().st_size
        excess = sum(sizes.values()) + self._segment_bytes - self._max_bytes
        for path, size in sizes.items():
            if excess <= 0:
                break
            with suppress(OSError):
                if is_finished(path):
                    count = _records_in(path)
                    path.unlink()
                    lost += count
                    excess -= size
        return lost


def segments(directory: Path) -> list[Path]:
    """List a journal's segments, the oldest first."""
    return sorted(directory.glob(SEGMENTS))


class Tail:
    """Reads what is added to a journal by all its writers."""

    def __init__(self, directory: Path, since: float) -> None:
        """Begin with the segments that were written to at or after `since` (seconds since 1970)."""
        self._directory, self._since = directory, since
        self._offsets: dict[str, int] = {}

    def read(self) -> list[dict[str, Any]]:
        """Return the records that came since the last call, 20,000 at most: the next call returns the others."""
        found: list[Any] = []
        offsets = {}
        for path in segments(self._directory):
            with suppress(OSError), path.open("rb") as file:  # shipped meanwhile, or dropped to make room
                skips = path.name not in self._offsets and os.fstat(file.fileno()).st_mtime < self._since
                file.seek(*((0, os.SEEK_END) if skips else (self._offsets.get(path.name, 0),)))
                offsets[path.name] = file.tell()
                while len(found) < 20_000 and (line := file.readline()).endswith(b"\n"):
                    offsets[path.name] += len(line)
                    with suppress(ValueError):  # torn
                        found.append(orjson.loads(line))
        self._offsets = offsets
        return [record for record in found if isinstance(record, dict)]


def is_finished(path: Path) -> bool:
    """Tell whether a segment's writer is done with it, or dead."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _records_in(path: Path) -> int:
    """Count the records that go with a segment, and those that it says went before."""
    count = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"}\n"):
                continue  # torn, and counted as lost by its writer
            if line.startswith(b'{"dropped":'):
                count += orjson.loads(line)["dropped"]
            else:
                count += 1
    return count


# A fork without exec copies the descriptor, and with it the lock: a child that kept it would keep the segment open
# after its writer's death, and write under the writer's name.
_journals: "weakref.WeakSet[Journal]" = weakref.WeakSet()


def _after_fork() -> None:
    for journal in _journals:
        journal._after_fork()


os.register_at_fork(after_in_child=_after_fork)
