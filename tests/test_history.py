"""The history: each change with who made it, whatever happens to the disk, and never a secret."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import PASSWORD, ROOT, records
from loopback_sls import LoopbackSLS

from history import EARLIER, FILE, History
from model.versions.guard import Guard
from model.versions.routing import Routing
from model.versions.store import Store
from monitor import segments
from settings import Settings
from telemetry.report import summarise

NOBODY = 65534  # a user id without rights on every Linux
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Operator:
    """Someone who runs commands on a host, each in a process of its own."""

    def __init__(self, place: Path, **environ: str) -> None:
        self.journal = place / "journal"
        paths = {"USERS_FILE": "users.json", "MODEL_DIR": "models", "JOURNAL_DIR": "journal", "WEB_CONCURRENCY": "1"}
        self.environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | paths | environ
        self.place = place

    def run(self, module: str, *arguments: str, given: str = "", **more: Any) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command, cwd=self.place, env=self.environ, input=given, capture_output=True, text=True, check=False, **more
        )

    def history(self, *arguments: str) -> list[str]:
        """Return the lines that `python -m model history` prints below the names of its columns."""
        done = self.run("model", "history", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()[1:]


def put(store: Store, place: Path, *versions: str) -> None:
    """Publish some bytes as versions, without the fresh processes that validate a model."""
    artifact = place / "model.joblib"
    artifact.write_bytes(b"not really a model")
    for version in versions:
        with store.new_version(artifact, version) as manifest:
            manifest.about.update(sample=[[1.0]], predictions=[1.0])


def changes(journal: Path) -> list[tuple[str, str, str]]:
    return [(each["command"], each["before"], each["after"]) for each in History.read(journal)]


def test_each_change_of_users_is_noted_with_who_made_it_and_no_secret(tmp_path: Path) -> None:
    operator = Operator(tmp_path, SUDO_USER="erin", USER="forged", LOGNAME="forged")
    secrets = ["first password", "second password", "third password"]
    operator.run("auth", "add", "bob", "--role", "predict", given=secrets[0])
    operator.run("auth", "role", "bob", "--role", "predict", "--role", "admin")
    operator.run("auth", "passwd", "bob", "--keep-old", "1h", given=secrets[1])
    operator.run("auth", "passwd", "bob", given=secrets[2])
    hashes = [json.loads((tmp_path / "users.json").read_text())["bob"]["password"]]
    operator.run("auth", "remove", "bob")
    assert operator.run("auth", "remove", "bob").returncode == 1  # which changes nothing
    found = changes(operator.journal)
    until = found[2][2].removeprefix("admin,predict; new password, the old one is valid until ")
    assert abs(time.mktime(time.strptime(until, "%Y-%m-%d %H:%M:%S UTC")) - time.timezone - time.time() - 3600) < 60
    assert [found[0], found[1], found[3], found[4]] == [
        ("auth add bob", "", "predict"),
        ("auth role bob", "predict", "admin,predict"),
        ("auth passwd bob", "admin,predict", "admin,predict; new password"),
        ("auth remove bob", "admin,predict", ""),
    ]
    for each in History.read(operator.journal):
        assert (each["sudo_user"], each["host"]) == ("erin", os.uname().nodename)
        assert each["os_user"] not in ("", "forged")  # not what the environment says
    shown = operator.history()
    assert len(shown) == 5
    assert f"erin as {each['os_user']}" in shown[0]
    kept = "".join(path.read_text() for path in operator.journal.iterdir() if path.is_file())
    for secret in (*secrets, *hashes, "scrypt"):
        assert secret not in kept
        assert secret not in "".join(shown)


def test_each_change_of_versions_and_routing_is_noted(tmp_path: Path) -> None:
    operator = Operator(tmp_path)
    settings = Settings(journal_dir=operator.journal)
    store = Store(tmp_path / "models", History(settings).note)
    put(store, tmp_path, "1", "2")
    store.promote("1")
    store.canary("2", 5, guard=True)
    store.rollback()
    assert operator.run("model", "remove", "2").returncode == 0
    sha256 = f"SHA-256 {store.manifest('1').about['sha256'][:12]}…"
    stable = "generation 1: stable 1"
    assert changes(operator.journal) == [
        ("model publish 1", "", sha256),
        ("model publish 2", "", sha256),
        ("model promote 1", "", stable),
        ("model canary 2 --weight 5 --guard", stable, "generation 2: stable 1, canary 2 for 5 % of the requests"),
        (
            "model rollback: canary 2",
            "generation 2: stable 1, canary 2 for 5 % of the requests",
            "generation 3: stable 1",
        ),
        ("model remove 2", "published", ""),
    ]
    assert [each["model_version"] for each in History.read(operator.journal)] == ["1", "2", "1", "2", "2", "2"]
    rolled_back, removed = operator.history("--last", "2")
    assert "  model rollback: canary 2  generation 2: stable 1, canary 2 for 5 % of the requests  gen" in rolled_back
    assert removed.endswith("  model remove 2            published" + " " * 49 + "–")
    assert operator.history("--since", "0s") == []
    assert len(operator.history("--since", "1h")) == 6


def test_rollback_of_the_guard_is_noted_also_if_it_cannot_write_the_store(tmp_path: Path, monkeypatch: Any) -> None:
    settings = Settings(journal_dir=tmp_path / "journal")
    store = Store(tmp_path / "models")
    put(store, tmp_path, "1", "2")
    store.promote("1")
    routing = store.canary("2", 5, guard=True)
    settings.journal_dir.mkdir()
    guard = Guard(settings.journal_dir, store.directory, History(settings).note)
    assert guard._roll_back(routing, "too slow")
    store.canary("2", 5, guard=True)
    monkeypatch.setattr(guard._store, "directory", tmp_path / "models" / "1" / "manifest.json")
    assert guard._roll_back(Routing.read(store.directory), "too slow")
    (_, was, now), (command, _, here) = changes(settings.journal_dir)
    assert (was, now) == (str(routing), "generation 3: stable 1")
    assert (command, here) == ("guard, too slow", "canary 2 rolled back on this host")


def test_changes_are_records_that_are_shipped_and_that_the_report_counts(tmp_path: Path, sls: LoopbackSLS) -> None:
    operator = Operator(tmp_path, **sls.environ())
    operator.run("auth", "add", "bob", "--role", "predict", given=PASSWORD)
    store = Store(tmp_path / "models", History(Settings(journal_dir=operator.journal)).note)
    put(store, tmp_path, "1")
    assert summarise(operator.journal, 0.0, time.time()).events == {"changes (python -m model history)": 2}
    before = (operator.journal / FILE).read_bytes()
    assert len(segments(operator.journal)) == 2
    assert FILE not in [path.name for path in segments(operator.journal)]
    assert operator.run("sls", "ship").returncode == 0  # it ends, since no worker serves
    assert [(each["event"], each["command"], each["after"]) for each in sls.logs] == [
        ("change", "auth add bob", "predict"),
        ("change", "model publish 1", store.manifest("1").about["sha256"][:12].join(("SHA-256 ", "…"))),
    ]
    assert segments(operator.journal) == []
    assert (operator.journal / FILE).read_bytes() == before, "the history stays"


def test_change_that_cannot_be_noted_is_made_with_one_warning(tmp_path: Path) -> None:
    for journal, why in (("/dev/null/journal", "Not a directory"), ("/proc/journal", "No such file")):
        operator = Operator(tmp_path, JOURNAL_DIR=journal)
        done = operator.run("auth", "add", why.split()[0], "--role", "predict", given=PASSWORD)
        assert (done.returncode, done.stderr.count("\n")) == (0, 1)
        assert done.stderr.startswith("the change was made, but not noted in the history: ")
        assert why in done.stderr
    wrong = Operator(tmp_path, PORT="many")  # a setting that does not matter here
    done = wrong.run("auth", "add", "bob", "--role", "predict", given=PASSWORD)
    assert (done.returncode, done.stdout) == (0, "bob: no user → predict\n")
    assert "PORT='many'" in done.stderr


def test_full_disk_costs_one_line_and_no_other(tmp_path: Path) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    operator = Operator(tmp_path)
    for n in range(12):  # a line is some 200 bytes
        done = operator.run(
            "auth", "--file", f"{n}.json", "add", "bob", "--role", "predict", given=PASSWORD, preexec_fn=limited
        )
        assert done.returncode == 0, done.stderr
        if "not noted" in done.stderr:
            break
    assert "disk" in done.stderr or "large" in done.stderr
    assert not (operator.journal / FILE).read_bytes().endswith(b"\n")
    whole = len(changes(operator.journal))
    operator.run("auth", "--file", "later.json", "add", "bob", "--role", "predict", given=PASSWORD)
    assert len(changes(operator.journal)) == whole + 1
    assert len(operator.history()) == whole + 1


def test_commands_at_once_lose_no_change_and_the_file_is_bounded(tmp_path: Path) -> None:
    script = """if True:
        import sys, history
        from pathlib import Path
        from settings import Settings
        history.MAX_BYTES = 8000
        settings = Settings(journal_dir=Path("journal"))
        for n in range(12):
            history.History(settings).note(f"{sys.argv[1]} {n}", "", "x" * 60)
    """
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen([*command, str(n)], cwd=tmp_path, env=environ) for n in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    journal = tmp_path / "journal"
    assert (journal / EARLIER).exists()
    written = sorted(each["command"] for each in records(journal))
    assert written == sorted(f"{n} {m}" for n in range(4) for m in range(12))
    # 48 lines of some 250 bytes: the first 33 or so are in the earlier file.
    assert sorted(command for command, _, _ in changes(journal)) == written
    for n in range(8):
        subprocess.run([*command, f"more {n}"], cwd=tmp_path, env=environ, check=True)
    assert sum(path.stat().st_size for path in journal.glob("history*")) < 2 * 8400


@pytest.fixture
def service_place() -> Iterator[Path]:
    """A directory of another user's, outside of pytest's own, which only its user may enter."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        os.chown(place, NOBODY, NOBODY)
        yield Path(place)


