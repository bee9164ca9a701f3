"""An operator's week in fast motion: one server under load, and all that docs/operations.md promises of each day."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import PASSWORD, ROOT, Gunicorn, Load, basic
from loopback_sls import LoopbackSLS
from sklearn.datasets import load_iris
from sls_tools import shipping, stored
from test_exits import all_serve, metrics
from test_state import BACK_UP, RESTORE, ask, elsewhere, environment, run, serving
from test_systemd import handed_in

from monitor import UNWRITABLE, segments

CALLERS, KILLS = 4, 3
OLD, NEW = PASSWORD, "battery staple"
KEPT = 20  # seconds that the old password stays valid
# Version 2 needs a file at each call, as others need a database.
MODULE = """
from sklearn.linear_model import LogisticRegression

class Dependent(LogisticRegression):
    def predict(self, X):
        open(self.needs).close()
        return super().predict(X)
"""


class Week:
    """The host: its state in `var`, its releases beside it, the socket that outlives them, and the server of now."""

    server: Gunicorn
    load: Load

    def __init__(self, place: Path, sls: LoopbackSLS, running: ExitStack) -> None:
        self.place, self.sls, self._running = place, sls, running
        self.state, self.needed = place / "var", place / "needed"
        self.journal = self.state / "journal"
        self._listener = running.enter_context(socket.create_server(("127.0.0.1", 0), backlog=2048))

    def run(self, command: str, given: str = "") -> str:
        """Run a command as the operator, who expects that it succeeds; return what it prints."""
        done = run(command, self.state, given)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def release(self, name: str) -> Path:
        """Make a directory with the code, whose answers name the release."""
        left_out = shutil.ignore_patterns(".*", "var", "tests", "bench", "docs", "deploy", "__pycache__")
        made = Path(shutil.copytree(ROOT, self.place / name, ignore=left_out))
        code, line = (made / "server.py").read_text(), '        response.headers.add("X-Request-ID"'
        assert code.count(line) == 1
        (made / "server.py").write_text(
            code.replace(line, f'        response.headers.add("X-Release", "{name}")\n{line}')
        )
        (made / "var").symlink_to(self.state)
        return made

    def start(self, release: Path) -> None:
        """Start the server from a release, with the socket that is held, and wait until its workers serve."""
        held = handed_in(self._listener)
        held["within"] = ("env", "-C", str(release), *held["within"])
        paths = {name.lower(): path for name, path in environment(self.state).items()}
        given = {"model_path": "", "max_wait": 30, "pythonpath": self.place} | paths | held
        self.server = self._running.enter_context(shipping(self.state, None, self.sls, **given))
        self.server.port = self._listener.getsockname()[1]
        assert self.server.ask("GET", "/healthz")[1]["X-Release"] == release.name

    def go_on(self, requests: int = 50) -> None:
        """Wait until so many more requests are answered."""
        before = len(self.load.answered)
        self.server.wait_until(lambda: len(self.load.answered) >= before + requests)

    def status(self, password: str) -> int:
        """Return what the user `predict` is answered with a password."""
        return self.server.ask("GET", "/model", Authorization=basic("predict", password))[0]

    def dropped(self) -> int:
        """Return how many records SLS was told of that it will not get."""
        return sum(int(entry["dropped"]) for entry in list(self.sls.logs) if "dropped" in entry)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[None]:
    """Let the journal's directory be a disk of its own, if this user may mount one."""
    journal = tmp_path / "var/journal"
    journal.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", journal]
    is_mounted = os.geteuid() == 0 and not subprocess.run(mount, check=False).returncode
    yield
    if is_mounted:
        subprocess.run(["umount", "--lazy", journal], check=True)


