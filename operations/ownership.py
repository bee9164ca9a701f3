"""JOURNAL_DIR has one owner: a second server is refused, since records, figures and lists of workers would be mixed.

An extension (EXTENSIONS in settings.py): the first one, since others put the directory in order at the start.
MODEL_DIR, USERS_FILE and FEEDBACK_KEY_FILE may be shared. A port that is taken is refused here too, since one command
may have to change both; gunicorn would try five times, and only report that it is.

Format: `server.lock` in JOURNAL_DIR holds the owner's pid and the address that it listens at.

Concurrency: gunicorn's master holds the lock of the file (`flock`) as long as it lives. If the directory is removed, or
the master took over from its parent (SIGUSR2), one of its workers takes the lock within a second.
"""

import errno
import logging
import os
import shlex
import socket
import sys
import time
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from processes import is_locked
from shared_files import FileLock

if TYPE_CHECKING:
    from flask import Flask

    from server import Service
    from settings import Settings

log = logging.getLogger(__name__)

MARGIN = 5.0  # seconds beyond GRACEFUL_TIMEOUT until a predecessor has ended

_ours: "tuple[int, FileLock] | None" = None  # the master's pid, and its lock


def master_starts(server: Any, settings: "Settings") -> None:
    """End this gunicorn if it cannot listen, with what to do about it."""
    inherited = server.master_pid or os.environ.get("LISTEN_PID") == str(os.getpid())  # by SIGUSR2, or from systemd
    for host, port in [] if inherited else [each for each in server.address if isinstance(each, tuple)]:
        family, dual = (socket.AF_INET6, socket.has_dualstack_ipv6()) if ":" in host else (socket.AF_INET, False)
        try:
            socket.create_server((host, port), family=family, dualstack_ipv6=dual).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                why = (error.strerror or str(error)).partition(" (while")[0]  # what Python adds shows a tuple
                sys.exit(f"cannot listen at HOST={host} PORT={port}: {why}")
            sys.exit(_when_taken(settings, port))


def _when_taken(settings: "Settings", port: int) -> str:
    """Return what to do when a port is taken: a command that would start, if JOURNAL_DIR is used as well."""
    other = port + 1 if port < 65535 else 5001
    path = settings.journal_dir / "server.lock"
    with suppress(OSError):  # nobody owns it
        if is_locked(path):
            return (
                f"cannot start: port {port} is taken, and JOURNAL_DIR={settings.journal_dir} is used by the server of "
                f"pid {path.read_text('utf-8', 'replace')}. To start another beside it: {_command(settings, other)}"
            )
    return f"port {port} is taken (on macOS by AirPlay). Choose another: PORT={other} make run"


def before_fork(settings: "Settings") -> None:
    """Make this gunicorn the owner, or end it. If the directory cannot be written, nobody owns it, and it serves."""
    global _ours
    _ours = os.getpid(), FileLock(settings.journal_dir / "server.lock")
    with suppress(OSError):  # those who write there log that they cannot
        if not _acquire(_ours[1], settings):
            owner = (settings.journal_dir / "server.lock").read_text("utf-8", "replace")
            if owner.partition(",")[0] != str(os.getppid()):  # else SIGUSR2, or a worker that begins anew (RELOAD=1)
                _wait_for_predecessor(_ours[1], settings, owner)


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
