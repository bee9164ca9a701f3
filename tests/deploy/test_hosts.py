"""Several hosts behind nginx, each a network namespace with a gunicorn of its own, under constant load.

The hosts have the addresses that deploy/nginx/upstream-several-hosts.conf names, in a network that nothing else is in.
"""

import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import joblib
import pytest
import runbook
from conftest import PASSWORD, Gunicorn, Load, basic, gunicorn, records, write_users
from nginx_tools import SHIPPED, Nginx, needs_nginx, nginx
from werkzeug.security import generate_password_hash

from bench.overload import Slow

HOSTS = ("10.0.0.11", "10.0.0.12", "10.0.0.13")
IRIS = [[5.1, 3.5, 1.4, 0.2]]
SETOSA = (200, {"prediction": [0]})
BODY = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'
BACK = 20.0  # seconds within which a host that serves again is asked again; fail_timeout is 5
SILENT = 20.0  # seconds that a host is away without a word: the kernel gives up on a request to it after some 13


def ip(*arguments: str) -> None:
    """Run iproute2's ip."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def can_make_namespaces() -> bool:
    """Tell whether this process may do what these tests need."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"probe-{uuid.uuid4().hex[:8]}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except subprocess.CalledProcessError:
        return False
    return True


pytestmark = [
    pytest.mark.long,
    needs_nginx,
    pytest.mark.skipif(not can_make_namespaces(), reason="needs network namespaces: root, sudo apt install iproute2"),
]


class Namespace:
    """A network namespace. In a `with` of it, this thread opens sockets there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.within = ("ip", "netns", "exec", name)
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
        self._outside = os.open("/proc/self/ns/net", os.O_RDONLY)
        self._inside = os.open(f"/run/netns/{name}", os.O_RDONLY)
        self._setns = ctypes.CDLL(None, use_errno=True).setns  # os.setns is there from Python 3.12 on

    def __enter__(self) -> None:
        self._enter(self._inside)

    def __exit__(self, *_: object) -> None:
        self._enter(self._outside)

    def _enter(self, namespace: int) -> None:
        if self._setns(namespace, 0x40000000) != 0:  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), "setns")

    def delete(self) -> None:
        """Remove it; what is in it goes with it."""
        os.close(self._inside)
        os.close(self._outside)
        ip("netns", "del", self.name)


class Front(Nginx):
    """An nginx in a namespace of its own, where its callers are as well."""

    def __init__(self, running: Nginx, namespace: Namespace) -> None:
        super().__init__(running.process, running.place, (running.port, running.http_port, running.plain_port))
        self.namespace = namespace

    def connect(self, timeout: float = 60.0, source: str = "127.0.0.1") -> http.client.HTTPSConnection:
        """Open a connection from within the namespace."""
        connection = super().connect(timeout, source)
        with self.namespace:
            connection.connect()
        return connection


class Host:
    """A host: a namespace with an address, and the gunicorn that runs in it."""

    def __init__(self, number: int, front: Namespace, place: Path, model: Path) -> None:
        self.address, self.place, self.model = HOSTS[number - 1], place, model
        self.namespace = Namespace(f"{front.name}-{number}")
        self._front, self._port = front, f"host{number}"
        ip("-n", front.name, "link", "add", self._port, "type", "veth", "peer", "eth0", "netns", self.namespace.name)
        ip("-n", front.name, "link", "set", self._port, "master", "hosts", "up")
        ip("-n", self.namespace.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.namespace.name, "link", "set", "eth0", "up")
        self._running = ExitStack()
        self.app: Gunicorn | None = None
        place.mkdir()

    def start(self, ready: bool = True, **settings: Any) -> None:
        """Start gunicorn as a host behind nginx does: at its address, and with addresses taken from nginx."""
        given = {"host": self.address, "port": 5000, "trusted_proxies": 1, "model_path": self.model} | settings
        self.app = self._running.enter_context(gunicorn(self.place, within=self.namespace.within, ready=ready, **given))

    def kill(self) -> None:
        """End all its processes at once."""
        assert self.app
        os.killpg(self.app.process.pid, signal.SIGKILL)
        self.app.process.wait()

    def stop(self) -> None:
        """Stop it as systemd does."""
        assert self.app
        assert self.app.stop() == 0

    def cut_off(self) -> None:
        """Take its network away: nothing is answered, nothing refused."""
        ip("-n", self._front.name, "link", "set", self._port, "down")

    def join(self) -> None:
        """Give its network back."""
        ip("-n", self._front.name, "link", "set", self._port, "up")

    def served(self) -> int:
        """Return how many predictions it has recorded."""
        return len(records(self.place / "journal"))

    def check_is_asked_again(self) -> float:
        """Wait until it has a part of the load again; return the seconds that this took."""
        assert self.app
        before, began = self.served(), time.monotonic()
        self.app.wait_until(lambda: self.served() > before + 5, BACK)
        return time.monotonic() - began

    def close(self) -> None:
        """End it and its namespace."""
        self._running.close()
        self.namespace.delete()


@contextmanager
def hosts_behind_nginx(place: Path, model: Path, count: int = 3) -> Iterator[tuple[Front, list[Host]]]:
    """Make the hosts, not started yet, and an nginx in front of them; all of it is gone with the block."""
    with ExitStack() as made:
        namespace = Namespace(f"test-{uuid.uuid4().hex[:8]}")
        made.callback(namespace.delete)
        ip("-n", namespace.name, "link", "add", "hosts", "type", "bridge")
        ip("-n", namespace.name, "addr", "add", "10.0.0.1/24", "dev", "hosts")
        ip("-n", namespace.name, "link", "set", "hosts", "up")
        with namespace:  # each namespace has these settings of its own
            for line in (SHIPPED / "sysctl-several-hosts.conf").read_text().splitlines():
                if line and not line.startswith("#"):
                    name, value = line.split(" = ")
                    Path("/proc/sys", name.replace(".", "/")).write_text(value)
        hosts = []
        for number in range(1, count + 1):
            hosts.append(Host(number, namespace, place / str(number), model))
            made.callback(hosts[-1].close)
        upstream = (SHIPPED / "upstream-several-hosts.conf").read_text()
        running = made.enter_context(nginx(place / "nginx", upstream, within=namespace.within))
        yield Front(running, namespace), hosts


def check_all_answered(load: Load, at_least: int) -> None:
    """Check that no caller saw a failure."""
    assert load.errors == []
    assert set(load.statuses) == {200}
    assert len(load.statuses) >= at_least


def logged(front: Front) -> list[dict[str, Any]]:
    """Return the lines of nginx's access log."""
    return [json.loads(line) for line in front.access_log.read_text().splitlines()]


