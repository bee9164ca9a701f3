"""Ships the journal to Alibaba Cloud's log service (SLS).

    python -m sls ship              until no worker serves any more; the workers start it by themselves
    python -m sls ship --forever    as a systemd unit or a sidecar

On when SLS_ENDPOINT, SLS_PROJECT and SLS_LOGSTORE are set. The credentials come from ALIBABA_CLOUD_ACCESS_KEY_ID and
ALIBABA_CLOUD_ACCESS_KEY_SECRET (with ALIBABA_CLOUD_SECURITY_TOKEN where they are temporary).

At least once: a record that SLS stored without our hearing of it is sent again, with the same `record_id`. Two locks in
the journal's directory say who is there, and the kernel frees them with their holders: `ship.lock` is the one
shipper's, `serving.lock` is shared by the workers. Progress is in `ship.json`, renamed into place after each batch.
"""

import argparse
import fcntl
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from monitor import TOPIC, is_finished, segments
from settings import Settings, SettingsError

log = logging.getLogger("sls")

BATCH_RECORDS = 4096  # SLS takes no more in one call
BATCH_BYTES = 2 * 2**20  # of journal lines; SLS takes 10 MB, and 3 MB of raw logs is advised
LINGER = 2.0  # seconds that a batch which is not full waits for more
BACK_OFF = 0.1, 50.0  # seconds: before the first retry, doubled up to the second
SLOW_RETRY = 30.0  # seconds, where an operator has to act first
REMIND = 3600.0  # seconds between two log lines on the same trouble

# What an operator can do about an error code of SLS.
ADVICE = {
    "Unauthorized": "check ALIBABA_CLOUD_ACCESS_KEY_ID and the permissions of its RAM user (log:PostLogStoreLogs)",
    "SignatureNotMatch": "check ALIBABA_CLOUD_ACCESS_KEY_SECRET",
    "ProjectNotExist": "check SLS_PROJECT and SLS_ENDPOINT, or make the project",
    "LogStoreNotExist": "check SLS_LOGSTORE, or make the logstore",
    "RequestTimeExpired": "set this machine's clock; it is more than 15 minutes off",
}
PASSING = ("LogRequestError", "WriteQuotaExceed", "ShardWriteQuotaExceed", "ExceedQuota", "ServerBusy", "BadResponse")
CONTENT = ("PostBodyInvalid", "PostBodyTooLarge", "PostBodyUncompressError", "InvalidLogTime")


