"""Who did what: the history of versions, routing, users and roles, for the commands that change them.

    python -m model history --last 20

A change that cannot be noted is made all the same, with a warning: on Kubernetes commands run without a journal.
"""

import logging
import os
import pwd
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

from monitor import Journal, read_lines
from processes import LogLimit, flock
from settings import Settings, SettingsError

log = logging.getLogger(__name__)
_limit = LogLimit(log)

FILE, EARLIER = "history.jsonl", "history.1.jsonl"
LATEST_TIME = 1e11  # seconds since 1970: the year 5138
MAX_BYTES = 8 * 2**20  # of a file, some 20,000 changes; then it becomes the earlier one


class History:
    """Who changed what, the oldest first; changes are appended only.

    Format: `history.jsonl` in the journal's directory, and `history.1.jsonl` with what was before it. A line is a JSON
    object with `event` ("change"), `time` (seconds since 1970), `host`, `os_user`, `sudo_user` (who called sudo, or
    ""), `command`, `before` and `after` (in words; never a password or its hash), and `model_version`, if it was one
    of a version. The same object is a record of the journal, and so shipped.

    Concurrency: a line is one `write` with O_APPEND, under the file's lock. One that a full disk cut off is skipped.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        """Remember where to write: as the settings say, by default those of this process."""
        self._settings = settings

    def note(self, command: str, before: str, after: str, version: str = "") -> None:
        """Note a change that was made. A failure is logged only."""
        record = {"event": "change", "time": time.time(), "host": socket.gethostname(), "os_user": os_user()}
        record |= {"sudo_user": os.environ.get("SUDO_USER", ""), "command": command, "before": before, "after": after}
        record["model_version"] = version
        try:
            settings = self._settings or Settings.load()
            with as_owner_of(settings.journal_dir):
                settings.journal_dir.mkdir(parents=True, exist_ok=True)
                _append(settings.journal_dir, orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
                journal = Journal(settings.journal_dir, settings.journal_max_bytes, settings.web_concurrency)
                journal.append(record)
                journal.close()
        except (OSError, SettingsError, TypeError) as error:
            _limit.error("history", "the change was made, but not noted in the history: %s", error)

    @staticmethod
    def read(directory: Path) -> Iterator[dict[str, Any]]:
        """Yield the changes of a journal's directory."""
        for name in (EARLIER, FILE):
            with suppress(FileNotFoundError):
                for _, record in read_lines(directory / name):
                    at = record.get("time") if record is not None else None
                    if record is not None and isinstance(at, (int, float)) and 0 <= at < LATEST_TIME:
                        yield record


HEAD = ("TIME (UTC)", "HOST", "WHO", "COMMAND", "BEFORE", "AFTER")


def cells_of(change: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a change in a table."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(change["time"]))
    host, user, sudo, *others = map(change.get, ("host", "os_user", "sudo_user", "command", "before", "after"))
    cells = (host, f"{sudo} as {user}" if sudo else user, *others)
    words = (" ".join(str(cell or "–").split()) for cell in cells)
    return at, *("".join(each if each.isprintable() else "�" for each in cell) for cell in words)  # for a terminal


def _append(directory: Path, line: bytes) -> None:
    path = directory / FILE
    while True:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            flock(fd, wait=True)
            found = os.fstat(fd)
            if not found.st_nlink or not os.path.samestat(found, path.stat()):
                continue  # another command has just renamed it
            if found.st_size > MAX_BYTES:
                os.rename(path, directory / EARLIER)
                continue
            if found.st_size and os.pread(fd, 1, found.st_size - 1) != b"\n":
                line = b"\n" + line  # a full disk cut the last one off
            if os.write(fd, line) < len(line):
                raise OSError("the disk is full")
            return
        finally:
            os.close(fd)


def os_user() -> str:
    """Return the user of this process. Not `getpass.getuser`, which believes the environment."""
    with suppress(KeyError):  # a container's user without a name
        return pwd.getpwuid(os.getuid()).pw_name
    return str(os.getuid())


@contextmanager
def as_owner_of(directory: Path) -> Iterator[None]:
    """Let root act as the owner of a directory, or of the nearest that exists above it.

    What is made there stays the service's to write; and a link that the service's user has laid there leads nowhere
    that this user could not write to. It changes the user of the whole process: for commands, which have one thread. If
    root may not change its user, as in some containers, it writes as root.
    """
    owner = next(each for each in (directory, *directory.absolute().parents) if each.exists()).stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    group = os.getegid()
    try:
        with suppress(OSError):  # no right to, or an id that this user namespace does not have
            os.setegid(owner.st_gid)
            os.seteuid(owner.st_uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
