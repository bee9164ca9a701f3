"""Who may do what: roles, odd headers, a users file that changes, floods of wrong passwords, and the command line."""

import fcntl
import io
import json
import logging
import multiprocessing
import netrc
import os
import re
import select
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import (
    CHEAP,
    PASSWORD,
    ROOT,
    WORKER_CLASSES,
    Client,
    Gunicorn,
    basic,
    gunicorn,
    ready,
    records,
    write_users,
)
from flask import Blueprint, Flask, g
from werkzeug.exceptions import ServiceUnavailable, TooManyRequests
from werkzeug.security import check_password_hash, generate_password_hash

import auth
import auth_commands
from auth import (
    FAILURES_ALLOWED,
    MAX_WAITING,
    RESERVED,
    SECONDS_PER_RETRY,
    NoUsers,
    Users,
    UsersFileError,
    has_role,
    read_users,
    require,
)
from settings import Settings

ROW = [5.1, 3.5, 1.4, 0.2]
NOBODY = 65534  # a user id without rights on every Linux


def cheap_hash(password: str) -> str:
    """Return a real hash without the cost."""
    return generate_password_hash(password, method="pbkdf2:sha256:1")


def entry(password_hash: Any = CHEAP, roles: Any = ("predict",)) -> dict[str, Any]:
    """Return a user as in the users file."""
    return {"password": password_hash, "roles": list(roles) if isinstance(roles, tuple) else roles}


def replace_file(path: Path, content: str | bytes) -> None:
    """Write beside and rename, as the command line does: no reader sees half a file."""
    beside = path.with_name("beside")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    beside.replace(path)


# --- roles

OPEN_TO = {"/predict": {"predict"}, "/model": {"predict", "admin"}}  # endpoint → roles
SPECIAL = {  # user → password, in the client's users file
    "алиса": "пароль: 🔑",
    "münchen": "pässwort",
    "colon": ":a:b:",
    "long": "x" * 8192,
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, iris_file: Path) -> Client:
    """A service whose users are one for each role and those of SPECIAL."""
    place = tmp_path_factory.mktemp("auth")
    users = write_users(place / "users.json")
    entries = json.loads(users.read_text()) | {name: entry(cheap_hash(password)) for name, password in SPECIAL.items()}
    users.write_text(json.dumps(entries))
    return Client(Settings(model_path=iris_file, users_file=users, journal_dir=place / "journal"))


addresses = (f"198.51.100.{n}" for n in range(256))  # one a request, so that no test is throttled by another


def ask(
    client: Client, path: str = "/predict", authorization: str | None = None, address: str = "", **more: str
) -> Any:
    """Send a good request with this Authorization header from this address."""
    return client.http.open(
        path,
        method="POST" if path == "/predict" else "GET",
        json={"data": [ROW]} if path == "/predict" else None,
        headers=more | ({} if authorization is None else {"Authorization": authorization}),
        environ_overrides={"REMOTE_ADDR": address or next(addresses)},
    )


@pytest.mark.parametrize("path", OPEN_TO)
@pytest.mark.parametrize("user", ["predict", "admin", "monitor", "metrics", "nobody"])
def test_a_role_opens_its_endpoints_and_no_other(client: Client, user: str, path: str) -> None:
    answer = ask(client, path, basic(user))
    if user in OPEN_TO[path]:
        assert answer.status_code == 200
    else:
        assert (answer.status_code, answer.content_type) == (403, "application/problem+json")
        assert all(role in answer.json["detail"] for role in OPEN_TO[path])  # it names the role