@contextmanager
def full_disk(week: Week) -> Iterator[None]:
    """Fill the journal's disk; if it has none of its own, let no file of the workers grow."""
    if week.journal.is_mount():
        with suppress(OSError), (week.journal / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1024))
        yield
        (week.journal / "filler").unlink()
    else:
        for limit in (1, resource.RLIM_INFINITY):
            for worker in week.server.workers():
                resource.prlimit(worker, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            if limit == 1:
                yield


@pytest.mark.long
def test_an_operators_week(
    tmp_path: Path, iris_file: Path, sls: LoopbackSLS, small_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "dependent_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    with ExitStack() as running:
        week = Week(tmp_path, sls, running)
        monday_install(week, iris_file)
        with Load(week.server, CALLERS) as week.load:
            tuesday_a_canary_goes_bad(week)
            wednesday_a_new_password(week)
            thursday_an_upgrade_and_the_way_back(week)
            friday_a_full_disk(week)
            saturday_workers_die_and_sls_is_away(week)
            backup, served = sunday_a_backup(week)
        everything_is_accounted_for(week)
        assert week.server.stop() == 0
        sls.wait_until(lambda: not segments(week.journal), 60)  # the shipper ends after the server, with nothing left
        the_history_tells_the_week(week)
        the_backup_is_restored(week, backup, served)
        no_password_is_written(week)


def monday_install(week: Week, iris_file: Path) -> None:
    for role in ("predict", "admin", "metrics"):
        week.run(f"auth add {role} --role {role}", given=OLD)
    (week.place / "rows.json").write_text("[[5.1, 3.5, 1.4, 0.2]]")
    week.run(f"model publish {iris_file} --version 1 --sample {week.place / 'rows.json'}")
    week.run("model promote 1")
    week.start(week.release("first"))


def tuesday_a_canary_goes_bad(week: Week) -> None:
    from dependent_module import Dependent  # type: ignore[import-not-found]  # just written

    iris = load_iris(as_frame=True)
    model = Dependent(max_iter=1000).fit(iris.data, iris.target)
    model.needs = str(week.needed)
    week.needed.touch()
    joblib.dump(model, week.place / "second.joblib")
    week.run(f"model publish {week.place / 'second.joblib'} --version 2 --sample {week.place / 'rows.json'}")
    week.run("model canary 2 --weight 50 --guard --wait")
    week.go_on(100)
    assert {answer.version for answer in week.load.answers[-50:]} == {"1", "2"}
    assert set(week.load.statuses) == {200}
    week.needed.unlink()
    week.server.wait_until(lambda: ask(week.server, "admin", "/model")["routing"]["canary"] is None)
    week.server.wait_until(lambda: {answer.version for answer in week.load.answers[-50:]} == {"1"})
    week.needed.touch()


def wednesday_a_new_password(week: Week) -> None:
    read = week.server.log.read_text().count("auth: read")
    week.run(f"auth passwd predict --keep-old {KEPT}s", given=NEW)
    week.server.wait_until(lambda: week.server.log.read_text().count("auth: read") == read + 2, 5)  # both workers
    week.load.passwords = [OLD, NEW]  # some callers have the new one already
    week.go_on()
    week.load.passwords = [NEW]
    week.go_on()


def thursday_an_upgrade_and_the_way_back(week: Week) -> None:
    assert week.load.errors == []
    first, second = week.place / "first", week.release("second")
    for release in (second, first):
        check = [sys.executable, "-m", "server", "check"]
        environ = os.environ | environment(week.state)
        done = subprocess.run(check, cwd=release, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        assert "FAIL" not in done.stdout
        assert week.server.stop() == 0
        week.start(release)
        week.go_on()
    # A stop closes connections that are idle: also of a caller that has just connected, and not sent anything yet.
    assert len(week.load.errors) <= 2 * CALLERS
    week.load.errors.clear()
    week.server.wait_until(lambda: week.status(OLD) == 401)
    assert week.status(NEW) == 200


def friday_a_full_disk(week: Week) -> None:
    with full_disk(week):
        week.server.wait_until(lambda: "records are being lost" in week.server.log.read_text())
        week.go_on()
    week.go_on()
    week.server.wait_until(lambda: week.dropped() > 0)
    assert week.load.errors == []


def saturday_workers_die_and_sls_is_away(week: Week) -> None:
    for count in range(1, KILLS + 1):
        os.kill(week.server.workers()[0], signal.SIGKILL)
        week.server.wait_until(lambda so_far=count: metrics(week.server).get("killed") == so_far)
        week.server.wait_until(lambda: all_serve(week.server))
    assert len(week.load.errors) <= CALLERS * KILLS  # a worker that is killed has one request of each caller at most
    week.load.errors.clear()
    week.sls.down()
    week.go_on(200)
    week.sls.up()


def sunday_a_backup(week: Week) -> tuple[Path, Any]:
    path = week.place / "state.tar.gz"
    script = elsewhere(BACK_UP, week.state, path)
    subprocess.run(["bash", "-c", script], cwd=ROOT, check=True, capture_output=True)
    return path, ask(week.server, "admin", "/model")


def everything_is_accounted_for(week: Week) -> None:
    """Answered, recorded and shipped are the same, but for what is counted as lost and what the pages predict."""
    answered = set(week.load.answered)
    week.sls.wait_until(lambda: len(answered - set(stored(week.sls))) == week.dropped(), 60)
    _, _, shown = week.server.ask("GET", "/metrics", Authorization=basic("metrics"))
    counted = re.search(rf'^prediction_records_dropped_total{{reason="{UNWRITABLE}"}} (.*)$', shown.decode(), re.M)
    assert counted
    assert float(counted[1]) == week.dropped() > 0
    # After an outage a batch may be sent again: with the same record ids.
    pairs = {(entry["request_id"], entry["record_id"]) for entry in week.sls.logs if entry.get("request_id")}
    assert max(Counter(name for name, _ in pairs).values()) == 1
    failed = [answer for answer in week.load.answers if answer.status != 200]
    assert {(answer.status, answer.version) for answer in failed} == {(500, "2")}  # while the guard counted
    assert week.load.errors == []


def the_history_tells_the_week(week: Week) -> None:
    _, *lines = week.run("model history").splitlines()
    story = (
        *(f"auth add {role}" for role in ("predict", "admin", "metrics")),
        *("model publish 1", "model promote 1", "model publish 2"),
        *("model canary 2 .* --guard", "guard, .* of its .* requests failed", "auth passwd predict .* new password"),
    )
    assert len(lines) == len(story)
    for line, expected in zip(lines, story, strict=True):
        who = "" if expected.startswith("guard") else "alice as "
        assert re.search(rf"^20\d\d-\d\d-\d\d \d\d:\d\d:\d\d  +\S+  +{who}\w+  +{expected}", line), line
    assert lines == sorted(lines, key=lambda line: line[:19])


def the_backup_is_restored(week: Week, backup: Path, served: Any) -> None:
    other = week.place / "other/var"
    other.mkdir(parents=True)
    script, environ = elsewhere(RESTORE, other, backup), os.environ | environment(other)
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environ, check=True, capture_output=True, text=True)
    assert done.stdout.count("as it was published") == 2  # both versions are there
    for command in ("auth list", "model history"):
        assert run(command, other).stdout == week.run(command)
    with serving(other, pythonpath=week.place) as server:
        body, headers = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}', {"Content_Type": "application/json"}
        status, told, answer = server.ask("POST", "/predict", body, Authorization=basic("predict", NEW), **headers)
        assert (status, told["X-Model-Version"], json.loads(answer)) == (200, "1", {"prediction": [0]})
        now = ask(server, "admin", "/model")
        assert (now["routing"], now["stable"]["sha256"]) == (served["routing"], served["stable"]["sha256"])
        assert server.predict([[5.1, 3.5, 1.4, 0.2]])[0] == 401  # with the old password


def no_password_is_written(week: Week) -> None:
    files = [path for place in ("var", "other") for path in (week.place / place).rglob("*") if path.is_file()]
    written = "".join(path.read_text(errors="replace") for path in files) + repr(week.sls.logs)
    assert "predict" in written
    for secret in (OLD, NEW, basic("predict", OLD), basic("predict", NEW)):
        assert secret.removeprefix("Basic ") not in written
