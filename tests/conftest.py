"""What the tests share: users, models in files, the test client, and a real gunicorn."""

import http.client
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from base64 import b64encode
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

# Before numpy: BLAS's threads of several test processes wait for each other's cores, a fit of 15 ms takes one of 400.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import joblib
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from werkzeug.security import generate_password_hash

from monitor import segments
from server import create_app
from settings import Settings, usable_cores

ROOT = Path(__file__).parent.parent
PASSWORD = "correct horse"  # of every test user
CHEAP = generate_password_hash(PASSWORD, method="pbkdf2:sha256:1")  # a real hash without the cost
# .ci/containers builds the image, and .ci/browser has an environment of its own.
collect_ignore = ["containers"] * ("TEST_IMAGE" not in os.environ) + ["browser"] * (not find_spec("playwright"))


# For tests of the whole server; under gthread, which few use, in `make test-all` only. Without speedups/ under nothing
# else: gunicorn's own gevent worker does not run slow work beside its loop.
WORKER_CLASS = "gevent" if find_spec("speedups") else "gthread"
WORKER_CLASSES = [WORKER_CLASS, *[pytest.param("gthread", marks=pytest.mark.long)] * (WORKER_CLASS == "gevent")]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that left a test out where all must run (REQUIRE_ALL=1, as CI sets it)."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # in the main process of xdist only
    if os.environ.get("REQUIRE_ALL") and reporter and reporter.stats.get("skipped") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List what was left out, a line for each reason."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"LEFT OUT, {count} tests: {reason.removeprefix('Skipped: ')}")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use two processes for a core, since most tests wait for a server; for the long ones, which load it, fewer."""
    return usable_cores() * 2 if config.option.markexpr == "not long" else usable_cores() * 3 // 2


@pytest.hookimpl(trylast=True)  # after those that are not asked for were left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let files of long tests come first, then those of many, so that no process is busy long after the others."""
    count = Counter(item.path for item in items)
    long = Counter(item.path for item in items if item.get_closest_marker("long"))
    items.sort(key=lambda item: (-long[item.path] / count[item.path], -count[item.path]))


def basic(user: str, password: str = PASSWORD) -> str:
    """Return the value of an Authorization header."""
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


def write_users(path: Path, password_hash: str = CHEAP) -> Path:
    """Write a users file with one user for each role, named after it, and `nobody` without any."""
    roles = ("predict", "admin", "monitor", "metrics", "feedback")
    entries = {role: {"password": password_hash, "roles": [role]} for role in roles}
    path.write_text(json.dumps(entries | {"nobody": {"password": password_hash, "roles": []}}))
    path.chmod(0o600)
    return path


def records(directory: Path) -> list[dict[str, Any]]:
    """Read every record of a journal, in order of writing in each segment; not a line that is still being written."""
    whole = (path.read_text().rpartition("\n")[0] for path in segments(directory))
    return [json.loads(line) for lines in whole for line in lines.splitlines()]