def slowest(load: Load) -> float:
    """Return the seconds that the slowest answer took."""
    return max(answer.seconds for answer in load.answers)


def test_host_that_is_killed_or_has_no_model_costs_no_request(tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "broken.joblib").write_bytes(b"not a model")
    with hosts_behind_nginx(tmp_path, iris_file) as (front, (first, second, third)):
        for host in (first, second):
            host.start()
        third.start(ready=False, model_path=tmp_path / "broken.joblib")
        third.app.wait_until(lambda: "NOT READY" in third.app.log.read_text())
        with Load(front, pause=0.05) as load:
            second.app.wait_until(lambda: first.served() > 5 and second.served() > 5)
            first.kill()
            time.sleep(2.0)
            asked_third = [line for line in logged(front) if third.address in line["upstream"]]
            shutil.copy(iris_file, tmp_path / "broken.joblib")
            third.app.process.send_signal(signal.SIGHUP)
            third.app.wait_until(lambda: "serving version" in third.app.log.read_text())
            third.check_is_asked_again()
        check_all_answered(load, 15)
        assert first.served() + second.served() + third.served() >= len(load.statuses)
        assert {line["upstream_status"].partition(",")[0] for line in asked_third} == {"502"}
        assert 1 <= len(asked_third) <= 5  # once in five seconds


def test_hosts_fail_and_come_back_under_load_without_a_failed_request(tmp_path: Path, iris_file: Path) -> None:
    with hosts_behind_nginx(tmp_path, iris_file) as (front, hosts):
        first, second, third = hosts
        for host in hosts:
            host.start()
        with Load(front, callers=4, pause=0.03) as load:
            for host in hosts:
                host.check_is_asked_again()

            first.kill()
            time.sleep(3.0)
            first.start()
            took = {"killed": first.check_is_asked_again()}
            killed = slowest(load)

            second.cut_off()
            time.sleep(SILENT)
            second.join()
            took["cut off"] = second.check_is_asked_again()

            third.stop()
            time.sleep(3.0)
            third.start()
            took["stopped"] = third.check_is_asked_again()
        check_all_answered(load, 300)
        print(f"{len(load.statuses)} requests; seconds until asked again {took}; slowest {killed} {slowest(load)}")
        assert killed < 12.0  # a host that does not say that it is gone costs 13
        assert slowest(load) < 30.0  # nginx itself would wait for 60


def test_request_that_an_overloaded_host_refuses_is_not_given_to_the_others(tmp_path: Path) -> None:
    """Nor is a host given up because it is overloaded; what goes on from one without a model is refused once."""
    joblib.dump(Slow(0.3).fit([[1.0, 2.0]]), tmp_path / "model.joblib")
    (tmp_path / "broken.joblib").write_bytes(b"not a model")
    with hosts_behind_nginx(tmp_path, tmp_path / "model.joblib") as (front, hosts):
        *loaded, empty = hosts
        for host in loaded:
            host.start(max_wait=0.1)
        empty.start(ready=False, model_path=tmp_path / "broken.joblib")
        empty.app.wait_until(lambda: "NOT READY" in empty.app.log.read_text())

        def ask(_: int) -> int:
            given = {"Content_Type": "application/json", "Authorization": basic("predict")}
            return front.ask("POST", "/predict", b'{"data": [[1, 2]]}', **given)[0]

        with ThreadPoolExecutor(40) as pool:
            statuses = Counter(pool.map(ask, range(120)))
        assert statuses.keys() == {200, 503}
        assert statuses[503] > 40
        front.wait_until(lambda: len(logged(front)) == 120)
        first_asked, last_asked = set(), set()
        for line in logged(front):
            asked = list(zip(line["upstream"].split(", "), line["upstream_status"].split(", "), strict=True))
            assert [status for _, status in asked[:-1]] == ["502"] * (len(asked) - 1)  # a 503 is the last
            first_asked.add(asked[0])
            last_asked.add(asked[-1])
        assert (f"{empty.address}:5000", "502") in first_asked
        assert last_asked == {(f"{host.address}:5000", status) for host in loaded for status in ("200", "503")}


