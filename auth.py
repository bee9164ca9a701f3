"""Who may do what: the gate in front of the views, and the users file with its passwords and roles.

    python -m auth add alice --role predict         asks for the password (auth_commands.py)

The users file is JSON, `{"alice": {"password": "<werkzeug hash>", "roles": ["predict"]}}`, mode 0600; with `"old":
{"password": …, "until": …}` another password is valid as well, until then (seconds since 1970). Running servers see a
change within a second. `predict` may call /predict and see /model; `admin` sees /model with the reasons of errors, and
may ask for a version; `metrics` may read /metrics; `feedback` may send truths to /feedback; `monitor` may see /monitor.
"""

import fcntl
import hashlib
import json
import logging
import mmap
import re
import secrets
import shlex
import stat
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from flask import current_app, g, request
from flask_httpauth import HTTPBasicAuth
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, ServiceUnavailable, TooManyRequests, Unauthorized
from werkzeug.security import check_password_hash

from processes import LogLimit
from web.callers import network_of

log = logging.getLogger(__name__)
View = Callable[..., Any]

ROLES = ("predict", "admin", "monitor", "metrics", "feedback")

# The hashes that werkzeug makes: method and parameters, salt, digest.
HASH = re.compile(r"(scrypt:\d+:\d+:\d+|pbkdf2:(sha1|sha256|sha512)(:\d+)?)\$[^$]+\$[0-9a-f]+")

MAX_WAITING = 32  # passwords that wait to be checked; callers with others are asked to come back
RESERVED = 8  # of those places, for addresses from which a password was right before
MAX_CACHED = 10_000  # Authorization headers whose password was verified; about 2 MB
FAILURES_ALLOWED = 10  # wrong passwords in a row from one address …
SECONDS_PER_RETRY = 6.0  # … and the time until one more is allowed

_basic = HTTPBasicAuth()


def require(*roles: str) -> Callable[[View], View]:
    """Return a decorator for views that only users with one of the roles may call: `@require("predict")`.

    The user's name is then `g.record["user"]`. With AUTH=off every caller passes, under the name "". A request without
    such a user raises Unauthorized, Forbidden, or what `Users.verify` raises.
    """

    def decorate(view: View) -> View:
        @wraps(view)  # Flask names the endpoint after it
        def gate(*args: Any, **kwargs: Any) -> Any:
            app, context = current_app._get_current_object(), g._get_current_object()  # type: ignore[attr-defined]
            users: Users | None = app.extensions["service"].users
            if users is None:
                context.record["user"] = ""
                return view(*args, **kwargs)
            header = request.environ.get("HTTP_AUTHORIZATION", "")
            context.user = user = users.cached(header) or _authenticate(users, header)
            context.record["user"] = user.name
            if user.roles.isdisjoint(roles):
                raise Forbidden(f"this needs the role {' or '.join(roles)}, which your user does not have")
            return view(*args, **kwargs)

        return gate

    return decorate


def has_role(role: str) -> bool:
    """Return whether the user that `require` let pass has a role; False with AUTH=off."""
    return "user" in g and role in g.user.roles


def _authenticate(users: "Users", header: str) -> "User":
    """Return the user whose name and password the request's Authorization header carries."""
    is_basic = header.isascii() and header[:6].lower() == "basic "  # Flask-HTTPAuth takes any scheme
    if is_basic and (given := _basic.get_auth()) and given.username:
        user = users.verify(header, given.username, given.password, request.environ.get("REMOTE_ADDR", ""))
        if user is not None:
            return user
    detail = "send a user name and a password (HTTP basic auth): curl -u NAME"
    if header:
        detail = "a user name and a password are needed (HTTP basic auth), and these are not right"
    challenge = WWWAuthenticate("basic", {"realm": "predictions", "charset": "UTF-8"})
    raise Unauthorized(detail, www_authenticate=challenge)


class NoUsers(Exception):
    """Nobody can log in; the log says why. The message is for callers."""


class UsersFileError(Exception):
    """A users file that cannot be used, or not be changed as asked. The message is for the operator."""


@dataclass(frozen=True)
class User:
    """One entry of the users file."""

    name: str
    password: str  # werkzeug's salted hash
    roles: frozenset[str]
    old: str = ""  # the hash of a password that is valid as well …
    until: float = 0.0  # … until then (seconds since 1970)

    def hashes(self) -> list[str]:
        """Return the hashes of the passwords that are valid now."""
        return [self.password, self.old] if time.time() < self.until else [self.password]


