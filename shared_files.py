"""Files that several processes write: locks, and replacement in one step. The rooms and the commands use them."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from processes import after_fork, flock, open_to_lock


class FileLock:
    """The lock of a file, which is made if it does not exist. A child process made by `fork` does not inherit it."""

    def __init__(self, path: Path, mode: int = 0o640) -> None:
        """Open nothing yet. A new file gets `mode`: who may read it can lock it; on NFS, only who may write it."""
        self._path, self._mode = path, mode
        self.fd: int | None = None
        after_fork(self.release)

    def acquire(self, *, shared: bool = False, wait: bool = False) -> bool:
        """Take the lock, or change how it is held; return whether it is held so. Raises: OSError."""
        if self.fd is not None and not os.fstat(self.fd).st_nlink:  # the file was removed
            self.release()
        if self.fd is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = open_to_lock(self._path, os.O_CREAT, self._mode)
        return flock(self.fd, shared=shared, wait=wait)

    def release(self) -> None:
        """Release the lock."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __enter__(self) -> "FileLock":
        self.acquire(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


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
