"""JOURNAL_DIR has one owner: a second server is refused, and a successor is not; and so is one without an address."""

import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import gunicorn, records

from processes import is_locked

IRIS = [[5.1, 3.5, 1.4, 0.2]]
SETOSA = (200, {"prediction": [0]})
SLOW = """
import time
from sklearn.linear_model import LogisticRegression

class Slow(LogisticRegression):
    def predict(self, X):
        time.sleep(4)
        return super().predict(X)
"""


def refusal(place: Path, **settings: Any) -> str:
    """Start a server that must not come up; return its log."""
    with gunicorn(place, ready=False, **settings) as server:
        assert server.process.wait(60) == 1
        return server.log.read_text()


def assert_refused(place: Path, **settings: Any) -> str:
    """Start another server with the same JOURNAL_DIR, which ends; return what it says."""
    said = refusal(place, **settings)
    assert "cannot start: JOURNAL_DIR=" in said
    assert "Traceback" not in said
    return said


def test_second_server_in_one_directory_is_refused_with_the_way_out(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file) as first:
        said = assert_refused(tmp_path, model_path=iris_file)
        assert f"pid {first.process.pid}, HOST=127.0.0.1 PORT={first.port}" in said
        command = said.strip().splitlines()[-1].partition("its own: ")[2]
        assert command.endswith(" .venv/bin/gunicorn")
        given = dict(word.split("=", 1) for word in shlex.split(command)[:-1])
        assert given["MODEL_PATH"] == str(iris_file)
        settings = {name.lower(): value for name, value in given.items()}
        with gunicorn(tmp_path, **settings) as second:
            second.port = int(given["PORT"])
            assert second.predict(IRIS) == SETOSA
            assert first.predict(IRIS) == first.predict(IRIS) == SETOSA
        assert len(records(first.journal_dir)) == 2
        assert len(records(Path(given["JOURNAL_DIR"]))) == 1