class Verified:
    """What gunicorn's workers share of passwords, and inherit from the master: in memory, never on disk.

    Format: what was verified, places of 32 bytes, each a digest under a random key of this object, at a place that its
    own bytes give. One that is overwritten, or half written, is not found: what it stood for is verified again.
    What failed, a count-min sketch: an address has four of the times, and its failures are forgiven at the earliest.
    None is pushed out by others, and an address pays for others only if they share all four with it.
    """

    def __init__(self) -> None:
        """Make the memory; to be called before the fork."""
        self.key = secrets.token_bytes(32)
        self._places, self._times = mmap.mmap(-1, 32 * 2**15), memoryview(mmap.mmap(-1, 8 * 2**16)).cast("d")
        self._locks = tempfile.TemporaryFile()  # noqa: SIM115  # it stays empty: only its bytes are locked

    def __del__(self) -> None:
        self._locks.close()

    def add(self, *parts: str) -> None:
        """Store a digest of some strings."""
        at, digest = self._find(parts)
        self._places[at : at + 32] = digest

    def __contains__(self, parts: tuple[str, ...]) -> bool:
        at, digest = self._find(parts)
        return self._places[at : at + 32] == digest

    def _find(self, parts: tuple[str, ...]) -> tuple[int, bytes]:
        digest = hashlib.blake2b(repr(parts).encode(), key=self.key, digest_size=32).digest()
        return int.from_bytes(digest[:2]) % 2**15 * 32, digest

    def forgiven_at(self, address: str, failures: int = 0) -> float:
        """Count failures of an address; return when all are forgiven (seconds, monotonic)."""
        cells = memoryview(self._find((address,))[1]).cast("H")[:4]
        due = max(time.monotonic(), min(self._times[cell] for cell in cells)) + failures * SECONDS_PER_RETRY
        for cell in cells if failures else ():
            self._times[cell] = max(self._times[cell], due)
        return due

    @contextmanager
    def locked(self, address: str, run_in_thread: Callable[..., Any]) -> Iterator[None]:
        """Let one worker at a time check an address that has failed; a killed one holds no lock."""
        place, _ = self._find((address,))
        if self.forgiven_at(address) > time.monotonic():
            run_in_thread(fcntl.lockf, self._locks, fcntl.LOCK_EX, 1, place)
        try:
            yield
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)


shared: Verified | None = None  # by all workers of a gunicorn, whose master makes it