@pytest.mark.parametrize("path", OPEN_TO)
def test_without_a_user_it_asks_for_one(client: Client, path: str) -> None:
    answer = ask(client, path)
    assert (answer.status_code, answer.content_type) == (401, "application/problem+json")
    assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
    assert answer.json["request_id"] == answer.headers["X-Request-ID"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_need_no_user(client: Client, path: str) -> None:
    assert ask(client, path).status_code == 200
    assert ask(client, path, "Basic nonsense").status_code == 200


@pytest.mark.parametrize(("user", "status"), [("predict", 200), ("admin", 403), ("mallory", 401)])
def test_gate_of_a_blueprint_whose_views_take_arguments(tmp_path: Path, user: str, status: int) -> None:
    blueprint = Blueprint("extra", __name__)

    @blueprint.get("/<number>")
    @require("predict", "metrics")
    def double(number: str, times: int = 2) -> str:
        return f"{g.record['user']} {int(number) * times} {has_role('predict')} {has_role('admin')}"

    app = Flask("test")
    app.register_blueprint(blueprint)
    app.before_request(lambda: setattr(g, "record", {}))
    app.extensions["service"] = SimpleNamespace(users=Users(write_users(tmp_path / "users.json"), RunInThread()))
    for _ in range(2):  # verified, then cached
        answer = app.test_client().get("/21", headers={"Authorization": basic(user)})
        assert answer.status_code == status
        assert status != 200 or answer.text == "predict 42 True False"
    app.extensions["service"].users = None  # AUTH=off
    assert app.test_client().get("/21").text == " 42 False False"


# --- headers


def encoded(credentials: bytes) -> str:
    return "Basic " + b64encode(credentials).decode()


HEADERS = {  # value → status
    "empty": ("", 401),
    "only the scheme": ("Basic", 401),
    "no credentials": ("Basic ", 401),
    "not base64": ("Basic !!!", 401),
    "base64 cut off": ("Basic cHJlZA=", 401),
    "no colon": (encoded(b"predict"), 401),
    "only a colon": (encoded(b":"), 401),
    "bytes that are not UTF-8": (encoded(b"predict:\xff\xfe\x80"), 401),
    "a user that is not UTF-8": (encoded(b"\xff\xfe:" + PASSWORD.encode()), 401),
    "NUL bytes": (encoded(b"predict\0:" + PASSWORD.encode()), 401),
    "bytes above ASCII in the header": ("Basic \xe9\xff", 401),
    "another scheme": ("Bearer abc.def.ghi", 401),
    "another scheme with good credentials": (basic("predict").replace("Basic", "Bearer"), 401),
    "empty user": (basic(""), 401),
    "empty password": (basic("predict", ""), 401),
    "unknown user": (basic("mallory"), 401),
    "wrong password": (basic("predict", PASSWORD + " "), 401),
    "wrong password of 1 MB": (basic("predict", "x" * 2**20), 401),
    "user in other letters": (basic("Predict"), 401),
    "good": (basic("predict"), 200),
    "scheme in other letters": (basic("predict").replace("Basic", "bASIC"), 200),  # RFC 9110, 11.1
    "good, unicode with a colon": (basic("алиса", SPECIAL["алиса"]), 200),
    "good, as an old client encodes it": (encoded("münchen:pässwort".encode("latin-1")), 200),
    "good, as UTF-8": (basic("münchen", SPECIAL["münchen"]), 200),
    "good, colons in the password": (basic("colon", SPECIAL["colon"]), 200),
    "good, 8 KB": (basic("long", SPECIAL["long"]), 200),
}


@pytest.mark.parametrize(("authorization", "status"), HEADERS.values(), ids=HEADERS)
def test_odd_authorization_header_is_refused_and_never_a_fault(client: Client, authorization: str, status: int) -> None:
    answer = ask(client, authorization=authorization)
    assert answer.status_code == status
    if status == 401:
        assert answer.content_type == "application/problem+json"
        assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
        assert PASSWORD not in answer.text


# --- verifying a password


class RunInThread:
    """Calls functions as the server's `run_in_thread` does, and keeps what they were called with.

    `hold`, when given, is run first: time that a real hash would take.
    """

    def __init__(self, hold: Callable[[], Any] = lambda: None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.hold = hold

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if function is auth._is_right:  # not a wait for a lock
            self.calls.append(arguments)
            self.hold()
        return function(*arguments)


class CountedUsers:
    """Users with a file of their own, and how many hashes were checked."""

    def __init__(self, path: Path) -> None:
        self.path, self.thread = write_users(path), RunInThread()
        self.users = Users(path, self.thread)

    def checks(self) -> int:
        """Return how many hashes were checked since the last call."""
        count = len(self.thread.calls)
        self.thread.calls.clear()
        return count

    def verify(
        self, name: str = "predict", password: str = PASSWORD, address: str = "192.0.2.1", scheme: str = "Basic"
    ) -> bool:
        """Look for the header and verify it if it is not cached, as `require` does."""
        header = basic(name, password).replace("Basic", scheme)
        return bool(self.users.cached(header) or self.users.verify(header, name, password, address))

    def roles(self, name: str, password: str = PASSWORD) -> frozenset[str]:
        user = self.users.cached(basic(name, password))
        return user.roles if user else frozenset()

    def fail(self, times: int, address: str = "192.0.2.1") -> None:
        for _ in range(times):
            assert not self.verify(password="wrong", address=address)

    def change(self, **entries: Any) -> None:
        """Replace the file by one with these users, and let the service see it."""
        replace_file(self.path, json.dumps(entries))
        self.users.refresh()


@pytest.fixture
def counted(tmp_path: Path) -> CountedUsers:
    return CountedUsers(tmp_path / "users.json")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time as `auth` sees it, of both its clocks; `clock.now` may be set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(auth, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now))
    return clock


def test_good_password_is_hashed_once_and_then_cached(counted: CountedUsers) -> None:
    assert [counted.verify() for _ in range(5)] == [True] * 5
    assert counted.checks() == 1
    assert counted.verify("admin")
    assert counted.checks() == 1
    assert counted.verify(), "one user's header pushed out another's"
    assert counted.checks() == 0


def test_two_spellings_of_the_same_credentials_are_both_cached(counted: CountedUsers) -> None:
    for _ in range(3):
        assert counted.verify(scheme="Basic")
        assert counted.verify(scheme="basic")
    assert counted.checks() == 2


def test_cache_is_bounded_and_holds_no_password(counted: CountedUsers, monkeypatch: pytest.MonkeyPatch) -> None:
    # Looked at from inside: from outside, memory that grows does not show.
    monkeypatch.setattr(auth, "MAX_CACHED", 3)
    for scheme in ("basic", "Basic", "bAsic", "baSic", "basIc"):
        assert counted.verify(scheme=scheme)
        assert not counted.verify(password="wrong", address=scheme)
    assert len(counted.users._verified) == 3
    assert PASSWORD not in repr(vars(counted.users))
    assert basic("predict").removeprefix("Basic ") not in repr(vars(counted.users))


def test_wrong_password_is_hashed_every_time(counted: CountedUsers) -> None:
    counted.fail(3)
    assert counted.checks() == 3


def test_unknown_user_costs_what_a_known_one_does(counted: CountedUsers) -> None:
    assert not counted.verify("mallory")
    ((checked_against, _),) = counted.thread.calls
    assert checked_against.split("$")[0] == CHEAP.split("$")[0]  # the method and parameters of most users
    costly = {f"user {n}": entry(generate_password_hash("x")) for n in range(3)}
    counted.change(predict=entry(), admin=entry(), **costly)
    counted.checks()
    assert not counted.verify("mallory")
    ((checked_against, _),) = counted.thread.calls
    assert checked_against.split("$")[0] == generate_password_hash("x").split("$")[0]


# --- a users file that changes


def test_added_user_can_log_in_and_removed_one_cannot(counted: CountedUsers) -> None:
    assert counted.verify()
    assert not counted.verify("bob", "b")
    counted.change(bob=entry(cheap_hash("b"), ("admin",)))
    assert counted.verify("bob", "b")
    assert not counted.verify()
    assert (counted.roles("bob", "b"), counted.roles("predict")) == ({"admin"}, frozenset())
    counted.change(predict=entry(cheap_hash("another")))  # added again
    assert not counted.verify()


def test_changed_password_takes_the_old_one_out_of_the_cache_at_once(counted: CountedUsers) -> None:
    assert counted.verify()
    counted.change(predict=entry(cheap_hash("new")))
    assert not counted.verify()
    assert counted.verify(password="new")


def test_password_changed_during_its_check_is_not_cached(counted: CountedUsers) -> None:
    counted.thread.hold = lambda: counted.change(predict=entry(cheap_hash("new")))
    counted.verify()  # begun with the old hash
    counted.thread.hold = lambda: None
    assert not counted.verify()


def test_changed_roles_count_at_once_and_the_password_stays_cached(counted: CountedUsers) -> None:
    assert counted.verify()
    counted.change(predict=entry(roles=("admin", "metrics")))
    counted.checks()
    assert counted.verify()
    assert counted.checks() == 0
    assert counted.roles("predict") == {"admin", "metrics"}


def test_change_in_place_of_the_same_length_is_seen(counted: CountedUsers) -> None:
    text = counted.path.read_text()
    counted.path.write_text(text.replace('"predict": {', '"alice__": {'))
    assert counted.path.stat().st_size == len(text)
    counted.users.refresh()
    assert counted.verify("alice__")


def test_unchanged_file_is_not_read_again(counted: CountedUsers, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        counted.users.refresh()
    assert not caplog.records


def old(password: str, until: Any) -> dict[str, Any]:
    return {"password": cheap_hash(password), "until": until}


def test_old_password_is_valid_until_its_time_also_if_it_is_cached(
    counted: CountedUsers, clock: SimpleNamespace
) -> None:
    assert counted.verify()
    counted.change(
        predict={"password": cheap_hash("new"), "old": {"password": CHEAP, "until": 1100}, "roles": ["admin"]}
    )
    counted.checks()
    assert counted.verify(), "the caller with the old one"
    assert counted.checks() == 0, "it stays cached"
    assert counted.verify(password="new")
    assert counted.roles("predict") == counted.roles("predict", "new") == {"admin"}
    clock.now = 1099.9
    assert counted.verify()
    clock.now = 1100.0
    counted.path.unlink()  # it needs no file to expire
    counted.users.refresh()
    assert not counted.verify()
    assert counted.verify(password="new")


def test_old_password_that_is_taken_back_is_invalid_at_once(counted: CountedUsers, clock: SimpleNamespace) -> None:
    counted.change(predict=entry(cheap_hash("new")) | {"old": {"password": CHEAP, "until": 1e12}})
    assert counted.verify()
    counted.change(predict=entry(cheap_hash("new")))
    assert not counted.verify()


def test_two_passwords_show_in_no_number_of_checks(counted: CountedUsers, clock: SimpleNamespace) -> None:
    both = entry(cheap_hash("new")) | {"old": old("old", 1100)}
    counted.change(predict=both, admin=entry(), dummy=entry(cheap_hash("x")))
    counted.checks()
    for name in ("predict", "admin", "nobody of that name"):
        assert not counted.verify(name, "wrong", address=name)
        assert counted.checks() == 2, name
    assert counted.verify("predict", "old")
    assert counted.checks() == 2
    clock.now = 1200.0
    for name in ("predict", "admin", "nobody of that name"):
        assert not counted.verify(name, "also wrong", address=name)
        assert counted.checks() == 1, name


def test_worker_knows_an_old_password_that_another_has_verified(
    workers: tuple[CountedUsers, CountedUsers], clock: SimpleNamespace
) -> None:
    one, other = workers
    for each in workers:
        each.change(predict=entry(cheap_hash("new")) | {"old": {"password": CHEAP, "until": 1100}})
    assert one.verify()
    one.checks()
    clock.now = 1099.0
    assert other.verify()
    assert other.checks() == 0
    clock.now = 1101.0
    assert not other.verify()
    assert not one.verify()


BROKEN = {
    "empty": "",
    "cut off": '{"predict": {"password": "' + CHEAP,
    "a list": "[]",
    "null": "null",
    "not UTF-8": b'{"\xff": 1}',
    "nested without end": "[" * 100_000,
    "a user without an entry": '{"predict": null}',
    "no password": json.dumps({"predict": {"roles": []}}),
    "a password instead of its hash": json.dumps({"predict": entry(PASSWORD)}),
    # Anyone who names this user would get a 500 else, and the log a part of the password.
    "a password with dollar signs": json.dumps({"predict": entry("pa$$word")}),
    "a hash by a method that werkzeug does not know": json.dumps({"predict": entry("sha256$salt$0123abcd")}),
    "a hash whose parameters are wrong": json.dumps({"predict": entry("scrypt:many:8:1$salt$0123abcd")}),
    "no roles": json.dumps({"predict": {"password": CHEAP}}),
    "an old password that is none": json.dumps({"predict": entry() | {"old": {"password": PASSWORD, "until": 1e12}}}),
    "an old password without an end": json.dumps({"predict": entry() | {"old": {"password": CHEAP}}}),
    "an old password until a day": json.dumps({"predict": entry() | {"old": {"password": CHEAP, "until": "2030"}}}),
    "an old password until true": json.dumps({"predict": entry() | {"old": {"password": CHEAP, "until": True}}}),
    "an old hash without its object": json.dumps({"predict": entry() | {"old": CHEAP}}),
    "a role alone": json.dumps({"predict": entry(roles="predict")}),
    "an unknown role": json.dumps({"predict": entry(roles=("king",))}),
    "a role that is a list": json.dumps({"predict": entry(roles=(["predict"],))}),
    "a role that is an object": json.dumps({"predict": entry(roles=({"predict": True},))}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_users_file_is_explained_and_keeps_the_last_good_users(
    counted: CountedUsers, caplog: pytest.LogCaptureFixture, content: str | bytes
) -> None:
    good = counted.path.read_text()
    replace_file(counted.path, content)
    for _ in range(3):
        counted.users.refresh()
    assert counted.verify()
    assert [record.levelname for record in caplog.records] == ["ERROR"], "logged once, not once a second"
    with pytest.raises(UsersFileError) as error:
        read_users(counted.path)  # as the master does before it starts
    # A worker that is started again meanwhile serves on: nobody can log in until the file is fixed.
    late = Users(counted.path, RunInThread())
    with pytest.raises(NoUsers):
        late.verify(basic("late"), "late", PASSWORD, "192.0.2.1")
    for text in (caplog.text, str(error.value)):
        assert str(counted.path) in text
        assert CHEAP not in text
        assert PASSWORD not in text
    replace_file(counted.path, good.replace('"admin": {', '"late": {'))
    for users in (counted.users, late):
        users.refresh()
        assert users.verify(basic("late"), "late", PASSWORD, "192.0.2.1")


def test_vanished_users_file_keeps_the_last_good_users(counted: CountedUsers, caplog: pytest.LogCaptureFixture) -> None:
    good = counted.path.read_text()
    counted.path.unlink()
    for _ in range(3):
        counted.users.refresh()
    assert counted.verify()
    assert len(caplog.records) == 1
    counted.path.write_text(good.replace('"admin": {', '"late": {'))
    counted.users.refresh()
    assert counted.verify("late")


@pytest.mark.parametrize("content", ["{}", "{", None])
def test_without_users_it_is_not_ready_and_says_why_until_there_are_some(
    tmp_path: Path, iris_file: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    users = tmp_path / "users.json"
    if content is not None:
        users.write_text(content)
    client = Client(Settings(model_path=iris_file, users_file=users, journal_dir=tmp_path / "journal"))
    client.service.on_error.append(lambda answer, error, record: error_types.add(record["error_type"]))
    error_types: set[str] = set()
    assert "ERROR" in [record.levelname for record in caplog.records]
    for answer in (client.get("/readyz"), client.post({"data": [ROW]})):  # not 401, by which callers give up
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert answer.json["detail"] == "not ready: there are no users; the server's log says why"
    assert error_types == {"internal"}  # not overload, as other answers of 503 are
    write_users(users)
    assert client.service.users is not None
    client.service.users.refresh()
    assert client.get("/readyz").status_code == 200
    assert client.predict([ROW]) == {"prediction": [0]}


@pytest.mark.long
def test_worker_that_is_replaced_while_there_is_no_users_file_is_not_ready(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file) as server:
        assert server.predict([ROW])[0] == 200
        users, away = tmp_path / "users.json", tmp_path / "away"
        users.rename(away)
        assert server.predict([ROW])[0] == 200
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_until(lambda: server.log.read_text().count("serving version") == 2)
        statuses = {server.predict([ROW])[0] for _ in range(FAILURES_ALLOWED + 2)}
        assert statuses == {503}
        assert server.ask("GET", "/readyz")[0] == 503
        away.rename(users)
        server.wait_until(server.is_ready)
        assert server.predict([ROW])[0] == 200


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Be a user whom file modes bind; root is not one."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_unreadable_users_file_keeps_the_last_good_users_until_it_can_be_read() -> None:
    # Not in tmp_path, which pytest opens to its own user only.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        counted = CountedUsers(Path(place) / "users.json")
        counted.path.chmod(0o644)
        replace_file(counted.path, json.dumps({"late": entry()}))
        counted.path.chmod(0o600 if os.geteuid() == 0 else 0)
        with ordinary_user():
            counted.users.refresh()
            assert counted.verify()
            assert not counted.verify("late")
        # What an operator does about it; nothing of the content changes.
        if os.geteuid() == 0:
            os.chown(counted.path, NOBODY, NOBODY)
        else:
            counted.path.chmod(0o600)
        with ordinary_user():
            counted.users.refresh()
        assert counted.verify("late")


@pytest.mark.parametrize(("mode", "starts", "warns"), [(0o600, 1, 0), (0o640, 1, 0), (0o644, 1, 1), (0o602, 0, 0)])
def test_users_file_that_others_may_write_is_not_used_and_one_that_they_may_read_is_warned_of(
    counted: CountedUsers, caplog: pytest.LogCaptureFixture, mode: int, starts: bool, warns: bool
) -> None:
    entries = json.loads(counted.path.read_text())
    counted.path.chmod(mode)
    counted.path.write_text(json.dumps(entries | {"mallory": entry()}))
    for _ in range(3):
        counted.users.refresh()
    assert counted.verify(), "the old users stay"
    assert counted.verify("mallory") == starts
    levels = [record.levelname for record in caplog.records if f" mode {mode:o}" in record.getMessage()]
    assert levels == ["WARNING"] * warns + ["ERROR"] * (not starts)
    if not starts:
        with pytest.raises(UsersFileError, match=f"mode 602, so anyone here can add users: chmod 600 {counted.path}"):
            read_users(counted.path)  # as the master does before it starts


def test_pipe_in_place_of_the_users_file_keeps_the_last_good_users(counted: CountedUsers) -> None:
    counted.path.unlink()
    os.mkfifo(counted.path)  # to open it would wait for a writer, and with it the worker's loop
    reading = threading.Thread(target=counted.users.refresh, daemon=True)
    reading.start()
    reading.join(10)
    assert not reading.is_alive()
    assert counted.verify()


# --- what workers share


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CountedUsers, CountedUsers]:
    """The users as two workers of one gunicorn have them."""
    monkeypatch.setattr(auth, "shared", auth.Verified())
    one, other = CountedUsers(tmp_path / "users.json"), CountedUsers(tmp_path / "users.json")
    return one, other


def test_password_that_one_worker_verified_is_not_hashed_by_another(
    workers: tuple[CountedUsers, CountedUsers],
) -> None:
    one, other = workers
    assert one.verify()
    assert other.verify()
    assert (one.checks(), other.checks()) == (1, 0)
    assert not other.verify(password="wrong")
    assert not other.verify("admin", password="wrong")
    assert other.checks() == 2


def test_worker_that_is_new_lets_a_verified_password_in_though_its_queue_is_full(
    workers: tuple[CountedUsers, CountedUsers],
) -> None:
    one, other = workers
    assert one.verify()
    for n in range(MAX_WAITING):
        other.users._waiting[str(n).encode()] = 1
    assert other.verify()
    with pytest.raises(ServiceUnavailable):
        other.verify("admin")


def test_changed_or_removed_user_is_not_verified_by_what_workers_share(
    workers: tuple[CountedUsers, CountedUsers],
) -> None:
    one, other = workers
    assert one.verify()
    other.change(predict=entry(cheap_hash("new")))
    assert not other.verify()
    other.change(admin=entry())
    assert not other.verify()
    assert other.checks() == 2


def test_torn_entry_of_what_workers_share_is_hashed_again(workers: tuple[CountedUsers, CountedUsers]) -> None:
    one, other = workers
    assert one.verify()
    places = one.users._shared._places
    at = next(at for at in range(len(places)) if places[at]) // 32 * 32
    for byte in range(at, at + 32):
        places[byte] ^= 1
    for byte in range(len(places)):
        if at <= byte < at + 32 or not places[byte]:
            continue
        places[byte] ^= 1  # the address
    assert other.verify()
    assert other.checks() == 1


def test_what_workers_share_holds_no_password_and_no_header(workers: tuple[CountedUsers, CountedUsers]) -> None:
    one, _ = workers
    assert one.verify()
    content = one.users._shared._places[:]
    for text in (PASSWORD, "predict", basic("predict"), CHEAP, "192.0.2.1"):
        assert text.encode() not in content


def test_ten_tries_are_ten_in_all_workers_together(
    workers: tuple[CountedUsers, CountedUsers], clock: SimpleNamespace
) -> None:
    one, other = workers
    one.fail(FAILURES_ALLOWED - 4)
    other.fail(4)
    for each in workers:
        with pytest.raises(TooManyRequests):
            each.fail(1)
        assert each.verify(address="192.0.2.2"), "another address"


def test_workers_that_check_at_once_allow_no_more_tries_than_one(tmp_path: Path) -> None:
    shared, tries = auth.Verified(), tmp_path / "tries"

    def work() -> None:
        while True:
            with shared.locked("192.0.2.1", lambda function, *arguments: function(*arguments)):
                if shared.forgiven_at("192.0.2.1") - time.monotonic() > (FAILURES_ALLOWED - 1) * 1000.0:
                    return
                time.sleep(0.02)  # a check
                shared.forgiven_at("192.0.2.1", failures=1)
                with tries.open("a") as file:
                    file.write("x")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auth, "SECONDS_PER_RETRY", 1000.0)
        workers = [multiprocessing.get_context("fork").Process(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(tries.read_text()) == FAILURES_ALLOWED


def test_worker_that_is_killed_during_a_check_keeps_no_other_waiting() -> None:
    shared, checking = auth.Verified(), multiprocessing.get_context("fork").Event()
    shared.forgiven_at("192.0.2.1", failures=1)

    def check() -> None:
        with shared.locked("192.0.2.1", lambda function, *arguments: function(*arguments)):
            checking.set()
            time.sleep(600)

    def is_free() -> bool:
        def lock(function: Any, file: int, how: int, *where: int) -> None:
            function(file, how | fcntl.LOCK_NB, *where)

        try:
            with shared.locked("192.0.2.1", lock):
                return True
        except BlockingIOError:
            return False

    worker = multiprocessing.get_context("fork").Process(target=check)
    worker.start()
    try:
        assert checking.wait(30)
        assert not is_free()
    finally:
        worker.kill()
        worker.join(30)
    assert is_free()


# --- floods


def test_address_with_many_failures_waits_and_others_do_not(counted: CountedUsers, clock: SimpleNamespace) -> None:
    assert counted.verify("admin")
    counted.fail(FAILURES_ALLOWED)
    counted.checks()
    with pytest.raises(TooManyRequests) as refusal:
        counted.verify()  # good, but not verified yet
    assert counted.checks() == 0, "a throttled address must cost no hash check"
    assert 0 < refusal.value.retry_after <= SECONDS_PER_RETRY + 1
    assert counted.verify("admin"), "a cached header is never throttled"
    assert counted.verify(address="192.0.2.2"), "another address is not affected"
    assert counted.verify(), "verified from elsewhere, so cached"


def test_allowance_returns_with_time(counted: CountedUsers, clock: SimpleNamespace) -> None:
    counted.fail(FAILURES_ALLOWED)
    with pytest.raises(TooManyRequests) as refusal:
        counted.fail(1)
    clock.now += refusal.value.retry_after
    counted.fail(1)  # the Retry-After is enough
    with pytest.raises(TooManyRequests):
        counted.fail(1)
    clock.now += 1000 * SECONDS_PER_RETRY
    counted.fail(FAILURES_ALLOWED)
    with pytest.raises(TooManyRequests):
        counted.fail(1)


def test_refused_attempts_do_not_lengthen_the_wait(counted: CountedUsers, clock: SimpleNamespace) -> None:
    counted.fail(FAILURES_ALLOWED)
    for _ in range(100):
        with pytest.raises(TooManyRequests):
            counted.fail(1)
    clock.now += SECONDS_PER_RETRY
    assert counted.verify()


def test_good_passwords_are_no_failures(counted: CountedUsers, clock: SimpleNamespace) -> None:
    for n in range(3 * FAILURES_ALLOWED):
        counted.change(predict=entry(cheap_hash(f"{n}")))
        assert counted.verify(password=f"{n}")


def test_memory_of_addresses_is_bounded_and_no_flood_pushes_one_out_or_locks_another_out(
    counted: CountedUsers, clock: SimpleNamespace
) -> None:
    counted.fail(FAILURES_ALLOWED, "192.0.2.1")
    shared = counted.users._shared
    for n in range(10_000):  # as many as some minutes of a flood: each costs a check
        shared.forgiven_at(f"198.51.{n >> 8}.{n & 255}", failures=1)
    with pytest.raises(TooManyRequests):
        counted.fail(1, "192.0.2.1")
    assert counted.verify(address="192.0.2.2")
    assert shared._times.nbytes == 512 * 1024  # looked at from inside: it is memory that counts


def at_once(count: int, call: Callable[[int], Any]) -> Counter[Any]:
    """Run `call(0)` … `call(count - 1)` on a thread each, and count the results; exceptions by their type."""
    results: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(n: int) -> None:
        start.wait()
        try:
            results[n] = call(n)
        except Exception as error:
            results[n] = type(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return Counter(results)


def test_many_callers_with_the_same_good_password_share_a_few_hash_checks(counted: CountedUsers) -> None:
    # As after a start under load: 64 connections, a cold cache, 50 ms a hash.
    counted.thread.hold = lambda: time.sleep(0.05)
    assert at_once(64, lambda n: counted.verify(address=f"192.0.2.{n}")) == {True: 64}
    assert counted.checks() <= 2


def test_many_callers_with_the_same_wrong_password_share_a_hash_check(counted: CountedUsers) -> None:
    counted.thread.hold = lambda: time.sleep(0.05)
    results = at_once(64, lambda n: counted.verify(password="wrong", address=f"2001:db8:{n}::1"))
    assert results == {False: 64}
    assert counted.checks() < 16  # those who come after a check has ended begin another


def test_ipv4_addresses_of_a_socket_for_both_are_not_one_network(counted: CountedUsers, clock: SimpleNamespace) -> None:
    for n in range(FAILURES_ALLOWED):
        assert not counted.verify(password=f"wrong {n}", address="::ffff:203.0.113.9")
    with pytest.raises(TooManyRequests):
        counted.verify(address="203.0.113.9")
    assert counted.verify(address="::ffff:203.0.113.10")


@pytest.mark.parametrize("form", ["203.0.113.9:{}", "[2001:db8::9]:{}"])
def test_port_that_a_proxy_writes_after_the_address_does_not_count(
    form: str, counted: CountedUsers, clock: SimpleNamespace
) -> None:
    for n in range(FAILURES_ALLOWED):
        assert not counted.verify(password=f"wrong {n}", address=form.format(50_000 + n))
    with pytest.raises(TooManyRequests):
        counted.verify(address=form.format(60_000))
    assert counted.verify(address="203.0.113.10:50000")


def test_addresses_of_one_ipv6_network_count_as_one(counted: CountedUsers, clock: SimpleNamespace) -> None:
    for n in range(FAILURES_ALLOWED):
        assert not counted.verify(password=f"wrong {n}", address=f"2001:db8::{n:x}")
    with pytest.raises(TooManyRequests):
        counted.verify(address="2001:db8::ffff")
    assert counted.verify(address="2001:db8:0:1::1")


def test_many_wrong_passwords_at_once_cost_few_hash_checks(counted: CountedUsers) -> None:
    # Without a second look after the wait, all would pass the throttle before the first failure counts.
    counted.thread.hold = lambda: time.sleep(0.01)
    results = at_once(50, lambda n: counted.verify(password=f"wrong {n}"))
    assert set(results) <= {False, TooManyRequests, ServiceUnavailable}
    assert results[False] == counted.checks()
    assert FAILURES_ALLOWED <= results[False] <= FAILURES_ALLOWED + 1


def test_waiting_is_bounded_and_does_not_keep_out_those_who_are_known(counted: CountedUsers) -> None:
    assert counted.verify("admin")
    go_on = threading.Event()
    counted.thread.hold = lambda: go_on.wait(30)
    refused: list[ServiceUnavailable] = []

    def call(n: int) -> bool:
        try:
            return counted.verify(password=f"wrong {n}", address=f"198.51.100.{n}")
        except ServiceUnavailable as refusal:
            refused.append(refusal)
            raise

    flood = threading.Thread(target=at_once, args=(MAX_WAITING - RESERVED + 10, call))
    flood.start()
    try:
        deadline = time.monotonic() + 10
        while len(refused) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(refused) == 10
        assert all(refusal.retry_after for refusal in refused)
        assert counted.verify("admin")
    finally:
        go_on.set()
        flood.join(30)
    assert counted.verify(), "the places were not given back"


def test_address_that_is_known_is_checked_before_strangers(counted: CountedUsers) -> None:
    assert counted.verify("admin", address="192.0.2.1")
    counted.thread.hold = lambda: time.sleep(0.05)
    strangers = MAX_WAITING - RESERVED
    flood = threading.Thread(
        target=at_once,
        args=(strangers, lambda n: counted.verify(password=f"wrong {n}", address=f"198.51.100.{n}")),
    )
    counted.checks()
    flood.start()
    try:
        deadline = time.monotonic() + 30
        while len(counted.users._waiting) < strangers and time.monotonic() < deadline:  # from inside: the queue is full
            time.sleep(0.001)
        before = len(counted.thread.calls)
        assert counted.verify("monitor", address="192.0.2.1")
        # The check under way, one stranger that was next, and its own; the threads may take a moment to wait.
        assert len(counted.thread.calls) - before <= 6
    finally:
        flood.join(60)
    assert counted.checks() == strangers + 1


def test_hash_check_that_fails_gives_its_place_back(counted: CountedUsers) -> None:
    def out_of_memory() -> None:
        raise MemoryError

    counted.thread.hold = out_of_memory
    for _ in range(MAX_WAITING + 1):
        with pytest.raises(MemoryError):
            counted.verify()
    counted.thread.hold = lambda: None
    assert counted.verify()


@pytest.mark.parametrize("hops", [0, 1])
def test_forwarded_address_is_believed_only_from_trusted_proxies(
    serve: Any, iris_file: Path, hops: int, clock: SimpleNamespace
) -> None:
    client = serve(iris_file, trusted_proxies=hops)

    def call(forwarded: str, peer: str = "192.0.2.1") -> Any:
        return ask(client, authorization=basic("predict", "wrong"), address=peer, X_Forwarded_For=forwarded)

    # A caller invents a new address each time; the proxy appends the caller's own.
    answers = [call(f"203.0.113.{n}, 198.51.100.7") for n in range(FAILURES_ALLOWED + 1)]
    assert [answer.status_code for answer in answers] == [401] * FAILURES_ALLOWED + [429]
    assert answers[-1].content_type == "application/problem+json"
    assert 0 < int(answers[-1].headers["Retry-After"]) <= SECONDS_PER_RETRY + 1
    assert call("203.0.113.1, 198.51.100.7:50001").status_code == 429  # as some proxies write it
    assert call("203.0.113.1, 198.51.100.8").status_code == (401 if hops else 429)
    assert call("203.0.113.1, 198.51.100.7", peer="192.0.2.2").status_code == (429 if hops else 401)


def test_auth_off_lets_anybody_predict_and_warns_loudly(
    serve: Any, iris_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve(iris_file, auth="off")
    assert any(each.levelno >= logging.WARNING and "AUTH=off" in each.getMessage() for each in caplog.records)
    assert ask(client).status_code == 200
    assert ask(client, authorization="Basic nonsense").status_code == 200
    assert ask(client, "/model").status_code == 200
    assert [record["user"] for record in records(client.journal_dir)] == ["", ""]


# --- the command line


def start_cli(file: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "auth", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "USERS_FILE": str(file), "JOURNAL_DIR": str(file.with_name("journal"))},
        umask=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_cli(file: Path, *arguments: str, given: str = "") -> tuple[int, str, str]:
    """Run a command in a process of its own; return its status, output and errors. `given` is its standard input."""
    process = start_cli(file, *arguments)
    output, errors = process.communicate(given.encode(), timeout=30)
    return process.returncode, output.decode(), errors.decode()


def cli(file: Path, *arguments: str | bytes, given: str | bytes = "") -> tuple[int, str, str]:
    """Do the same in this process, which takes a tenth of the time; what it raises is raised."""
    stdin = io.BytesIO(given.encode() if isinstance(given, str) else given)
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setenv("USERS_FILE", str(file))
        patch.setenv("JOURNAL_DIR", str(file.with_name("journal")))
        # As Python opens it on Linux without a locale, in containers for one.
        patch.setattr(sys, "stdin", io.TextIOWrapper(stdin, "utf-8", "surrogateescape", newline="\n"))
        status = auth_commands.main([os.fsdecode(each) for each in arguments])
    return status, output.getvalue(), errors.getvalue()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    """A users file with the user alice."""
    path = tmp_path / "users.json"
    path.write_text(json.dumps({"alice": entry()}, indent=2))
    path.chmod(0o600)
    return path


def test_a_users_life(tmp_path: Path) -> None:
    file = tmp_path / "new" / "users.json"
    roles = ["--role", "predict", "--role", "admin", "--role", "predict"]
    results = [run_cli(file, "add", "bob", *roles, given="first: pässwort\n")]
    assert mode(file) == 0o600
    assert check_password_hash(read_users(file)["bob"].password, "first: pässwort")
    assert read_users(file)["bob"].roles == {"predict", "admin"}
    results.append(run_cli(file, "add", "eve", "--role", "metrics", given="without a newline"))
    assert check_password_hash(read_users(file)["eve"].password, "without a newline")
    results.append(run_cli(file, "list"))
    assert results[-1][1] == "bob\tadmin,predict\neve\tmetrics\n"
    results.append(run_cli(file, "passwd", "bob", given="second pässwort\n"))
    assert check_password_hash(read_users(file)["bob"].password, "second pässwort")
    assert read_users(file)["bob"].roles == {"predict", "admin"}
    results.append(run_cli(file, "remove", "bob"))
    assert set(read_users(file)) == {"eve"}
    assert [status for status, _, _ in results] == [0] * len(results)
    added, _, _, changed, removed = (output for _, output, _ in results)
    assert added == "bob: no user → admin,predict\n"
    assert changed == "bob: admin,predict → admin,predict; new password\n"
    assert removed == "bob: admin,predict → no user\n"
    for text in [file.read_text(), *(output + errors for _, output, errors in results)]:
        assert "pässwort" not in text
        assert "without a newline" not in text


def test_password_from_a_file_made_on_windows_has_no_carriage_return(users_file: Path) -> None:
    assert cli(users_file, "passwd", "alice", given="new password\r\n")[0] == 0
    assert check_password_hash(read_users(users_file)["alice"].password, "new password")


def test_file_option_goes_before_the_variable(tmp_path: Path, users_file: Path) -> None:
    other = tmp_path / "other.json"
    before = users_file.read_bytes()
    assert cli(users_file, "--file", str(other), "add", "bob", "--role", "predict", given="battery staple\n")[0] == 0
    assert set(read_users(other)) == {"bob"}
    assert users_file.read_bytes() == before


REFUSED = {  # arguments, standard input, what the message holds
    "a user that exists": (["add", "alice", "--role", "predict"], "new password\n", "alice"),
    "an unknown user's password": (["passwd", "mallory"], "new password\n", "mallory"),
    "an unknown user's removal": (["remove", "mallory"], "", "mallory"),
    "an empty name": (["add", "", "--role", "predict"], "new password\n", "name"),
    "a colon in the name": (["add", "a:b", "--role", "predict"], "new password\n", "a:b"),
    "a control character": (["add", "a\nb", "--role", "predict"], "new password\n", "name"),
    "a name of 65 characters": (["add", "x" * 65, "--role", "predict"], "new password\n", "64"),
    "a name that is not UTF-8": (["add", b"\xff\xfe", "--role", "predict"], "new password\n", "name"),
    "an empty password": (["add", "bob", "--role", "predict"], "\n", "empty password"),
    "no new password": (["passwd", "alice"], "", "empty password"),
    "a password of seven characters": (["passwd", "alice"], "seven é\n", "at least 8"),
    "roles of an unknown user": (["role", "mallory", "--role", "predict"], "", "mallory"),
    "a password that is not UTF-8": (["passwd", "alice"], b"\xff\xfe\n", "UTF-8"),
}
MISUSED = {  # arguments, what the message holds
    "an unknown role": (["add", "bob", "--role", "king"], "king"),
    "no role": (["add", "bob"], "--role"),
    "no role in place of those of now": (["role", "alice"], "--role"),
    "a time without a unit": (["passwd", "alice", "--keep-old", "1"], "s, m, h or d"),
    "a time that is none": (["passwd", "alice", "--keep-old", "-1h"], "s, m, h or d"),
    "an unknown command": (["promote", "alice"], "promote"),
    "no command": ([], "COMMAND"),
}


@pytest.mark.parametrize("until", [10**400, 1e300, float("inf"), float("nan"), -(10**400)])
def test_odd_time_of_an_old_password_is_a_time(users_file: Path, until: float) -> None:
    users_file.write_text(json.dumps({"alice": entry() | {"old": {"password": CHEAP, "until": until}}}))
    status, output, errors = cli(users_file, "list")
    assert (status, errors) == (0, "")
    assert output == "alice\tpredict" + ("\told password until 9999-12-31 23:59:59 UTC\n" if until > 0 else "\n")


def test_list_shows_until_when_an_old_password_is_valid(users_file: Path) -> None:
    assert cli(users_file, "passwd", "alice", "--keep-old", "2h", given="new password\n")[0] == 0
    before = json.loads(users_file.read_text())["alice"]
    assert check_password_hash(before["password"], "new password")
    assert before["old"]["password"] == CHEAP
    assert abs(before["old"]["until"] - time.time() - 7200) < 60
    shown = re.fullmatch(r"alice\tpredict\told password until (.*) UTC\n", cli(users_file, "list")[1])
    assert shown
    assert cli(users_file, "passwd", "alice", "--keep-old", "0s", given="newer password\n")[0] == 0
    assert cli(users_file, "passwd", "alice", "--keep-old", "1d", given="newest password\n")[0] == 0
    assert check_password_hash(read_users(users_file)["alice"].old, "newer password"), "two at most"
    assert cli(users_file, "role", "alice", "--role", "admin")[1] == "alice: predict → admin\n"
    assert read_users(users_file)["alice"].old
    assert cli(users_file, "passwd", "alice", given="last password\n")[0] == 0
    assert "old" not in json.loads(users_file.read_text())["alice"]


@pytest.mark.parametrize(("arguments", "given", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_command_says_why_on_one_line_and_changes_nothing(
    users_file: Path, arguments: list[str], given: str | bytes, words: str
) -> None:
    before = users_file.read_bytes(), users_file.stat().st_mtime_ns
    status, output, errors = cli(users_file, *arguments, given=given)
    assert (status, output) == (1, "")
    assert errors.startswith("auth: ")
    assert errors.index("\n") == len(errors) - 1
    assert words in errors
    assert (users_file.read_bytes(), users_file.stat().st_mtime_ns) == before


@pytest.mark.parametrize(("arguments", "words"), MISUSED.values(), ids=MISUSED)
def test_misuse_shows_the_usage(users_file: Path, arguments: list[str], words: str) -> None:
    status, output, errors = cli(users_file, *arguments, given="new password\n")
    assert (status, output) == (2, "")
    assert errors.startswith("Usage: python -m auth")
    assert words in errors


@pytest.mark.parametrize(
    "command",
    [
        ["add", "bob", "--role", "predict"],
        ["passwd", "alice"],
        ["role", "alice", "--role", "admin"],
        ["remove", "alice"],
        ["list"],
    ],
)
def test_broken_users_file_is_explained_and_left_alone(users_file: Path, command: list[str]) -> None:
    broken = '{"alice": {"password": "' + CHEAP
    users_file.write_text(broken)
    status, output, errors = cli(users_file, *command, given="new password\n")
    assert (status, output) == (1, "")
    assert str(users_file) in errors
    assert CHEAP not in errors
    assert users_file.read_text() == broken


@pytest.mark.parametrize("command", [["passwd", "alice"], ["remove", "alice"], ["list"]])
def test_missing_users_file_is_reported(tmp_path: Path, command: list[str]) -> None:
    file = tmp_path / "users.json"
    status, _, errors = cli(file, *command, given="new password\n")
    assert status == 1
    assert str(file) in errors
    assert not file.exists()


def test_command_that_an_error_advises_fixes_the_file(users_file: Path) -> None:
    users_file.write_text(json.dumps({"alice": entry(PASSWORD), "bob": entry()}))
    advised = re.search(r"python -m auth ([\w ]+)", cli(users_file, "list")[2])
    assert advised
    assert cli(users_file, *advised[1].split(), given="new password\n")[0] == 0
    assert check_password_hash(read_users(users_file)["alice"].password, "new password")


def test_change_keeps_the_files_mode_and_owner(users_file: Path) -> None:
    if os.geteuid() == 0:
        os.chown(users_file, NOBODY, NOBODY)
    users_file.chmod(0o640)
    before = users_file.stat()
    assert cli(users_file, "passwd", "alice", given="new password\n")[0] == 0
    after = users_file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_change_through_a_link_changes_the_file_it_leads_to(tmp_path: Path, users_file: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(users_file)
    assert cli(link, "add", "bob", "--role", "predict", given="battery staple\n")[0] == 0
    assert link.is_symlink()
    assert set(read_users(users_file)) == {"alice", "bob"}


def test_commands_at_once_lose_no_user(users_file: Path) -> None:
    names = [f"user{n}" for n in range(8)]
    adding = [start_cli(users_file, "add", name, "--role", "predict") for name in names]
    for process in adding:
        process.communicate(b"password\n", timeout=30)
    assert [process.returncode for process in adding] == [0] * 8
    assert set(read_users(users_file)) == {"alice", *names}


def test_killed_command_leaves_the_old_file_and_no_lock(users_file: Path) -> None:
    before = users_file.read_bytes()
    script = "import auth_commands, os; os.rename = lambda *_: os.kill(os.getpid(), 9); auth_commands.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "--file", str(users_file), "passwd", "alice"], cwd=ROOT, stdin=subprocess.PIPE
    )
    process.communicate(b"new password\n", timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert users_file.read_bytes() == before
    assert cli(users_file, "add", "bob", "--role", "predict", given="battery staple\n")[0] == 0


def test_command_that_fails_leaves_the_old_file_and_no_other(users_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = users_file.read_bytes()
    monkeypatch.setattr(os, "rename", fail)
    why = f"auth: {users_file.resolve()} cannot be written, nothing was changed: No space left on device\n"
    assert cli(users_file, "remove", "alice") == (1, "", why)
    assert users_file.read_bytes() == before
    assert {path.name for path in users_file.parent.iterdir()} <= {
        "users.json",
        ".users.json.lock",
    }  # no history either


def test_list_is_quiet_if_nobody_reads_it(users_file: Path) -> None:
    users_file.write_text(json.dumps({f"user{n}": entry() for n in range(10_000)}))  # more than a pipe takes
    with start_cli(users_file, "list") as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("command", [[], ["add"], ["passwd"], ["role"], ["remove"], ["list"], ["demo"]])
def test_help_is_there(users_file: Path, command: list[str]) -> None:
    status, output, errors = cli(users_file, *command, "--help")
    assert (status, errors) == (0, "")
    assert output.startswith("Usage: python -m auth")


def test_demo_user_is_made_once_and_its_netrc_is_what_curl_reads(tmp_path: Path) -> None:
    file, at = tmp_path / "var" / "users.json", tmp_path / "var" / "demo.netrc"
    status, output, _ = run_cli(file, "demo")
    assert (status, str(at) in output) == (0, True)
    assert (mode(file), mode(at)) == (0o600, 0o600)
    for host in ("127.0.0.1", "localhost"):
        login, _, password = netrc.netrc(str(at)).authenticators(host) or ("", "", "")
        assert check_password_hash(read_users(file)[login].password, password)
        assert read_users(file)[login].roles == {"predict", "monitor"}
        assert password not in output
        assert password not in file.read_text()
    before = file.read_bytes(), at.read_bytes()
    assert run_cli(file, "demo")[0] == 0
    assert (file.read_bytes(), at.read_bytes()) == before


# --- the command line at a terminal


class Terminal:
    """A command at a pseudo-terminal."""

    def __init__(self, file: Path, *arguments: str) -> None:
        self.screen = ""
        self._ours, theirs = os.openpty()
        # The terminal must be the controlling one: that is where getpass asks, and what sends Ctrl-C.
        script = "import auth_commands, fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        script += "sys.exit(auth_commands.main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, "--file", str(file), *arguments],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def answer(self, prompt: str, typed: str) -> None:
        """Wait for the prompt, and type."""
        seen = len(self.screen)
        while prompt not in self.screen[seen:]:
            assert self._read(), f"ended without {prompt!r}: {self.screen!r}"
        os.write(self._ours, typed.encode())

    def end(self) -> int:
        """Read to the end; return the exit status."""
        while self._read():
            pass
        os.close(self._ours)
        return self.process.wait(10)

    def _read(self) -> bool:
        if not ready(self._ours, select.POLLIN, 20):
            self.process.kill()
            raise AssertionError(f"nothing comes after {self.screen!r}")
        try:
            chunk = os.read(self._ours, 4096).decode()
        except OSError:  # how Linux ends a pseudo-terminal
            chunk = ""
        self.screen += chunk
        return bool(chunk)


def test_password_is_asked_for_twice_without_echo(users_file: Path) -> None:
    terminal = Terminal(users_file, "add", "bob", "--role", "predict")
    for first, second in (
        ("hünter two\n", "hunter two\n"),
        ("hünter two\n", "hünter two\n"),
    ):  # until the two are the same
        terminal.answer("Password: ", first)
        terminal.answer("Again: ", second)
    assert terminal.end() == 0
    assert "nter two" not in terminal.screen
    assert check_password_hash(read_users(users_file)["bob"].password, "hünter two")


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_interrupted_prompt_changes_nothing(users_file: Path, key: str) -> None:
    before = users_file.read_bytes()
    terminal = Terminal(users_file, "passwd", "alice")
    terminal.answer("Password: ", "one password\n")
    terminal.answer("Again: ", key)
    assert terminal.end() not in (0, 2)
    assert users_file.read_bytes() == before
    assert "Traceback" not in terminal.screen


def test_user_who_was_added_meanwhile_is_not_overwritten(users_file: Path) -> None:
    slow = Terminal(users_file, "add", "bob", "--role", "admin")
    slow.answer("Password: ", "slow password\n")
    assert cli(users_file, "add", "bob", "--role", "predict", given="quick password\n")[0] == 0
    slow.answer("Again: ", "slow password\n")
    assert slow.end() == 1
    assert "bob" in slow.screen
    assert check_password_hash(read_users(users_file)["bob"].password, "quick password")


def test_password_of_a_user_who_was_removed_meanwhile_is_no_success(users_file: Path) -> None:
    slow = Terminal(users_file, "passwd", "alice")
    slow.answer("Password: ", "slow password\n")
    assert cli(users_file, "remove", "alice")[0] == 0
    slow.answer("Again: ", "slow password\n")
    assert slow.end() == 1
    assert read_users(users_file) == {}


# --- a real server, with hashes as the command line makes them


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, iris_file: Path) -> Iterator[Gunicorn]:
    """A worker behind one (imagined) proxy, so that each test is an address of its own."""
    place = tmp_path_factory.mktemp("server")
    write_users(place / "users.json", generate_password_hash(PASSWORD))
    with gunicorn(place, model_path=iris_file, trusted_proxies=1) as running:
        yield running


def status_of(server: Gunicorn, user: str, address: str) -> int:
    body = json.dumps({"data": [ROW]}).encode()
    return server.ask(
        "POST",
        "/predict",
        body,
        Content_Type="application/json",
        Authorization=basic(user),
        X_Forwarded_For=address,
    )[0]


def test_running_server_sees_the_command_lines_changes_within_seconds(server: Gunicorn) -> None:
    def becomes(status: int) -> bool:
        for n in range(30):  # a second for the server to notice, the rest for a busy machine
            if status_of(server, "bob", f"203.0.113.{n}") == status:  # an address's failures would use up its allowance
                return True
            time.sleep(0.5)
        return False

    file = server.place / "users.json"
    assert status_of(server, "bob", "192.0.2.1") == 401
    assert run_cli(file, "add", "bob", "--role", "predict", given=PASSWORD + "\n")[0] == 0
    assert becomes(200)
    assert run_cli(file, "remove", "bob")[0] == 0
    assert becomes(401)


def test_flood_of_wrong_passwords_leaves_a_good_caller_all_answers(server: Gunicorn) -> None:
    # All from one address, as behind a proxy that hides them: throttling must not become a lock-out for all.
    assert status_of(server, "predict", "192.0.2.2") == 200
    body = json.dumps({"data": [ROW]}).encode()
    good: Counter[int] = Counter()
    floods: Counter[int] = Counter()

    def keep_calling(n: int) -> None:
        headers = {
            "Content-Type": "application/json",
            "Authorization": basic("predict", f"wrong {n}" if n else PASSWORD),
            "X-Forwarded-For": "192.0.2.2",
        }
        end = time.monotonic() + 3.0
        with closing(server.connect()) as connection:
            while True:
                connection.request("POST", "/predict", body, headers)
                answer = connection.getresponse()
                answer.read()
                (floods if n else good)[answer.status] += 1
                if time.monotonic() >= end:
                    break

    assert at_once(31, keep_calling) == {None: 31}, "a connection broke"
    assert set(good) == {200}
    assert set(floods) <= {401, 429, 503}
    assert floods[401] <= FAILURES_ALLOWED + 2
    assert "Traceback" not in server.log.read_text(), "a stranger filled the log"


@pytest.mark.long
@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
@pytest.mark.parametrize("form", ["203.0.113.7:{}", "[2001:db8::7]:{}"])
def test_ten_tries_at_once_are_ten_in_all_workers(
    tmp_path: Path, iris_file: Path, form: str, worker_class: str
) -> None:
    write_users(tmp_path / "users.json", generate_password_hash(PASSWORD))
    given = {"model_path": iris_file, "trusted_proxies": 1, "web_concurrency": 4, "worker_class": worker_class}

    with gunicorn(tmp_path, **given) as server:
        server.wait_until(server.all_ready)
        began = time.monotonic()

        def call(n: int) -> int:
            body, password = json.dumps({"data": [ROW]}).encode(), basic("predict", f"wrong {n}")
            headers = {"Content_Type": "application/json", "Authorization": password}
            return server.ask("POST", "/predict", body, X_Forwarded_For=form.format(50_000 + n), **headers)[0]

        answers = at_once(24, call) + at_once(24, call)
        more = int((time.monotonic() - began) / SECONDS_PER_RETRY)  # that are allowed on a busy machine
        assert set(answers) == {401, 429}
        assert FAILURES_ALLOWED <= answers[401] <= FAILURES_ALLOWED + more
