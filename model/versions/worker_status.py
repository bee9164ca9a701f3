"""Which workers of this host serve what: said by the workers, read by `python -m model`."""

import fcntl
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..formats import ModelLoadError
from .store import Routing, write_json

log = logging.getLogger(__name__)

LAST = "routing.json"


class Roster:
    """Says which workers serve what, in a file each: `worker-<pid>.json` in the service's state directory.

    Beside them, `routing.json` is a copy of the store's as it was last served.

    Format: a JSON object with `pid`, `ready`, `error`, and `stable`, `canary` (versions or null), and `generation`
    and `changed` of the routing that is served.

    Concurrency: a worker holds its file with `flock`, and replaces it by another that it holds already. So a file that
    can be locked and still has its name is of a dead worker, and one that is read is whole.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd: int | None = None
        os.register_at_fork(after_in_child=self._leave)  # a child that kept it would keep the lock

    def announce(self, state: dict[str, Any]) -> None:
        """Write what `Serving.describe` says. A directory that cannot be written costs only this knowledge."""
        routing = state["routing"] or {}
        known = {"pid": os.getpid(), "ready": state["ready"], "error": state["error"]}
        known |= {name: state[name] and state[name]["version"] for name in ("stable", "canary")}
        known |= {name: routing.get(name) for name in ("generation", "changed")}
        path = self._directory / f"worker-{os.getpid()}.json"
        fd = None
        try:
            if self._fd is None:
                self.read(self._directory)  # sweeps
                self._directory.mkdir(parents=True, exist_ok=True)
            fd = os.open(path.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.write(fd, json.dumps(known).encode())
            os.rename(path.with_suffix(".new"), path)
            self._leave()
            self._fd, fd = fd, None
            if routing and not state["error"]:
                # Not synced: this runs in the event loop, and a power cut that takes it takes no more than a hint.
                write_json(self._directory / LAST, routing, lasting=False)
        except OSError as error:
            log.warning("what this worker serves cannot be told in %s: %s", self._directory, error)
            if fd is not None:
                os.close(fd)

    def last(self) -> Routing | None:
        """Return the last routing that was served without an error, by any worker; None where none is known."""
        try:
            found = Routing.read(self._directory, LAST)
        except ModelLoadError:
            return None
        return found if found.stable else None

    @staticmethod
    def read(directory: Path) -> list[dict[str, Any]]:
        """Return what the living workers have announced; remove the files of the dead."""
        found = []
        for path in sorted(directory.glob("worker-*.json")):
            replaced = True
            while replaced:
                replaced = False
                with suppress(OSError, ValueError), path.open("rb") as file:  # gone meanwhile, or torn by a full disk
                    try:
                        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        found.append(json.loads(file.read()))
                    else:
                        replaced = not os.fstat(file.fileno()).st_nlink
                        if not replaced:
                            path.unlink()
        return found

    def _leave(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
