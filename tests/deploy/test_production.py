"""docs/operations.md, "Production deployment", typed word for word on a host of its own, which is thrown away."""

import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PASSWORD, ROOT, basic, ready, records
from nginx_tools import OPERATIONS, needs_nginx
from test_hosts import Namespace, can_make_namespaces

PROMPTS = ("Password: ", "Again: ", "Enter host password for user 'alice':")

# The host: what is here, with a layer over it that takes all that is written, and /run empty.
HOST = """
mount -t tmpfs tmpfs {place}
mkdir {place}/upper {place}/work {place}/host
mount -t overlay overlay -o lowerdir=/,upperdir={place}/upper,workdir={place}/work {place}/host
for each in /proc /sys /dev {root}; do mkdir -p {place}/host$each; mount --rbind $each {place}/host$each; done
mount -t tmpfs -o mode=755 tmpfs {place}/host/run
mkdir {place}/host/run/netns
mount --rbind /run/netns {place}/host/run/netns
mkdir {place}/host/stand-ins
cp {stand_ins}/* {place}/host/stand-ins/
cd {root}
exec chroot {place}/host setsid --ctty --wait bash -c 'cd {root}; exec bash -exu /stand-ins/typed'
"""

# What a container lacks: sudo, a package manager that leaves alone what is installed, systemd; and a curl that is on
# the host's network.
STAND_INS = {
    "sudo": 'if [ "$1" = -u ]; then user=$2; shift 2; exec runuser -u "$user" -- "$@"; fi; exec "$@"',
    "apt-get": 'shift; for each; do [ "${{each#-}}" != "$each" ] || dpkg -s "$each" >/dev/null || exit 1; done',
    "systemctl": f'exec {sys.executable} /stand-ins/systemctl_stand_in.py {{namespace}} "$@"',
    "curl": 'exec ip netns exec {namespace} /usr/bin/curl "$@"',
    "journalctl": "cat /var/log/prediction-server.log",
    "nft": 'exec ip netns exec {namespace} /usr/sbin/nft "$@"',
}


def block(heading: str) -> str:
    """Return a section's first commands."""
    section = rf"^#+ {heading}\n.*?^```sh\n(.*?)^```$"
    return re.search(section, OPERATIONS, re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]


def pids(namespace: Namespace) -> list[int]:
    """Return the processes that are in a namespace."""
    told = subprocess.run(["ip", "netns", "pids", namespace.name], capture_output=True, text=True, check=True)
    return [int(pid) for pid in told.stdout.split()]


def type_in(commands: str, place: Path, namespace: Namespace) -> str:
    """Type the commands into a terminal of the host, and the password where it is asked for; return what is shown."""
    stand_ins = place / "stand-ins"
    stand_ins.mkdir()
    for name, script in STAND_INS.items():
        (stand_ins / name).write_text("#!/bin/bash\n" + script.format(namespace=namespace.name) + "\n")
        (stand_ins / name).chmod(0o755)
    shutil.copy(ROOT / "tests/deploy/systemctl_stand_in.py", stand_ins)
    (stand_ins / "typed").write_text(commands)
    (place / "root").mkdir()
    host = HOST.format(place=place / "root", root=ROOT, stand_ins=stand_ins)
    terminal, far_end = os.openpty()
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-ec", host],
        # As root of a fresh host has it: a Python of this machine's own may be where the service's user may not go.
        env=os.environ | {"PATH": "/stand-ins:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
        stdin=far_end,
        stdout=far_end,
        stderr=far_end,
        start_new_session=True,
    )
    os.close(far_end)
    shown, answered, deadline = "", 0, time.monotonic() + 1800
    try:
        while time.monotonic() < deadline:
            if ready(terminal, select.POLLIN, 0.5):
                try:
                    shown += os.read(terminal, 65536).decode(errors="replace")
                except OSError:  # the last process that had it open has ended
                    break
                if shown.endswith(PROMPTS) and len(shown) > answered:
                    answered = len(shown)
                    os.write(terminal, f"{PASSWORD}\n".encode())
            elif process.poll() is not None:
                break
        assert process.wait(10) == 0, shown
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(terminal)
    return shown


