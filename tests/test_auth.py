"""Who may do what: roles, odd headers, a users file that changes, floods of wrong passwords, and the command line."""

import io
import json
import logging
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
from conftest import CHEAP, PASSWORD, ROOT, Client, Gunicorn, basic, gunicorn, records, write_users
from werkzeug.exceptions import ServiceUnavailable, TooManyRequests
from werkzeug.security import check_password_hash, generate_password_hash

import auth
from auth import FAILURES_ALLOWED, MAX_WAITING, REFILL, Users, UsersFileError, read_users
from settings import Settings

ROW = [5.1, 3.5, 1.4, 0.2]
NOBODY = 65534  # a user id without rights on every Linux
ALLOWED = int(FAILURES_ALLOWED)


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
    "empty": "",
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
        assert all(role in answer.json["detail"] for role in OPEN_TO[path])  # says which role it takes


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
    "only colons": (encoded(b":::"), 401),
    "bytes that are not UTF-8": (encoded(b"predict:\xff\xfe\x80"), 401),
    "a user that is not UTF-8": (encoded(b"\xff\xfe:" + PASSWORD.encode()), 401),
    "NUL bytes": (encoded(b"predict\0:" + PASSWORD.encode()), 401),
    "bytes above ASCII in the header": ("Basic \xe9\xff", 401),
    "another scheme": ("Bearer abc.def.ghi", 401),
    "another scheme with good credentials": (basic("predict").replace("Basic", "Bearer"), 401),
    "digest": ('Digest username="predict", realm="x"', 401),
    "empty user": (basic(""), 401),
    "empty password": (basic("predict", ""), 401),
    "unknown user": (basic("mallory"), 401),
    "wrong password": (basic("predict", PASSWORD + " "), 401),
    "wrong password of 8 KB": (basic("predict", "x" * 8192), 401),
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


# --- proving a password


UNKNOWN = generate_password_hash("nobody has this")  # made once: at full cost a good part of the run time