class Users:
    """The users of a running server, and the Authorization headers whose password was verified.

    Checking a hash takes tens of milliseconds and 32 MB by design; a good password must not cost that at each request.
    So a verified header is cached, as a digest under a random key, for as long as the user's hash in the file stays the
    same; other workers find it in what they share. Hashes are checked one at a time on a native thread, and an address
    with many failures has to wait, so that a flood of wrong passwords costs good callers little. Addresses from which
    one was right before go first. A cached header never has to wait.
    """

    def __init__(self, path: Path, run_in_thread: Callable[..., Any]) -> None:
        """Read the users file. If it cannot be used, the log says why, and nobody can log in until it is fixed."""
        self._path, self._run_in_thread = path, run_in_thread
        self._etag: tuple[int, ...] = ()  # of the file when it was last read
        self._log_limit = LogLimit(log)
        self._users: dict[str, User] = {}
        self._nobody = User("", "scrypt:32768:8:1$salt$00", frozenset())  # as slow to check as most hashes of the file
        self._shared = shared or Verified()
        self._verified: dict[bytes, User] = {}  # digest of an Authorization header → the user as it was then
        self._checking = threading.Semaphore(1)
        self._unknown_address = threading.Semaphore(1)  # the others wait behind it; addresses that are known pass them
        self._waiting: Counter[bytes] = Counter()  # digest of a header → callers that wait for its check
        self._rejected: set[bytes] = set()  # those of them whose password was wrong
        self.refresh()

    def cached(self, header: str) -> User | None:
        """Return the user whose password was verified by this very Authorization header, if it is still the same."""
        verified = self._verified.get(self._digest(header))
        user = self._users.get(verified.name) if verified else None
        return user if verified and user and verified.password in user.hashes() else None

    def verify(self, header: str, name: str, password: str, address: str) -> User | None:
        """Return the user if the password in an Authorization header is theirs.

        Raises: TooManyRequests, with the time to wait; ServiceUnavailable, too many wait to be checked, or as `check`.
        """
        self.check()
        digest, network = self._digest(header), network_of(address)
        user = self._users.get(name, self._nobody)
        for valid in user.hashes():
            if (header, valid) in self._shared:
                return self._cache(digest, replace(user, password=valid))
        self._reject_throttled(network)
        is_known = (network,) in self._shared
        if digest not in self._waiting and len(self._waiting) >= MAX_WAITING - (0 if is_known else RESERVED):
            raise ServiceUnavailable("too many passwords are being checked; try again", retry_after=1)
        self._waiting[digest] += 1
        try:
            alone = self._shared.locked(network, self._run_in_thread)
            with nullcontext() if is_known else self._unknown_address, self._checking, alone:
                if found := self.cached(header):  # verified while this caller waited
                    return found
                self._reject_throttled(network)
                user = self._users.get(name, self._nobody)
                # As many checks for every name, or the time would show which users have two passwords.
                count = max((len(each.hashes()) for each in self._users.values()), default=1)
                checked = [] if digest in self._rejected else [*user.hashes(), self._nobody.password][:count]
                right = next((each for each in checked if self._run_in_thread(_is_right, each, password)), None)
                if not right:
                    self._rejected.add(digest)  # for the others that wait with the same header
                    self._shared.forgiven_at(network, failures=1)
                    return None
                self._shared.add(header, right)
                self._shared.add(network)
                return self._cache(digest, replace(user, password=right))
        finally:
            self._waiting[digest] -= 1
            if not self._waiting[digest]:
                del self._waiting[digest]
                self._rejected.discard(digest)

    def _cache(self, digest: bytes, user: User) -> User:
        self._verified[digest] = user
        if len(self._verified) > MAX_CACHED:
            del self._verified[next(iter(self._verified))]
        return user

    def check(self) -> None:
        """Check that anyone can log in. Raises: NoUsers."""
        if not self._users:
            raise NoUsers("there are no users; the server's log says why")

    def refresh(self) -> None:
        """Read the users file again if it has changed. If it cannot be used, the last good users stay."""
        try:
            found = self._path.stat()
            etag = (found.st_ctime_ns, found.st_mtime_ns, found.st_size, found.st_ino)  # ctime: owner and mode as well
            if etag == self._etag:
                return
            self._users = read_users(self._path)
        except (OSError, UsersFileError) as error:  # tried again each second: it may have been the reading that failed
            kept = f"the {n} users stay as they were" if (n := len(self._users)) else "NOT READY, nobody can log in"
            self._log_limit.error(str(error), "%s: %s", kept, error)
            return
        self._etag = etag
        self._log_limit.reset()
        self._verified = {digest: user for digest, user in self._verified.copy().items() if user.name in self._users}
        costs = Counter(user.password.partition("$")[0] for user in self._users.values())
        for cost, _ in costs.most_common(1):
            self._nobody = replace(self._nobody, password=f"{cost}$salt$00")
        log.info("read %s: %d user%s", self._path, len(self._users), "" if len(self._users) == 1 else "s")
        if not self._users:
            log.error("NOT READY, nobody can log in. Make a user with: python -m auth add NAME --role predict")
        if found.st_mode & stat.S_IROTH:
            mode = found.st_mode & 0o777
            log.warning("%s has mode %o: anyone here can read its hashes and guess passwords", self._path, mode)

    def _digest(self, header: str) -> bytes:
        return hashlib.blake2b(self._shared.key + header.encode()).digest()  # a quarter of a microsecond less than key=

    def _reject_throttled(self, network: str) -> None:
        wait = self._shared.forgiven_at(network) - time.monotonic() - (FAILURES_ALLOWED - 1) * SECONDS_PER_RETRY
        if wait > 0:
            detail = "too many wrong passwords from your address; wait before the next one"
            raise TooManyRequests(detail, retry_after=int(wait) + 1)


def _is_right(expected: str, password: str) -> bool:
    with suppress(ValueError, OverflowError):  # someone wrote a hash whose parameters do not exist
        return check_password_hash(expected, password)
    return False


def read_users(path: Path) -> dict[str, User]:
    """Read a users file. Raises: UsersFileError, it is not of the form above; the message holds no hash."""
    users = {}
    for name, entry in read_entries(path).items():
        entry = entry if isinstance(entry, dict) else {}
        password, roles = entry.get("password"), entry.get("roles")
        old = entry.get("old", {"password": password, "until": 0})
        old = old if isinstance(old, dict) else {}
        hashes = all(HASH.fullmatch(str(each)) for each in (password, old.get("password")))
        if not hashes or type(old.get("until")) not in (int, float):
            raise UsersFileError(
                f"{path}: user {name!r} has no password hash, or an old one without hash or time; set one with: "
                f"python -m auth passwd {shlex.quote(name)}"
            )
        if not isinstance(roles, list) or not all(role in ROLES for role in roles):
            raise UsersFileError(f"{path}: user {name!r}: expected roles to be a list of {', '.join(ROLES)}")
        users[name] = User(name, str(password), frozenset(roles), old["password"], old["until"])
    return users


def read_entries(path: Path) -> dict[str, Any]:
    """Read the entries of a users file as they are, by name. Raises: UsersFileError."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            raise UsersFileError(f"{path} is not a file")
        if mode & stat.S_IWOTH:
            raise UsersFileError(f"{path} has mode {mode & 0o777:o}, so anyone here can add users: chmod 600 {path}")
        entries = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsersFileError(f"{path}: {error}") from None
    if not isinstance(entries, dict):
        raise UsersFileError(f"{path}: expected an object of users by name")
    return entries


if __name__ == "__main__":  # the commands are no part of the server, which runs without them
    sys.exit(import_module("auth_commands").main())
