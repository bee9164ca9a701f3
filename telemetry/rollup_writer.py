"""Counts requests for the roll-ups, and writes them; telemetry/rollups.py has their format, and reads them.

    watch(service)      # counts each request, and writes every ten seconds

Counting costs a request 1 µs (CPython 3.11, one user, one version).
"""

import _thread  # its RLock is native under gevent too, its allocate_lock is not; nothing yields while it is held
import errno
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from processes import LogLimit, after_fork
from shared_files import FileLock, replace_file
from telemetry.rollups import Sums, add_up, bucket_of, day_of, days, name_of, read_file

if TYPE_CHECKING:
    from server import Service

FLUSH_SECONDS = 10.0  # a killed worker's requests of so long are lost
COMPACT_SECONDS = 600.0
MINUTES_KEPT = 2 * 3600  # seconds; what is older is added up to five minutes, and before yesterday to hours
DAYS_KEPT = 35  # and today
EVENTS_KEPT = 1000  # of a day
MAX_PENDING = 2000  # sums that wait to be written: of a day, if one version is served
EXIT_SECONDS = 2.0  # that a worker waits for the lock when it ends


def watch(service: "Service") -> None:
    """Count the requests of a service, its feedback, its events, and the records that its journal lost."""
    writer = RollupWriter(service.settings.journal_dir, service.run_in_thread)
    service.observers.append(writer.count_request)
    service.journal.on_loss.append(writer.count_loss)
    service.journal.on_event.append(writer.note_event)
    service.every_second.append(writer.tick)
    service.on_exit.append(writer.close)


class _Cell:
    """The requests that differ only in their time and rows."""

    __slots__ = ("requests", "rows", "seconds", "times")

    def __init__(self) -> None:
        self.requests, self.rows, self.seconds = 0, 0, 0.0
        self.times: dict[int, int] = {}  # bucket → requests