class Client:
    """A Flask test client with a user, whose service has loaded its model."""

    def __init__(self, settings: Settings, user: str = "predict") -> None:
        if not settings.feedback_key_file.is_absolute():  # not in this repository's var/
            settings = replace(settings, feedback_key_file=settings.journal_dir.with_name("feedback.key"))
        self.app = create_app(settings)
        self.service = self.app.extensions["service"]
        self.service.start()
        assert self.service.serving.finished.wait(60)
        self.http = self.app.test_client()
        self.headers = {"Authorization": basic(user)}
        self.journal_dir = settings.journal_dir

    def post(self, body: Any, path: str = "/predict", **headers: str) -> Any:
        """POST a JSON value, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = (
            {"Content-Type": "application/json"} | self.headers | {k.replace("_", "-"): v for k, v in headers.items()}
        )
        return self.http.post(path, data=data, headers=given)

    def predict(self, data: Any, method: str | None = None) -> Any:
        """POST rows, expect 200, return the decoded answer."""
        answer = self.post({"data": data} if method is None else {"data": data, "method": method})
        assert answer.status_code == 200, answer.text
        return answer.json

    def get(self, path: str) -> Any:
        """GET a path as the user."""
        return self.http.get(path, headers=self.headers)


@pytest.fixture(scope="session")
def iris_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A logistic regression on iris, fitted on a data frame, in a file."""
    iris = load_iris(as_frame=True)
    path = tmp_path_factory.mktemp("iris") / "iris.joblib"
    joblib.dump(LogisticRegression(max_iter=1000).fit(iris.data, iris.target), path)
    return path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the product, to be changed while it runs."""
    left_out = shutil.ignore_patterns(".*", "var", "tests", "bench", "docs", "deploy", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=left_out))


@pytest.fixture
def serve(tmp_path: Path) -> Any:
    """Return a function that serves a fitted model, or a model file, through the test client."""
    count = iter(range(1000))

    def start(model: Any, **settings: Any) -> Client:
        place = tmp_path / str(next(count))
        place.mkdir()
        path = model if isinstance(model, Path) else place / "model.joblib"
        if path is not model:
            joblib.dump(model, path)
        users = write_users(place / "users.json")
        return Client(Settings(model_path=path, users_file=users, journal_dir=place / "journal", **settings))

    return start


@pytest.fixture
def sls() -> Iterator[Any]:
    """A loopback SLS that is up."""
    from loopback_sls import LoopbackSLS  # imports the SDK, which most tests do without

    with LoopbackSLS() as running:
        yield running


class Server:
    """A running server process, and what a client needs of it."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def connect(self, timeout: float = 30.0) -> http.client.HTTPConnection:
        """Open a connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
        """Send one request on a connection of its own; return status, headers and body."""
        connection = self.connect()
        try:
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def predict(self, data: Any, user: str = "predict") -> tuple[int, Any]:
        """POST rows; return the status and the decoded answer."""
        body = json.dumps({"data": data}).encode()
        status, _, answer = self.ask(
            "POST", "/predict", body, Content_Type="application/json", Authorization=basic(user)
        )
        return status, json.loads(answer)

    def raw(self, sent: bytes, timeout: float = 30.0) -> bytes:
        """Send bytes as they are, and return all that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(sent)
            return read_all(connection)

    def wait_until(self, met: Any, seconds: float = 180.0) -> None:
        """Wait until `met()` is true, while the server runs."""
        deadline = time.monotonic() + seconds
        while not met():
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"waited {seconds} s in vain:\n{self.log.read_text()}"
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGTERM, seconds: float = 40.0) -> int:
        """Stop the server and return its exit status."""
        self.process.send_signal(how)
        return self.process.wait(seconds)


class Gunicorn(Server):
    """A running gunicorn with this project's configuration."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, place: Path, log: Path, count: int) -> None:
        super().__init__(process, port, log)
        self.place, self.count = place, count
        self.journal_dir = place / "journal"

    def workers(self) -> list[int]:
        """Return the pids of the worker processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def is_ready(self) -> bool:
        """Tell whether a worker answers that it is ready; each worker of several may still differ."""
        try:
            return self.ask("GET", "/readyz")[0] == 200
        except OSError:
            return False

    def all_ready(self) -> bool:
        """Tell whether every worker has said that it serves."""
        return self.log.read_text().count("serving version") >= self.count


class Answer(NamedTuple):
    """What a caller of `Load` was answered."""

    began: float  # when it was asked, as time.monotonic() counts
    status: int
    version: str | None  # that X-Model-Version names
    body: bytes
    seconds: float  # until the answer was there


