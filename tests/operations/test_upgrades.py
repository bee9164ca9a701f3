"""Code that changes under a running server: its workers keep the code it was started with, and a reload is refused."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import ROOT, WORKER_CLASSES, Gunicorn, Load, basic, gunicorn

from settings import EXTENSIONS

IRIS = [[5.1, 3.5, 1.4, 0.2]]
SETOSA = (200, {"prediction": [0]})
OTHER = "from settings import what_only_the_new_code_has\n"


def pull(copy: Path) -> None:
    """Change each of the product's files, so that none of them goes with the old ones."""
    for path in [
        *copy.glob("*.py"),
        *(path for room in copy.glob("*/__init__.py") for path in room.parent.rglob("*.py")),
    ]:
        text = path.read_text()
        path.write_text(text.replace("\nimport ", f"\n{OTHER}import ", 1) if "\nimport " in text else text + OTHER)


def replaced(server: Gunicorn, signalled: int, count: int = 1) -> None:
    """Send the signal to a worker or the master, and wait until so many new workers serve."""
    served = server.log.read_text().count("serving version")
    os.kill(signalled, signal.SIGHUP if signalled == server.process.pid else signal.SIGKILL)
    server.wait_until(lambda: server.log.read_text().count("serving version") >= served + count)


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_worker_that_dies_after_a_pull_is_replaced_by_one_with_the_same_code(
    tmp_path: Path, copy: Path, iris_file: Path, worker_class: str
) -> None:
    given = {"model_path": iris_file, "web_concurrency": 2, "worker_class": worker_class}
    with gunicorn(tmp_path, within=("env", "-C", str(copy)), **given) as server:
        pull(copy)
        with Load(server) as load:
            for worker in server.workers():
                replaced(server, worker)
            replaced(server, server.process.pid, count=2)  # a reload brings no other code either, and ends nothing
        assert {answer.status for answer in load.answers} == {200}
        assert server.predict(IRIS) == SETOSA
        for path, user in pages():
            assert server.ask("GET", path, Authorization=basic(user))[0] == 200, server.log.read_text()
        log = server.log.read_text()
        assert "what_only_the_new_code_has" not in log
        assert "Traceback" not in log
        assert "was sent SIGKILL" in log  # gunicorn knows how they ended


def pages() -> list[tuple[str, str]]:
    """Return paths whose modules may be imported late, and who may ask."""
    found = {"telemetry": ("/metrics", "metrics"), "endpoints.docs": ("/openapi.json", "predict")}
    found["endpoints.monitor_page"] = ("/monitor", "monitor")
    return [
        found[name] for name in EXTENSIONS if name in found and (ROOT / f"{name.replace('.', '/')}").parent.exists()
    ]


def reload_as_the_unit(copy: Path, server: Gunicorn) -> Any:
    """Run what the unit's first ExecReload does, in the service's directory and with its settings."""
    environ = {"PATH": os.environ["PATH"], "JOURNAL_DIR": str(server.journal_dir)}
    unit = (ROOT / "deploy/systemd/prediction-server.service").read_text()
    refuse, _ = [line.partition("=")[2] for line in unit.splitlines() if line.startswith("ExecReload=")]
    assert ".venv/bin/python" in refuse
    words = {"${MAINPID}": str(server.process.pid), ".venv/bin/python": sys.executable}
    command = [
        re.sub("|".join(map(re.escape, words)), lambda word: words[word[0]], each) for each in shlex.split(refuse)
    ]
    return subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, check=False)


def test_reload_is_refused_once_the_code_has_changed(tmp_path: Path, copy: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, within=("env", "-C", str(copy)), model_path=iris_file) as server:
        assert reload_as_the_unit(copy, server).returncode == 0
        text = (copy / "web/body.py").read_text()
        (copy / "web/body.py").write_text(text + "\n")
        refused = reload_as_the_unit(copy, server)
        assert refused.returncode == 1
        assert "web/body.py" in refused.stderr
        assert "systemctl restart prediction-server" in refused.stderr
        (copy / "web/body.py").write_text(text)  # the way back: it is what is served again, whatever its date is
        assert reload_as_the_unit(copy, server).returncode == 0
        (copy / "web/another.py").touch()
        assert "web/another.py" in reload_as_the_unit(copy, server).stderr


