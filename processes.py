"""What belongs to no subject of its own: locks of files, forks, log limits, and the calls of hooks."""

import fcntl
import logging
import os
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

TIMED_OUT = 124  # exit status of a worker at PREDICT_TIMEOUT, as timeout(1) has it

# --- locks


def flock(fd: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until all its descriptors are closed, as those of a dead process are; return if that worked."""
    with suppress(BlockingIOError):
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        return True
    return False


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file; only a user who may write it detects a shared one.

    Raises: OSError.
    """
    fd = open_to_lock(path)
    try:
        return not flock(fd, shared=not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_RDWR)
    finally:
        os.close(fd)


def open_to_lock(path: Path, flags: int = 0, mode: int = 0) -> int:
    """Open a file to lock it: for writing, without which NFS gives no exclusive lock, if this user may write it."""
    only_read = path.exists() and not os.access(path, os.W_OK, effective_ids=True)
    return os.open(path, flags | (os.O_RDONLY if only_read else os.O_RDWR), mode)


# --- forks


def after_fork(method: Callable[[], None]) -> None:
    """Call a bound method in every child process made by `fork` without `exec`, as long as its object lives.

    Python's descriptors are closed by `exec`; a plain fork copies them, and with them the locks of their files.
    """
    reference = weakref.WeakMethod(method)

    def call() -> None:
        if alive := reference():
            alive()

    os.register_at_fork(after_in_child=call)


# --- logs


class LogLimit:
    """Logs the same trouble once in a while: what fails at each request or each second would fill the log."""

    def __init__(self, log: logging.Logger, seconds: float = 60.0, burst: int = 1) -> None:
        self._log, self._seconds = log, seconds
        self._slack = (burst - 1) * seconds if burst > 1 else 0.0  # inf * 0 is not a number
        self._due: dict[str, float] = {}  # trouble → when it may be logged again, had it come once in `seconds`

    def is_due(self, trouble: str) -> bool:
        """Return whether to log this trouble now: once in `seconds`, or `burst` times at first and after a calm."""
        now = time.monotonic()
        if (due := max(self._due.get(trouble, 0.0), now - self._slack)) > now:
            return False
        self._due[trouble] = due + self._seconds
        return True

    def error(self, trouble: str, message: str, *arguments: Any, exc_info: Any = False) -> None:
        """Log an error, unless this `trouble` was logged too often lately."""
        if self.is_due(trouble):
            self._log.error(message, *arguments, exc_info=exc_info)

    def reset(self) -> None:
        """Log the next error of each kind: the trouble is over."""
        self._due.clear()


_hooks = LogLimit(logging.getLogger("hooks"))


def run_hooks(hooks: Sequence[Callable[..., Any]], *arguments: Any) -> None:
    """Call the hooks of extensions. One that raises is logged; the others, and the request, go on."""
    for hook in hooks:
        try:
            hook(*arguments)
        except (Exception, SystemExit):
            _hooks.error(repr(hook), "a hook failed: %r", hook, exc_info=True)
