"""Ships a journal's records: batches, retries, progress that survives a restart, and the locks of the two sides.

At least once: a record that SLS stored without our hearing of it is sent again, with the same `record_id`. Two files in
the journal's directory are locked: `serving.lock` by all workers together, `ship.lock` by the one shipper. Progress is
in `ship.json`, which is replaced after each batch; records that SLS rejects for their content are in `refused.json`,
which once it is full becomes `refused.old.json`.
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
from processes import LogLimit, is_locked
from shared_files import FileLock, replace_file

log = logging.getLogger("sls")

ROOT = Path(__file__).resolve().parent.parent

STATE = "ship.json"
DEAD_LETTERS, OLD_DEAD_LETTERS = "refused.json", "refused.old.json"
DEAD_LETTERS_BYTES = 8 * 2**20  # from which on the file becomes the old one
BATCH_RECORDS = 2048  # SLS takes 4096 in one call; decoded, these are some 5 MB
BATCH_BYTES = 2 * 2**20  # of journal lines; SLS takes 10 MB, and 3 MB of raw logs is advised
LINGER = 2.0  # seconds that a batch which is not full waits for more
FIRST_RETRY, LONGEST_PAUSE = 0.1, 50.0  # seconds before a retry, doubled for each
SLOW_RETRY = 30.0  # seconds, if an operator has to act first
REMIND = 3600.0  # seconds between two log lines on the same trouble
TOO_OLD = 7 * 86400.0  # seconds; SLS rejects older records

# What an operator can do about an error code of SLS.
ADVICE = {
    "NoCredentials": "set ALIBABA_CLOUD_ACCESS_KEY_ID and ALIBABA_CLOUD_ACCESS_KEY_SECRET, or "
    "ALIBABA_CLOUD_CREDENTIALS_FILE, or give this ECS instance, or on ACK the service account, a RAM role",
    "Unauthorized": "check ALIBABA_CLOUD_ACCESS_KEY_ID, and that its RAM user has the permission that SLS names",
    "SignatureNotMatch": "check ALIBABA_CLOUD_ACCESS_KEY_SECRET",
    "LogRequestError": "check SLS_ENDPOINT, and this machine's DNS, network and proxy",
    "ProjectNotExist": "check SLS_PROJECT and SLS_ENDPOINT, or create it: python -m sls setup --make-project",
    "LogStoreNotExist": "check SLS_LOGSTORE, or create it: python -m sls setup",
    "IndexConfigNotExist": "create it: python -m sls setup",
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


class SLSError(Exception):
    """A call that SLS did not acknowledge: its code, and the HTTP status (0 or 200 if there was no answer)."""

    def __init__(self, code: str, message: str, status: int) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.status = code, status
        # Whether it goes away by itself: throttling, a fault of SLS's, the network.
        self.is_transient = code in TRANSIENT or status in (408, 429) or status >= 500
        self.is_content = code in CONTENT  # whether SLS rejects the batch for its content

    def explain(self) -> str:
        """Return the error, and what to do about it."""
        return f"{self}: {ADVICE[self.code]}" if self.code in ADVICE else str(self)


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

        Raises: OSError, the journal's directory cannot be written.
        """
        self._serving.acquire(shared=True)  # if a shipper is just checking whether anyone serves, the next tick gets it
        is_running = self._shipper is not None and self._shipper.poll() is None
        if is_running or time.monotonic() - self._started_at < 5.0:
            return  # a new one needs a moment to take its lock
        with suppress(FileNotFoundError):
            if is_locked(self._ship_lock):
                return
        self._started_at = time.monotonic()
        # From our own directory, since the working directory may be another; in a session of its own, so that a Ctrl-C
        # meant for the server lets it finish.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._shipper = subprocess.Popen(
            [sys.executable, "-P", "-m", "sls", "ship"],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


# --- the shipper


