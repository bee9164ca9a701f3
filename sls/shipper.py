"""Ships a journal's records: batches, retries, progress that survives a restart, and the locks of the two sides.

At least once: a record that SLS stored without our hearing of it is sent again, with the same `record_id`. Two files in
the journal's directory are locked: `serving.lock` by all workers together, `ship.lock` by the one shipper. Progress is
in `ship.json`, which is replaced after each batch; records that SLS rejects for their content are in `refused.json`.
"""

import gc
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import orjson

from monitor import read_lines, segments
from processes import FileLock, LogLimit, is_locked, replace_file

log = logging.getLogger("sls")

ROOT = Path(__file__).resolve().parent.parent

STATE = "ship.json"
DEAD_LETTERS = "refused.json"
COUNTS = ("shipped", "refused", "dropped")
BATCH_RECORDS = 2048  # SLS takes 4096 in one call; decoded, these are some 5 MB
BATCH_BYTES = 2 * 2**20  # of journal lines; SLS takes 10 MB, and 3 MB of raw logs is advised
LINGER = 2.0  # seconds that a batch which is not full waits for more
BACK_OFF = 0.1, 50.0  # seconds: before the first retry, doubled up to the second
SLOW_RETRY = 30.0  # seconds, if an operator has to act first
REMIND = 3600.0  # seconds between two log lines on the same trouble

# What an operator can do about an error code of SLS.
ADVICE = {
    "NoCredentials": "set ALIBABA_CLOUD_ACCESS_KEY_ID and ALIBABA_CLOUD_ACCESS_KEY_SECRET, or "
    "ALIBABA_CLOUD_CREDENTIALS_FILE, or give this ECS instance a RAM role",
    "Unauthorized": "check ALIBABA_CLOUD_ACCESS_KEY_ID and the permissions of its RAM user (log:PostLogStoreLogs)",
    "SignatureNotMatch": "check ALIBABA_CLOUD_ACCESS_KEY_SECRET",
    "ProjectNotExist": "check SLS_PROJECT and SLS_ENDPOINT, or create the project",
    "LogStoreNotExist": "check SLS_LOGSTORE, or create the logstore",
    "RequestTimeExpired": "set this machine's clock; it is more than 15 minutes off",
}
TRANSIENT = ("LogRequestError", "WriteQuotaExceed", "ShardWriteQuotaExceed", "ExceedQuota", "ServerBusy", "BadResponse")
CONTENT = (
    "PostBodyInvalid",
    "PostBodyTooLarge",
    "PostBodyUncompressError",
    "InvalidTimestamp",
    "InvalidEncoding",
    "InvalidKey",
    "Unshippable",  # our own
)
TOO_OLD = 7 * 86400.0  # seconds; SLS rejects older records


class SLSError(Exception):
    """A call that SLS did not acknowledge: its code, and the HTTP status (0 or 200 if there was no answer)."""

    def __init__(self, code: str, message: str, status: int) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.status = code, status

    @property
    def is_transient(self) -> bool:
        """Whether it goes away by itself: throttling, a fault of SLS's, the network."""
        return self.code in TRANSIENT or self.status in (408, 429) or self.status >= 500

    @property
    def is_content(self) -> bool:
        """Whether SLS rejects the batch for its content."""
        return self.code in CONTENT


# --- the worker's side


class ShipperSupervisor:
    """Shows that a worker serves, and keeps a shipper running. One in each worker."""

    def __init__(self, directory: Path) -> None:
        self._serving = FileLock(directory / "serving.lock")
        self._ship_lock = directory / "ship.lock"
        self._shipper: subprocess.Popen[bytes] | None = None
        self._started_at = -10.0  # seconds of the monotonic clock

    def tick(self) -> None:
        """Share `serving.lock`, and start a shipper if none runs. To be called once a second; it does not wait.

        Raises:
            OSError: the journal's directory cannot be written.
        """
        self._serving.acquire(shared=True)  # if a shipper is just checking whether anyone serves, the next tick gets it
        if self._shipper is not None and self._shipper.poll() is not None:
            self._shipper = None
        # A new shipper needs a moment to take its lock.
        if self._shipper is None and time.monotonic() - self._started_at > 5.0 and not self._is_shipping():
            self._started_at = time.monotonic()
            # From our own directory, since the working directory may be another; in a session of its own, so that a
            # Ctrl-C meant for the server lets it finish.
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            self._shipper = subprocess.Popen(
                [sys.executable, "-P", "-m", "sls", "ship"],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _is_shipping(self) -> bool:
        try:
            return is_locked(self._ship_lock)
        except FileNotFoundError:
            return False


# --- the shipper


@dataclass
class Batch:
    """Records to send in one call, and how far that takes each segment."""

    records: list[dict[str, Any]] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)  # segment → the end of what was read of it, in bytes
    finished: list[Path] = field(default_factory=list)  # segments to remove with this batch
    size: int = 0  # bytes of journal lines

    @property
    def is_full(self) -> bool:
        """Whether it holds as much as one call may."""
        return len(self.records) >= BATCH_RECORDS or self.size >= BATCH_BYTES


