"""Three containers as hosts behind nginx, under load: one is killed, one is frozen, one is replaced by a newer image.

They share the machine's network, each at a loopback address of its own, so that all of them reach the log service here;
tests/deploy/test_hosts.py has networks that fail.
"""

import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from conftest import Load, write_users
from loopback_sls import LoopbackSLS
from nginx_tools import SHIPPED, needs_nginx, nginx, substitute
from podman_tools import HARDENED, IMAGE, STATE, podman, state_volume, wait_until
from sls_tools import stored

ADDRESSES = ("127.0.61.11", "127.0.61.12", "127.0.61.13")
FROZEN = 15.0  # seconds

pytestmark = needs_nginx


class Host:
    """A container with an address and a journal of its own."""

    def __init__(self, address: str, *options: str) -> None:
        self.address, self.name, self._options = address, f"test-{uuid.uuid4().hex[:8]}", options
        self.journal = podman("volume", "create").stdout.strip()

    def start(self, image: str = IMAGE) -> None:
        """Run an image until it is ready."""
        where = ("--network", "host", "--env", f"HOST={self.address}", "--volume", f"{self.journal}:{STATE}")
        podman("run", "--detach", "--name", self.name, *HARDENED, *where, *self._options, image)
        wait_until(self.is_ready)

    def is_ready(self) -> bool:
        """Ask its /readyz."""
        try:
            with urllib.request.urlopen(f"http://{self.address}:5000/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def remove(self, seconds: int = 70) -> None:
        """Stop it as `docker stop` does, and remove it; its journal stays."""
        podman("stop", "--time", str(seconds), self.name)
        podman("rm", self.name)

    def close(self) -> None:
        """Remove everything."""
        podman("rm", "--force", "--time", "0", "--ignore", self.name, check=False)
        podman("volume", "rm", "--force", self.journal, check=False)


@contextmanager
def newer_image() -> Iterator[str]:
    """An image that differs from ours."""
    name = f"localhost/test-{uuid.uuid4().hex[:8]}"
    podman("build", "--quiet", "--tag", name, "-", text=f"FROM {IMAGE}\nLABEL version=newer\n")
    try:
        yield name
    finally:
        podman("rmi", "--force", name, check=False)


def test_hosts_are_killed_frozen_and_replaced_without_a_failed_request(tmp_path: Path) -> None:
    write_users(tmp_path / "users.json").chmod(0o644)
    with ExitStack() as made:
        sls = made.enter_context(LoopbackSLS())
        models = made.enter_context(state_volume())
        newer = made.enter_context(newer_image())
        settings = sls.environ() | {
            **{"MODEL_DIR": "/mnt/state/models", "USERS_FILE": "/mnt/users.json"},
            **{"TRUSTED_PROXIES": "1", "WEB_CONCURRENCY": "1", "GRACEFUL_TIMEOUT": "20"},
        }
        options = [part for name, value in settings.items() for part in ("--env", f"{name}={value}")]
        options += ["--volume", f"{models}:/mnt/state:ro", "--volume", f"{tmp_path}/users.json:/mnt/users.json:ro"]
        hosts = [Host(address, *options) for address in ADDRESSES]
        for host in hosts:
            made.callback(host.close)
            host.start()
        addresses = {
            f"10.0.0.{number}:": f"{address}:" for number, address in zip((11, 12, 13), ADDRESSES, strict=True)
        }
        upstream = substitute((SHIPPED / "upstream-several-hosts.conf").read_text(), addresses)
        front = made.enter_context(nginx(tmp_path / "nginx", upstream))
        killed, frozen, replaced = hosts

        with Load(front, callers=4, pause=0.03) as load:
            wait_until(lambda: len(load.answered) > 50)
            podman("kill", killed.name)
            before = len(load.answered)
            wait_until(lambda: len(load.answered) > before + 50)
            podman("start", killed.name)
            wait_until(killed.is_ready)

            podman("pause", frozen.name)
            time.sleep(FROZEN)
            podman("unpause", frozen.name)
            wait_until(frozen.is_ready)

            replaced.remove()
            replaced.start(newer)
            before = len(load.answered)
            wait_until(lambda: len(load.answered) > before + 50)
        assert (load.errors, set(load.statuses)) == ([], {200})
        print(f"{len(load.answered)} requests; the slowest took {max(each.seconds for each in load.answers):.1f} s")

        # Each that was answered was recorded, and each record arrives: also those that the killed host had not sent.
        sls.wait_until(lambda: set(load.answered) <= set(stored(sls)), 120)
        podman("stop", "--time", "70", *(host.name for host in hosts))
        for host in hosts:
            assert podman("inspect", "--format", "{{.State.ExitCode}}", host.name).stdout.strip() == "0"