class Native:
    """Runs functions as a server's `native` does, and keeps what they were called with.

    `hold`, when given, is run first: time that a real hash would take.
    """

    def __init__(self, hold: Callable[[], Any] = lambda: None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.hold = hold

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if function is generate_password_hash:  # the hash for unknown users, which needs no checking by anyone
            return UNKNOWN
        self.calls.append(arguments)
        self.hold()
        return function(*arguments)


class Proving:
    """Users with a file of their own, and how many hashes were checked."""

    def __init__(self, path: Path) -> None:
        self.path, self.native = write_users(path), Native()
        self.users = Users(path, self.native)

    def checks(self) -> int:
        """Return how many hashes were checked since the last call."""
        count = len(self.native.calls)
        self.native.calls.clear()
        return count

    def verify(self, name: str = "predict", password: str = PASSWORD, address: str = "192.0.2.1") -> bool:
        return self.users.verify(name, password, address)

    def fail(self, times: int, address: str = "192.0.2.1") -> None:
        for _ in range(times):
            assert not self.verify(password="wrong", address=address)

    def change(self, **entries: Any) -> None:
        """Replace the file by one with these users, and let the service see it."""
        replace_file(self.path, json.dumps(entries))
        self.users.refresh()


@pytest.fixture
def proving(tmp_path: Path) -> Proving:
    return Proving(tmp_path / "users.json")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time as `auth` sees it; `clock.now` may be set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(auth, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_good_password_is_hashed_once_and_then_remembered(proving: Proving) -> None:
    assert [proving.verify() for _ in range(5)] == [True] * 5
    assert proving.checks() == 1
    assert proving.verify("admin")
    assert proving.checks() == 1
    assert proving.verify(), "one user's proof pushed out another's"
    assert proving.checks() == 0


def test_what_is_remembered_is_one_entry_a_user_and_not_the_password(proving: Proving) -> None:
    for n in range(5):
        proving.change(predict=entry(cheap_hash(f"password {n}")))
        assert proving.verify(password=f"password {n}", address=f"192.0.2.{n}")
        assert not proving.verify(password="wrong", address=f"192.0.2.{n}")
    # Looked at from inside: from outside, memory that grows does not show.
    assert len(proving.users._proved) == 1
    assert "password 4" not in repr(vars(proving.users))


def test_wrong_password_is_hashed_every_time(proving: Proving) -> None:
    proving.fail(3)
    assert proving.checks() == 3


def test_unknown_user_costs_what_a_known_one_does(proving: Proving) -> None:
    assert not proving.verify("mallory")
    ((checked_against, _),) = proving.native.calls
    # By the same method and parameters as `python -m auth add` uses.
    assert checked_against.split("$")[0] == generate_password_hash("x").split("$")[0]


# --- a users file that changes


def test_added_user_can_log_in_and_removed_one_cannot(proving: Proving) -> None:
    assert proving.verify()
    assert not proving.verify("bob", "b")
    proving.change(bob=entry(cheap_hash("b"), ("admin",)))
    assert proving.verify("bob", "b")
    assert not proving.verify()
    assert (proving.users.roles("bob"), proving.users.roles("predict")) == (["admin"], [])


def test_removed_user_who_comes_back_must_prove_the_password_again(proving: Proving) -> None:
    assert proving.verify()
    proving.change()
    assert not proving.verify()
    proving.change(predict=entry())
    proving.checks()
    assert proving.verify()
    assert proving.checks() == 1


def test_changed_password_makes_the_old_proof_worthless_at_once(proving: Proving) -> None:
    assert proving.verify()
    proving.change(predict=entry(cheap_hash("new")))
    assert not proving.verify()
    assert proving.verify(password="new")


def test_password_changed_during_its_check_is_not_remembered(proving: Proving) -> None:
    proving.native.hold = lambda: proving.change(predict=entry(cheap_hash("new")))
    proving.verify()  # begun with the old hash
    proving.native.hold = lambda: None
    assert not proving.verify()


def test_changed_roles_count_at_once_and_the_proof_stays(proving: Proving) -> None:
    assert proving.verify()
    proving.change(predict=entry(roles=("admin", "metrics")))
    proving.checks()
    assert proving.verify()
    assert proving.checks() == 0
    assert proving.users.roles("predict") == ["admin", "metrics"]


def test_change_in_place_of_the_same_length_is_seen(proving: Proving) -> None:
    text = proving.path.read_text()
    proving.path.write_text(text.replace('"predict": {', '"alice__": {'))
    assert proving.path.stat().st_size == len(text)
    proving.users.refresh()
    assert proving.verify("alice__")


def test_unchanged_file_is_not_read_again(proving: Proving, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        proving.users.refresh()
    assert not caplog.records


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
    "a role alone": json.dumps({"predict": entry(roles="predict")}),
    "an unknown role": json.dumps({"predict": entry(roles=("king",))}),
    "a role that is a list": json.dumps({"predict": entry(roles=(["predict"],))}),
    "a role that is an object": json.dumps({"predict": entry(roles=({"predict": True},))}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_users_file_keeps_the_last_good_users(
    proving: Proving, caplog: pytest.LogCaptureFixture, content: str | bytes
) -> None:
    good = proving.path.read_text()
    replace_file(proving.path, content)
    for _ in range(3):
        proving.users.refresh()
    assert proving.verify()
    assert [record.levelname for record in caplog.records] == ["ERROR"], "told once, not once a second"
    assert str(proving.path) in caplog.text
    assert CHEAP not in caplog.text
    assert PASSWORD not in caplog.text
    replace_file(proving.path, good.replace('"admin": {', '"late": {'))
    proving.users.refresh()
    assert proving.verify("late")


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_users_file_is_explained_at_start(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "users.json"
    replace_file(path, content)
    with pytest.raises(UsersFileError) as refusal:
        read_users(path)  # as the master does before it starts
    assert str(path) in str(refusal.value)
    assert CHEAP not in str(refusal.value)
    assert PASSWORD not in str(refusal.value)
    # A worker that is started again meanwhile serves on: nobody can log in until the file is mended.
    users = Users(path, Native())
    assert not users.verify("predict", PASSWORD, "192.0.2.1")
    replace_file(path, json.dumps({"predict": entry()}))
    users.refresh()
    assert users.verify("predict", PASSWORD, "192.0.2.1")


def test_many_callers_with_the_same_wrong_password_share_a_hash_check(proving: Proving) -> None:
    proving.native.hold = lambda: time.sleep(0.05)
    results = at_once(64, lambda n: proving.verify(password="wrong", address=f"2001:db8:{n}::1"))
    assert results == {False: 64}
    assert proving.checks() < 16  # who comes after a check has ended begins another


def test_addresses_of_one_ipv6_network_count_as_one(proving: Proving, clock: SimpleNamespace) -> None:
    results = at_once(
        1, lambda _: [proving.verify(password=f"wrong {n}", address=f"2001:db8::{n:x}") for n in range(40)]
    )
    assert results == {TooManyRequests: 1}
    assert proving.verify(address="2001:db8:0:1::1")


def test_vanished_users_file_keeps_the_last_good_users(proving: Proving, caplog: pytest.LogCaptureFixture) -> None:
    good = proving.path.read_text()
    proving.path.unlink()
    for _ in range(3):
        proving.users.refresh()
    assert proving.verify()
    assert len(caplog.records) == 1
    proving.path.mkdir()
    proving.users.refresh()
    assert proving.verify()
    proving.path.rmdir()
    proving.path.write_text(good.replace('"admin": {', '"late": {'))
    proving.users.refresh()
    assert proving.verify("late")


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
        proving = Proving(Path(place) / "users.json")
        proving.path.chmod(0o644)
        replace_file(proving.path, json.dumps({"late": entry()}))
        proving.path.chmod(0o600 if os.geteuid() == 0 else 0)
        with ordinary_user():
            proving.users.refresh()
            assert proving.verify()
            assert not proving.verify("late")
        # What an operator does about it; nothing of the content changes.
        if os.geteuid() == 0:
            os.chown(proving.path, NOBODY, NOBODY)
        else:
            proving.path.chmod(0o600)
        with ordinary_user():
            proving.users.refresh()
        assert proving.verify("late")


# --- floods


def test_address_with_many_failures_waits_and_others_do_not(proving: Proving, clock: SimpleNamespace) -> None:
    assert proving.verify("admin")
    proving.fail(ALLOWED)
    proving.checks()
    with pytest.raises(TooManyRequests) as refusal:
        proving.verify()  # good, but not proved yet
    assert proving.checks() == 0, "a throttled address must cost no hash check"
    assert 0 < refusal.value.retry_after <= REFILL + 1
    assert proving.verify("admin"), "a remembered password is never throttled"
    assert proving.verify(address="192.0.2.2"), "another address is not affected"
    assert proving.verify(), "proved from elsewhere, so remembered"


def test_allowance_returns_with_time(proving: Proving, clock: SimpleNamespace) -> None:
    proving.fail(ALLOWED)
    with pytest.raises(TooManyRequests) as refusal:
        proving.fail(1)
    clock.now += refusal.value.retry_after
    proving.fail(1)  # the Retry-After that was told is enough
    with pytest.raises(TooManyRequests):
        proving.fail(1)
    clock.now += 1000 * REFILL
    proving.fail(ALLOWED)
    with pytest.raises(TooManyRequests):
        proving.fail(1)


def test_refused_attempts_do_not_lengthen_the_wait(proving: Proving, clock: SimpleNamespace) -> None:
    proving.fail(ALLOWED)
    for _ in range(100):
        with pytest.raises(TooManyRequests):
            proving.fail(1)
    clock.now += REFILL
    assert proving.verify()


def test_good_passwords_are_no_failures(proving: Proving, clock: SimpleNamespace) -> None:
    for n in range(3 * ALLOWED):
        proving.change(predict=entry(cheap_hash(f"{n}")))
        assert proving.verify(password=f"{n}")


def test_memory_of_addresses_is_bounded_and_forgets_the_oldest(
    proving: Proving, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "MAX_ADDRESSES", 10)
    proving.fail(ALLOWED, "192.0.2.1")
    for n in range(2, 11):
        proving.fail(1, f"192.0.2.{n}")
    with pytest.raises(TooManyRequests):
        proving.fail(1, "192.0.2.1")
    for n in range(11, 61):
        proving.fail(1, f"192.0.2.{n}")
    assert len(proving.users._failures) <= 10  # looked at from inside: it is memory that counts
    proving.fail(1, "192.0.2.1")


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


def test_many_callers_with_the_same_good_password_share_a_few_hash_checks(proving: Proving) -> None:
    # As after a start under load: 64 connections, a cold cache, 50 ms a hash.
    proving.native.hold = lambda: time.sleep(0.05)
    assert at_once(64, lambda n: proving.verify(address=f"192.0.2.{n}")) == {True: 64}
    assert proving.checks() <= 2


def test_many_wrong_passwords_at_once_cost_few_hash_checks(proving: Proving) -> None:
    # Without a second look after the wait, all would pass the throttle before the first failure counts.
    proving.native.hold = lambda: time.sleep(0.01)
    results = at_once(50, lambda n: proving.verify(password=f"wrong {n}"))
    assert set(results) <= {False, TooManyRequests, ServiceUnavailable}
    assert results[False] == proving.checks()
    assert ALLOWED <= results[False] <= ALLOWED + 1


def test_waiting_is_bounded_and_does_not_keep_out_those_who_are_known(proving: Proving) -> None:
    assert proving.verify("admin")
    go_on = threading.Event()
    proving.native.hold = lambda: go_on.wait(30)
    refused: list[ServiceUnavailable] = []

    def call(n: int) -> bool:
        try:
            return proving.verify(password=f"wrong {n}", address=f"192.0.2.{n}")
        except ServiceUnavailable as refusal:
            refused.append(refusal)
            raise

    flood = threading.Thread(target=at_once, args=(MAX_WAITING + 10, call))
    flood.start()
    try:
        deadline = time.monotonic() + 10
        while (
            len(refused) < 9 and time.monotonic() < deadline
        ):  # the one whose hash is checked may not count as waiting
            time.sleep(0.01)
        assert 9 <= len(refused) <= 10
        assert all(refusal.retry_after for refusal in refused)
        assert proving.verify("admin")
    finally:
        go_on.set()
        flood.join(30)
    assert proving.verify(), "the places were not given back"


def test_hash_check_that_fails_gives_its_place_back(proving: Proving) -> None:
    def out_of_memory() -> None:
        raise MemoryError

    proving.native.hold = out_of_memory
    for _ in range(MAX_WAITING + 1):
        with pytest.raises(MemoryError):
            proving.verify()
    proving.native.hold = lambda: None
    assert proving.verify()


def test_throttled_caller_is_told_when_to_come_back(serve: Any, iris_file: Path, clock: SimpleNamespace) -> None:
    client = serve(iris_file)
    wrong = [ask(client, authorization=basic("predict", "wrong"), address="192.0.2.1") for _ in range(ALLOWED + 1)]
    assert [answer.status_code for answer in wrong] == [401] * ALLOWED + [429]
    assert wrong[-1].content_type == "application/problem+json"
    assert 0 < int(wrong[-1].headers["Retry-After"]) <= REFILL + 1


@pytest.mark.parametrize("hops", [0, 1])
def test_forwarded_address_is_believed_only_from_trusted_proxies(
    serve: Any, iris_file: Path, hops: int, clock: SimpleNamespace
) -> None:
    client = serve(iris_file, trusted_proxies=hops)

    def status(forwarded: str, peer: str = "192.0.2.1") -> int:
        wrong = basic("predict", "wrong")
        return int(ask(client, authorization=wrong, address=peer, X_Forwarded_For=forwarded).status_code)

    # A caller invents a new address each time; the proxy appends the caller's own.
    assert [status(f"203.0.113.{n}, 198.51.100.7") for n in range(ALLOWED + 1)] == [401] * ALLOWED + [429]
    assert status("203.0.113.1, 198.51.100.8") == (401 if hops else 429)
    assert status("203.0.113.1, 198.51.100.7", peer="192.0.2.2") == (429 if hops else 401)


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
        env={"PATH": os.environ["PATH"], "USERS_FILE": str(file)},
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
        # As Python opens it on Linux without a locale, in containers for one.
        patch.setattr(sys, "stdin", io.TextIOWrapper(stdin, "utf-8", "surrogateescape", newline="\n"))
        try:
            status = auth.main([os.fsdecode(each) for each in arguments])
        except SystemExit as end:  # argparse's way
            status = int(end.code or 0)
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
    said = [
        run_cli(
            file, "add", "bob", "--role", "predict", "--role", "admin", "--role", "predict", given="first: pässwort\n"
        )
    ]
    assert mode(file) == 0o600
    assert check_password_hash(read_users(file)["bob"].password, "first: pässwort")
    assert set(read_users(file)["bob"].roles) == {"predict", "admin"}
    said.append(run_cli(file, "add", "eve", "--role", "metrics", given="without a newline"))
    assert check_password_hash(read_users(file)["eve"].password, "without a newline")
    said.append(run_cli(file, "list"))
    assert said[-1][1] == "bob\tadmin,predict\neve\tmetrics\n"
    said.append(run_cli(file, "passwd", "bob", given="second pässwort\n"))
    assert check_password_hash(read_users(file)["bob"].password, "second pässwort")
    assert set(read_users(file)["bob"].roles) == {"predict", "admin"}
    said.append(run_cli(file, "remove", "bob"))
    assert set(read_users(file)) == {"eve"}
    assert [status for status, _, _ in said] == [0] * len(said)
    for text in [file.read_text(), *(output + errors for _, output, errors in said)]:
        assert "pässwort" not in text
        assert "without a newline" not in text


def test_password_from_a_file_made_on_windows_has_no_carriage_return(users_file: Path) -> None:
    assert cli(users_file, "passwd", "alice", given="new\r\n")[0] == 0
    assert check_password_hash(read_users(users_file)["alice"].password, "new")


def test_file_option_goes_before_the_variable(tmp_path: Path, users_file: Path) -> None:
    other = tmp_path / "other.json"
    before = users_file.read_bytes()
    assert cli(users_file, "--file", str(other), "add", "bob", "--role", "predict", given="b\n")[0] == 0
    assert set(read_users(other)) == {"bob"}
    assert users_file.read_bytes() == before


REFUSED = {  # arguments, standard input, what the message holds
    "a user that is there": (["add", "alice", "--role", "predict"], "new\n", "alice"),
    "an unknown user's password": (["passwd", "mallory"], "new\n", "mallory"),
    "an unknown user's removal": (["remove", "mallory"], "", "mallory"),
    "an empty name": (["add", "", "--role", "predict"], "new\n", "name"),
    "a colon in the name": (["add", "a:b", "--role", "predict"], "new\n", "a:b"),
    "a control character": (["add", "a\nb", "--role", "predict"], "new\n", "name"),
    "an escape sequence": (["add", "\x1b[31m", "--role", "predict"], "new\n", "name"),
    "a name of 65 characters": (["add", "x" * 65, "--role", "predict"], "new\n", "64"),
    "a name that is not UTF-8": (["add", b"\xff\xfe", "--role", "predict"], "new\n", "name"),
    "an unknown role": (["add", "bob", "--role", "king"], "new\n", "king"),
    "no role": (["add", "bob"], "new\n", "--role"),
    "an empty password": (["add", "bob", "--role", "predict"], "\n", "empty password"),
    "no password": (["add", "bob", "--role", "predict"], "", "empty password"),
    "an empty new password": (["passwd", "alice"], "\n", "empty password"),
    "a password that is not UTF-8": (["passwd", "alice"], b"\xff\xfe\n", "UTF-8"),
    "an unknown command": (["promote", "alice"], "", "promote"),
    "no command": ([], "", "COMMAND"),
}


@pytest.mark.parametrize(("arguments", "given", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_command_says_why_and_changes_nothing(
    users_file: Path, arguments: list[str], given: str | bytes, said: str
) -> None:
    before = users_file.read_bytes(), users_file.stat().st_mtime_ns
    status, output, errors = cli(users_file, *arguments, given=given)
    assert status != 0
    assert output == ""
    assert said in errors
    assert (users_file.read_bytes(), users_file.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    "command", [["add", "bob", "--role", "predict"], ["passwd", "alice"], ["remove", "alice"], ["list"]]
)
def test_broken_users_file_is_explained_and_left_alone(users_file: Path, command: list[str]) -> None:
    broken = '{"alice": {"password": "' + CHEAP
    users_file.write_text(broken)
    status, output, errors = cli(users_file, *command, given="new\n")
    assert (status, output) == (1, "")
    assert str(users_file) in errors
    assert CHEAP not in errors
    assert users_file.read_text() == broken


@pytest.mark.parametrize("command", [["passwd", "alice"], ["remove", "alice"], ["list"]])
def test_missing_users_file_is_said(tmp_path: Path, command: list[str]) -> None:
    file = tmp_path / "users.json"
    status, _, errors = cli(file, *command, given="new\n")
    assert status == 1
    assert str(file) in errors
    assert not file.exists()


def test_command_that_an_error_advises_mends_the_file(users_file: Path) -> None:
    users_file.write_text(json.dumps({"alice": entry(PASSWORD), "bob": entry()}))
    advised = re.search(r"python -m auth ([\w ]+)", cli(users_file, "list")[2])
    assert advised
    assert cli(users_file, *advised[1].split(), given="new\n")[0] == 0
    assert check_password_hash(read_users(users_file)["alice"].password, "new")


def test_change_keeps_the_files_mode_and_owner(users_file: Path) -> None:
    if os.geteuid() == 0:
        os.chown(users_file, NOBODY, NOBODY)
    users_file.chmod(0o640)
    before = users_file.stat()
    assert cli(users_file, "passwd", "alice", given="new\n")[0] == 0
    after = users_file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_change_through_a_link_changes_the_file_it_leads_to(tmp_path: Path, users_file: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(users_file)
    assert cli(link, "add", "bob", "--role", "predict", given="b\n")[0] == 0
    assert link.is_symlink()
    assert set(read_users(users_file)) == {"alice", "bob"}


def test_commands_at_once_lose_no_user(users_file: Path) -> None:
    names = [f"user{n}" for n in range(8)]
    adding = [start_cli(users_file, "add", name, "--role", "predict") for name in names]
    for process in adding:
        process.communicate(b"password\n", timeout=30)
    assert [process.returncode for process in adding] == [0] * 8
    assert set(read_users(users_file)) == {"alice", *names}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_killed_command_leaves_the_old_file_and_no_lock(users_file: Path, call: str) -> None:
    before = users_file.read_bytes()
    script = f"import auth, os; os.{call} = os.replace = lambda *_: os.kill(os.getpid(), 9); auth.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "--file", str(users_file), "passwd", "alice"], cwd=ROOT, stdin=subprocess.PIPE
    )
    process.communicate(b"new\n", timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert users_file.read_bytes() == before
    assert cli(users_file, "add", "bob", "--role", "predict", given="b\n")[0] == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_command_that_fails_leaves_the_old_file_and_no_other(
    users_file: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = users_file.read_bytes()

    def fail(*_: Any) -> None:
        raise error

    for call in ("rename", "replace"):
        monkeypatch.setattr(os, call, fail)
    try:
        assert auth.main(["--file", str(users_file), "remove", "alice"]) != 0
    except KeyboardInterrupt:
        assert isinstance(error, KeyboardInterrupt)
    assert users_file.read_bytes() == before
    assert {path.name for path in users_file.parent.iterdir()} <= {"users.json", ".users.json.lock"}


def test_refusal_is_one_line_and_a_status(users_file: Path) -> None:
    assert run_cli(users_file, "remove", "mallory") == (1, "", f"auth: there is no user 'mallory' in {users_file}\n")


@pytest.mark.parametrize("command", [[], ["add"], ["passwd"], ["remove"], ["list"], ["demo"]])
def test_help_is_there(users_file: Path, command: list[str]) -> None:
    status, output, errors = cli(users_file, *command, "--help")
    assert (status, errors) == (0, "")
    assert output.startswith("usage: python -m auth")


def test_demo_user_is_made_once_and_its_netrc_is_what_curl_reads(tmp_path: Path) -> None:
    file, at = tmp_path / "var" / "users.json", tmp_path / "var" / "demo.netrc"
    status, output, _ = run_cli(file, "demo")
    assert (status, str(at) in output) == (0, True)
    assert (mode(file), mode(at)) == (0o600, 0o600)
    for host in ("127.0.0.1", "localhost"):
        login, _, password = netrc.netrc(str(at)).authenticators(host) or ("", "", "")
        assert check_password_hash(read_users(file)[login].password, password)
        assert read_users(file)[login].roles == ("predict",)
        assert password not in output
        assert password not in file.read_text()
    before = file.read_bytes(), at.read_bytes()
    assert run_cli(file, "demo")[0] == 0
    assert (file.read_bytes(), at.read_bytes()) == before


def test_demo_leaves_users_alone(users_file: Path) -> None:
    before = users_file.read_bytes()
    assert cli(users_file, "demo")[0] == 0
    assert users_file.read_bytes() == before
    assert not users_file.with_name("demo.netrc").exists()


# --- the command line at a terminal


class Terminal:
    """A command at a pseudo-terminal."""

    def __init__(self, file: Path, *arguments: str) -> None:
        self.screen = ""
        self._ours, theirs = os.openpty()
        # The terminal must be the controlling one: that is where getpass asks, and what sends Ctrl-C.
        script = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); import auth; sys.exit(auth.main())"
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
        if not select.select([self._ours], [], [], 20)[0]:
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
    terminal.answer("Password: ", "hünter2\n")
    terminal.answer("Again: ", "hünter2\n")
    assert terminal.end() == 0
    assert "nter2" not in terminal.screen
    assert check_password_hash(read_users(users_file)["bob"].password, "hünter2")


@pytest.mark.parametrize(
    ("first", "second"),
    [("one\n", "two\n"), ("\n", "\n"), ("\x03", None), ("\x04", None), ("one\n", "\x03"), ("one\n", "\x04")],
    ids=["mismatch", "empty", "Ctrl-C", "Ctrl-D", "Ctrl-C at the second", "Ctrl-D at the second"],
)
def test_password_that_is_not_given_twice_changes_nothing(users_file: Path, first: str, second: str | None) -> None:
    before = users_file.read_bytes()
    terminal = Terminal(users_file, "passwd", "alice")
    terminal.answer("Password: ", first)
    if second is not None:
        terminal.answer("Again: ", second)
    assert terminal.end() != 0
    assert users_file.read_bytes() == before
    assert "Traceback" not in terminal.screen


def test_user_who_was_added_meanwhile_is_not_overwritten(users_file: Path) -> None:
    slow = Terminal(users_file, "add", "bob", "--role", "admin")
    slow.answer("Password: ", "slow\n")
    assert cli(users_file, "add", "bob", "--role", "predict", given="quick\n")[0] == 0
    slow.answer("Again: ", "slow\n")
    assert slow.end() == 1
    assert "bob" in slow.screen
    assert check_password_hash(read_users(users_file)["bob"].password, "quick")


def test_password_of_a_user_who_was_removed_meanwhile_is_no_success(users_file: Path) -> None:
    slow = Terminal(users_file, "passwd", "alice")
    slow.answer("Password: ", "slow\n")
    assert cli(users_file, "remove", "alice")[0] == 0
    slow.answer("Again: ", "slow\n")
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
        for n in range(30):  # a second for the housekeeping, the rest for a busy machine
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
    assert floods[401] <= ALLOWED + 2
    assert "Traceback" not in server.log.read_text(), "a stranger filled the log"
