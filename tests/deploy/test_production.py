"""The operators' pages, typed word for word on a host of its own, which is thrown away.

docs/operations.md sets it up; then comes what an operator does on other days, and what the alerts' pages say.
"""

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
import runbook
from conftest import PASSWORD, ROOT, basic, ready, records
from nginx_tools import needs_nginx, substitute
from test_hosts import Namespace, can_make_namespaces, ip

PROMPT = re.compile(r"(Password: |Again: |Enter host password for user '\w+':)\Z")

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
    # The kernel's log is the machine's: here it is what the kernel writes when memory is short.
    "journalctl": '[ "$1" = -k ] && echo "gunicorn invoked oom-killer" || cat /var/log/prediction-server.log',
    "nft": 'exec ip netns exec {namespace} /usr/sbin/nft "$@"',
    "openssl": 'exec ip netns exec {namespace} /usr/bin/openssl "$@"',
    "python3.13": 'exec /usr/bin/python3 "$@"',  # another one would have to be where the service's user may go
}


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
                if PROMPT.search(shown) and len(shown) > answered:
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


SETUP = "".join(runbook.commands(__file__, "operations.md", "Production deployment"))
(SECOND,) = runbook.commands(__file__, "operations.md", "A second service on the host")
(PORT,) = runbook.commands(__file__, "operations.md", "Prometheus and Grafana")
(NEW_VERSION,) = runbook.commands(__file__, "operations.md", "A new version of the model")
(SYSTEM,) = runbook.commands(__file__, "operations.md", "Upgrades of the system")

# Of these pages .venv/bin/python is to be typed as docs/operations.md says; what is in capitals is filled in.
(LOOK,) = runbook.commands(__file__, "alerts.md", "What to look at")
(OBJECTIVES,) = runbook.commands(__file__, "alerts.md", "Objectives")
(PASSWORDS,) = runbook.commands(__file__, "alerts.md", "Alert: Rejected passwords")
(DEATHS,) = runbook.commands(__file__, "alerts.md", "Alert: Worker deaths")
(EXPIRY,) = runbook.commands(__file__, "alerts.md", "Alert: Certificate expires")
(VERSIONS,) = runbook.commands(__file__, "alerts.md", "Alert: Versions disagree")
(ROWS,) = runbook.commands(__file__, "alerts.md", "Alert: Rows rejected")
(DISK,) = runbook.commands(__file__, "alerts.md", "Alert: Disk nearly full")
(REFUSED,) = runbook.commands(__file__, "alerts.md", "Alert: Records refused")
(REPORT,) = runbook.commands(__file__, "records.md", "Report")
(HISTORY,) = runbook.commands(__file__, "records.md", "Who did what")

# What has happened on the host when its operator looks: a second version, a wrong password, a worker that was killed, a
# record that was refused.
HAPPENED = """
cd /opt/prediction-server
sudo deploy/systemd/as_service.py -m auth add admin --role admin
cp var/models/1/*.joblib model.joblib; echo '{"data": [[5.1, 3.5, 1.4, 0.2]]}' >rows.json
ask() { curl -k "$@" -H 'Content-Type: application/json' -d @rows.json https://localhost/predict; }
ask -u alice -H 'X-Request-ID: order-1'
ask -u alice:wrong
sudo kill -9 $(cut -d' ' -f1 /proc/$(cat /run/prediction-server.service.pid)/task/*/children)
until journalctl -u prediction-server | grep -q 'SIGKILL'; do sleep 1; done
echo '{"reason": "too odd"}' >var/journal/refused.json
"""
FOLLOW = ".venv/bin/python -m telemetry.report --follow"
LOOKED = "\n".join((LOOK, OBJECTIVES, PASSWORDS, DEATHS, EXPIRY, VERSIONS, ROWS, DISK, REFUSED, REPORT, HISTORY))
for word, meant in {
    FOLLOW: f"timeout --signal INT 5 {FOLLOW} || [ $? = 124 ]",
    ".venv/bin/python": "sudo deploy/systemd/as_service.py",
    "--request ID": "--request order-1",
    "HOST:443": "localhost:443",
    "HOST:5000": "10.0.0.11:5000",
    "--max-depth=2 / ": "--max-depth=2 /etc ",  # the machine's own disk is not ours to count
    "-m model rollback": "-m model promote 8 --wait 60\nsudo deploy/systemd/as_service.py -m model rollback",
}.items():
    LOOKED = substitute(LOOKED, {word: meant})
TYPED = SETUP + PORT + HAPPENED + NEW_VERSION + LOOKED + SYSTEM + SECOND
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
        ip("-n", namespace.name, "address", "add", "10.0.0.11/24", "dev", "lo")
        shown = type_in(commands, tmp_path, namespace)
        assert shown.replace("\r", "").endswith('{"prediction":[0]}\n')
        assert "configuration file /etc/nginx/nginx.conf test is successful" in shown
        assert not [line for line in shown.splitlines() if "[warn]" in line and "http2" not in line]
        if commands == TYPED:
            check_what_the_operator_saw(shown)
        users = [check_service(namespace, name) for name in SERVICES if f" {name}.service" in commands]
        assert len(users) == len(set(users)) == (2 if commands == TYPED else 1)
        check_front(namespace)


def check_what_the_operator_saw(shown: str) -> None:
    """Check that the commands of a day found what had happened; one that failed would have ended the typing."""
    shown, history = shown.replace("\r", ""), r"^20\d\d-\d\d-\d\d .*"
    for found in (
        r'^request_id +"order-1"$',
        r"^1\.0 without a fault$",
        r"wrong password from ",
        r"^gunicorn invoked oom-killer$",
        r"was sent SIGKILL",
        r'^\{"reason": "too odd"\}$',
        rf"{history}auth add admin ",
        rf"{history}model promote 8 ",
        rf"{history}model rollback: from 8 to 1 ",
        r'"version":"1"',
    ):
        assert re.search(found, shown, re.MULTILINE), found
    assert len(re.findall(r"^notAfter=", shown, re.MULTILINE)) == 2  # the file's, and what callers see


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
    (first, *_) = [each for each in recorded if "event" not in each]
    assert (first["user"], first["status"]) == ("alice", 200)
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
