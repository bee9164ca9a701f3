"""Callers that take all the connections they can get, of an nginx that is set up as docs/operations.md says.

nginx and the callers are in a network namespace of their own, whose firewall is that of the set-up. The app is outside.
"""

import contextlib
import re
import resource
import shutil
import socket
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Load, gunicorn, read_all
from nginx_tools import SHIPPED, needs_nginx, nginx, one_host, substitute
from test_hosts import Front, Namespace, can_make_namespaces, ip

FIREWALL = (SHIPPED / "connections.nft").read_text()
LIMIT = 256  # connections of an address
HALF_A_HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Slow: "
HELD = 15.0  # seconds for the others' requests; less than the 20 after which nginx itself ends such a head
NFT = shutil.which("nft", path="/usr/sbin:/usr/bin")

pytestmark = pytest.mark.skipif(
    not (NFT and can_make_namespaces()), reason="needs root and nftables: sudo apt install iproute2 nftables"
)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A network of its own, in which all of 2001:db8::/32 is this machine, as all of 127.0.0.0/8 is anyway."""
    made = Namespace(f"test-{uuid.uuid4().hex[:8]}")
    ip("-n", made.name, "-6", "route", "add", "local", "2001:db8::/32", "dev", "lo")
    with made:
        Path("/proc/sys/net/ipv6/ip_nonlocal_bind").write_text("1")
    yield made
    made.delete()


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Let this process have as many connections as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def load_firewall(namespace: Namespace, *ports: int) -> None:
    """Load the firewall for these ports, twice, as at a restart of nginx."""
    text = FIREWALL.replace("{ 80, 443 }", f"{{ {', '.join(map(str, ports))} }}")
    for _ in range(2):
        command = [*namespace.within, NFT, "-f", "-"]
        subprocess.run(command, input=text, text=True, check=True)  # type: ignore[arg-type]


class Callers:
    """Connections from some addresses that send `first` and no more; `opened` counts those that came about."""

    def __init__(self, namespace: Namespace, to: tuple[str, int], first: bytes = HALF_A_HEAD) -> None:
        self._namespace, self._to, self._first = namespace, to, first
        self.opened: Counter[str] = Counter()
        self.connections: list[socket.socket] = []

    def call(self, address: str, times: int = 1) -> int:
        """Connect so often from an address; return how many of its connections came about by now."""
        for _ in range(times):
            with self._namespace, contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
                made = socket.create_connection(self._to, 30, (address, 0))
                self.connections.append(made)
                made.sendall(self._first)
                self.opened[address] += 1
        return self.opened[address]

    def close(self) -> None:
        """End all connections."""
        for each in self.connections:
            each.close()


@pytest.mark.parametrize(
    ("here", "one", "same", "another"),
    [
        ("127.0.0.1", "127.0.0.2", "127.0.0.2", "127.0.0.3"),
        ("2001:db8::1", "2001:db8:0:2::1", "2001:db8:0:2:a:b:c:d", "2001:db8:0:3::1"),
    ],
    ids=["address", "network"],
)
def test_address_has_so_many_connections_and_others_have_theirs(
    here: str, one: str, same: str, another: str, namespace: Namespace
) -> None:
    family = socket.AF_INET6 if ":" in here else socket.AF_INET
    with namespace, socket.create_server((here, 0), family=family, backlog=2048) as listener:
        to = listener.getsockname()[:2]
        load_firewall(namespace, to[1])
        with contextlib.closing(Callers(namespace, to, b"")) as callers:
            assert callers.call(one, LIMIT + 20) == LIMIT
            if same != one:
                assert callers.call(same) == 0
            assert callers.call(another, LIMIT) == LIMIT
        for _ in range(2 * LIMIT):  # what both sides have closed does not count any more
            listener.accept()[0].close()
        assert callers.call(one) == LIMIT + 1
        callers.close()


@contextlib.contextmanager
def served(namespace: Namespace, place: Path, model: Path, changes: dict[str, str] | None = None) -> Iterator[Front]:
    """Serve through an nginx that is in the namespace, behind the firewall."""
    app = gunicorn(place, "--bind", f"unix:{place}/gunicorn.sock", trusted_proxies=1, model_path=model)
    upstream = one_host(place / "gunicorn.sock")
    with app, nginx(place / "nginx", upstream, changes, within=namespace.within) as front:
        load_firewall(namespace, front.port, front.http_port, front.plain_port)
        yield Front(front, namespace)


def check_others_are_served(front: Front, attack: Callable[[], Any]) -> None:
    """Check that good callers are answered while connections are being taken, and while they are held."""
    with Load(front, pause=0.02) as load:
        front.wait_until(lambda: len(load.statuses) >= 10)
        attack()
        before = len(load.statuses)
        front.wait_until(lambda: len(load.statuses) >= before + 60, HELD)
    assert load.errors == []
    assert set(load.statuses) == {200}


@pytest.mark.long
@needs_nginx
def test_2000_unfinished_heads_of_one_address_keep_nobody_else_waiting(
    namespace: Namespace, iris_file: Path, tmp_path: Path
) -> None:
    with served(namespace, tmp_path, iris_file) as front:
        callers = Callers(namespace, ("127.0.0.1", front.plain_port))
        with contextlib.closing(callers):
            check_others_are_served(front, lambda: callers.call("127.0.0.2", 2000))
        assert callers.opened["127.0.0.2"] == LIMIT


@pytest.mark.long
@needs_nginx
def test_3000_unfinished_heads_of_fifteen_addresses_keep_nobody_else_waiting(
    namespace: Namespace, iris_file: Path, tmp_path: Path
) -> None:
    """More than Debian's nginx.conf has connections for, and than a process of systemd's has descriptors."""
    with served(namespace, tmp_path, iris_file) as front:
        callers = Callers(namespace, ("127.0.0.1", front.plain_port))
        with contextlib.closing(callers):
            attack = lambda: [callers.call(f"127.0.0.{number}", 200) for number in range(2, 17)]  # noqa: E731
            check_others_are_served(front, attack)
        assert callers.opened.total() == 3000


@needs_nginx
def test_head_that_does_not_end_is_ended(namespace: Namespace, iris_file: Path, tmp_path: Path) -> None:
    changes = {"client_header_timeout 20s;": "client_header_timeout 1s;"}
    with served(namespace, tmp_path, iris_file, changes) as front:
        callers = Callers(namespace, ("127.0.0.1", front.plain_port))
        with contextlib.closing(callers):
            callers.call("127.0.0.2", 20)
            for each in callers.connections:  # each waits 30 s at most, half as long as nginx would by itself
                assert read_all(each) == b""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: sudo apt install systemd")
def test_systemd_has_nothing_to_say_against_what_nginx_gets(tmp_path: Path) -> None:
    unit = "[Service]\nExecStart=/bin/true\n"
    (tmp_path / "nginx.service").write_text(unit)
    (tmp_path / "nginx.service.d").mkdir()
    shipped = ROOT / "deploy/systemd/nginx-connections.conf"
    (command,) = re.findall(r"^ExecStartPre=-(.*)$", shipped.read_text(), re.MULTILINE)
    shutil.copy(shipped, tmp_path / "nginx.service.d")
    told = subprocess.run(["systemd-analyze", "verify", tmp_path / "nginx.service"], capture_output=True, text=True)
    assert (told.returncode, told.stdout + told.stderr) == (0, "")
    checked = substitute(command, {"/etc/nginx/connections.nft": f"--check {SHIPPED}/connections.nft"})
    subprocess.run(["unshare", "--net", *checked.replace("-f --check", "--check -f").split()], check=True)