class Shipper:
    """Sends a journal's records, the oldest segment first, and removes the segments that are finished and sent."""

    def __init__(self, directory: Path, send: Callable[[list[dict[str, Any]]], None], forever: bool = False) -> None:
        """Read how far the last one got.

        Args:
            directory: the journal's.
            send: sends records or raises SLSError.
            forever: go on when no worker serves.
        """
        self._directory, self._send, self._forever = directory, send, forever
        self._state = _read_state(directory) or _no_progress()
        self._ending = False  # once true, it stays so: workers that start meanwhile start a shipper of their own
        # Held open, it shows whether the journal was removed, even if workers have made another one since.
        self._serving = os.open(directory / "serving.lock", os.O_RDONLY | os.O_CREAT, 0o640)
        self._errors = LogLimit(log, REMIND)

    def stop(self) -> None:
        """End once everything in the journal is sent. May be called from a signal handler."""
        self._ending = True

    def run(self) -> None:
        """Ship until `is_ending`, and then what is left. While SLS does not take it, this does not return."""
        while True:
            ending = self.is_ending()  # before reading, so that what the last worker wrote is read
            batch = self.collect()
            self._deliver(batch.records)
            self._commit(batch)
            if batch.is_full:
                continue
            if ending and not batch.records:
                return
            self._wait(0.1 if ending else LINGER)

    def is_ending(self) -> bool:
        """Return whether to end once everything is sent: stopped, no worker serves, or the journal was removed."""
        self._ending = self._ending or not self._is_needed()
        return self._ending

    def _is_needed(self) -> bool:
        try:
            is_removed = not os.fstat(self._serving).st_nlink
            return not is_removed and (self._forever or is_locked(self._directory / "serving.lock"))
        except OSError:  # removed or moved just now
            return False

    def collect(self) -> Batch:
        """Read the next records of the journal."""
        batch = Batch()
        for path in segments(self._directory):
            try:
                self._read(path, batch)
            except FileNotFoundError:  # a worker dropped it to make room
                continue
            except OSError as error:
                self._errors.error(path.name, "%s cannot be read, its records wait: %s", path, error)
            if batch.is_full:
                break
        return batch

    def _read(self, path: Path, batch: Batch) -> None:
        start = end = self._state["offsets"].get(path.name, 0)
        size = batch.size
        for end, record in read_lines(path, start):
            if _is_record(record):
                batch.records.append(record)
            batch.offsets[path.name], batch.size = end, size + end - start
            if batch.is_full:
                return
        # Its writer may have added lines between the last one and its end; after them only a line that a kill cut off.
        if not is_locked(path) and path.stat().st_size >= end and next(read_lines(path, end), None) is None:
            batch.finished.append(path)

    def _commit(self, batch: Batch) -> None:
        """Remove the segments that are done with, and save the progress."""
        if not (batch.offsets or batch.finished):
            return
        for path in batch.finished:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._errors.error(path.name, "%s is sent and cannot be removed: %s", path, error)
        offsets = self._state["offsets"] | batch.offsets
        left = {path.name for path in segments(self._directory)}
        self._state["offsets"] = {name: offset for name, offset in offsets.items() if name in left}
        self._state["shipped"] += len(batch.records)
        self._state["dropped"] += sum(record.get("dropped", 0) for record in batch.records)
        self._save()

    def _save(self) -> None:
        path = self._directory / STATE
        try:
            replace_file(path, json.dumps(self._state).encode(), durable=False)  # at worst, some are sent again
        except OSError as error:  # a full disk: going on makes room
            self._errors.error(STATE, "the progress cannot be written to %s: %s", path, error)

    def _deliver(self, records: list[dict[str, Any]]) -> None:
        """Send records, again and again, until they are stored or kept as dead letters."""
        retries = 0
        while (error := self._attempt(records)) is not None:
            self._note(error)
            gc.collect()  # a connection that failed leaves a cycle that holds the whole batch
            # Halving a batch that is too old would end at each of its records.
            is_old = max(record["time"] for record in records) < time.time() - TOO_OLD
            if error.is_content and len(records) > 1 and not is_old:
                middle = len(records) // 2
                self._deliver(records[:middle])
                self._deliver(records[middle:])
                return
            if error.is_content and self._dead_letter(records, error):
                return
            first, longest = BACK_OFF
            pause = min(longest, first * 2**retries) if error.is_transient else SLOW_RETRY
            retries = min(retries + 1, 30)
            self._wait(pause * random.uniform(0.5, 1.0))  # noqa: S311  # jitter, no secret
        if records and self._state["error"]:
            log.info("SLS takes records again")
            self._state["error"] = None
            self._errors.reset()

    def _attempt(self, records: list[dict[str, Any]]) -> SLSError | None:
        """Send records, if there are any; return the error, None if they are stored."""
        try:
            if records:
                self._send(records)
        except SLSError as error:
            return error
        except (ValueError, TypeError) as error:  # a record that was edited by hand, for example
            return SLSError("Unshippable", f"it cannot be made into a log ({type(error).__name__})", 0)
        return None

    def _note(self, error: SLSError) -> None:
        """Keep the error for reports, and log it once an hour."""
        self._state["error"] = {"time": time.time(), "code": error.code, "message": str(error)}
        self._save()
        default = "" if error.is_transient or error.is_content else "see SLS's list of error codes"
        advice = ADVICE.get(error.code, default)
        message = "records wait in the journal, SLS does not take them (%s)%s"
        self._errors.error(error.code, message, error, f": {advice}" if advice else "")

    def _dead_letter(self, records: list[dict[str, Any]], error: SLSError) -> bool:
        """Keep records that SLS rejects for their content in a file, for an operator; return False if that fails."""
        try:
            with (self._directory / DEAD_LETTERS).open("ab") as file:
                file.write(b"".join(orjson.dumps({"refused": str(error), **record}) + b"\n" for record in records))
        except OSError as failure:
            self._errors.error(
                DEAD_LETTERS, "a record that SLS rejects cannot be kept in %s: %s", DEAD_LETTERS, failure
            )
            return False
        self._state["refused"] += len(records)
        log.error(
            "SLS rejects %d records for their content (%s); they are kept in %s", len(records), error, DEAD_LETTERS
        )
        return True

    def _wait(self, seconds: float) -> None:
        """Wait, but at most a second once it is time to end."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.is_ending():
                time.sleep(min(left, 1.0))
                return
            time.sleep(min(left, 0.25))  # not an Event, whose lock a signal handler could find taken


# --- progress


@dataclass(frozen=True)
class Progress:
    """How far shipping has come, for reports and metrics."""

    shipped: int  # records
    refused: int  # records that SLS rejected for their content
    dropped: int  # records that were lost before they could be shipped, as the journal says
    waiting: int  # bytes of journal
    oldest: float | None  # seconds since 1970: when the oldest record that waits was written
    error: str  # SLS's last, until it takes records again; else ""

    @classmethod
    def read(cls, directory: Path, expected: bool = False) -> "Progress | None":
        """Read it from a journal's directory; return None if no shipper has been at work, unless one is `expected`."""
        state = _read_state(directory) or (_no_progress() if expected else {})
        if not state:
            return None
        waiting, oldest = 0, None
        for path in segments(directory):
            offset = state["offsets"].get(path.name, 0)
            with suppress(OSError):  # sent meanwhile, or dropped to make room
                waiting += path.stat().st_size - offset
                if oldest is None:
                    records = (record for _, record in read_lines(path, offset) if _is_record(record))
                    oldest = next((record["time"] for record in records), None)
        error = state["error"]["message"] if state["error"] else ""
        return cls(state["shipped"], state["refused"], state["dropped"], waiting, oldest, error)


def _is_record(entry: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Return whether a journal line can be sent: if it was torn or edited by hand, it may have no time."""
    return entry is not None and isinstance(entry.get("time"), (int, float))


def _no_progress() -> dict[str, Any]:
    return {"offsets": {}, **dict.fromkeys(COUNTS, 0), "error": None}


def _read_state(directory: Path) -> dict[str, Any]:
    """Read `ship.json`: offsets of segments, counts, and the last error. Return {} if it cannot be used."""
    try:
        state = json.loads((directory / STATE).read_text("utf-8"))
        numbers = [*state["offsets"].values(), *(state[name] for name in COUNTS)]
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("expected whole numbers")
        return {name: state[name] for name in ("offsets", *COUNTS, "error")}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # sent again rather than never
        log.error("%s cannot be used, so shipping begins as if nothing had been sent: %s", directory / STATE, error)
        return {}
