"""The state works where NFS holds it, whose locks are stricter.

NFS is not at hand. What stands in for it is its rule, in each Python process: `flock` is emulated by locks of byte
ranges, so an exclusive one needs a descriptor that is open for writing, a shared one a descriptor that is open for
reading, and a directory has none. flock(2): https://man7.org/linux/man-pages/man2/flock.2.html
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import PASSWORD, ROOT, basic
from loopback_sls import LoopbackSLS
from sls_tools import shipping

from monitor import segments
from processes import is_locked
from shared_files import FileLock

RULE = """
import errno, fcntl, os, stat, sys

real, place = fcntl.flock, os.path.dirname(__file__)

def flock(fd, operation):
    fd = fd if isinstance(fd, int) else fd.fileno()
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    lacks = {fcntl.LOCK_EX: os.O_RDONLY, fcntl.LOCK_SH: os.O_WRONLY}.get(operation & ~fcntl.LOCK_NB)
    is_refused = stat.S_ISDIR(os.fstat(fd).st_mode) or mode == lacks
    with open(f"{place}/{'refused' if is_refused else 'taken'}", "a") as file:
        print(os.readlink(f"/proc/self/fd/{fd}"), sys.argv, file=file)
    if is_refused:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    real(fd, operation)

fcntl.flock = flock
"""
ROW = [[5.1, 3.5, 1.4, 0.2]]


@pytest.mark.long
def test_everything_locks_as_nfs_allows(tmp_path: Path, iris_file: Path, sls: LoopbackSLS) -> None:
    (tmp_path / "sitecustomize.py").write_text(RULE)
    (tmp_path / "rows.json").write_text(json.dumps(ROW))
    environ = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": ""}
    environ |= {"MODEL_DIR": str(tmp_path / "models"), "JOURNAL_DIR": str(tmp_path / "journal")}

    def run(command: str, given: str = "") -> None:
        done = subprocess.run(
            [sys.executable, "-m", *command.split()],
            cwd=ROOT, env=environ, input=given, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    sample = f"--sample {tmp_path / 'rows.json'}"
    run(f"model publish {iris_file} --version 1 {sample}")
    run("model promote 1")
    run(f"auth --file {tmp_path / 'users.json'} add predict --role predict", PASSWORD + "\n")
    run(f"auth --file {tmp_path / 'users.json'} add feedback --role feedback", PASSWORD + "\n")
    with shipping(tmp_path, Path(), sls, model_path="", model_dir=tmp_path / "models") as server:
        assert server.predict(ROW)[0] == 200
        run(f"model publish {iris_file} --version 2 {sample}")
        run("model canary 2 --weight 50 --guard --wait 60")
        headers = {"Content_Type": "application/json", "Authorization": basic("predict")}
        status, told, _ = server.ask("POST", "/predict", json.dumps({"data": ROW}).encode(), **headers)
        truth = json.dumps({"feedback": [{"receipt": told["X-Feedback"], "truth": [0]}]}).encode()
        headers["Authorization"] = basic("feedback")
        assert (status, server.ask("POST", "/feedback", truth, **headers)[0]) == (200, 200)
        server.wait_until(lambda: "journal/guard.lock" in (tmp_path / "taken").read_text())  # it looks once a second
        run("model rollback --wait 60")
        run("model promote 2 --wait 60")
        run("model rollback --wait 60")
        run("model promote 2 --wait 60")
        run(f"model publish {iris_file} --version 3 {sample}")
        run("model remove 3")
        run("model list")
        run("telemetry.report --since 1h")
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_until(lambda: server.log.read_text().count("serving version") > 6)
        server.wait_until(lambda: len(segments(server.journal_dir)) <= 2)  # those that are shipped are not locked
        assert server.stop() == 0
        log = server.log.read_text()
    assert os.strerror(9) not in log
    taken = (tmp_path / "taken").read_text()
    for name in ("models/.lock", "journal/server.lock", "journal/ship.lock", "journal/guard.lock", "feedback/lock"):
        assert name in taken
    assert not (tmp_path / "refused").exists(), (tmp_path / "refused").read_text()


@pytest.mark.parametrize("shared", [False, True])
def test_user_who_may_only_read_a_file_sees_its_exclusive_lock(shared: bool) -> None:
    with TemporaryDirectory() as place:  # not tmp_path, which pytest opens to its own user only
        Path(place).chmod(0o755)
        path = Path(place) / "lock"
        with FileLock(path) as lock:
            assert lock.acquire(shared=shared)
            assert is_locked(path)
            path.chmod(0o444)
            is_root = os.geteuid() == 0
            os.seteuid(65534 if is_root else os.geteuid())
            try:
                assert is_locked(path) == (not shared)
            finally:
                os.seteuid(0 if is_root else os.geteuid())
        assert not is_locked(path)
