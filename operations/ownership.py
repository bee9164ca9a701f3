"""JOURNAL_DIR has one owner: a second server is refused, since records, figures and lists of workers would be mixed.

An extension (EXTENSIONS in settings.py): the first one, since others put the directory in order at the start.
MODEL_DIR, USERS_FILE and FEEDBACK_KEY_FILE may be shared.

Format: `server.lock` in JOURNAL_DIR holds the owner's pid and the address that it listens at.

Concurrency: gunicorn's master holds the lock of the file (`flock`) as long as it lives. If the directory is removed, or
the master took over from its parent (SIGUSR2), one of its workers takes the lock within a second.
"""

import logging
import os
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING

from processes import FileLock, is_locked

if TYPE_CHECKING:
    from flask import Flask

    from server import Service
    from settings import Settings

log = logging.getLogger(__name__)

MARGIN = 5.0  # seconds beyond GRACEFUL_TIMEOUT until a predecessor has ended

_ours: "tuple[int, FileLock] | None" = None  # the master's pid, and its lock


def before_fork(settings: "Settings") -> None:
    """Make this gunicorn the owner, or end it. If the directory cannot be written, nobody owns it, and it serves."""
    global _ours
    _ours = os.getpid(), FileLock(settings.journal_dir / "server.lock")
    with suppress(OSError):  # those who write there log that they cannot
        if not _acquire(_ours[1], settings):
            owner = (settings.journal_dir / "server.lock").read_text("utf-8", "replace")
            if owner.partition(",")[0] != str(os.getppid()):  # else SIGUSR2, or a worker that begins anew (RELOAD=1)
                _wait_for_predecessor(_ours[1], settings, owner)


def address_taken(settings: "Settings") -> None:
    """End this gunicorn with a command that would start, if the directory is owned, not only the address taken."""
    path = settings.journal_dir / "server.lock"
    with suppress(OSError):  # nobody owns it
        if is_locked(path):
            other = settings.port + 1 if settings.port < 65535 else 5001
            sys.exit(
                f"cannot start: port {settings.port} is taken, and JOURNAL_DIR={settings.journal_dir} is used by the "
                f"server of pid {path.read_text('utf-8', 'replace')}. To start another beside it: "
                f"{_command(settings, other)}"
            )


def init_app(app: "Flask", service: "Service") -> None:
    """Let a worker take the lock if nobody has it any more."""
    lock = FileLock(service.settings.journal_dir / "server.lock")

    def tick() -> None:
        if _ours is not None and os.getppid() == _ours[0]:  # not once the master is dead: its successor shall have it
            with suppress(OSError):
                if not _acquire(lock, service.settings):
                    lock.release()  # each worker would keep a descriptor

    service.every_second.append(tick)


def _acquire(lock: FileLock, settings: "Settings") -> bool:
    """Take the lock if it is free, and note whose it is. Raises: OSError."""
    if not lock.acquire():
        return False
    assert lock.fd is not None
    assert _ours is not None
    note = f"{_ours[0]}, {_address(settings)}".encode()
    if os.pread(lock.fd, 1000, 0) != note:
        os.truncate(lock.fd, 0)
        os.pwrite(lock.fd, note, 0)
    return True


def _address(settings: "Settings") -> str:
    return f"HOST={settings.host} PORT={settings.port}"


def _wait_for_predecessor(lock: FileLock, settings: "Settings", owner: str) -> None:
    """Take the lock once the owner has ended, or refuse to start.

    An owner that listened where this server will is about to end, since the address is free: it answers what it began.
    """
    seconds = settings.graceful_timeout + MARGIN if owner.endswith(_address(settings)) else 1.0
    log.warning("%s is used by the server of pid %s; waiting %g s for it to end", settings.journal_dir, owner, seconds)
    deadline = time.monotonic() + seconds
    while not _acquire(lock, settings):
        if time.monotonic() > deadline:
            sys.exit(
                f"cannot start: JOURNAL_DIR={settings.journal_dir} is used by another server (pid {owner}), and what "
                f"the two record and count would be mixed. Give this one its own: {_command(settings, settings.port)}"
            )
        time.sleep(0.1)


def _command(settings: "Settings", port: int) -> str:
    """Return the command that was given, with the settings of the environment, this PORT and another JOURNAL_DIR."""
    names = [each.name.upper() for each in fields(settings)]
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if port != settings.port:
        given["PORT"] = str(port)
    given["JOURNAL_DIR"] = f"{settings.journal_dir}-{port}"
    command = ["make", "run"] if "MAKELEVEL" in os.environ else [".venv/bin/gunicorn", *sys.argv[1:]]
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in given.items()), shlex.join(command)])