class Shipper:
    """Sends a journal's records, the oldest segment first, and removes the segments that are finished and sent."""

    def __init__(self, directory: Path, send: Callable[[list[dict[str, Any]]], None], forever: bool = False) -> None:
        """Read how far the last one got. `send` raises SLSError; with `forever`, go on when no worker serves."""
        self._directory, self._send, self._forever = directory, send, forever
        self._progress = Progress.read(directory) or Progress()
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
            records, ends, is_full = self._collect()
            if records:
                self._deliver(records)
            self._commit(records, ends, is_full)
            if is_full:
                continue
            if ending and not records:
                return
            self._wait(0.1 if ending else LINGER)

    def is_ending(self) -> bool:
        """Return whether to end once everything is sent: stopped, no worker serves, or the journal was removed."""
        try:
            is_removed = not os.fstat(self._serving).st_nlink
            if is_removed or not (self._forever or is_locked(self._directory / "serving.lock")):
                self._ending = True
        except OSError:  # removed or moved just now
            self._ending = True
        return self._ending

    def _collect(self) -> tuple[list[dict[str, Any]], dict[str, int], bool]:
        """Return the next records, how far that takes each segment, and whether it is as much as one call may send."""
        records: list[dict[str, Any]] = []
        ends: dict[str, int] = {}
        size = 0  # bytes of journal lines
        for path in segments(self._directory):
            start = end = self._progress.offsets.get(path.name, 0)
            try:
                for end, record in read_lines(path, start):
                    ends[path.name] = end
                    if _is_record(record):
                        records.append(record)
                    if len(records) >= BATCH_RECORDS or size + end - start >= BATCH_BYTES:
                        return records, ends, True
            except FileNotFoundError:  # a worker dropped it to make room
                continue
            except OSError as error:
                self._errors.error(path.name, "%s cannot be read, its records wait: %s", path, error)
            size += end - start
        return records, ends, False

    def _commit(self, records: list[dict[str, Any]], ends: dict[str, int], is_full: bool) -> None:
        """Remove the segments that are finished and sent, and save the progress."""
        ends = self._progress.offsets | ends
        left = {}
        for path in segments(self._directory):
            end = ends.get(path.name, 0)
            if is_full and not end:
                continue  # it was not read yet
            try:
                # Its writer may have added lines before it ended; after them only a line that a kill cut off.
                if not is_locked(path) and next(read_lines(path, end), None) is None:
                    path.unlink()
                    continue
            except FileNotFoundError:
                continue
            except OSError as error:
                self._errors.error(path.name, "%s is sent and cannot be removed: %s", path, error)
            if end:
                left[path.name] = end
        if records or left != self._progress.offsets:
            self._progress.offsets = left
            self._progress.shipped += len(records)
            self._progress.dropped += sum(record.get("dropped", 0) for record in records)
            self._save()

    def _save(self) -> None:
        path = self._directory / STATE
        try:
            content = json.dumps(vars(self._progress)).encode()
            replace_file(path, content, durable=False)  # at worst, some are sent again
        except OSError as error:  # a full disk: going on makes room
            self._errors.error(STATE, "the progress cannot be written to %s: %s", path, error)

    def _deliver(self, records: list[dict[str, Any]]) -> None:
        """Send records, again and again, until they are stored or kept as dead letters."""
        pause = FIRST_RETRY
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
            jitter = random.uniform(0.5, 1.0)  # noqa: S311  # no secret
            self._wait(jitter * (pause if error.is_transient else SLOW_RETRY))
            pause = min(2 * pause, LONGEST_PAUSE)
        if self._progress.error:
            log.info("SLS takes records again")
            self._progress.error = None
            self._errors.reset()

    def _attempt(self, records: list[dict[str, Any]]) -> SLSError | None:
        """Send records; return the error, None if they are stored."""
        try:
            self._send(records)
        except SLSError as error:
            return error
        except (ValueError, TypeError) as error:  # a record that was edited by hand, for example
            return SLSError("Unshippable", f"it cannot be made into a log ({type(error).__name__})", 0)
        return None

    def _note(self, error: SLSError) -> None:
        """Keep the error for reports, and log it once an hour."""
        self._progress.error = {"time": time.time(), "code": error.code, "message": str(error)}
        self._save()
        self._errors.error(error.code, "records wait in the journal, SLS does not take them: %s", error.explain())

    def _dead_letter(self, records: list[dict[str, Any]], error: SLSError) -> bool:
        """Keep records that SLS rejects for their content in a file, for an operator; return False if that fails."""
        path, old = self._directory / DEAD_LETTERS, self._directory / OLD_DEAD_LETTERS
        try:
            if path.exists() and path.stat().st_size >= DEAD_LETTERS_BYTES:
                if old.exists():
                    log.error("%s is full: the records in %s are lost", path, old)
                path.rename(old)
            with path.open("ab") as file:
                file.write(b"".join(orjson.dumps({"refused": str(error), **record}) + b"\n" for record in records))
        except OSError as failure:
            message = "a record that SLS rejects cannot be kept in %s: %s"
            self._errors.error(DEAD_LETTERS, message, DEAD_LETTERS, failure)
            return False
        self._progress.refused += len(records)
        log.error("SLS rejects %d records for their content (%s): see %s", len(records), error, DEAD_LETTERS)
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


@dataclass
class Progress:
    """How far shipping has come, as `ship.json` holds it."""

    offsets: dict[str, int] = field(default_factory=dict)  # segment → the end of what was sent of it, in bytes
    shipped: int = 0  # records
    refused: int = 0  # records that SLS rejected for their content
    dropped: int = 0  # records that were lost before they could be shipped, as the journal says
    error: dict[str, Any] | None = None  # SLS's last, until it takes records again: `time`, `code` and `message`

    @classmethod
    def read(cls, directory: Path) -> "Progress | None":
        """Read it from a journal's directory; return None if there is none, or none that can be used."""
        try:
            state = json.loads((directory / STATE).read_text("utf-8"))
            offsets = {name: int(offset) for name, offset in state["offsets"].items()}
            counts = {name: int(state[name]) for name in ("shipped", "refused", "dropped")}
            return cls(offsets, **counts, error=state["error"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # sent again rather than never
            log.error("%s cannot be used, so everything is sent again: %s", directory / STATE, error)
            return None

    @staticmethod
    def refused_bytes(directory: Path) -> int:
        """Return the size of the records that SLS rejected, and that are kept."""
        size = 0
        for name in (DEAD_LETTERS, OLD_DEAD_LETTERS):
            with suppress(FileNotFoundError):
                size += (directory / name).stat().st_size
        return size

    def waiting(self, directory: Path) -> tuple[int, float | None]:
        """Return how many bytes of the journal wait, and when the oldest record in them was written (since 1970)."""
        size, oldest = 0, None
        for path in segments(directory):
            offset = self.offsets.get(path.name, 0)
            with suppress(OSError):  # sent meanwhile, or dropped to make room
                size += path.stat().st_size - offset
                if oldest is None:
                    times = (record["time"] for _, record in read_lines(path, offset) if _is_record(record))
                    oldest = next(times, None)
        return size, oldest


def _is_record(entry: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Return whether a journal line can be sent: if it was torn or edited by hand, it may have no time."""
    return entry is not None and isinstance(entry.get("time"), (int, float))
