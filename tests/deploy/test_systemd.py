"""The units of deploy/systemd: what systemd thinks of them, and what they promise of gunicorn."""

import json
import os
import pwd
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, WORKER_CLASSES, Gunicorn, Load, gunicorn
from nginx_tools import needs_nginx, nginx, one_host, substitute

from settings import Settings

SHIPPED = ROOT / "deploy/systemd"
SERVICE = (SHIPPED / "prediction-server.service").read_text()
IRIS = [[5.1, 3.5, 1.4, 0.2]]
SETOSA = (200, {"prediction": [0]})
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: sudo apt install systemd"
)


@needs_systemd
def test_systemd_has_nothing_to_say_against_the_units(tmp_path: Path) -> None:
    found = shutil.which("true") or ""  # systemd looks whether they are there
    there = {"/opt/%N/.venv/bin/gunicorn": found}
    units = []
    for path in SHIPPED.glob("prediction-server*"):
        units.append(tmp_path / path.name)
        units[-1].write_text(substitute(path.read_text(), there if path.suffix == ".service" else {}))
    assert len(units) == 4
    told = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "prediction-server" not in told.stdout + told.stderr


@needs_systemd
def test_exposure_is_what_the_documentation_says() -> None:
    command = ["systemd-analyze", "security", "--offline=true", SHIPPED / "prediction-server.service"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    (exposure,) = re.findall(r"Overall exposure level for prediction-server.service: ([\d.]+) OK", told.stdout)
    (documented,) = re.findall(r"exposure level is ([\d.]+)", (ROOT / "docs/operations.md").read_text())
    assert abs(float(exposure) - float(documented)) < 0.5  # each version of systemd weighs a little differently


def test_further_services_of_a_host_are_the_same_unit_under_another_name() -> None:
    for kind in ("service", "socket"):
        plain, template = (SHIPPED / f"prediction-server{at}.{kind}" for at in ("", "@"))
        assert template.resolve() == plain
        lines = [line for line in plain.read_text().splitlines() if not line.startswith(("#", "Description="))]
        named = {line for line in lines if "prediction" in line}  # where it does not say %N or %i, two would share it
        assert named <= {"User=predictions%i", "Group=predictions%i"}


def directives(name: str) -> list[str]:
    """Return the values of a directive in the service's unit."""
    return re.findall(rf"^{name}=(.*)$", SERVICE, re.MULTILINE)


def test_service_waits_longer_than_the_requests_in_flight_have() -> None:
    (stop,) = directives("TimeoutStopSec")
    assert int(stop) > Settings().graceful_timeout + 5
    assert directives("Type") == ["notify"]


def test_gunicorn_tells_systemd_when_it_listens(tmp_path: Path, iris_file: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(path))
        told.settimeout(30)
        with gunicorn(tmp_path, ready=False, model_path=iris_file, notify_socket=path) as server:
            message = told.recv(4096).decode().splitlines()
            assert "READY=1" in message
            socket.create_connection(("127.0.0.1", server.port), timeout=5).close()  # it is there already
            server.wait_until(server.all_ready)
            assert server.predict(IRIS) == SETOSA


def test_start_that_is_refused_is_tried_again_more_slowly_than_one_that_crashed(tmp_path: Path) -> None:
    (tmp_path / "users.json").write_text("[]")
    with gunicorn(tmp_path, ready=False, model_path=tmp_path / "none.joblib") as server:
        refused = server.process.wait(60)
    assert "cannot start" in server.log.read_text()
    (stop,) = directives("ExecStopPost")
    program, option, script = shlex.split(stop.replace("$$", "$"))
    (tmp_path / "sleep").write_text('#!/bin/sh\nprintf %s "$1"\n')
    (tmp_path / "sleep").chmod(0o755)
    slept = {}
    for status in (str(refused), "0", "3", "TERM", "KILL"):
        environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "EXIT_STATUS": status}
        slept[status] = subprocess.run([program, option, script], env=environ, capture_output=True, check=True).stdout
    assert slept == {"1": b"30", "0": b"", "3": b"", "TERM": b"", "KILL": b""}
    (wait,) = directives("TimeoutStopSec")
    assert int(wait) > 30


