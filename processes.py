"""What processes of one host need to work on the same files: locks, atomic replacement, forks; and log limits."""

import fcntl
import logging
import os
import tempfile
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
    """Return whether a process holds the lock of a file; a shared one only who may write it sees. Raises: OSError."""
    fd = _open(path)
    try:
        return not flock(fd, shared=not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_RDWR)
    finally:
        os.close(fd)


def _open(path: Path, flags: int = 0, mode: int = 0) -> int:
    """Open a file to lock it: for writing, without which NFS gives no exclusive lock, if this user may write it."""
    only_read = path.exists() and not os.access(path, os.W_OK, effective_ids=True)
    return os.open(path, flags | (os.O_RDONLY if only_read else os.O_RDWR), mode)


class FileLock:
    """The lock of a file, which is made if it does not exist. A child process made by `fork` does not inherit it."""

    def __init__(self, path: Path, mode: int = 0o640) -> None:
        """Remember the file, and the mode of a new one: who may read it can lock it, but on NFS only its writers."""
        self._path, self._mode = path, mode
        self.fd: int | None = None
        after_fork(self.release)

    def acquire(self, *, shared: bool = False, wait: bool = False) -> bool:
        """Take the lock, or change how it is held; return whether it is held so. Raises: OSError."""
        if self.fd is not None and not os.fstat(self.fd).st_nlink:  # the file was removed
            self.release()
        if self.fd is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = _open(self._path, os.O_CREAT, self._mode)
        return flock(self.fd, shared=shared, wait=wait)

    def release(self) -> None:
        """Let others have it."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __enter__(self) -> "FileLock":
        self.acquire(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


# --- files


def replace_file(
    path: Path, content: bytes, *, mode: int = 0o644, durable: bool = True, keep_owner: bool = True
) -> None:
    """Write a file that readers see whole: the old content or the new.

    A new file gets `mode`. With `durable`, the new content survives a power failure. With `keep_owner`, an existing
    file keeps its owner and mode; else everyone who may write to its directory can replace it, and it is theirs then.
    """
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(fd, mode)
            with suppress(FileNotFoundError):
                before = path.stat() if keep_owner else os.fstat(fd)
                os.fchmod(fd, before.st_mode & 0o777)
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(fd, before.st_uid, before.st_gid)
            if durable:
                os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if durable:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make what was renamed in a directory survive a power failure."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
    """Call the hooks of extensions. One that fails is logged; the others, and what they hang on, go on."""
    for hook in hooks:
        try:
            hook(*arguments)
        except (Exception, SystemExit):
            _hooks.error(repr(hook), "a hook failed: %r", hook, exc_info=True)