class SendError(Exception):
    """A batch that SLS did not acknowledge."""

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
        """Take part in `serving.lock`."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._serving = _open_lock(directory / "serving.lock")
        self._shipper: subprocess.Popen[bytes] | None = None
        self._spawned = -10.0
        # A fork without exec would keep the lock for its own life.
        os.register_at_fork(after_in_child=lambda: os.close(self._serving))
        self.tick()

    def tick(self) -> None:
        """Start a shipper where there is none. Call it once a second; it does not wait."""
        with suppress(BlockingIOError):  # a shipper looks whether anybody serves; the next tick will do
            fcntl.flock(self._serving, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if self._shipper is not None and self._shipper.poll() is not None:
            self._shipper = None
        # A new shipper needs a moment to take its lock.
        if self._shipper is None and time.monotonic() - self._spawned > 5.0 and _is_free(self._directory / "ship.lock"):
            self._spawned = time.monotonic()
            # By its path, since the working directory may be another; in a session of its own, so that a Ctrl-C meant
            # for the server lets it finish.
            command = [sys.executable, str(Path(__file__).resolve()), "ship"]
            self._shipper = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603  # our own file


def _open_lock(path: Path) -> int:
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

    def __init__(self, directory: Path, send: Callable[[list[dict[str, Any]]], None], drain: float) -> None:
        """Read how far the last one got.

        Args:
            send: sends records or raises SendError.
            drain: seconds to go on for once told to stop, or once nobody serves.
        """
        self._directory, self._send, self._drain = directory, send, drain
        self._state_path = directory / "ship.json"
        self._state: dict[str, Any] = {"offsets": {}, "shipped": 0, "refused": 0, "error": None}
        try:
            self._state |= json.loads(self._state_path.read_text("utf-8"))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:  # sent again rather than never
            log.error(
                "%s cannot be used, so what is in the journal is sent from its beginning: %s", self._state_path, error
            )
        self._stop = threading.Event()
        self._end: float | None = None  # when to give up
        self._serving = _open_lock(directory / "serving.lock")
        self._reminded: dict[str, float] = {}
        self.forever = False

    def stop(self) -> None:
        """Send what can be sent within the drain time, then end. May be called from a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Ship until stopped, or until nobody serves any more and all is sent or the drain time is over."""
        while True:
            batch = self.collect()
            if batch.records and not self._deliver(batch.records):
                return
            self._commit(batch)
            if batch.is_full:
                continue
            if self._is_ending() and not batch.records:
                return
            self._wait(0.1 if self._is_ending() else LINGER)

    def collect(self) -> Batch:
        """Read the next records of the journal."""
        batch = Batch()
        for path in segments(self._directory):
            try:
                with path.open("rb") as file:
                    start = file.seek(self._state["offsets"].get(path.name, 0))
                    while not batch.is_full and (line := file.readline()).endswith(b"\n"):
                        batch.offsets[path.name] = file.tell()
                        batch.size += len(line)
                        try:
                            record = orjson.loads(line)
                        except orjson.JSONDecodeError:
                            continue  # torn by a full disk; its writer counts it as lost
                        if isinstance(record, dict) and isinstance(record.get("time"), (int, float)):
                            batch.records.append(record)
                    at = batch.offsets.get(path.name, start)
                    if not batch.is_full and is_finished(path) and file.seek(0, os.SEEK_END) >= at:
                        file.seek(at)
                        if b"\n" not in file.read():  # the rest, if any, is a line that a kill cut off
                            batch.offsets[path.name] = -1  # remove it with this batch
            except FileNotFoundError:  # a worker dropped it to make room
                continue
            if batch.is_full:
                break
        return batch

    def _commit(self, batch: Batch) -> None:
        """Make the progress last, then remove what is done with."""
        if not batch.offsets:
            return
        done = [name for name, offset in batch.offsets.items() if offset < 0]
        kept = {path.name for path in segments(self._directory)}
        self._state["offsets"] = {n: o for n, o in (self._state["offsets"] | batch.offsets).items() if n in kept}
        for (
            name
        ) in done:  # its offset goes first: without its segment it means nothing, and the other way it is sent twice
            (self._directory / name).unlink(missing_ok=True)
            self._state["offsets"].pop(name, None)
        self._state["shipped"] += len(batch.records)
        self._save()

    def _save(self) -> None:
        beside = self._state_path.with_suffix(".new")
        beside.write_text(json.dumps(self._state))
        os.replace(beside, self._state_path)

    def _deliver(self, records: list[dict[str, Any]]) -> bool:
        """Send records, again and again; False if there was no time left to."""
        tries = 0
        while True:
            try:
                self._send(records)
            except SendError as error:
                self._note(error)
                if error.is_content:
                    if len(records) == 1:
                        self._set_aside(records[0], error)
                        return True
                    middle = len(records) // 2
                    return self._deliver(records[:middle]) and self._deliver(records[middle:])
                first, most = BACK_OFF
                pause = min(most, first * 2**tries) if error.is_passing else SLOW_RETRY
                tries = min(tries + 1, 30)
                self._wait(pause * random.uniform(0.5, 1.0))  # noqa: S311  # jitter, no secret
                if self._end is not None and time.monotonic() >= self._end:
                    return False
            else:
                if self._state["error"]:
                    log.info("SLS takes records again")
                    self._state["error"] = None
                    self._reminded.clear()
                return True

    def _note(self, error: SendError) -> None:
        """Keep the error for reports, and log it once an hour."""
        self._state["error"] = {"time": time.time(), "code": error.code, "message": str(error)}
        self._save()
        if time.monotonic() - self._reminded.get(error.code, -REMIND) >= REMIND:
            self._reminded[error.code] = time.monotonic()
            advice = ADVICE.get(
                error.code, "" if error.is_passing or error.is_content else "see SLS's list of error codes"
            )
            log.error(
                "records wait in the journal, SLS does not take them (%s)%s", error, f": {advice}" if advice else ""
            )

    def _set_aside(self, record: dict[str, Any], error: SendError) -> None:
        with (self._directory / "refused.json").open("ab") as file:
            file.write(orjson.dumps({"refused": str(error), **record}) + b"\n")
        self._state["refused"] += 1
        log.error("SLS refuses record %s for what is in it; it is kept in refused.json", record.get("record_id"))

    def _wait(self, seconds: float) -> None:
        """Wait, but no longer than until it is time to give up; look once a second whether it is time to end."""
        until = time.monotonic() + seconds
        while not self._is_ending() and (left := until - time.monotonic()) > 0:
            self._stop.wait(min(left, 1.0))
        if self._end is not None:
            time.sleep(max(0.0, min(until, self._end) - time.monotonic()))

    def _is_ending(self) -> bool:
        """Tell whether to end, and set the time to give up when that begins."""
        ending = self._stop.is_set() or not (self.forever or self._somebody_serves())
        if not ending:
            self._end = None
        elif self._end is None:
            self._end = time.monotonic() + self._drain
        return ending

    def _somebody_serves(self) -> bool:
        try:
            fcntl.flock(self._serving, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._serving, fcntl.LOCK_UN)
        return False


# --- the wire


def sender(settings: Settings, environ: Mapping[str, str]) -> Callable[[list[dict[str, Any]]], None]:
    """Return a function that sends records to SLS through its SDK, in one call."""
    from aliyun.log import LogClient, LogException
    from aliyun.log.log_logs_raw_pb2 import LogGroupRaw

    class Client(LogClient):  # type: ignore[misc]  # the SDK's types are left out
        """Turns the SDK's exception into ours where it arises: the SDK would retry it ten times itself."""

        def _sendRequest(self, *arguments: Any, **named: Any) -> Any:  # noqa: N802  # the SDK's name
            try:
                return super()._sendRequest(*arguments, **named)
            except LogException as error:
                message = str(error.get_error_message())
                for name in SECRETS:
                    if environ.get(name):
                        message = message.replace(environ[name], "***")
                raise SendError(error.get_error_code(), message[:500], error.get_resp_status()) from None

    endpoint = settings.sls_endpoint
    source = socket.gethostname()
    client = Client(
        endpoint if "://" in endpoint else f"https://{endpoint}",
        *(environ.get(name, "") for name in SECRETS),
        source=source,  # without it, the SDK looks its own name up
        auth_version="v4" if settings.sls_region else "v1",
        region=settings.sls_region,
    )
    client.timeout = (3, 10)  # seconds to connect, and to answer

    def send(records: list[dict[str, Any]]) -> None:
        group = LogGroupRaw(Topic=TOPIC, Source=source)
        for record in records:
            nanoseconds = round(record["time"] * 1e6) * 1000
            entry = group.Logs.add(Time=nanoseconds // 10**9, Time_ns=nanoseconds % 10**9)
            for key, value in record.items():
                if key != "time":
                    entry.Contents.add(Key=key, Value=_as_text(value).encode())
        client.put_log_raw(settings.sls_project, settings.sls_logstore, group)

    return send


SECRETS = ("ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET", "ALIBABA_CLOUD_SECURITY_TOKEN")


def _as_text(value: Any) -> str:
    """Write a value as SLS takes it: it has texts only."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def ship(settings: Settings, environ: Mapping[str, str], forever: bool) -> int:
    """Ship the journal until it is time to end; return the exit status."""
    if not settings.ships:
        print("sls: set SLS_ENDPOINT, SLS_PROJECT and SLS_LOGSTORE", file=sys.stderr)
        return 2
    settings.journal_dir.mkdir(parents=True, exist_ok=True)
    lock = _open_lock(settings.journal_dir / "ship.lock")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0  # another ships
    shipper = Shipper(settings.journal_dir, sender(settings, environ), settings.graceful_timeout)
    shipper.forever = forever
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: shipper.stop())
    shipper.run()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sls", description="Ship the journal to Alibaba Cloud's log service."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shipping = commands.add_parser("ship", help="ship records until no worker serves any more")
    shipping.add_argument("--forever", action="store_true", help="until it is stopped: as a systemd unit or a sidecar")
    given = parser.parse_args(arguments)
    logging.basicConfig(level="INFO", format="[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s")
    try:
        return ship(Settings.from_environ(os.environ), os.environ, given.forever)
    except SettingsError as error:
        print(f"sls: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