class RollupWriter:
    """What a worker has counted and not written yet, and how the files are written.

    Concurrency: only who holds the lock of `rollup/lock` writes. Nobody waits for it: a worker that does not get it
    tries again a second later. Lines are appended, which takes microseconds. Every ten minutes one worker adds up the
    lines of a file and replaces it; `lock` holds the time of that, in seconds since 1970. Readers need no lock.
    """

    def __init__(self, journal_dir: Path, run_in_thread: Callable[..., Any]) -> None:
        """Remember where to write. Nothing is read or written before `tick`."""
        self._journal_dir, self._directory, self._run_in_thread = journal_dir, journal_dir / "rollup", run_in_thread
        self._file_lock = FileLock(self._directory / "lock")
        self._trouble = LogLimit(logging.getLogger(__name__), math.inf)
        self._begin()
        after_fork(self._begin)

    def _begin(self) -> None:
        self._lock, self._writing = _thread.RLock(), threading.Lock()  # the latter is never waited for
        self._cells: dict[tuple[Any, ...], _Cell] = {}  # the requests of this minute
        self._sums: dict[tuple[str, str], Sums] = {}  # what else is counted, by version and variant
        self._pending: dict[tuple[int, tuple[str, str]], Sums] = {}  # by minute, version and variant; to be written
        self._pending_events: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []
        self._minute = int(time.time() // 60) * 60  # in which is counted
        self._flush_at = time.monotonic() + FLUSH_SECONDS
        self._compact_at = time.monotonic() + 60

    # --- counting

    def count_request(self, seconds: float, record: dict[str, Any]) -> None:
        """Count a request that was answered after so many seconds."""
        user = record["user"]
        if user is None and record["success"]:
            return  # OPTIONS
        version, variant, protocol = record["model_version"], record["variant"], record["protocol"]
        key = version, variant, user, protocol, record["status"], record["error_type"], record["error"]
        bucket = bucket_of(seconds)
        with self._lock:
            cell = self._cells.get(key)
            if cell is None:
                cell = self._cells[key] = _Cell()
            cell.requests += 1
            cell.rows += record["rows"]
            cell.seconds += seconds
            times = cell.times
            times[bucket] = times.get(bucket, 0) + 1

    def count_loss(self, reason: str, count: int) -> None:
        """Count records that the journal lost."""
        with self._lock:
            self._sums.setdefault(("", ""), Sums()).dropped[reason] += count

    def note_event(self, record: dict[str, Any]) -> None:
        """Count a record of feedback; keep any other with `event`, such as a rollback's, but wrong passwords."""
        if record["event"] == "wrong_password":  # which would push the others out
            return
        with self._lock:
            if record["event"] != "feedback":
                self._events.append({"time": time.time()} | record)
                del self._events[:-EVENTS_KEPT]
                self._flush_at = 0.0
                return
            self._sums.setdefault((record["model_version"], record["variant"]), Sums()).add_feedback(record)

    def _collect(self) -> None:
        """Move what was counted to what is to be written."""
        with self._lock:
            cells, sums, self._cells, self._sums = self._cells, self._sums, {}, {}
            self._pending_events, self._events = [*self._pending_events, *self._events][-EVENTS_KEPT:], []
        for (version, variant, user, protocol, status, error_type, error), cell in cells.items():
            found = sums.setdefault((version, variant), Sums())
            found.requests += cell.requests
            found.rows += cell.rows
            found.protocols[protocol] += cell.requests
            if status < 400:
                found.success += cell.requests
            else:
                found.errors[f"{error_type} {status} {error}"] += cell.requests
            if user is None:
                found.unauthenticated += cell.requests
            else:
                found.users[user] += cell.requests
                found.seconds += cell.seconds
                found.times.update(cell.times)
        for key, found in sums.items():
            self._pending.setdefault((self._minute, key), Sums()).add(found)
        while len(self._pending) > MAX_PENDING:
            del self._pending[min(self._pending)]

    # --- beside the requests

    def tick(self) -> None:
        """Write what was counted, if it is time. To be called once a second."""
        if not self._writing.acquire(blocking=False):  # it is the worker's last second
            return
        try:
            minute, now = int(time.time() // 60) * 60, time.monotonic()
            if minute != self._minute or now >= self._flush_at:
                self._collect()
                self._minute = minute
            if now >= self._flush_at and self._with_lock(self._flush):
                self._flush_at = now + FLUSH_SECONDS
            if now >= self._compact_at and self._run_in_thread(self._with_lock, self._compact):
                self._compact_at = now + COMPACT_SECONDS
        finally:
            self._writing.release()

    def close(self) -> None:
        """Write what was counted: the worker ends."""
        late = time.monotonic() + EXIT_SECONDS
        while time.monotonic() < late:
            if self._writing.acquire(blocking=False):
                self._collect()
                done = self._with_lock(self._flush)
                self._writing.release()
                if done:
                    return
            time.sleep(0.05)

    def _with_lock(self, work: Callable[[], None]) -> bool:
        """Do something under the lock; return whether that need not be tried again soon."""
        try:
            if not self._file_lock.acquire():
                return False
            work()
        except OSError as error:
            message = "the monitor page and the report lack requests, %s cannot be written: %s"
            self._trouble.error("", message, self._directory, error)
        finally:
            self._file_lock.release()
        return True

    # --- under the lock

    def _flush(self) -> None:
        for (start, name), sums in list(self._pending.items()):
            self._append(start, _line(start, 60, name, sums))
            del self._pending[start, name]
        while self._pending_events:
            self._append(self._pending_events[0]["time"], self._pending_events[0])
            del self._pending_events[0]
        self._trouble.reset()

    def _append(self, when: float, line: dict[str, Any]) -> None:
        fd = os.open(self._directory / f"{day_of(when)}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            text = b"\n" + orjson.dumps(line) + b"\n"  # the first, since the line before it may be torn
            if os.write(fd, text) < len(text) - 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)

    def _compact(self) -> None:
        now = time.time()
        fd, last = self._file_lock.fd, 0.0
        assert fd is not None
        with suppress(ValueError):
            last = float(os.pread(fd, 20, 0))
        if 0 <= now - last < 0.9 * COMPACT_SECONDS:  # another worker did
            return
        for path in self._directory.glob(".*.jsonl-*"):  # of a process that was killed here
            path.unlink()
        files = days(self._journal_dir)
        for day in sorted(files)[: -1 - DAYS_KEPT]:
            files.pop(day).unlink()
        is_first_of_day = day_of(last) != day_of(now)
        for day, path in files.items():
            if is_first_of_day or day >= day_of(now - 86_400):
                before, content = path.read_bytes(), compacted(path, now)
                if content != before:
                    replace_file(path, content)
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d" % now, 0)


def compacted(path: Path, now: float) -> bytes:
    """Return the content of a file with lines added up as they may be at a time (seconds since 1970)."""
    yesterday = (now // 86_400 - 1) * 86_400

    def key_of(line: dict[str, Any]) -> tuple[int, int, tuple[str, str]]:
        span = 3600 if line["time"] < yesterday else 300 if line["time"] < now - MINUTES_KEPT else 60
        span = max(line["span"], span)
        return int(line["time"] // span * span), span, name_of(line)

    lines = list(read_file(path))
    found = [line for line in lines if "event" in line][-EVENTS_KEPT:]
    found += [_line(*key, sums) for key, sums in add_up(lines, key_of).items()]
    return b"".join(orjson.dumps(line) + b"\n" for line in found)


def _line(start: int, span: int, name: tuple[str, str], sums: Sums) -> dict[str, Any]:
    return {"time": start, "span": span, "version": name[0], "variant": name[1]} | sums.encode()