def test_same_command_again_is_refused_with_another_port_and_directory_at_once(
    tmp_path: Path, iris_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Below those that the kernel gives to whoever asks for any, so that the next is nobody's either.
    ports = range(20_000 + os.getpid() % 10_000, 32_000)
    port = next(each for each in ports if not is_open(each) and not is_open(each + 1))
    monkeypatch.setattr("conftest.free_port", itertools.chain([port], itertools.repeat(port + 2)).__next__)
    with gunicorn(tmp_path, model_path=iris_file) as first:
        with gunicorn(tmp_path, ready=False, model_path=iris_file, port=first.port, makelevel=1) as second:
            assert second.process.wait(60) == 1
            said = second.log.read_text()
        assert f"port {first.port} is taken, and JOURNAL_DIR={first.journal_dir} is used by the server of pid" in said
        command = said.strip().splitlines()[-1].partition("beside it: ")[2]
        assert command.endswith(" make run")
        given = {k.lower(): v for k, v in (word.split("=", 1) for word in shlex.split(command)[:-2])}
        with gunicorn(tmp_path, **given) as second:
            second.port = int(given["port"])
            assert second.predict(IRIS) == first.predict(IRIS) == SETOSA


def test_command_under_make_is_make(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file):
        assert assert_refused(tmp_path, model_path=iris_file, makelevel=1).endswith(" make run\n")


def is_open(port: int) -> bool:
    """Return whether somebody listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False


@pytest.mark.long
def test_successor_waits_for_the_requests_in_flight_of_a_server_that_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_model.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    from slow_model import Slow  # type: ignore[import-not-found]

    joblib.dump(Slow().fit([[0.0] * 4, [1.0] * 4], [0, 1]), tmp_path / "slow.joblib")
    answers: list[Any] = []
    with gunicorn(tmp_path, model_path=tmp_path / "slow.joblib", max_wait=60) as first:
        caller = threading.Thread(target=lambda: answers.append(first.predict([[0.0] * 4])))
        caller.start()
        time.sleep(1)
        first.process.send_signal(signal.SIGTERM)
        while is_open(first.port):  # the worker closes it within a second
            time.sleep(0.1)
        with gunicorn(tmp_path, model_path=tmp_path / "slow.joblib", port=first.port) as second:
            caller.join()
            assert answers == [SETOSA]
            assert "waiting" in second.log.read_text()
            assert first.process.wait(10) == 0


@pytest.mark.long
def test_successor_of_a_killed_master_is_not_refused_for_its_workers(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=2) as first:
        first.process.kill()
        first.process.wait()
        while True:  # the workers hold the port a moment longer
            with gunicorn(tmp_path, ready=False, model_path=iris_file, port=first.port) as second:
                second.port = first.port
                deadline = time.monotonic() + 60
                while not second.all_ready() and second.process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.1)
                if "is taken" in second.log.read_text():
                    continue
                assert second.predict(IRIS) == SETOSA
                assert "is used by" not in second.log.read_text()
                return


def holders(path: Path) -> set[int]:
    """Return the processes that hold the lock of a file."""
    inode = path.stat().st_ino
    locks = re.findall(r"FLOCK +ADVISORY +WRITE (\d+) \w+:\w+:(\d+) ", Path("/proc/locks").read_text())
    return {int(pid) for pid, number in locks if int(number) == inode}


@pytest.mark.long
def test_owner_stays_when_the_directory_is_removed_or_the_workers_are_replaced(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=2) as server:
        lock, before = server.journal_dir / "server.lock", server.workers()
        assert holders(lock) == {server.process.pid}
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(lambda: server.workers() and not set(before) & set(server.workers()))
        assert_refused(tmp_path, model_path=iris_file)

        shutil.rmtree(server.journal_dir)
        server.wait_until(lambda: lock.exists() and is_locked(lock))
        (holder,) = holders(lock)
        assert holder in server.workers()
        assert str(server.process.pid) in assert_refused(tmp_path, model_path=iris_file)
        os.kill(holder, signal.SIGKILL)
        server.wait_until(lambda: holders(lock) and holders(lock) <= set(server.workers()) - {holder})
        assert_refused(tmp_path, model_path=iris_file)
        assert server.predict(IRIS) == SETOSA


def children_of(pid: int) -> list[int]:
    """Return the pids of the children of a process."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.long
def test_upgrade_by_sigusr2_hands_the_directory_over(tmp_path: Path, iris_file: Path) -> None:
    # Not by `python -m`, which gunicorn would not repeat.
    program = Path(sys.executable).with_name("gunicorn")
    as_installed = ("sh", "-c", f'shift 3; exec {program} "$@"', "sh")
    with gunicorn(tmp_path, model_path=iris_file, within=as_installed) as server:
        lock = server.journal_dir / "server.lock"
        server.process.send_signal(signal.SIGUSR2)
        server.wait_until(lambda: server.log.read_text().count("serving version") == 2)
        (successor,) = [pid for pid in server.workers() if children_of(pid)]
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(30)
        deadline = time.monotonic() + 30
        while not holders(lock) & set(children_of(successor)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert server.predict(IRIS) == SETOSA
        assert str(successor) in assert_refused(tmp_path, model_path=iris_file)


def test_directory_that_cannot_be_written_is_nobodys(tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "file").touch()
    with gunicorn(tmp_path, model_path=iris_file, journal_dir=tmp_path / "file/journal") as server:
        assert server.predict(IRIS) == SETOSA


# --- addresses


def test_server_with_a_host_that_is_not_here_names_the_setting(tmp_path: Path) -> None:
    log = refusal(tmp_path, host="192.0.2.1")  # reserved for documentation
    assert "Traceback" not in log
    assert "HOST" in log


@contextmanager
def taken(port: int) -> Iterator[int]:
    """Listen on a port, any if it is 0."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("port", [0, 65535], ids=["some port", "the last port"])
def test_server_on_a_taken_port_names_another(tmp_path: Path, port: int) -> None:
    with taken(port) as port:
        log = refusal(tmp_path, port=port)
    assert f"port {port} is taken" in log
    assert "Traceback" not in log
    (other,) = (int(word.removeprefix("PORT=")) for word in log.split() if word.startswith("PORT="))
    assert other != port
    assert 0 < other <= 65535
