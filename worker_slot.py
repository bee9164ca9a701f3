"""The number of a worker among those of its host, for rooms that count or publish something for each worker."""

import itertools
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import is_locked
from shared_files import FileLock, replace_file

if TYPE_CHECKING:
    from flask import Flask

    from server import Service


def slot_of(app: "Flask", service: "Service") -> "WorkerSlot":
    """Return the slot of a service's worker, which is taken when it starts, and again if it is lost."""
    slot: WorkerSlot = app.extensions.setdefault("worker_slot", WorkerSlot(service.settings.journal_dir / "workers"))
    if slot.take not in service.on_start:
        service.on_start.append(slot.take)
        service.every_second.append(slot.take)
    return slot


class WorkerSlot:
    """A worker's number among those of its host: the lowest that no living process holds in a directory.

    Format: an empty file `slot-<n>` for each worker that lives or lived, which the worker holds with `flock`, and
    beside it `status-<n>`, the JSON object that it published last.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock: FileLock | None = None
        self.number = -1  # if it has none

    def take(self) -> None:
        """Take the lowest free number, unless one is held."""
        if self._lock is not None and self._lock.fd is not None and os.fstat(self._lock.fd).st_nlink:
            return
        self.number = -1
        with suppress(OSError):  # tried again every second; those who use the slot log that there is none
            for number in itertools.count():
                lock = FileLock(self._directory / f"slot-{number}")
                if lock.acquire():
                    break
                lock.release()
            self._lock, self.number = lock, number
            (self._directory / f"status-{number}").unlink(missing_ok=True)  # what a dead worker published

    def publish(self, state: dict[str, Any]) -> None:
        """Publish a JSON object to readers on this host. Raises: OSError."""
        self.take()
        if self.number < 0:
            raise OSError("this worker has no slot")
        replace_file(self._directory / f"status-{self.number}", json.dumps(state).encode(), durable=False)

    @staticmethod
    def read(directory: Path) -> dict[int, dict[str, Any]]:
        """Return what the living workers have published, by number; {} for one that has published nothing."""
        found: dict[int, dict[str, Any]] = {}
        for path in directory.glob("slot-*"):
            with suppress(OSError, ValueError):  # removed just now, or not ours
                number = int(path.name.removeprefix("slot-"))
                if is_locked(path):
                    found[number] = {}
                    found[number] = json.loads((directory / f"status-{number}").read_bytes())
        return dict(sorted(found.items()))
