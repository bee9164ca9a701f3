"""Ships a journal's records: batches, retries, progress that lasts, and the two locks that say who is there.

At least once: a record that SLS stored without our hearing of it is sent again, with the same `record_id`. The locks
are files in the journal's directory, and the kernel frees them with their holders: `ship.lock` is the one shipper's,
`serving.lock` is shared by the workers. Progress is in `ship.json`, renamed into place after each batch.
"""

import fcntl
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
from typing import Any

import orjson

from monitor import is_finished, segments

log = logging.getLogger("sls")

ROOT = Path(__file__).resolve().parent.parent

STATE = "ship.json"
COUNTS = ("shipped", "refused", "dropped")
BATCH_RECORDS = 2048  # SLS takes 4096 in one call; decoded, these are some 5 MB
BATCH_BYTES = 2 * 2**20  # of journal lines; SLS takes 10 MB, and 3 MB of raw logs is advised
LINGER = 2.0  # seconds that a batch which is not full waits for more
BACK_OFF = 0.1, 50.0  # seconds: before the first retry, doubled up to the second
SLOW_RETRY = 30.0  # seconds, where an operator has to act first
REMIND = 3600.0  # seconds between two log lines on the same trouble

# What an operator can do about an error code of SLS.
ADVICE = {
    "NoCredentials": "set ALIBABA_CLOUD_ACCESS_KEY_ID and ALIBABA_CLOUD_ACCESS_KEY_SECRET, or "
    "ALIBABA_CLOUD_CREDENTIALS_FILE, or give this ECS instance a RAM role",
    "Unauthorized": "check ALIBABA_CLOUD_ACCESS_KEY_ID and the permissions of its RAM user (log:PostLogStoreLogs)",
    "SignatureNotMatch": "check ALIBABA_CLOUD_ACCESS_KEY_SECRET",
    "ProjectNotExist": "check SLS_PROJECT and SLS_ENDPOINT, or make the project",
    "LogStoreNotExist": "check SLS_LOGSTORE, or make the logstore",
    "RequestTimeExpired": "set this machine's clock; it is more than 15 minutes off",
}
PASSING = ("LogRequestError", "WriteQuotaExceed", "ShardWriteQuotaExceed", "ExceedQuota", "ServerBusy", "BadResponse")
CONTENT = (
    "PostBodyInvalid",
    "PostBodyTooLarge",
    "PostBodyUncompressError",
    "InvalidTimestamp",
    "InvalidEncoding",
    "InvalidKey",
    "Unshippable",  # our own
)
TOO_OLD = 7 * 86400.0  # seconds; SLS refuses older records


class SLSError(Exception):
    """A call that SLS did not acknowledge: its code, and the HTTP status (0 or 200 where there was no answer)."""

    def __init__(self, code: str, message: str, status: int) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.status = code, status

    @property
    def is_passing(self) -> bool:
        """Whether it goes away by itself: throttling, a fault of SLS's, the network."""
        return self.code in PASSING or self.status in (408, 429) or self.status >= 500

    @property
    def is_content(self) -> bool:
        """Whether SLS refuses the batch for what is in it."""
        return self.code in CONTENT


# --- the worker's side