class Load:
    """Callers in threads of their own that ask one request after the other, each on a connection of its own.

    `answers` holds what they were answered, `statuses` its statuses alone, `answered` the ids of the requests that got
    a 200, and `errors` what came instead of an answer. Each request has one of `passwords`.
    """

    def __init__(self, server: Server, callers: int = 3, pause: float = 0.01) -> None:
        self.statuses: list[int] = []
        self.answers: list[Answer] = []
        self.answered: list[str] = []
        self.errors: list[Exception] = []
        self.passwords = [PASSWORD]
        self._server, self._pause, self._ending = server, pause, threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(callers)]

    def _call(self) -> None:
        body = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'
        while not self._ending.wait(self._pause):
            name = uuid.uuid4().hex
            sign_in = basic("predict", random.choice(self.passwords))
            headers = {"Content_Type": "application/json", "Authorization": sign_in, "X_Request_ID": name}
            began = time.monotonic()
            try:
                status, told, answer = self._server.ask("POST", "/predict", body, **headers)
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(error)
            else:
                self.statuses.append(status)
                self.answers.append(Answer(began, status, told["X-Model-Version"], answer, time.monotonic() - began))
                if status == 200:
                    self.answered.append(name)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Let this process make no file larger than `size` bytes: to a writer the same as a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class SmallDisk:
    """A disk to be filled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def mount(self, size: str) -> Path:
        """Mount it with a size, such as "8m"; return its directory."""
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.place]
        if os.geteuid() != 0 or subprocess.run(command).returncode:
            pytest.skip("needs to mount a small disk: root")
        return self.place

    def fill(self) -> Path:
        """Fill it to its last kilobyte; return the file that does."""
        filler = self.place / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
        return filler


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk that the test mounts, and fills."""
    disk = SmallDisk(tmp_path / "disk")
    disk.place.mkdir()
    yield disk
    if disk.place.is_mount():
        subprocess.run(["umount", "--lazy", disk.place], check=True)


def read_all(connection: socket.socket) -> bytes:
    """Read until the other side closes or resets."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


_held: deque[int] = deque()


def ready(file: Any, events: int, seconds: float) -> int:
    """Wait for events of `select.POLL…` on a socket or descriptor; return those that came, and 0 when it is too late.

    Not `select.select`, which takes no descriptor above 1023, as a long run of tests may have.
    """
    poll = select.poll()
    poll.register(file, events)
    return next((found for _, found in poll.poll(1000 * seconds)), 0)


def free_port() -> int:
    """Return a port that is free, and that nobody else is given before a server listens there.

    Bound and never listening, a socket keeps it ours; servers set SO_REUSEADDR too, and so may bind it beside that.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port: int = holder.getsockname()[1]
    _held.append(holder.detach())
    if len(_held) > 200:  # descriptors, of which a process may have few
        os.close(_held.popleft())
    return port


@contextmanager
def gunicorn(
    place: Path,
    *arguments: str,
    ready: bool = True,
    within: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    **settings: Any,
) -> Iterator[Gunicorn]:
    """Run a real gunicorn; settings are environment variables by their names in lower case.

    It gets a port, a users file, a journal and a log in `place`, and a process group of its own that is ended with the
    block. With `ready`, the block begins when all workers serve. `within` is a command that runs the command behind it,
    `pass_fds` are descriptors that it gets.
    """
    port = free_port()
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(place),  # for modules that a test's model needs
        "PORT": str(port),
        "WEB_CONCURRENCY": "1",
        "WORKER_CLASS": WORKER_CLASS,
        "USERS_FILE": str(place / "users.json"),
        "JOURNAL_DIR": str(place / "journal"),
        "FEEDBACK_KEY_FILE": str(place / "feedback.key"),
    } | {name.upper(): str(value) for name, value in settings.items()}
    if not Path(environ["USERS_FILE"]).exists():
        write_users(Path(environ["USERS_FILE"]))
    log = place / f"gunicorn-{port}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*within, sys.executable, "-m", "gunicorn", *arguments],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            pass_fds=pass_fds,
        )
    server = Gunicorn(process, port, place, log, int(environ["WEB_CONCURRENCY"]))
    try:
        if ready:
            server.wait_until(server.all_ready)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
