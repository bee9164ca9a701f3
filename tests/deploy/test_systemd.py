"""The units of deploy/systemd: what systemd thinks of them, and what they promise of gunicorn."""

import re
import shutil
import signal
import socket
import subprocess
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
    there = {"/opt/prediction-server/.venv/bin/gunicorn": shutil.which("true") or ""}  # systemd looks whether it is
    (tmp_path / "prediction-server.service").write_text(substitute(SERVICE, there))
    shutil.copy(SHIPPED / "prediction-server.socket", tmp_path)
    units = [str(tmp_path / f"prediction-server.{kind}") for kind in ("service", "socket")]
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


@contextmanager
def held_socket(path: Path) -> Iterator[dict[str, Any]]:
    """Hold a listening socket as systemd does; yield what hands it to a gunicorn."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(2048)
        # systemd passes sockets from descriptor 3 on, and says which process they are for.
        script = f'exec 3<&{listener.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
        yield {"within": ("bash", "-c", script, "as-systemd"), "pass_fds": [listener.fileno()]}


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
    (reload,) = directives("ExecReload")
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