class Presence:
    """Says that a worker serves, and sees to it that a shipper runs. One in each worker, after the fork."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._serving: int | None = None  # the descriptor that holds our share of serving.lock
        self._shipper: subprocess.Popen[bytes] | None = None
        self._spawned = -10.0
        # A fork without exec would keep the lock for its own life.
        os.register_at_fork(after_in_child=self._leave)

    def tick(self) -> None:
        """Take part in `serving.lock`, and start a shipper where there is none. Once a second; it does not wait.

        Raises:
            OSError: the journal's directory cannot be written.
        """
        if self._serving is not None and not os.fstat(self._serving).st_nlink:  # somebody removed the journal
            self._leave()
        if self._serving is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._serving = open_lock(self._directory / "serving.lock")
        with suppress(BlockingIOError):  # a shipper looks whether anybody serves; the next tick will do
            fcntl.flock(self._serving, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if self._shipper is not None and self._shipper.poll() is not None:
            self._shipper = None
        # A new shipper needs a moment to take its lock.
        if self._shipper is None and time.monotonic() - self._spawned > 5.0 and _is_free(self._directory / "ship.lock"):
            self._spawned = time.monotonic()
            # From our own directory, since the working directory may be another; in a session of its own, so that a
            # Ctrl-C meant for the server lets it finish.
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            self._shipper = subprocess.Popen(
                [sys.executable, "-P", "-m", "sls", "ship"],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _leave(self) -> None:
        if self._serving is not None:
            os.close(self._serving)
            self._serving = None


def open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o640)


def _is_free(path: Path) -> bool:
    try:
        return is_finished(path)  # a lock without a holder, as a segment without a writer
    except FileNotFoundError:
        return True


# --- the shipper


@dataclass
class Batch:
    """Records to send in one call, and where that leaves each segment."""

    records: list[dict[str, Any]] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)  # segment → bytes of it that are dealt with
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
            forever: go on when nobody serves.
        """
        self._directory, self._send, self._forever = directory, send, forever
        self._state = _read_state(directory) or _no_progress()
        self._ending = False  # once over, always over: workers that start meanwhile start a shipper of their own
        self._serving = open_lock(directory / "serving.lock")
        self._reminded: dict[str, float] = {}  # trouble → when it was logged

    def stop(self) -> None:
        """End once all that is there is sent. May be called from a signal handler."""
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
        """Tell whether to end when all is sent: stopped, nobody serves any more, or the journal was removed."""
        if self._ending or not os.fstat(self._serving).st_nlink:
            return True
        if self._forever:
            return False
        try:
            fcntl.flock(self._serving, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._serving, fcntl.LOCK_UN)
        self._ending = True
        return True

    def collect(self) -> Batch:
        """Read the next records of the journal."""
        batch = Batch()
        for path in segments(self._directory):
            try:
                self._read(path, batch)
            except FileNotFoundError:  # a worker dropped it to make room
                continue
            except OSError as error:
                self._complain(path.name, f"{path} cannot be read, its records wait: {error}")
            if batch.is_full:
                break
        return batch

    def _read(self, path: Path, batch: Batch) -> None:
        with path.open("rb") as file:
            start = file.seek(self._state["offsets"].get(path.name, 0))
            at = start
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written just now, or cut off by a kill
                at += len(line)
                try:
                    record = orjson.loads(line)
                    if isinstance(record, dict) and isinstance(record.get("time"), (int, float)):
                        batch.records.append(record)
                except orjson.JSONDecodeError:
                    pass  # torn by a full disk; its writer counts it as lost
                if len(batch.records) >= BATCH_RECORDS or batch.size + at - start >= BATCH_BYTES:
                    break
            if at > start:
                batch.offsets[path.name] = at
                batch.size += at - start
            if not batch.is_full and is_finished(path) and file.seek(0, os.SEEK_END) >= at:
                file.seek(at)
                if b"\n" not in file.read():  # the rest, if any, is a line that a kill cut off
                    batch.offsets[path.name] = -1  # remove it with this batch

    def _commit(self, batch: Batch) -> None:
        """Remove the segments that are done with, and make the progress last."""
        if not batch.offsets:
            return
        offsets = self._state["offsets"] | batch.offsets
        for name, offset in batch.offsets.items():
            if offset < 0:
                path = self._directory / name
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    self._complain(name, f"{path} is sent and cannot be removed: {error}")
                    offsets[name] = path.stat().st_size
        left = {path.name for path in segments(self._directory)}
        self._state["offsets"] = {name: offset for name, offset in offsets.items() if name in left}
        self._state["shipped"] += len(batch.records)
        self._state["dropped"] += sum(record.get("dropped", 0) for record in batch.records)
        self._save()

    def _save(self) -> None:
        beside = self._directory / f"{STATE}.new"
        try:
            beside.write_text(json.dumps(self._state))
            os.replace(beside, self._directory / STATE)
        except OSError as error:  # a full disk: go on, which makes room; a new shipper would send some again
            self._complain(STATE, f"progress cannot be written to {self._directory / STATE}: {error}")

    def _deliver(self, records: list[dict[str, Any]]) -> None:
        """Send records, again and again, until they are stored or set aside."""
        tries = 0
        while records:
            try:
                try:
                    self._send(records)
                except (ValueError, TypeError) as error:  # a record that was edited by hand, say
                    raise SLSError("Unshippable", f"it cannot be made into a log ({type(error).__name__})", 0) from None
            except SLSError as error:
                self._note(error)
                gc.collect()  # a connection that failed leaves a cycle that holds the whole batch
                # Halving would end at each of them.
                is_old = max(record["time"] for record in records) < time.time() - TOO_OLD
                if error.is_content and len(records) > 1 and not is_old:
                    middle = len(records) // 2
                    self._deliver(records[:middle])
                    return self._deliver(records[middle:])
                if error.is_content and self._set_aside(records, error):
                    return None
                first, most = BACK_OFF
                pause = min(most, first * 2**tries) if error.is_passing else SLOW_RETRY
                tries = min(tries + 1, 30)
                self._wait(pause * random.uniform(0.5, 1.0))  # noqa: S311  # jitter, no secret
            else:
                if self._state["error"]:
                    log.info("SLS takes records again")
                    self._state["error"] = None
                    self._reminded.clear()
                return None

    def _note(self, error: SLSError) -> None:
        """Keep the error for reports, and log it once an hour."""
        self._state["error"] = {"time": time.time(), "code": error.code, "message": str(error)}
        self._save()
        default = "" if error.is_passing or error.is_content else "see SLS's list of error codes"
        advice = ADVICE.get(error.code, default)
        self._complain(
            error.code,
            f"records wait in the journal, SLS does not take them ({error}){f': {advice}' if advice else ''}",
        )

    def _set_aside(self, records: list[dict[str, Any]], error: SLSError) -> bool:
        """Keep records that SLS refuses for what is in them where somebody can look at them; False if that fails."""
        try:
            with (self._directory / "refused.json").open("ab") as file:
                file.write(b"".join(orjson.dumps({"refused": str(error), **record}) + b"\n" for record in records))
        except OSError as failure:
            self._complain("refused.json", f"a record that SLS refuses cannot be set aside: {failure}")
            return False
        self._state["refused"] += len(records)
        log.error("SLS refuses %d records for what is in them (%s); refused.json keeps them", len(records), error)
        return True

    def _complain(self, what: str, message: str) -> None:
        """Log trouble, and again after an hour."""
        if time.monotonic() - self._reminded.get(what, -REMIND) >= REMIND:
            self._reminded[what] = time.monotonic()
            log.error("%s", message)

    def _wait(self, seconds: float) -> None:
        """Wait, but only a second once it is time to end."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.is_ending():
                time.sleep(min(left, 1.0))
                return
            time.sleep(min(left, 0.25))  # not an Event, whose lock a signal handler could meet taken


# --- progress


@dataclass(frozen=True)
class Progress:
    """How far shipping has come, for reports and metrics."""

    shipped: int  # records
    refused: int  # records that SLS does not take for what is in them
    dropped: int  # records that were lost before they could be shipped, as the journal says
    waiting: int  # bytes of journal
    oldest: float | None  # seconds since 1970: when the oldest record that waits was written
    error: str  # SLS's last, until it takes records again; else ""

    @classmethod
    def read(cls, directory: Path, expected: bool = False) -> "Progress | None":
        """Read it from a journal's directory; None where no shipper has been at work, unless one is `expected`."""
        state = _read_state(directory) or (_no_progress() if expected else {})
        if not state:
            return None
        waiting, oldest = 0, None
        for path in segments(directory):
            with suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as file:
                at = state["offsets"].get(path.name, 0)
                waiting += file.seek(0, os.SEEK_END) - at
                file.seek(at)
                if oldest is None and (line := file.readline()):
                    oldest = float(orjson.loads(line)["time"])
        error = state["error"]["message"] if state["error"] else ""
        return cls(state["shipped"], state["refused"], state["dropped"], waiting, oldest, error)


def _no_progress() -> dict[str, Any]:
    return {"offsets": {}, **dict.fromkeys(COUNTS, 0), "error": None}


def _read_state(directory: Path) -> dict[str, Any]:
    """Read `ship.json`: offsets of segments, counts, and the last error; {} where there is none that can be used."""
    try:
        state = json.loads((directory / STATE).read_text("utf-8"))
        if not (isinstance(state["offsets"], dict) and all(isinstance(state[name], int) for name in COUNTS)):
            raise TypeError("not as it was written")
        return {name: state[name] for name in ("offsets", *COUNTS, "error")}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:  # sent again rather than never
        log.error("%s cannot be used, so what waits is as if nothing had been sent: %s", directory / STATE, error)
        return {}
