"""Who may do what: the users file, its passwords and roles.

    python -m auth add alice --role predict         asks for the password, without echo
    python -m auth passwd alice
    python -m auth remove alice
    python -m auth list
    python -m auth demo                             a user with a random password, where there are no users yet

The users file is JSON, `{"alice": {"password": "<werkzeug hash>", "roles": ["predict"]}}`, mode 0600. Running servers
see a change within a second. `predict` may call /predict and see /model; `admin` sees /model; `metrics` and `monitor`
are for /metrics and /monitor.
"""

import argparse
import functools
import getpass
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from werkzeug.exceptions import ServiceUnavailable, TooManyRequests
from werkzeug.security import check_password_hash, generate_password_hash

log = logging.getLogger(__name__)

ROLES = ("predict", "admin", "monitor", "metrics")

# The hashes that werkzeug makes: method and parameters, salt, digest.
HASH = re.compile(r"(scrypt:\d+:\d+:\d+|pbkdf2:(sha1|sha256|sha512)(:\d+)?)\$[^$]+\$[0-9a-f]+")

MAX_WAITING = 32  # passwords that wait to be checked; callers with others are told to come back
FAILURES_ALLOWED = 10.0  # wrong passwords in a row from one address …
REFILL = 6.0  # … and the seconds until one more is allowed
MAX_ADDRESSES = 10_000  # whose failures are remembered; about 1 MB


class UsersFileError(Exception):
    """A users file that cannot be used. The message is for the operator."""


@dataclass(frozen=True)
class User:
    """One entry of the users file."""

    password: str  # werkzeug's salted hash
    roles: tuple[str, ...]


def read_users(path: Path) -> dict[str, User]:
    """Read and check a users file.

    Raises:
        UsersFileError: it is not readable, or not of the form above; the message holds no hash.
    """
    users = {}
    for name, entry in _read_entries(path).items():
        password = entry.get("password") if isinstance(entry, dict) else None
        roles = entry.get("roles") if isinstance(entry, dict) else None
        if not isinstance(password, str) or not HASH.fullmatch(password):
            raise UsersFileError(
                f"{path}: user {name!r} has no password hash; set one with: python -m auth passwd {shlex.quote(name)}"
            )
        if not isinstance(roles, list) or not all(role in ROLES for role in roles):
            raise UsersFileError(f"{path}: user {name!r}: expected roles to be a list of {', '.join(ROLES)}")
        users[name] = User(password, tuple(roles))
    return users


def _read_entries(path: Path) -> dict[str, Any]:
    """Read a users file as it is, its entries unchecked."""
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsersFileError(f"{path}: {error}") from None
    if not isinstance(entries, dict):
        raise UsersFileError(f"{path}: expected an object of users by name")
    return entries