def test_rolling_restart_fails_no_request(tmp_path: Path, iris_file: Path) -> None:
    with hosts_behind_nginx(tmp_path, iris_file) as (front, hosts):
        for host in hosts:
            host.start(web_concurrency=2)
        with Load(front, callers=4, pause=0.03) as load:
            for host in hosts:  # reloaded one after the other
                assert host.app
                wanted = host.app.log.read_text().count("serving version") + 2
                host.app.process.send_signal(signal.SIGHUP)
                host.app.wait_until(
                    lambda app=host.app, wanted=wanted: app.log.read_text().count("serving v") >= wanted
                )
            for host in hosts:  # and stopped and started one after the other
                host.stop()
                host.start(web_concurrency=2)
                host.check_is_asked_again()
        check_all_answered(load, 100)
        assert slowest(load) < 45.0  # while all workers of a host are new ones, requests wait for them


# Restarts the host that the test at the other end of two pipes has; it runs as `ssh HOST sudo systemctl restart …`.
SSH = """#!/bin/sh
[ "$2 $3 $4 $5" = "sudo systemctl restart prediction-server" ] && echo $1 >{place}/asked && read done <{place}/done
"""


def test_loop_that_restarts_one_host_after_the_other_fails_no_request(tmp_path: Path, iris_file: Path) -> None:
    (loop,) = runbook.commands(__file__, "operations.md", "Restarts, drain and time-outs")
    for name in ("asked", "done"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "ssh").write_text(SSH.format(place=tmp_path))
    (tmp_path / "ssh").chmod(0o755)
    with hosts_behind_nginx(tmp_path, iris_file) as (front, hosts):
        for host in hosts:
            host.start()
        with Load(front, callers=4, pause=0.03) as load:
            environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
            typed = subprocess.Popen([*front.namespace.within, "bash", "-eu", "-c", loop], env=environ)
            for host in hosts:
                assert (tmp_path / "asked").read_text() == f"{host.address}\n"
                host.stop()
                host.start(ready=False)
                (tmp_path / "done").write_text("done\n")
            assert typed.wait(120) == 0
            for host in hosts:
                host.check_is_asked_again()
        check_all_answered(load, 50)


def test_hosts_that_were_all_away_are_asked_as_soon_as_one_is_back(tmp_path: Path, iris_file: Path) -> None:
    with hosts_behind_nginx(tmp_path, iris_file) as (front, hosts):
        for host in hosts:
            host.start()
        assert front.predict(IRIS) == SETOSA
        for host in hosts:
            host.kill()
        headers = {"Content_Type": "application/json", "Authorization": basic("predict")}
        for _ in range(5):  # until all are marked as failed
            status, told, _ = front.ask("POST", "/predict", BODY, **headers)
            assert (status, told["Content-Type"], told["Retry-After"]) == (502, "application/problem+json", "5")
        hosts[1].start()
        assert front.predict(IRIS) == SETOSA


def test_hosts_that_strangers_keep_busy_still_answer_good_callers(tmp_path: Path, iris_file: Path) -> None:
    with hosts_behind_nginx(tmp_path, iris_file) as (front, hosts):
        for host in hosts:
            write_users(host.place / "users.json", generate_password_hash(PASSWORD))
            host.start()
        for host in hosts:  # the good caller's password is known to each, as after a minute of work
            assert host.app
            while host.served() == 0:
                assert front.predict(IRIS) == SETOSA
        seen: Counter[int] = Counter()
        with Load(front, callers=2, pause=0.05) as load:
            for number in range(3):
                seen.update(strangers(front, number, 150))
        check_all_answered(load, 20)
        assert seen[503] > 30
        assert seen[401] > 10
        assert seen.keys() <= {401, 429, 503}


def strangers(front: Front, number: int, count: int) -> list[int]:
    """Ask at once with as many wrong passwords from as many addresses; return the statuses."""
    with ExitStack() as opened:
        connections = []
        for each in range(count):
            given = {"Content-Type": "application/json", "Authorization": basic("predict", f"wrong {number} {each}")}
            head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
            with front.namespace:
                made = socket.create_connection(
                    ("127.0.0.1", front.plain_port), 30, (f"127.0.{number + 1}.{each + 1}", 0)
                )
            connections.append(opened.enter_context(made))
            made.sendall(
                f"POST /predict HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY
            )
        return [int(made.recv(12).split()[1]) for made in connections]