@contextmanager
def held_socket(path: Path) -> Iterator[dict[str, Any]]:
    """Hold a listening socket as systemd does; yield what hands it to a gunicorn."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(2048)
        yield handed_in(listener)


def handed_in(listener: socket.socket) -> dict[str, Any]:
    """Return what hands a listening socket to a gunicorn as systemd does."""
    # systemd passes sockets from descriptor 3 on, and says which process they are for.
    script = f'exec 3<&{listener.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
    return {"within": ("bash", "-c", script, "as-systemd"), "pass_fds": [listener.fileno()]}


@pytest.mark.long
@needs_nginx
def test_restart_with_a_socket_that_systemd_holds_fails_no_request(tmp_path: Path, iris_file: Path) -> None:
    path = tmp_path / "held.sock"
    with ExitStack() as running:
        held = running.enter_context(held_socket(path))
        front = running.enter_context(nginx(tmp_path / "nginx", one_host(path)))
        given = {"model_path": iris_file, "trusted_proxies": 1, "web_concurrency": 2} | held
        server = running.enter_context(gunicorn(tmp_path, **given))
        assert "http://127.0.0.1" not in server.log.read_text()  # HOST and PORT are not where to ask
        with Load(front, pause=0.03) as load:
            front.wait_until(lambda: len(load.statuses) > 20)
            assert server.stop() == 0
            assert path.is_socket()  # it is not gunicorn's to remove
            before = len(load.statuses)
            server = running.enter_context(gunicorn(tmp_path, **given))
            server.wait_until(lambda: len(load.statuses) > before + 20)
        assert load.errors == []
        assert set(load.statuses) == {200}


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_first_workers_answer_what_waited_in_the_socket_only_with_a_model(
    tmp_path: Path, iris_file: Path, worker_class: str
) -> None:
    """Connections that were made before the start are answered by the model, not with 503."""
    path = tmp_path / "held.sock"
    with held_socket(path) as held, socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(60)
        caller.connect(str(path))
        caller.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        with gunicorn(tmp_path, ready=False, model_path=iris_file, worker_class=worker_class, **held):
            assert caller.recv(12) == b"HTTP/1.1 200"


def test_reload_as_the_unit_does_it_starts_new_workers(tmp_path: Path, iris_file: Path) -> None:
    *_, reload = directives("ExecReload")  # the first only compares the code: tests/operations
    with gunicorn(tmp_path, model_path=iris_file) as server:
        before = server.workers()
        subprocess.run(["sh", "-c", reload], env={"MAINPID": str(server.process.pid)}, check=True)
        server.wait_until(lambda: server.workers() and not set(before) & set(server.workers()))
        server.wait_until(lambda: server.log.read_text().count("serving version") >= 2)
        assert server.predict(IRIS) == SETOSA


def test_master_that_ends_takes_its_workers_with_it(tmp_path: Path, iris_file: Path) -> None:
    """So that systemd's Restart starts from nothing, and no worker is left on the port."""

    def are_gone(server: Gunicorn, workers: list[int]) -> bool:
        return not any(Path(f"/proc/{pid}").exists() for pid in workers)

    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=2) as server:
        workers = server.workers()
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        deadline = time.monotonic() + 20
        while not are_gone(server, workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert are_gone(server, workers)


# --- commands as the service runs

ENVIRONMENT_FILES = (
    "A=1",
    "  A = 1 \nB=2\t\n",
    "# A=1\n; B=2\nC=3 # no comment\n",
    "A='it is'  \" quoted\" B\nB='x\ny'\n",
    'A="a \\"b\\" \\$ \\x `" \nB=\\$\\ and\\ more\\ \\ \n',
    'A=over \\\n  two lines\nB="and \\\n two"\n',
    'A=in"side"\nB=\'open\nC=1\n',
    "export A=1\nnonsense\nB==\n0C=1\r\nC=1\r\n",
    "A=first\nA=second\nB=/srv/päth;#\n",
)
GENERATOR = Path("/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator")


@pytest.mark.skipif(not GENERATOR.exists(), reason="needs systemd's generators: sudo apt install systemd")
@pytest.mark.parametrize("text", ENVIRONMENT_FILES)
def test_environment_file_is_read_as_systemd_reads_it(tmp_path: Path, text: str) -> None:
    """Compared with what reads files of the same syntax without a running systemd, for users' sessions."""
    (tmp_path / "environment.d").mkdir()
    (tmp_path / "environment.d" / "test.conf").write_text(text, newline="")
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    quoted = subprocess.run([GENERATOR], env=environ, capture_output=True, text=True, check=True).stdout
    script = f"{quoted}\nfor name in A B C; do [ -v $name ] && printf '%s=%s\\0' $name \"${{!name}}\"; done; true"
    shown = subprocess.run(["bash", "-c", script], env={}, capture_output=True, text=True, check=True).stdout
    expected = dict(each.split("=", 1) for each in shown.split("\0") if each)
    assert expected
    found = runpy.run_path(str(SHIPPED / "as_service.py"))["read_environment"](text)
    assert {name: value.replace("\n", "\\n") for name, value in found.items()} == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_command_runs_as_the_service_does(tmp_path: Path) -> None:
    """With a python that shows what it was given: the service's user, settings and directory, and nothing else's."""
    script = (
        "import json, os; print(json.dumps([os.getuid(), os.getgroups(), os.umask(0), os.getcwd(), dict(os.environ)]))"
    )
    with tempfile.TemporaryDirectory() as place:  # which that user may enter
        Path(place).chmod(0o755)
        (Path(place) / "python").symlink_to("/usr/bin/python3")
        (Path(place) / "settings").write_text("USERS_FILE='/srv/the users.json'\n")
        (Path(place) / "settings").chmod(0o600)
        changed = {"User=predictions%i": "User=nobody", "/etc/%N.env": f"{place}/settings"}
        changed |= {"/opt/%N/.venv/bin": place, "/opt/%N": place}
        (Path(place) / "prediction-server.service").write_text(substitute(SERVICE, changed))
        (Path(place) / "prediction-server.service.d").mkdir()
        (Path(place) / "prediction-server.service.d" / "override.conf").write_text(
            "[Service]\nEnvironment=PORT=5001 X=y\n"
        )
        run = f"""import pathlib, runpy, sys
module = runpy.run_path({shutil.copy(SHIPPED / "as_service.py", place)!r})
module["main"].__globals__["INSTALLED"] = pathlib.Path({place!r})
module["main"](sys.argv[1:])"""
        given = os.environ | {"SUDO_USER": "erin", "MODEL_DIR": "/root/models", "TERM": "dumb"}
        command = [sys.executable, "-c", run, "-c", script]
        shown = subprocess.run(command, env=given, capture_output=True, text=True, check=True).stdout
        user, groups, mask, directory, environ = json.loads(shown)
        assert (user, 0 in groups, mask, directory) == (pwd.getpwnam("nobody").pw_uid, False, 0o077, place)
    expected = {"USERS_FILE": "/srv/the users.json", "TRUSTED_PROXIES": "1", "PORT": "5001", "X": "y"}
    assert expected.items() <= environ.items()
    assert (environ["SUDO_USER"], environ["USER"]) == ("erin", "nobody")
    assert "MODEL_DIR" not in environ