class Users:
    """The users of a running server, and which passwords have been proved.

    Checking a hash takes tens of milliseconds and 32 MB by design; the proof of a good password must not. A checked
    pair is remembered as a digest under a random key of this process, one a user, for as long as the user's hash in
    the file stays the same. Hashes are checked one at a time on a native thread, and an address with many failures
    waits, so that a flood of wrong passwords costs good callers little. A remembered password is never made to wait.
    """

    def __init__(self, path: Path, native: Callable[..., Any]) -> None:
        """Read the users file. One that cannot be used is said in the log, and nobody can log in until it is mended."""
        self._path, self._native = path, native
        self._stamp: tuple[int, ...] | None = ()  # of the file as it was last read
        self._complained: tuple[int, ...] | None = ()  # of the file as it could not be used
        self._users: dict[str, User] = {}
        self._key = secrets.token_bytes(32)
        self._proved: dict[str, tuple[bytes, str]] = {}  # name → (digest of the password, hash it was checked against)
        self._headers: dict[bytes, tuple[str, str]] = {}  # digest of an Authorization header → (name, hash), one a user
        self._failures: dict[str, tuple[float, float]] = {}  # address → (failures left over, at this time)
        self._checking = threading.Semaphore(1)
        self._waiting: Counter[bytes] = Counter()  # digest of name and password → callers that wait for its check
        self._refused: set[bytes] = set()  # of those, what was found wrong meanwhile
        self.refresh()

    def roles(self, name: str) -> list[str]:
        """Return a user's roles."""
        user = self._users.get(name)
        return list(user.roles) if user else []

    def remembered(self, header: str) -> str | None:
        """Return the user whose password was last proved by this very Authorization header, and is still the same."""
        name, password_hash = self._headers.get(self._digest(header), ("", ""))
        user = self._users.get(name)
        return name if user is not None and user.password == password_hash else None

    def remember(self, header: str, name: str) -> None:
        """Note that `verify` has just said yes to the user and password of an Authorization header."""
        proof = self._proved.get(name)
        if proof is not None:
            others = {digest: entry for digest, entry in self._headers.items() if entry[0] != name}
            self._headers = others | {self._digest(header): (name, proof[1])}

    def _digest(self, text: str) -> bytes:
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._key).digest()

    def verify(self, name: str, password: str, address: str) -> bool:
        """Tell whether the password is the user's.

        Raises:
            TooManyRequests: too many failures from this address; with the time to wait.
            ServiceUnavailable: too many callers wait for a check.
        """
        user = self._users.get(name)
        digest = self._digest(f"{name}:{password}")
        if self._is_proved(name, user, digest):
            return True
        address = _network(address)
        self._refuse_throttled(address)
        if digest not in self._waiting and len(self._waiting) >= MAX_WAITING:
            raise ServiceUnavailable("too many passwords are being checked; try again", retry_after=1)
        self._waiting[digest] += 1
        try:
            with self._checking:
                # While this caller waited, another may have proved the pair, or this address may have failed often.
                if self._is_proved(name, user, digest):
                    return True
                self._refuse_throttled(address)
                if digest in self._refused:  # one check for all who wait with the same wrong password
                    self._note_failure(address)
                    return False
                good = self._native(check_password_hash, user.password if user else _hash_of_nobody(), password)
                if not (user and good):
                    self._refused.add(digest)
                    self._note_failure(address)
                    return False
                self._proved[name] = (digest, user.password)
                return True
        finally:
            self._waiting[digest] -= 1
            if not self._waiting[digest]:
                del self._waiting[digest]
                self._refused.discard(digest)

    def refresh(self) -> None:
        """Read the users file again if it changed. A file that cannot be used keeps the last good users."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        try:
            self._users = read_users(self._path)
            self._stamp = stamp
            self._proved = {name: proof for name, proof in self._proved.items() if name in self._users}
            log.info("read %s again: %d users", self._path, len(self._users))
        except UsersFileError as error:  # tried again, since it may have been the reading that failed
            if stamp != self._complained:
                self._complained = stamp
                log.error("the %d users stay as they were: %s", len(self._users), error)

    def _is_proved(self, name: str, user: User | None, digest: bytes) -> bool:
        proof = self._proved.get(name)
        return (
            proof is not None
            and user is not None
            and proof[1] == user.password
            and hmac.compare_digest(proof[0], digest)
        )

    def _failures_now(self, address: str) -> float:
        count, since = self._failures.get(address, (0.0, 0.0))
        return max(0.0, count - (time.monotonic() - since) / REFILL)

    def _refuse_throttled(self, address: str) -> None:
        excess = self._failures_now(address) - (FAILURES_ALLOWED - 1)
        if excess > 0:
            raise TooManyRequests(
                "too many wrong passwords from your address; wait before the next one",
                retry_after=int(excess * REFILL) + 1,
            )

    def _note_failure(self, address: str) -> None:
        count = self._failures_now(address) + 1
        self._failures.pop(address, None)  # to the end: the dict is in the order of the latest failure
        self._failures[address] = (count, time.monotonic())
        if len(self._failures) > MAX_ADDRESSES:
            del self._failures[next(iter(self._failures))]


def _network(address: str) -> str:
    """Return the part of an address that one customer of a provider has: all of IPv4, the first 64 bits of IPv6."""
    try:
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    except ValueError:  # IPv4, a unix socket's "", or what a proxy made up
        return address


@functools.cache
def _hash_of_nobody() -> str:
    """Make the hash that an unknown name is checked against, so that it takes as long as a known one."""
    return generate_password_hash(secrets.token_hex(16))


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file does, or None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ctime_ns, found.st_mtime_ns, found.st_size, found.st_ino  # ctime: owner and mode as well


# --- the command line


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the users as in the file, and replace the file by what they were made into, keeping its owner and mode."""
    import fcntl

    path = path.resolve()  # what a link leads to is changed, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once: one waits
        users = _read_entries(path) if path.exists() else {}
        yield users
        fd, beside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
        try:
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(users, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(fd)
                if path.exists():
                    before = path.stat()
                    os.fchmod(fd, before.st_mode & 0o777)
                    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                        os.fchown(fd, before.st_uid, before.st_gid)
            os.rename(beside, path)
        except BaseException:
            os.unlink(beside)
            raise


def _ask_password() -> str:
    """Ask for a new password twice, or read one line where standard input is not a terminal."""
    try:
        if not sys.stdin.isatty():
            password = sys.stdin.readline().rstrip("\r\n")
        else:
            password = getpass.getpass("Password: ")
            if getpass.getpass("Again: ") != password:
                raise UsersFileError("the two passwords differ; nothing was changed")
        password.encode()  # what is not UTF-8 comes in as surrogates
    except (EOFError, KeyboardInterrupt):
        raise UsersFileError("no password given; nothing was changed") from None
    except UnicodeError:
        raise UsersFileError("the password is not UTF-8; nothing was changed") from None
    if not password:
        raise UsersFileError("an empty password; nothing was changed")
    return password


def _check_name(name: str) -> None:
    # A colon ends the name in basic auth; the rest would make logs and listings hard to read.
    if not name or len(name) > 64 or ":" in name or not name.isprintable():
        raise UsersFileError(f"{name!r} is not a user name: expected 1 to 64 printable characters without a colon")


def _make_demo(path: Path) -> None:
    """Make the user `demo` with a random password, and a netrc file from which curl takes it."""
    if path.exists():
        return
    password = secrets.token_urlsafe(16)
    netrc = path.with_name("demo.netrc")
    with _changing(path) as users:
        users["demo"] = {"password": generate_password_hash(password), "roles": ["predict"]}
        netrc.unlink(missing_ok=True)
        with open(os.open(netrc, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(
                "".join(f"machine {host} login demo password {password}\n" for host in ("127.0.0.1", "localhost"))
            )
    print(f"made the user demo; its password is in {netrc}")


def _change(path: Path, command: str, name: str, roles: list[str]) -> None:
    """Add, remove or give a new password to a user."""

    def check(users: dict[str, Any]) -> None:
        if command == "add" and name in users:
            raise UsersFileError(f"there is a user {name!r} already; for another password: python -m auth passwd")
        if command != "add" and name not in users:
            raise UsersFileError(f"there is no user {name!r} in {path}")

    if command == "add":
        _check_name(name)
    check(_read_entries(path) if path.exists() else {})  # before asking; and again when nobody else can change the file
    hashed = None if command == "remove" else generate_password_hash(_ask_password())
    with _changing(path) as users:
        check(users)
        if command == "remove":
            del users[name]
        elif command == "add":
            users[name] = {"password": hashed, "roles": sorted(set(roles))}
        elif isinstance(users[name], dict):
            users[name]["password"] = hashed
        else:
            users[name] = {"password": hashed, "roles": []}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m auth", description="Manage the users of the prediction server.")
    default = Path(os.environ.get("USERS_FILE") or "var/users.json")
    parser.add_argument(
        "--file", type=Path, default=default, help=f"the users file (default {default}, from USERS_FILE)"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser("add", help="make a user; the password is asked for, or read from standard input")
    add.add_argument("name")
    add.add_argument("--role", action="append", choices=ROLES, required=True, dest="roles", help="may be given again")
    passwd = commands.add_parser("passwd", help="change a user's password")
    passwd.add_argument("name")
    remove = commands.add_parser("remove", help="remove a user")
    remove.add_argument("name")
    commands.add_parser("list", help="list the users and their roles")
    commands.add_parser("demo", help="make the user demo with a random password, where there is no users file")
    given = parser.parse_args(arguments)
    path: Path = given.file.expanduser()
    try:
        if given.command == "list":
            for name, user in sorted(read_users(path).items()):
                print(f"{name}\t{','.join(user.roles)}")
        elif given.command == "demo":
            _make_demo(path)
        else:
            _change(path, given.command, given.name, getattr(given, "roles", []))
    except (UsersFileError, OSError) as error:
        print(f"auth: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