TYPED = block("Production deployment") + block("A second service on the host")
SERVICES = ("prediction-server", "prediction-server@b")
needs_a_host = pytest.mark.skipif(
    not (can_make_namespaces() and all(map(shutil.which, ("systemd-analyze", "openssl", "curl", "runuser")))),
    reason="needs root, systemd and curl: sudo apt install systemd curl openssl",
)
# The machine boots twice, as one of Compute Engine may; then its owner adds a user, as the script says.
FIRST_BOOT = """
sed 's|^repository=.*|repository=file://{root}|' deploy/first-boot.sh >/first-boot
env -i PATH="$PATH" sh /first-boot
env -i PATH="$PATH" sh /first-boot
cd /opt/prediction-server && sudo deploy/systemd/as_service.py -m auth add alice --role predict
systemctl start prediction-server.service
curl -k -u alice -H 'Content-Type: application/json' -d '{{"data": [[5.1, 3.5, 1.4, 0.2]]}}' https://localhost/predict
"""


@contextlib.contextmanager
def host_network() -> Iterator[Namespace]:
    """Yield a network namespace; whatever runs in it ends with it."""
    namespace = Namespace(f"test-{uuid.uuid4().hex[:8]}")
    try:
        yield namespace
    finally:
        for pid in pids(namespace):
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(pid, signal.SIGKILL)
        while pids(namespace):
            time.sleep(0.1)
        namespace.delete()


@pytest.mark.long
@needs_nginx
@needs_a_host
@pytest.mark.parametrize("commands", [TYPED, FIRST_BOOT.format(root=ROOT)], ids=["typed", "first boot"])
def test_commands_word_for_word_end_in_a_prediction(commands: str, tmp_path: Path) -> None:
    with host_network() as namespace:
        shown = type_in(commands, tmp_path, namespace)
        assert shown.replace("\r", "").endswith('{"prediction":[0]}\n')
        assert "configuration file /etc/nginx/nginx.conf test is successful" in shown
        assert not [line for line in shown.splitlines() if "[warn]" in line and "http2" not in line]
        users = [check_service(namespace, name) for name in SERVICES if f" {name}.service" in commands]
        assert len(users) == len(set(users)) == (2 if commands == TYPED else 1)
        check_front(namespace)


def check_service(namespace: Namespace, name: str) -> str:
    """Check that gunicorn runs with no more rights than the unit gives it, and writes where it may; return its user."""
    gunicorn = f"/opt/{name}/.venv/bin/gunicorn"
    found = [pid for pid in pids(namespace) if gunicorn in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(found) >= 2
    for pid in found:
        status = dict(re.findall(r"^(\w+):[ \t]*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
        assert "0" not in status["Uid"].split() + status["Gid"].split()
        assert (status["Groups"], status["NoNewPrivs"], status["Seccomp"]) == ("", "1", "2")
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert not Path(f"/proc/{pid}/root/home").stat().st_mode & 0o777
        with pytest.raises(OSError, match="Read-only file system"):
            Path(f"/proc/{pid}/cwd/written").touch()  # /opt/… may be a link, which would lead out of that root
    state = Path(f"/proc/{found[0]}/root/var/lib/{name}")
    assert {"users.json", "models", "journal"} <= {path.name for path in state.iterdir()}
    recorded = records(state / "journal")
    assert {"auth add alice", "model promote 1"} <= {each.get("command") for each in recorded}  # who set it up
    (record,) = [each for each in recorded if "event" not in each]
    assert (record["user"], record["status"]) == ("alice", 200)
    return status["Uid"]


def check_front(namespace: Namespace) -> None:
    """Check from another machine's view: HTTP is sent on, probes are closed, a wrong password is refused."""
    with namespace:
        front = http.client.HTTPSConnection("127.0.0.1", timeout=10, context=ssl._create_unverified_context())
        front.connect()
        plain = http.client.HTTPConnection("127.0.0.1", timeout=10)
        plain.connect()
    with contextlib.closing(front), contextlib.closing(plain):
        plain.request("GET", "/model")
        assert plain.getresponse().status == 308
        for path, status in (("/readyz", 404), ("/model", 401)):
            front.request("GET", path, headers={} if status == 404 else {"Authorization": basic("alice", "wrong")})
            answer = front.getresponse()
            assert (answer.status, json.loads(answer.read())["status"]) == (status, status)