@needs_root
def test_what_root_notes_belongs_to_the_services_user(service_place: Path) -> None:
    operator = Operator(service_place)
    assert operator.run("auth", "add", "bob", "--role", "predict", given=PASSWORD).returncode == 0
    for path in (operator.journal, *operator.journal.iterdir()):
        assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY, NOBODY), path
    assert len(list(operator.journal.iterdir())) == 2


@needs_root
def test_link_that_the_services_user_lays_leads_root_nowhere(service_place: Path, tmp_path: Path) -> None:
    target = tmp_path / "owned by root"
    target.write_text("")
    operator = Operator(service_place)
    operator.journal.mkdir()
    os.chown(operator.journal, NOBODY, NOBODY)
    (operator.journal / FILE).symlink_to(target)
    done = operator.run("auth", "add", "bob", "--role", "predict", given=PASSWORD)
    assert done.returncode == 0
    assert "Permission denied" in done.stderr
    assert target.read_text() == ""
    assert target.stat().st_uid == 0


def test_odd_lines_of_the_history_are_skipped_or_shown_plainly(tmp_path: Path) -> None:
    operator = Operator(tmp_path)
    operator.journal.mkdir()
    odd: list[Any] = [
        1,
        None,
        [],
        {},
        {"time": "now"},
        {"time": 1e300},
        {"time": -1e300},
        {"time": 1.5},
        {"time": 2, "command": ["x"], "before": 3, "host": "a\nb\x1b[2J"},
    ]
    (operator.journal / FILE).write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in odd) + b"\xff\n{\n")
    first, second = operator.history()
    assert first.split() == ["1970-01-01", "00:00:01", "–", "–", "–", "–", "–"]
    assert "['x']" in second
    assert "a b�[2J" in second  # steers no terminal
    assert Operator(tmp_path / "journal").history() == []