def test_reload_is_not_refused_without_the_room_that_knows(tmp_path: Path, copy: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, within=("env", "-C", str(copy)), model_path=iris_file) as server:
        shutil.rmtree(copy / "operations")
        assert reload_as_the_unit(copy, server).returncode == 0


def test_reload_is_refused_once_a_package_has_changed(tmp_path: Path, copy: Path, iris_file: Path) -> None:
    installed = tmp_path / "site-packages"
    for version in ("1.0", "1.1"):
        (installed / f"some_library-{version}.dist-info").mkdir(parents=True)
    (installed / "some_library-1.0.dist-info/RECORD").write_text("some_library.py,sha256=abc,1\n")
    within = ("env", "-C", str(copy), f"PYTHONPATH={tmp_path}:{installed}")
    with gunicorn(tmp_path, within=within, model_path=iris_file) as server:
        (installed / "some_library-1.0.dist-info/RECORD").rename(installed / "some_library-1.1.dist-info/RECORD")
        environ = {"PATH": os.environ["PATH"], "JOURNAL_DIR": str(server.journal_dir), "PYTHONPATH": str(installed)}
        command = [sys.executable, "-m", "server", "check", "--reload", str(server.process.pid)]
        refused = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert "some_library 1.0, some_library 1.1" in refused.stderr


LATE = """
class Late:
    n_features_in_ = 4

    def __getstate__(self):
        return {"some": "state"}

    def __setstate__(self, state):
        import late_library
        self.value = late_library.VALUE

    def predict(self, rows):
        return [self.value] * len(rows)
"""


@pytest.mark.long
def test_worker_does_not_mix_a_model_with_a_library_that_was_installed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages"

    def install(library: str, version: str, value: int) -> None:
        for old in installed.glob(f"{library}-*"):
            shutil.rmtree(old)
        (installed / f"{library}-{version}.dist-info").mkdir(parents=True)
        (installed / f"{library}.py").write_text(f"VALUE = {value}\n")
        (installed / f"{library}-{version}.dist-info/RECORD").write_text(f"{library}.py,sha256={value},10\n")

    for library in ("late_library", "another_library"):
        install(library, "1.0", 1)
    (tmp_path / "late_module.py").write_text(LATE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from late_module import Late  # type: ignore[import-not-found]  # just written

    joblib.dump(Late(), tmp_path / "late.joblib")
    within = ("env", f"PYTHONPATH={tmp_path}:{installed}")
    with gunicorn(tmp_path, within=within, model_path=tmp_path / "late.joblib", web_concurrency=2) as server:
        install("another_library", "1.1", 2)
        replaced(server, server.workers()[0])  # the model does not need that one
        install("late_library", "1.1", 2)
        with Load(server) as load:
            os.kill(server.workers()[0], signal.SIGKILL)
            server.wait_until(lambda: "NOT READY" in server.log.read_text())  # and waits
            before = len(load.answered)
            server.wait_until(lambda: len(load.answered) > before + 50)  # by the other one
        assert {answer.status for answer in load.answers} == {200}
        assert server.predict(IRIS) == (200, {"prediction": [1]})
        assert "late_library 1.1 was installed after the server was started" in server.log.read_text()
        for worker in server.workers():
            os.kill(worker, signal.SIGKILL)
        server.wait_until(lambda: server.log.read_text().count("NOT READY") == 3)
        server.wait_until(lambda: server.predict(IRIS)[0] == 503)  # no answer rather than another one


def test_master_that_left_no_note_may_be_reloaded(tmp_path: Path, copy: Path) -> None:
    command = [sys.executable, "-m", "server", "check", "--reload", str(os.getpid())]
    environ = {"PATH": os.environ["PATH"], "JOURNAL_DIR": str(tmp_path)}
    for note in (None, b"", b"{", b"[]", b'{"pid": 1}', b'{"pid": 1, "code": {}}'):
        if note is not None:
            (tmp_path / "code.json").write_bytes(note)
        done = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout[:8]) == (0, "unknown:")
