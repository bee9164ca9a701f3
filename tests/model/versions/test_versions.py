"""The version store, and `python -m model` as its operators use it."""

import json
import os
import platform
import pty
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import numpy as np
import orjson
import pandas as pd
import pytest
from conftest import ROOT
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from version_tools import validate_in_this_process

from model.__main__ import main
from model.formats import ModelLoadError
from model.versions import publish_status, publishing
from model.versions.loading import SIGNATURE_FORM
from model.versions.routing import Routing
from model.versions.store import Manifest, Store, StoreError, read_manifest, read_rows, write_json
from worker_slot import WorkerSlot

SAMPLE = [[5.1, 3.5, 1.4, 0.2], [7.0, 3.2, 4.7, 1.4], [6.3, 3.3, 6.0, 2.5]]
COLUMNS = [{"name": name, "type": "number", "nullable": False} for name in load_iris().feature_names]
# What a manifest says of a version that was not really validated.
KNOWN: dict[str, Any] = {
    "signature": {"layout": "array", "columns": COLUMNS, "form": "[[0.5, 0.5, 0.5, 0.5]]"},
    "signature_form": SIGNATURE_FORM,
    "methods": ["predict", "predict_proba", "predict_log_proba", "decision_function"],
    "classes": [0, 1, 2],
    "sample": SAMPLE,
    "sample_from": "operator",
    "predictions": [0, 1, 2],
    "libraries": publishing.installed(),
    "machine": platform.machine(),
    "memory": 10**6,
    "metrics": None,
    "note": "",
}


@pytest.fixture
def artifact(tmp_path: Path, iris: Path) -> Path:
    """A model file that predicts what `KNOWN` says."""
    return Path(shutil.copy(iris / "iris.joblib", tmp_path))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store that nobody has written to yet."""
    return Store(tmp_path / "store")


def put(store: Store, artifact: Path, *names: str) -> None:
    """Publish a file under each of the names, without the fresh processes that validate a model."""
    for name in names:
        with store.new_version(artifact, name) as manifest:
            manifest.about.update(KNOWN)


def edit(store: Store, version: str, /, **changes: Any) -> None:
    """Change a version's manifest; `...` removes a key."""
    path = store.directory / version / "manifest.json"
    known = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in known.items() if value is not ...}))


def tree(store: Store) -> list[str]:
    """List what is in a store, but the lock."""
    found = (str(path.relative_to(store.directory)) for path in store.directory.rglob("*"))
    return sorted(name for name in found if name != ".lock")


def state(store: Store) -> tuple[str, tuple[str, ...], str]:
    """Return what is stable, what was before, and the canary."""
    routing = Routing.read(store.directory)
    return routing.stable, routing.previous, routing.canary


def stop(*_: Any, **__: Any) -> None:
    """Stop the process, as Ctrl-C does."""
    raise KeyboardInterrupt


@dataclass
class Done:
    """What a command came to."""

    status: int
    out: str
    err: str

    def refusal(self) -> str:
        """Return why it was refused, which has to be said in one line."""
        assert self.status == 1
        assert re.fullmatch(r"model: .+\n", self.err), self.err
        return self.err


@pytest.fixture
def command(store: Store, tmp_path: Path, capfd: Any, monkeypatch: Any) -> Callable[..., Done]:
    """Return a function that runs `python -m model` in this process."""
    for name in ("MODEL_PATH", "ALLOW_VERSION_MISMATCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODEL_DIR", str(store.directory))
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))
    monkeypatch.setenv("WEB_CONCURRENCY", "2")

    def run(*arguments: str | Path) -> Done:
        capfd.readouterr()
        try:
            status = main([str(each) for each in arguments])
        except SystemExit as ended:  # argparse's
            status = int(ended.code or 0)
        return Done(status, *capfd.readouterr())

    return run


@pytest.fixture
def validated_here(monkeypatch: Any) -> None:
    """Let what proves a version run in this process, where a fresh one is not the point."""
    validate_in_this_process(monkeypatch)


# --- versions on disk


def test_published_version_is_whole_and_read_only(store: Store, artifact: Path) -> None:
    put(store, artifact, "1")
    assert tree(store) == ["1", "1/manifest.json", "1/model.joblib"]
    assert stat.S_IMODE((store.directory / "1/model.joblib").stat().st_mode) == 0o444
    assert stat.S_IMODE((store.directory / "1").stat().st_mode) == 0o755
    assert (store.directory / "1/model.joblib").read_bytes() == artifact.read_bytes()
    manifest = read_manifest(store.directory, "1")
    assert (manifest.version, manifest.artifact) == ("1", store.directory / "1/model.joblib")
    assert {key: manifest.about[key] for key in KNOWN} == KNOWN


def test_published_artifact_does_not_follow_the_file_it_came_from(store: Store, artifact: Path) -> None:
    put(store, artifact, "1")
    before = artifact.read_bytes()
    artifact.write_bytes(b"retrained")
    assert (store.directory / "1/model.joblib").read_bytes() == before


def test_name_that_is_taken_during_the_proof_is_refused_and_nothing_stays(store: Store, artifact: Path) -> None:
    def publish_late() -> None:
        with store.new_version(artifact, "1") as manifest:
            put(store, artifact, "1")
            manifest.about.update(KNOWN, note="late")

    with pytest.raises(StoreError, match="version 1 already exists"):
        publish_late()
    assert read_manifest(store.directory, "1").about["note"] == ""
    assert tree(store) == ["1", "1/manifest.json", "1/model.joblib"]


def test_several_at_once_publish_a_name_once(store: Store, artifact: Path) -> None:
    outcomes, barrier = [], threading.Barrier(4)

    def try_it() -> None:
        barrier.wait()
        try:
            put(store, artifact, "1")
            outcomes.append("published")
        except StoreError:
            outcomes.append("refused")

    threads = [threading.Thread(target=try_it) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(outcomes) == ["published", "refused", "refused", "refused"]
    assert tree(store) == ["1", "1/manifest.json", "1/model.joblib"]


@pytest.mark.parametrize(
    ("there", "next_one"),
    [
        ([], "1"),
        (["1"], "2"),
        (["9", "10"], "11"),
        (["2024-05-01", "v7", "rc-3"], "1"),
        (["007"], "8"),
        (["7", "v8"], "8"),
        (["9" * 64], "1"),
    ],
    ids=str,
)
def test_version_without_a_name_gets_the_next_whole_number(
    store: Store, artifact: Path, there: list[str], next_one: str
) -> None:
    put(store, artifact, *there, "")
    assert store.versions() == [*there, next_one]


def test_two_that_publish_without_a_name_get_a_number_each(store: Store, artifact: Path) -> None:
    with store.new_version(artifact) as first, store.new_version(artifact) as second:
        second.about.update(KNOWN)
        first.about.update(KNOWN)
    assert sorted(store.versions()) == ["1", "2"]
    for version in "1", "2":
        assert read_manifest(store.directory, version).about["version"] == version


BAD_NAMES = [".", "..", "../1", "a/b", "/etc", "a\\b", "-x", ".hidden", "1 ", "1\n", "a\0", "é", "x" * 65]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_name_that_is_no_version_is_refused_everywhere(store: Store, artifact: Path, name: str) -> None:
    put(store, artifact, "1")
    store.promote("1")
    before = tree(store)
    with pytest.raises(StoreError, match="expected 1 to 64 letters"):
        put(store, artifact, name)
    with pytest.raises(StoreError, match="is not a valid version name"):
        store.promote(name)
    with pytest.raises(StoreError, match="is not a valid version name"):
        store.canary(name, 5)
    with pytest.raises(StoreError, match=r"there is no version .*; there are 1$"):
        store.remove(name)
    assert tree(store) == before
    for routing in ({"stable": name}, {"stable": "1", "previous": [name]}, {"stable": "1", "canary": routed(name)}):
        write_json(store.directory / "routing.json", routing)
        with pytest.raises(ModelLoadError, match="it contains an invalid version name"):
            Routing.read(store.directory)


def test_nothing_is_no_name_where_one_is_needed(store: Store, artifact: Path, command: Any) -> None:
    put(store, artifact, "1")
    for line in (["promote", ""], ["canary", "", "--weight", "5"], ["show", ""]):
        assert "'' is not a valid version name. There are: 1" in command(*line).refusal()
    assert "there is no version ''" in command("remove", "").refusal()
    assert tree(store) == ["1", "1/manifest.json", "1/model.joblib"]


def routed(version: str) -> dict[str, Any]:
    """Return a canary as routing.json has it."""
    return {"version": version, "weight": 5, "guard": False}


@pytest.mark.parametrize("name", ["1", "2024-05-01", "v1.2.3", "a_b", "A" * 64, "1..2"])
def test_sane_names_are_versions(store: Store, artifact: Path, name: str) -> None:
    put(store, artifact, name)
    assert store.promote(name).stable == name
    assert read_manifest(store.directory, name).version == name


def test_version_may_not_take_the_name_of_the_routing_file(store: Store, artifact: Path) -> None:
    with pytest.raises(StoreError, match=r"routing\.json"):
        put(store, artifact, "routing.json")


def test_publish_that_fails_leaves_nothing(store: Store, artifact: Path, monkeypatch: Any) -> None:
    with pytest.raises(StoreError, match=r"gone\.joblib cannot be copied into the store"):
        put(store, artifact.with_name("gone.joblib"), "1")
    with pytest.raises(TypeError), store.new_version(artifact, "1") as manifest:
        manifest.about.update(sample={1, 2})  # no JSON
    for step in ("os.rename", "os.fsync", "shutil.copyfileobj", "json.dumps"):
        with monkeypatch.context() as patch:
            patch.setattr(step, stop)
            with pytest.raises(KeyboardInterrupt):
                put(store, artifact, "1")
    assert tree(store) == []


@pytest.mark.parametrize("step", ["os.fsync", "os.rename", "os.fchmod"])
def test_write_that_stops_at_any_step_leaves_the_old_file(tmp_path: Path, monkeypatch: Any, step: str) -> None:
    path = tmp_path / "routing.json"
    write_json(path, {"stable": "1"})
    monkeypatch.setattr(step, stop)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"stable": "2"})
    assert json.loads(path.read_text()) == {"stable": "1"}
    assert os.listdir(tmp_path) == ["routing.json"]


def test_written_json_can_be_read_by_the_service_user(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": None})
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"ü": None}


# --- routing


# Each command, and then the stable version, those before it, and the canary.
LIVES = {
    "promotions are remembered, the latest first": [
        ("promote 1", "1", (), ""),
        ("promote 2", "2", ("1",), ""),
        ("promote 3", "3", ("2", "1"), ""),
    ],
    "a version that comes back is no longer a previous one": [
        ("promote 1", "1", (), ""),
        ("promote 2", "2", ("1",), ""),
        ("promote 1", "1", ("2",), ""),
    ],
    "rollback goes back further if it is told how far": [
        ("promote 1", "1", (), ""),
        ("promote 2", "2", ("1",), ""),
        ("promote 3", "3", ("2", "1"), ""),
        ("rollback", "2", ("1",), ""),
        ("rollback 1", "1", (), ""),
    ],
    "rollback passes over versions": [
        ("promote 1", "1", (), ""),
        ("promote 2", "2", ("1",), ""),
        ("promote 3", "3", ("2", "1"), ""),
        ("rollback 1", "1", (), ""),
    ],
    "rollback takes the canary first": [
        ("promote 1", "1", (), ""),
        ("promote 2", "2", ("1",), ""),
        ("canary 3 --weight 5", "2", ("1",), "3"),
        ("rollback", "2", ("1",), ""),
        ("rollback 1", "1", (), ""),
    ],
    "rollback to a version takes the canary as well": [
        ("promote 1", "1", (), ""),
        ("promote 2", "2", ("1",), ""),
        ("canary 3 --weight 5", "2", ("1",), "3"),
        ("rollback 1", "1", (), ""),
    ],
    "rollback to the stable version takes the canary": [
        ("promote 1", "1", (), ""),
        ("canary 2 --weight 5", "1", (), "2"),
        ("rollback 1", "1", (), ""),
    ],
    "after another promotion rollback needs no name": [
        ("promote 1", "1", (), ""),
        ("promote 2", "2", ("1",), ""),
        ("rollback", "1", (), ""),
        ("promote 3", "3", ("1",), ""),
        ("rollback", "1", (), ""),
    ],
    "a canary that is promoted is none any more": [
        ("promote 1", "1", (), ""),
        ("canary 2 --weight 50", "1", (), "2"),
        ("promote 2", "2", ("1",), ""),
    ],
    "a canary outlives the promotion of another version": [
        ("promote 1", "1", (), ""),
        ("canary 2 --weight 50", "1", (), "2"),
        ("promote 3", "3", ("1",), "2"),
    ],
    "one canary replaces another": [
        ("promote 1", "1", (), ""),
        ("canary 2 --weight 50", "1", (), "2"),
        ("canary 3 --weight 50", "1", (), "3"),
    ],
}


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.usefixtures("validated_here")
def test_routing_follows_the_commands(store: Store, artifact: Path, command: Any, life: str) -> None:
    put(store, artifact, "1", "2", "3")
    for generation, (line, *expected) in enumerate(LIVES[life], start=1):
        words = line.split()
        assert command(*words, *([] if words[0] == "rollback" else ["--force"])).status == 0
        assert list(state(store)) == expected
        routing = Routing.read(store.directory)
        assert routing.generation == generation
        assert routing.why.startswith(line if words[0] != "rollback" else "rollback")
        assert routing.by
        assert abs(time.time() - publishing_time(routing.changed)) < 60


def publishing_time(text: str) -> float:
    """Return a time as the store writes it in seconds since 1970."""
    from calendar import timegm

    return timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))


def test_ten_previous_versions_are_remembered(store: Store, artifact: Path) -> None:
    names = [str(number) for number in range(1, 14)]
    put(store, artifact, *names)
    for name in names:
        store.promote(name)
    assert Routing.read(store.directory).previous == tuple(reversed(names[2:-1]))


def test_first_sight_of_the_files_says_what_is_going_on(store: Store, artifact: Path) -> None:
    put(store, artifact, "1", "2")
    store.promote("1")
    store.canary("2", 7.5, guard=True)
    routing = json.loads((store.directory / "routing.json").read_text())
    assert list(routing) == ["generation", "stable", "previous", "canary", "changed", "by", "why"]
    assert routing | {"changed": "", "by": ""} == {
        "generation": 2,
        "stable": "1",
        "previous": [],
        "canary": {"version": "2", "weight": 7.5, "guard": True},
        "changed": "",
        "by": "",
        "why": "canary 2 --weight 7.5 --guard",
    }
    assert Routing.read(store.directory).to_json() == routing


def test_guards_rollback_does_nothing_where_the_routing_has_moved_on(store: Store, artifact: Path) -> None:
    put(store, artifact, "1", "2")
    store.promote("1")
    judged = store.canary("2", 5).generation
    store.canary("2", 10)
    before = Routing.read(store.directory)
    assert store.rollback("guard, too slow", only=judged) == before
    assert Routing.read(store.directory) == before
    assert store.rollback("guard, too slow", only=before.generation).why == "guard, too slow: canary 2"
    assert state(store) == ("1", (), "")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("promote 9", "version 9: .*cannot be used: FileNotFoundError.*There are: 1, 2, 3$"),
        ("promote ../1", "'../1' is not a valid version name. There are: 1, 2, 3$"),
        ("promote 2", "version 2 is already the stable one$"),
        ("canary 9 --weight 5", "version 9: .*There are: 1, 2, 3$"),
        ("canary 2 --weight 5", "version 2 is the stable one; the canary must be another version$"),
        ("canary 1 --weight 0", "weight 0: expected a percentage of the requests, more than 0 and at most 100$"),
        ("canary 1 --weight -1", "weight -1: expected"),
        ("canary 1 --weight 101", "weight 101: expected"),
        ("canary 1 --weight nan", "weight nan: expected"),
        ("canary 1 --weight inf", "weight inf: expected"),
        ("show 9", "version 9: .*There are: 1, 2, 3$"),
        ("remove 9", "there is no version '9'; there are 1, 2, 3$"),
        ("remove ..", "there is no version '..'; there are 1, 2, 3$"),
        ("remove routing.json", "there is no version 'routing.json'; there are 1, 2, 3$"),
        ("remove .lock", "there is no version '.lock'; there are 1, 2, 3$"),
        ("remove 2", "version 2 is in use: stable$"),
        ("remove 1", "version 1 is in use: stable before$"),
        ("remove 3", "version 3 is in use: canary, 5 % of the requests$"),
    ],
)
def test_what_cannot_be_done_says_why_and_changes_nothing(
    store: Store, artifact: Path, command: Any, line: str, why: str
) -> None:
    put(store, artifact, "1", "2", "3")
    for version in "1", "2":
        store.promote(version)
    store.canary("3", 5)
    before = tree(store), (store.directory / "routing.json").read_bytes()
    words = line.split()
    refusal = command(*words, *(["--force"] if words[0] in ("promote", "canary") else [])).refusal()
    assert re.search(why, refusal.rstrip()), refusal
    assert (tree(store), (store.directory / "routing.json").read_bytes()) == before


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("promote 1", "version 1: .*There are: none$"),
        ("canary 1 --weight 5", "There are: none"),
        ("rollback", "there is no canary, and no earlier stable version to return to$"),
        ("show 1", "There are: none$"),
        ("remove 1", "there is no version '1'; there are none$"),
    ],
)
def test_store_without_versions_says_so(command: Any, line: str, why: str) -> None:
    assert re.search(why, command(*line.split()).refusal())
    listed = command("list")
    assert listed.out.split("\n")[0].split()[:3] == ["VERSION", "FORMAT", "MB"]
    assert listed.err.startswith("model: there is no version in ")
    assert "there is no version in " in command("verify").refusal()


def test_canary_needs_a_stable_version(store: Store, artifact: Path, command: Any) -> None:
    put(store, artifact, "1")
    assert "no stable version to compare a canary with" in command("canary", "1", "--weight", "5", "--force").refusal()


def test_rollback_passes_over_what_was_removed(store: Store, artifact: Path, command: Any) -> None:
    put(store, artifact, "1", "2", "3", "4")
    for version in "1", "2", "3", "4":
        store.promote(version)
    store.remove("2")
    shutil.rmtree(store.directory / "3")  # by hand
    assert "stable before" in command("remove", "1").refusal()
    assert command("rollback").out == "back to version 1, from version 4\ngeneration 5: stable 1\n"
    assert command("rollback").refusal().endswith("So version 1 stays the stable one.\n")
    assert "version '4' was not the stable one lately; promote it" in command("rollback", "4").refusal()


def test_second_rollback_in_a_row_changes_nothing_and_names_the_way(store: Store, artifact: Path, command: Any) -> None:
    put(store, artifact, "1", "2", "3", "4")
    for version in "1", "2", "3":
        store.promote(version)
    assert command("rollback").out == "back to version 2, from version 3\ngeneration 4: stable 2\n"
    why = command("rollback").refusal()
    assert "the last change was a rollback already, at " in why
    assert "(rollback: from 3 to 2). So version 2 stays the stable one. " in why
    assert why.endswith("To go further back, name one of 1: python -m model rollback 1\n")
    assert "version '9' was not the stable one lately, as 1 was; promote it" in command("rollback", "9").refusal()
    assert "version 2 is already the stable one" in command("rollback", "2").refusal()

    store.canary("4", 5, guard=True)
    assert store.rollback("guard, 9 % of its requests failed").why.startswith("guard, 9 %")
    why = command("rollback").refusal()  # as the page of the alert says, and too late
    assert "(guard, 9 % of its requests failed: canary 4). So version 2 stays the stable one" in why

    store.canary("4", 5, guard=True)
    done = command("rollback")
    assert done.out == "generation 8: stable 2\ncanary 4 is withdrawn (5 % of the requests, guarded)\n"
    assert "the last change was a rollback already" in command("rollback").refusal()
    assert state(store) == ("2", ("1",), "")


@pytest.mark.usefixtures("validated_here")
def test_canary_that_replaces_another_says_so(store: Store, artifact: Path, command: Any) -> None:
    put(store, artifact, "1", "2", "3")
    store.promote("1")
    store.canary("2", 5, guard=True)
    said = [
        (
            "3 --weight 10 --guard",
            "it replaces canary 2 (5 % of the requests, guarded), which gets no requests any more",
        ),
        ("3 --weight 20 --guard", "its guard counts anew"),
        ("3 --weight 20", "it is NOT guarded any more"),
        ("3 --weight 30", "generation 6: stable 1, canary 3 for 30 % of the requests"),
    ]
    for line, last in said:
        assert command("canary", *line.split()).out.splitlines()[-1] == last
    assert command("promote", "3").out.splitlines()[-1] == "generation 7: stable 3"


def test_prune_keeps_what_is_in_use_and_the_newest(
    store: Store, artifact: Path, tmp_path: Path, command: Any, worker: Any
) -> None:
    put(store, artifact, *"abcdefghij")
    for number, version in enumerate("abcdefghij"):
        os.utime(store.directory / version / "manifest.json", (number, number))
    for version in "bcd":
        store.promote(version)
    store.canary("e", 5)
    worker(4, stable="a", canary="e")  # which it fell back on, because the others do not load
    before = tree(store)
    size = sum(path.stat().st_size for path in (store.directory / "b").iterdir()) / 1e6
    shown = command("prune", "--keep", "3", "--dry-run")
    assert tree(store) == before
    assert shown.out.replace("would remove", "removed").replace("would be ", "") == (
        "".join(f"removed version {each}, {size:.1f} MB\n" for each in "bfg") + f"3 versions, {3 * size:.1f} MB freed\n"
    )
    done = command("prune", "--keep", "3")
    assert (done.status, done.err) == (0, "")
    assert done.out == shown.out.replace("would remove", "removed").replace("would be ", "")
    assert store.versions() == ["a", "c", "d", "e", "h", "i", "j"]  # in use are a, c, d and e
    assert command("prune", "--keep", "3").out == "0 versions, 0.0 MB freed\n"
    assert [name for name in os.listdir(store.directory) if name.startswith(".")] == [".lock"]
    (store.directory / "routing.json").write_text("{")
    assert "routing.json cannot be used" in command("prune", "--keep", "0").refusal()
    assert len(store.versions()) == 7


def test_prune_leaves_a_version_that_is_promoted_meanwhile(
    store: Store, artifact: Path, command: Any, monkeypatch: Any
) -> None:
    put(store, artifact, "1", "2", "3")
    store.promote("3")
    monkeypatch.setattr(Store, "size", lambda store, version: store.promote("2") and 0 if version == "1" else 0)
    done = command("prune", "--keep", "0")
    assert (done.status, done.err) == (1, "model: kept version 2: version 2 is in use: stable\n")
    assert store.versions() == ["2", "3"]


def test_rollback_to_a_version_that_cannot_be_read_is_refused(store: Store, artifact: Path, command: Any) -> None:
    put(store, artifact, "1", "2")
    store.promote("1")
    store.promote("2")
    (store.directory / "1/manifest.json").write_text("{")
    assert "1/manifest.json cannot be used: " in command("rollback").refusal()
    assert state(store) == ("2", ("1",), "")


WRONG_LINES = [
    "",
    "publish",
    "promote",
    "promote 1 2",
    "promote --wait 1",
    "promote 1 --wait soon",
    "canary 1",
    "canary 1 --weight half",
    "canary 1 --weight",
    "rollback 1 2",
    "prune --keep -1",
    "restart",
    "show",
    "remove",
    "verify 1 2",
    "export a",
    "publish a --sampel b",
]


@pytest.mark.parametrize("line", WRONG_LINES)
def test_wrong_command_line_shows_the_usage(command: Any, line: str) -> None:
    done = command(*line.split())
    assert done.status == 2
    assert done.err.startswith(("Usage: python -m model", "Error: Option '--weight' requires"))
    assert not line or done.err.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize(
    "name", ["", "publish", "promote", "canary", "rollback", "list", "show", "verify", "remove", "prune", "export"]
)
def test_every_command_helps(command: Any, name: str) -> None:
    done = command(*([name] if name else []), "--help")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"Usage: python -m model {name}".strip())


def test_nobody_who_reads_the_output_is_no_error(store: Store, artifact: Path, tmp_path: Path) -> None:
    put(store, artifact, "1")
    out, into = os.pipe()
    os.close(out)  # as `| head` does
    done = subprocess.run(
        [sys.executable, "-m", "model", "--dir", store.directory, "list"], cwd=ROOT, stdout=into, stderr=subprocess.PIPE
    )
    os.close(into)
    assert done.stderr == b""


def test_progress_is_shown_on_a_terminal(iris: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    line = [sys.executable, "-m", "model", "--dir", tmp_path / "store", "publish", iris / "iris.joblib"]
    done = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, timeout=120)
    os.close(theirs)
    assert re.search(rb"publishing  \[#+\]  100%", os.read(ours, 100_000))
    os.close(ours)
    assert done.stdout.startswith(b"published version 1;")


def test_settings_that_contradict_each_other_are_named(command: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("MODEL_PATH", "model.joblib")
    assert "MODEL_PATH and MODEL_DIR are both set" in command("list").refusal()


def test_dir_names_another_store(tmp_path: Path, artifact: Path, command: Any) -> None:
    put(Store(tmp_path / "other"), artifact, "blue")
    assert "blue" not in command("list").out
    assert "blue" in command("--dir", tmp_path / "other", "list").out


# --- list, show, remove


def test_list_shows_versions_in_order_of_publication_and_how_they_are_served(
    store: Store, artifact: Path, command: Any
) -> None:
    artifact.write_bytes(b"x" * 1_250_000)
    put(store, artifact, "b", "a", "c", "d")
    edit(store, "c", note="two\nlines")
    (store.directory / "d/manifest.json").write_text("{")
    for number, version in enumerate("bacd"):
        os.utime(store.directory / version / "manifest.json", (number, number))
    store.promote("b")
    store.promote("a")
    store.canary("c", 12.5)
    lines = command("list").out.splitlines()
    assert re.split(r"  +", lines[0]) == ["VERSION", "FORMAT", "MB", "PUBLISHED", "BY", "SERVED AS", "NOTE"]
    found = {line[0]: line for line in lines[1:5]}
    assert list(found) == ["b", "a", "c", "d"]
    assert re.match(r"b +joblib +1\.2 +\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ  \S+ +stable before$", found["b"])
    assert found["a"].endswith("stable")
    assert re.search(r"canary, 12\.5 % of the requests  two lines$", found["c"])
    assert found["d"].endswith("ITS MANIFEST CANNOT BE USED")
    assert re.match(r"generation 3, \S+Z, by \S+: canary c --weight 12\.5$", lines[5])
    assert len(lines) == 6


@pytest.mark.usefixtures("validated_here")
def test_list_says_which_workers_serve_what(
    store: Store, tmp_path: Path, artifact: Path, command: Any, worker: Any
) -> None:
    put(store, artifact, "1", "2")
    store.promote("1")
    store.canary("2", 5)
    worker(2, stable="1", canary="2")
    assert command("list").out.splitlines()[-1] == f"worker {os.getpid()}: generation 2, stable 1, canary 2"
    worker(2, stable="1", error="version 2 does not load")
    assert command("list").out.splitlines()[-1].endswith("generation 2, stable 1, version 2 does not load")


def test_list_shows_a_rollback_of_this_host_only(store: Store, tmp_path: Path, artifact: Path, command: Any) -> None:
    put(store, artifact, "1", "2")
    store.promote("1")
    store.canary("2", 5, guard=True)
    (tmp_path / "journal").mkdir()
    write_json(
        tmp_path / "journal/guard.json",
        {"routing": Routing.read(store.directory).etag, "canary": "2", "reason": "too slow"},
    )
    assert "the canary was rolled back on this host: guard, too slow" in command("list").out
    store.canary("2", 10, guard=True)
    assert "rolled back" not in command("list").out


def test_list_bears_a_version_that_is_removed_meanwhile(store: Store, artifact: Path, monkeypatch: Any) -> None:
    put(store, artifact, "1", "2")
    seen = [store.directory / version / "manifest.json" for version in ("1", "gone", "2")]
    monkeypatch.setattr(Path, "glob", lambda *_: iter(seen))
    assert store.versions() == ["1", "2"]


def test_show_prints_the_manifest_as_json(store: Store, artifact: Path, command: Any) -> None:
    put(store, artifact, "1")
    edit(store, "1", note="größer", metrics={"accuracy": 0.97})
    done = command("show", "1")
    assert (done.status, json.loads(done.out)) == (0, json.loads((store.directory / "1/manifest.json").read_text()))
    assert "größer" in done.out


def test_remove_removes_what_is_not_in_use_and_leaves_nothing(store: Store, artifact: Path, command: Any) -> None:
    put(store, artifact, "1", "2", "3", "4")
    for version in "1", "2", "3":
        store.promote(version)
    for version in "4", "1":
        done = command("remove", version)
        assert (done.status, done.out) == (0, f"removed version {version}\n")
    assert store.versions() == ["2", "3"]
    assert [name for name in os.listdir(store.directory) if name.startswith(".")] == [".lock"]


@pytest.mark.usefixtures("validated_here")
def test_broken_routing_stops_no_publish_and_is_named_by_the_rest(store: Store, artifact: Path, command: Any) -> None:
    put(store, artifact, "1")
    (store.directory / "routing.json").write_text('{"stable": "1"')
    for line in ("promote 1 --force", "canary 1 --weight 5 --force", "rollback", "remove 1"):
        why = command(*line.split()).refusal()
        assert "routing.json cannot be used: " in why
        assert "Correct it, or remove it and promote a version" in why
    listed = command("list")
    assert listed.status == 0
    assert "routing.json cannot be used: " in listed.err
    assert listed.out.splitlines()[1].startswith("1 ")
    put(store, artifact, "2")
    (store.directory / "routing.json").unlink()
    assert command("promote", "2", "--force").status == 0


# --- --wait


@pytest.fixture
def worker(store: Store, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Return a function that publishes, as a worker with this process's number, what is served."""
    slot = WorkerSlot(tmp_path / "journal/workers")

    def publish(generation: int, stable: str = "1", canary: str = "", error: str = "") -> None:
        served = {name: {"version": version} for name, version in (("stable", stable), ("canary", canary)) if version}
        changed = Routing.read(store.directory).changed
        routing = {"routing": {"generation": generation, "changed": changed}, "ready": True, "error": error or None}
        publish_status(slot, str(store.directory), {"stable": None, "canary": None} | served | routing)

    yield publish
    assert slot._lock
    slot._lock.release()


@contextmanager
def once_promoted(store: Store, act: Callable[..., object], *arguments: Any) -> Iterator[None]:
    """Do something in a thread of its own after generation 2 of the routing was written."""

    def wait_and_act() -> None:
        deadline = time.monotonic() + 60
        while Routing.read(store.directory).generation < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)  # most likely it is waited for by then
        act(*arguments)

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    yield
    thread.join()


@pytest.mark.usefixtures("validated_here")
def test_wait_without_a_worker_ends_and_says_so(store: Store, tmp_path: Path, artifact: Path, command: Any) -> None:
    put(store, artifact, "1")
    done = command("promote", "1", "--force", "--wait", "1e9")  # seconds
    assert f"no server runs on this host with JOURNAL_DIR={tmp_path / 'journal'}" in done.refusal()
    assert done.out.endswith("generation 1: stable 1\n")  # that much is done


@pytest.mark.usefixtures("validated_here")
def test_wait_for_a_server_that_serves_something_else_ends_and_says_so(
    store: Store, artifact: Path, tmp_path: Path, command: Any
) -> None:
    put(store, artifact, "1", "2")
    slot = WorkerSlot(tmp_path / "journal/workers")
    served = {"stable": {"version": "x"}, "canary": None, "routing": None, "ready": True, "error": None}
    for version, source, said in (
        ("1", None, "serves a file, not versions: unset MODEL_PATH and restart it"),
        ("2", "/elsewhere", "serves another store: MODEL_DIR=/elsewhere"),
    ):
        publish_status(slot, source, served)
        why = command("promote", version, "--wait", "1e9").refusal()  # seconds
        assert why == f"model: it is routed, but the server with JOURNAL_DIR={tmp_path / 'journal'} {said}\n"
        assert command("list").out.splitlines()[-1] == f"worker {os.getpid()}: {said}"
    assert slot._lock
    slot._lock.release()


@pytest.mark.usefixtures("validated_here")
def test_wait_that_is_interrupted_ends_without_a_traceback(
    store: Store, artifact: Path, command: Any, worker: Any, monkeypatch: Any
) -> None:
    put(store, artifact, "1")
    worker(0)
    monkeypatch.setattr("model.__main__.time", SimpleNamespace(sleep=stop, monotonic=time.monotonic))
    done = command("promote", "1", "--force", "--wait")
    assert (done.status, done.err.strip()) == (130, "")


@pytest.mark.parametrize("seconds", ["0", "nan"])
@pytest.mark.usefixtures("validated_here")
def test_wait_of_no_time_ends_at_once(store: Store, artifact: Path, command: Any, worker: Any, seconds: str) -> None:
    put(store, artifact, "1")
    worker(0)
    assert command("promote", "1", "--force", f"--wait={seconds}").err == "0 of 1 workers serve it\n"


@pytest.mark.usefixtures("validated_here")
def test_wait_ends_when_the_workers_serve_it(store: Store, artifact: Path, command: Any, worker: Any) -> None:
    put(store, artifact, "1", "2")
    store.promote("1")
    worker(1, error="version 1 does not load")
    with once_promoted(store, worker, 2, "2"):
        done = command("promote", "2", "--force", "--wait", "60")
    assert (done.status, done.err) == (0, "")
    assert re.search(r"^all 1 workers serve it, after \d+\.\d s$", done.out, re.M)


@pytest.mark.usefixtures("validated_here")
def test_wait_tells_of_a_worker_that_cannot_serve_it(store: Store, artifact: Path, command: Any, worker: Any) -> None:
    put(store, artifact, "1", "2")
    store.promote("1")
    worker(1)
    with once_promoted(store, worker, 2, "1", "", "version 2 does not load"):
        done = command("promote", "2", "--force", "--wait", "60")
    assert done.status == 1
    assert done.err == f"worker {os.getpid()}: version 2 does not load\n0 of 1 workers serve it\n"


@pytest.mark.usefixtures("validated_here")
def test_wait_tells_of_a_worker_that_is_late(store: Store, artifact: Path, command: Any, worker: Any) -> None:
    put(store, artifact, "1")
    worker(0)
    done = command("promote", "1", "--force", "--wait", "0.3")
    assert (done.status, done.err) == (1, "0 of 1 workers serve it\n")


@pytest.mark.usefixtures("validated_here")
def test_wait_ends_where_somebody_changed_the_routing_again(
    store: Store, artifact: Path, command: Any, worker: Any
) -> None:
    put(store, artifact, "1", "2")
    store.promote("1")
    worker(1)
    with once_promoted(store, store.canary, "1", 5.0):
        done = command("promote", "2", "--force", "--wait", "60")
    assert done.refusal() == "model: the routing was changed again meanwhile: generation 3, canary 1 --weight 5\n"


# --- preflight


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"memory": 10**15},
            r"memory: 2 workers of 1000000000 MB need up to 2000000000 MB more, \d+ MB are free",
        ),
        ({"machine": "vax"}, f"processor: published on vax, this is {platform.machine()}"),
        ({"machine": ...}, f"processor: published on None, this is {platform.machine()}"),
        ({"libraries": {"python": "2.7.18"}}, r"python: published with 2\.7\.18, here 3\.\d+\.\d+"),
        ({"libraries": {"scikit-learn": "0.24.2"}}, r"scikit-learn: published with 0\.24\.2, here \d\S+"),
        ({"libraries": {"numpy": "1.26.4"}}, r"numpy: published with 1\.26\.4, here \d\S+"),
        ({"libraries": {"caffe": "1.0"}}, r"caffe: published with 1\.0, here none"),
        ({"libraries": {"caffe": None}}, r"caffe: published with None, here none"),
    ],
    ids=str,
)
@pytest.mark.parametrize("line", ["promote 2", "canary 2 --weight 5"])
@pytest.mark.usefixtures("validated_here")
def test_version_that_does_not_fit_is_refused_unless_forced(
    store: Store, artifact: Path, command: Any, changes: Any, said: str, line: str
) -> None:
    put(store, artifact, "1", "2")
    store.promote("1")
    edit(store, "2", **changes)
    done = command(*line.split())
    assert done.refusal() == "model: version 2 does not fit this machine; --any-machine serves it anyway\n"
    assert re.fullmatch(f"DOES NOT FIT  {said}", unfit(done))
    assert command(*line.split(), "--force").refusal() == done.err
    assert state(store) == ("1", (), "")
    forced = command(*line.split(), "--any-machine")
    assert forced.status == 0
    assert re.fullmatch(f"DOES NOT FIT  {said}", unfit(forced))  # it is said all the same
    assert state(store) in [("2", ("1",), ""), ("1", (), "2")]


def unfit(done: Done) -> str:
    """Return the lines that say what does not fit."""
    return "\n".join(line for line in done.out.splitlines() if not re.match("fits|generation", line))


def test_patch_release_of_a_library_fits(store: Store, artifact: Path) -> None:
    put(store, artifact, "1")
    major, minor, *_ = platform.python_version_tuple()
    edit(store, "1", libraries={"python": f"{major}.{minor}.999"})
    found = publishing.preflight(read_manifest(store.directory, "1"), workers=1)
    assert all(fits for fits, _ in found)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8_000_000 * 1024),
        ({"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "inactive_file 1\n"}, 8_000_000 * 1024),
        (
            {"memory.max": "2000\n", "memory.current": "1900\n", "memory.stat": "anon 400\ninactive_file 1500\n"},
            1600,  # what the files take that were read is given back
        ),
        ({"memory.max": "2000\n", "memory.current": "1900\n", "memory.stat": ""}, 8_000_000 * 1024),
        ({"meminfo": "MemTotal: 5 kB\n"}, None),
        ({"meminfo": "nonsense"}, None),
    ],
    ids=["machine", "no limit", "container", "unknown cache", "old kernel", "nonsense"],
)
def test_free_memory_is_that_of_the_machine_or_of_the_container(
    monkeypatch: Any, files: dict[str, str], free: int | None
) -> None:
    known = {"meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n"} | files

    def read(path: Path) -> str:
        if path.name not in known:
            raise FileNotFoundError(path)
        return known[path.name]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read)
        found = publishing.free_memory()
    assert found == free


def test_memory_that_nobody_knows_is_no_reason_to_refuse(store: Store, artifact: Path, monkeypatch: Any) -> None:
    put(store, artifact, "1")
    monkeypatch.setattr("model.versions.publishing.free_memory", lambda: None)
    assert all(fits for fits, _ in publishing.preflight(read_manifest(store.directory, "1"), workers=10**9))


# --- manifests and routings that make no sense


ODD: list[Any] = [None, True, 0, -1, 1.5, 10**30, "", "x", "\n", "../x", [], [None], [[]], {}, {"x": {}}, ["1"] * 3]


def test_manifest_of_odd_values_is_used_or_refused_in_words(store: Store, artifact: Path, command: Any) -> None:
    put(store, artifact, "sound")
    sound = json.loads((store.directory / "sound/manifest.json").read_text())
    texts = [json.dumps(odd) for odd in ODD] + [
        "",
        "{",
        "[" * 100_000,
        '{"version": "\\ud800"}',
        "\xff",
        '{"size": NaN}',
    ]
    changes = [{name: odd} for name in sound for odd in ODD]
    texts += [json.dumps(sound | {"version": str(at)} | change) for at, change in enumerate(changes, start=len(texts))]
    used = 0
    for at, text in enumerate(texts):
        path = store.directory / str(at) / "manifest.json"
        path.parent.mkdir()
        path.write_text(text, "latin-1")
        try:
            manifest = read_manifest(store.directory, str(at))
        except ModelLoadError:
            continue
        used += 1
        assert manifest.artifact.parent == path.parent
        publishing.preflight(manifest, workers=4)
        json.dumps(manifest.about, allow_nan=False, ensure_ascii=False).encode()
    assert 0 < used < len(changes)
    done = command("list")
    assert (done.status, len(done.out.splitlines())) == (0, 2 + len(texts))
    assert done.out.count("ITS MANIFEST CANNOT BE USED") == len(texts) - used


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sha256": "0" * 64}, "model.joblib is not the file that was published"),
        ({"predictions": [2, 1, 0]}, "version 1 answers its recorded sample differently than when it was published"),
        ({"sample": [[1.0]]}, "the model refuses its recorded sample"),
        ({"sample": ["a"]}, "the model refuses its recorded sample"),
        ({"signature": {"layout": "frame"}}, "version 1 has another signature than its manifest records"),
        ({"artifact": "gone.joblib"}, "gone.joblib cannot be read"),
        ({"artifact": "manifest.json"}, "is not the file that was published"),
        ({"artifact": "../1/model.joblib"}, "artifact is not the name of a file here"),
        ({"artifact": "/etc/passwd"}, "artifact is not the name of a file here"),
        ({"version": "2"}, "it belongs to version '2'"),
        ({"sha256": "secret"}, "sha256 is not a SHA-256 sum"),
        ({"sample": None}, "it has no sample"),
        ({"predictions": None}, "it has no sample, or no predictions"),
    ],
    ids=str,
)
def test_manifest_that_lies_is_found_out_by_verify_and_before_promote(
    store: Store, published: Path, command: Any, validated_here: None, changes: Any, why: str
) -> None:
    shutil.copytree(published, store.directory)
    edit(store, "1", **changes)
    done = command("verify", "1")
    assert done.status == 1
    assert why in done.out
    assert "as it was published" not in done.out
    (store.directory / "routing.json").unlink()
    assert why in command("promote", "1").refusal()
    assert not (store.directory / "routing.json").exists()


def test_verify_fails_if_there_is_no_version(store: Store, command: Any) -> None:
    done = command("verify")
    assert (done.status, done.err) == (1, f"model: there is no version in {store.directory}\n")


def test_verify_without_a_name_verifies_all(store: Store, published: Path, command: Any, validated_here: None) -> None:
    shutil.copytree(published, store.directory)
    shutil.copytree(published / "1", store.directory / "2")
    edit(store, "2", version="2", predictions=[0, 0, 0])
    done = command("verify")
    assert done.status == 1
    assert done.out.splitlines() == [
        "1: as it was published",
        "2: version 2 answers its recorded sample differently than when it was published",
    ]
    assert command("verify", "1").status == 0
    assert command("verify", "3").status == 1


def test_file_that_is_cut_off_at_any_byte_is_a_load_error(store: Store, artifact: Path) -> None:
    put(store, artifact, "1", "2")
    store.promote("1")
    store.canary("2", 5, guard=True)
    reads = {
        "routing.json": lambda: Routing.read(store.directory),
        "1/manifest.json": lambda: read_manifest(store.directory, "1"),
    }
    for name, read in reads.items():
        path = store.directory / name
        whole = path.read_bytes()
        for end in range(len(whole.rstrip())):
            path.write_bytes(whole[:end])
            with pytest.raises(ModelLoadError, match=f"{name} cannot be used"):
                read()


def test_routing_of_odd_values_is_a_load_error_or_sound(store: Store) -> None:
    store.directory.mkdir()
    path = store.directory / "routing.json"
    canary = {"version": "2", "weight": 5, "guard": True}
    sound = {"generation": 3, "stable": "1", "previous": ["0"], "canary": canary, "changed": "", "by": "", "why": ""}
    texts = [json.dumps(odd) for odd in ODD]
    texts += [json.dumps(sound | {name: odd}) for name in sound for odd in ODD]
    texts += [json.dumps(sound | {"canary": canary | {name: odd}}) for name in canary for odd in ODD]
    texts += [json.dumps(sound).replace("5", number) for number in ("1e400", "NaN", "Infinity", "1" * 400, "1" * 5000)]
    texts += [json.dumps(sound).replace("3", number) for number in ("1e400", "NaN", "Infinity", "1" * 400, "1" * 5000)]
    texts += [json.dumps(sound | {"generation": number}) for number in (1e300, 2**53, -1)]
    texts += ["[" * 100_000, '{"a":' * 100_000, '{"stable": "\\ud800"}', json.dumps(sound).replace('""', '"\\ud800"')]
    outcomes = set()
    for text in texts:
        path.write_text(text)
        try:
            routing = Routing.read(store.directory)
        except ModelLoadError:
            outcomes.add("refused")
        else:
            assert all(isinstance(name, str) for name in (routing.stable, *routing.previous))
            assert 0 <= routing.weight <= 100
            orjson.dumps(routing.to_json())  # as GET /model does
            outcomes.add("sound")
    assert outcomes == {"refused", "sound"}


def test_routing_that_is_a_directory_is_a_load_error(store: Store) -> None:
    (store.directory / "routing.json").mkdir(parents=True)
    with pytest.raises(ModelLoadError, match="it is not a file"):
        Routing.read(store.directory)


def test_routing_that_is_a_pipe_is_a_load_error(store: Store) -> None:
    store.directory.mkdir(parents=True)
    os.mkfifo(store.directory / "routing.json")  # to open it would wait for a writer
    errors: list[Exception] = []

    def read() -> None:
        try:
            Routing.read(store.directory)
        except ModelLoadError as error:
            errors.append(error)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(10)
    assert "it is not a file" in str(errors)


# --- publishing


@pytest.fixture(scope="module")
def iris(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, iris.joblib, and rows for it, rows.json."""
    place = tmp_path_factory.mktemp("iris")
    data = load_iris(as_frame=True)
    joblib.dump(LogisticRegression(max_iter=1000).fit(data.data, data.target), place / "iris.joblib")
    (place / "rows.json").write_text(json.dumps(SAMPLE))
    return place


@pytest.fixture(scope="module")
def published(iris: Path) -> Path:
    """A store with the model published and promoted by the real command line; tests work on copies of it."""
    line = ["publish", "iris.joblib", "--sample", "rows.json", "--metrics", '{"accuracy": 0.97}', "--note", "Grüße"]
    for arguments in (line, ["promote", "1"]):
        done = operator(iris, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
    return iris / "store"


def operator(place: Path, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run `python -m model` in a process, as an operator does who stands in a directory of theirs."""
    paths = {"PYTHONPATH": str(ROOT), "MODEL_DIR": "store", "JOURNAL_DIR": "journal"}
    return subprocess.run(
        [sys.executable, "-m", "model", *arguments],
        cwd=place,
        env={"PATH": os.environ["PATH"]} | paths | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_published_manifest_says_what_is_known(published: Path, iris: Path) -> None:
    about = read_manifest(published, "1").about
    assert {"python", "scikit-learn", "numpy", "joblib"} <= set(about["libraries"])
    assert about["libraries"]["numpy"] == np.__version__
    assert 10**7 < about["memory"] < 10**9
    assert [column["name"] for column in about["signature"]["columns"]] == load_iris().feature_names
    expected = {
        "version": "1",
        "artifact": "model.joblib",
        "format": "joblib",
        "size": (iris / "iris.joblib").stat().st_size,
        "methods": ["predict", "predict_proba", "predict_log_proba", "decision_function"],
        "classes": [0, 1, 2],
        "sample": SAMPLE,
        "sample_from": "operator",
        "predictions": [0, 1, 2],
        "machine": platform.machine(),
        "metrics": {"accuracy": 0.97},
        "note": "Grüße",
        "error_bound": 0.03,
        "reference": None,  # of three rows there is none
    }
    assert {key: about[key] for key in expected} == expected
    documented = set(re.findall(r"`([a-z0-9_]+)`", (Manifest.__doc__ or "").partition("Format:")[2]))
    assert set(about) == documented


def test_published_version_is_proved_again_by_the_real_verify(published: Path, iris: Path) -> None:
    done = operator(iris, "verify")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1: as it was published\n", "")


def test_publish_without_rows_makes_one_up_and_says_so(
    iris: Path, store: Store, command: Any, validated_here: None
) -> None:
    done = command("publish", iris / "iris.joblib")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == [
        "published version 1; serve it with: python -m model promote 1",
        "validated with a synthetic row only: give your own rows with --sample next time",
    ]
    about = read_manifest(store.directory, "1").about
    assert (about["sample_from"], about["sample"], about["metrics"], about["note"]) == (
        "synthetic",
        [[0.0] * 4],
        None,
        "",
    )


def test_file_that_is_published_twice_is_a_version_that_names_the_first(
    iris: Path, store: Store, command: Any, validated_here: None
) -> None:
    line = ("publish", iris / "iris.joblib", "--sample", iris / "rows.json")
    assert command(*line).err == ""
    done = command(*line)
    assert (done.status, done.out) == (0, "published version 2; serve it with: python -m model promote 2\n")
    assert done.err == "model: its file is equal to that of version 1\n"
    (store.directory / "1/manifest.json").write_text("{")
    assert command(*line).err == "model: its file is equal to that of version 2\n"


def test_publish_shows_what_only_a_sample_can_settle(
    tmp_path: Path, store: Store, command: Any, validated_here: None
) -> None:
    frame = pd.DataFrame({"code": ["a", "bcd", "e", "fgh"]})
    model = make_pipeline(FunctionTransformer(lengths), LogisticRegression()).fit(frame, [0, 1, 0, 1])
    joblib.dump(model, tmp_path / "model.joblib")
    lines = command("publish", tmp_path / "model.joblib").out.splitlines()
    assert lines[1].startswith("warning: the model takes numbers as well as strings in code")
    assert lines[2] == "callers share no calls: func=lengths of FunctionTransformer may look at several rows at once"
    (tmp_path / "rows.json").write_text('[{"code": "a"}]')
    lines = command("publish", tmp_path / "model.joblib", "--sample", tmp_path / "rows.json").out.splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == ["callers share no calls"]


def lengths(frame: Any) -> Any:
    """Count the letters of strings, or of numbers as strings."""
    return frame.apply(lambda column: column.astype(str).str.len())


def test_whole_request_body_is_a_sample_as_well(iris: Path, store: Store, command: Any, validated_here: None) -> None:
    rows = store.directory.with_name("rows.json")
    rows.write_text(json.dumps({"data": SAMPLE[:1]}))
    assert command("publish", iris / "iris.joblib", "--version", "x", "--sample", rows).status == 0
    assert read_manifest(store.directory, "x").about["sample"] == SAMPLE[:1]


SAMPLES = {
    "no json": ("[[5.1, 3.5", "cannot be read as JSON"),
    "NaN": ("[[NaN, 1, 2, 3]]", "cannot be read as JSON"),
    "deep": ("[" * 100_000, "cannot be read as JSON"),
    "no rows": ("[]", "expected a JSON list of 1 to 1000 rows"),
    "no data": ('{"rows": []}', "expected a JSON list of 1 to 1000 rows"),
    "too many": (json.dumps([[1.0]] * 1001), "expected a JSON list of 1 to 1000 rows"),
    "fewer columns": ("[[5.1, 3.5]]", "the model refuses its recorded sample"),
    "texts": ('[["a", "b", "c", "d"]]', "the model refuses its recorded sample"),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_sample_that_proves_nothing_is_refused(
    iris: Path, store: Store, tmp_path: Path, command: Any, validated_here: None, kind: str
) -> None:
    text, why = SAMPLES[kind]
    (tmp_path / "rows.json").write_text(text, "latin-1")
    assert why in command("publish", iris / "iris.joblib", "--sample", tmp_path / "rows.json").refusal()
    assert not store.directory.exists() or tree(store) == []


def test_sample_file_that_is_not_there_is_named(iris: Path, tmp_path: Path, command: Any) -> None:
    for path in (tmp_path / "gone.json", tmp_path):
        assert f"{path} cannot be read" in command("publish", iris / "iris.joblib", "--sample", path).refusal()
    with pytest.raises(StoreError, match="cannot be read"):
        read_rows(Path("a\0b"))


@pytest.mark.parametrize("text", ["accuracy=0.97", "{", "NaN", '{"a": Infinity}', '"\\ud800"', "[" * 10_000])
def test_metrics_that_are_no_json_are_refused(iris: Path, store: Store, command: Any, text: str) -> None:
    why = command("publish", iris / "iris.joblib", "--metrics", text).refusal()
    assert "--metrics: expected JSON, such as '{\"accuracy\": 0.97}'" in why
    assert not store.directory.exists()


def test_error_bound_is_kept_and_an_impossible_one_leaves_nothing(
    iris: Path, store: Store, command: Any, validated_here: None
) -> None:
    metrics = ("--metrics", '{"accuracy": 0.97}')
    assert "--error-bound 5: expected" in command("publish", iris / "iris.joblib", "--error-bound", "5").refusal()
    assert tree(store) == []
    assert command("publish", iris / "iris.joblib", *metrics, "--error-bound", "0.1").status == 0
    assert read_manifest(store.directory, "1").about["error_bound"] == 0.1
    assert command("publish", iris / "iris.joblib").status == 0
    assert read_manifest(store.directory, "2").about["error_bound"] is None


def test_note_that_is_no_text_is_refused(iris: Path, store: Store, command: Any, validated_here: None) -> None:
    assert "surrogates not allowed" in command("publish", iris / "iris.joblib", "--note", "\udcff").refusal()
    assert tree(store) == []


def test_metrics_and_note_may_be_anything_else(iris: Path, store: Store, command: Any, validated_here: None) -> None:
    note = "-- 'quoted' \"twice\" and\nbroken \\ 🙂"
    assert command("publish", iris / "iris.joblib", "--metrics", "[null, 1e300]", f"--note={note}").status == 0
    about = read_manifest(store.directory, "1").about
    assert (about["metrics"], about["note"]) == ([None, 1e300], note)
    assert command("list").out.splitlines()[1].endswith("and broken \\ 🙂")


FILES = {
    "garbage.joblib": (b"\x80garbage", r"garbage|model\.joblib does not load"),
    "model.exe": (b"MZ", r"model\.exe: the suffix names the format; expected one of \.joblib"),
    "model": (b"MZ", "model: the suffix names the format"),
    "class.joblib": (LogisticRegression, "model.joblib holds the class LogisticRegression"),
    "unfitted.joblib": (LogisticRegression(), "model"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_not_a_model_is_refused_and_leaves_nothing(
    store: Store, tmp_path: Path, command: Any, validated_here: None, name: str
) -> None:
    content, why = FILES[name]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        joblib.dump(content, path)
    assert re.search(why, command("publish", path).refusal())
    assert tree(store) == []


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere"), None])
def test_artifact_that_is_no_file_is_refused(store: Store, tmp_path: Path, command: Any, make: Any) -> None:
    path = tmp_path / "odd.joblib"
    if make:
        make(path)
    assert f"{path} cannot be copied into the store: " in command("publish", path).refusal()
    assert tree(store) == []


# A model that misbehaves in the way that it was made with.
ODD_MODEL = """
import os, random, signal, time

class Odd:
    n_features_in_ = 2

    def __init__(self, how):
        self.how = how

    def __setstate__(self, state):
        self.__dict__ = state
        if self.how == "exits":
            os._exit(0)
        if self.how == "crashes":
            signal.raise_signal(signal.SIGSEGV)
        if self.how == "ends":
            raise SystemExit("enough\\nof this")
        if self.how == "prints":
            print("hello from the model")
            os.write(1, b"and from below\\n")
        if self.how == "sleeps":
            time.sleep(10)

    def predict(self, x):
        return [random.random() if self.how == "gambles" else 1.0 for _ in x]
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: Any) -> Callable[[str], Path]:
    """Return a function that makes the file of a model that misbehaves."""
    (tmp_path / "odd.py").write_text(ODD_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "odd", raising=False)

    def make(how: str) -> Path:
        import odd

        joblib.dump(odd.Odd(how), tmp_path / "odd.joblib")
        return tmp_path / "odd.joblib"

    return make


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("exits", "model: model.joblib: the process that loaded it ended with 0\n"),
        ("crashes", f"model: model.joblib: the process that loaded it ended with {-signal.SIGSEGV}\n"),
    ],
)
def test_model_that_ends_the_process_that_loads_it_is_refused_and_leaves_nothing(
    store: Store, command: Any, odd: Any, how: str, why: str
) -> None:
    assert command("publish", odd(how)).refusal() == why
    assert tree(store) == []


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("ends", "model: SystemExit: enough of this\n"),
        ("gambles", "model: version 1 answers its recorded sample differently than when it was published\n"),
    ],
)
def test_model_that_cannot_be_relied_on_is_refused_and_leaves_nothing(
    store: Store, command: Any, odd: Any, validated_here: None, how: str, why: str
) -> None:
    assert command("publish", odd(how)).refusal() == why
    assert tree(store) == []


def test_model_that_takes_for_ever_is_given_up(store: Store, command: Any, iris: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("model.versions.publishing.TIME_LIMIT", 0.1)  # seconds; the libraries alone take longer
    assert "did not load and predict within 0.1 s" in command("publish", iris / "iris.joblib").refusal()
    assert tree(store) == []


def test_what_a_model_prints_while_it_loads_is_seen_and_does_no_harm(store: Store, command: Any, odd: Any) -> None:
    done = command("publish", odd("prints"))
    assert done.status == 0
    assert done.out.startswith("published version 1")
    assert "hello from the model" in done.err
    assert "and from below" in done.err
    assert read_manifest(store.directory, "1").about["predictions"] == [1.0]


def test_killed_publish_leaves_no_version_and_its_name_free(store: Store, iris: Path, command: Any, odd: Any) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "model", "publish", str(odd("sleeps"))], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (store.directory.exists() and tree(store)):  # until the proof has begun
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    (left,) = (path for path in store.directory.glob(".1-*"))
    assert store.versions() == []
    put(store, iris / "iris.joblib", "1")
    assert left.exists()  # it might be somebody's who has begun just now
    age(left)
    put(store, iris / "iris.joblib", "2")
    assert not left.exists()
    assert store.versions() == ["1", "2"]


# --- leftovers


def age(*paths: Path) -> None:
    """Make files look older than a minute."""
    for path in paths:
        then = time.time() - 61
        os.utime(path, (then, then))


def test_leftovers_are_no_versions_and_go_once_they_are_old(store: Store, artifact: Path) -> None:
    # What a kill leaves: a directory beside with part of an artifact, a manifest, or both, and half a routing file.
    put(store, artifact, "1")
    store.promote("1")
    half = store.directory / ".2-k1ll3d_x"
    half.mkdir()
    (half / "model.joblib").write_bytes(artifact.read_bytes()[:5])
    (half / ".manifest.json-abcdefgh").write_text('{"vers')
    routing = store.directory / ".routing.json-abcdefgh"
    routing.write_text('{"sta')
    assert store.versions() == ["1"]
    put(store, artifact, "2")
    store.promote("2")
    assert half.exists()
    assert routing.exists()
    age(half, routing)
    put(store, artifact, "3")
    assert not half.exists()
    assert not routing.exists()
    assert store.versions() == ["1", "2", "3"]


def test_what_others_keep_in_the_store_stays(store: Store, artifact: Path) -> None:
    put(store, artifact, "1")
    names = [".pre-commit-config.yaml", ".git-keep", "README", ".dockerignore", "lost-and-found-by-somebody"]
    for name in names:
        (store.directory / name).write_text("")
        age(store.directory / name)
    put(store, artifact, "2")
    assert set(names) <= set(os.listdir(store.directory))


def test_publish_that_takes_long_is_not_swept_away_by_another(store: Store, artifact: Path) -> None:
    with store.new_version(artifact, "1") as manifest:
        age(manifest.artifact.parent)
        put(store, artifact, "2")
        manifest.about.update(KNOWN)
    assert sorted(store.versions()) == ["1", "2"]


# --- a store that cannot be written


@contextmanager
def without_privileges() -> Iterator[None]:
    """Be nobody where we are root, whom no mode of a file binds."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.fixture
def read_only(artifact: Path, command: Any, monkeypatch: Any) -> Iterator[Store]:
    """A store that may only be read."""
    place = Path(tempfile.mkdtemp())  # pytest's own are closed to all but us
    store = Store(place / "store")
    put(store, artifact, "1", "2")
    store.promote("1")
    place.chmod(0o755)
    monkeypatch.setenv("JOURNAL_DIR", str(place))
    (store.directory / ".lock").unlink()
    store.directory.chmod(0o555)
    yield store
    store.directory.chmod(0o755)
    shutil.rmtree(place)


@pytest.mark.usefixtures("validated_here")
def test_read_only_store_is_read_and_every_change_is_refused(read_only: Store, artifact: Path, command: Any) -> None:
    lines = ("promote 2 --force", "canary 2 --weight 5 --force", "rollback", "remove 2")
    before = tree(read_only)
    with without_privileges():
        for line in lines:
            why = command("--dir", read_only.directory, *line.split()).refusal()
            assert "the store cannot be written: [Errno 13] Permission denied" in why
        assert "Permission denied" in command("--dir", read_only.directory, "publish", ROOT / "README.md").refusal()
        assert command("--dir", read_only.directory, "list").status == 0
        assert command("--dir", read_only.directory, "show", "1").status == 0
    assert tree(read_only) == before


@pytest.mark.usefixtures("validated_here")
def test_users_who_may_write_to_the_directory_share_a_store(read_only: Store, command: Any) -> None:
    read_only.directory.chmod(0o777)
    read_only.canary("2", 5)  # makes the lock, as another user
    with without_privileges():
        assert command("--dir", read_only.directory, "promote", "2", "--force").status == 0
    assert read_only.promote("1").generation == 4
    assert stat.S_IMODE((read_only.directory / "routing.json").stat().st_mode) == 0o644


def test_what_root_writes_belongs_to_the_owner_of_the_store(artifact: Path) -> None:
    place = Path(tempfile.mkdtemp())  # pytest's own are closed to all but us
    try:
        owner = os.geteuid() or 65534
        os.chown(place, owner, -1)
        store = Store(place / "var/models")
        put(store, artifact, "1", "2", "3")
        for version in "1", "2", "3":
            store.promote(version)
        assert {path.stat().st_uid for path in place.rglob("*")} == {owner}
        with without_privileges():
            assert store.rollback().stable == "2"
            store.remove("3")
        assert store.versions() == ["1", "2"]
    finally:
        shutil.rmtree(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_link_that_the_owner_of_the_store_lays_leads_root_nowhere(artifact: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to all but us
        place = Path(name)
        os.chown(place, 65534, 65534)
        (place / ".lock").symlink_to(tmp_path / "made by root")
        with pytest.raises(StoreError, match="Permission denied"):
            put(Store(place), artifact, "1")
        assert not (tmp_path / "made by root").exists()


def test_version_of_another_user_that_cannot_be_removed_names_the_way(
    store: Store, artifact: Path, command: Any, monkeypatch: Any
) -> None:
    put(store, artifact, "1")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "1":  # whose directory only its owner may move
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    way = f"as root: chown -R --reference={store.directory} {store.directory / '1'}\n"
    assert command("remove", "1").refusal() == f"model: version 1 belongs to another user; {way}"
    done = command("prune", "--keep", "0")
    assert (done.status, done.err) == (1, f"model: kept version 1: version 1 belongs to another user; {way}")
    assert tree(store) == ["1", "1/manifest.json", "1/model.joblib"]


@pytest.mark.parametrize("line", ["publish FILE", "promote 1", "rollback", "remove 1", "canary 1 --weight 1"])
def test_store_below_a_file_is_refused(tmp_path: Path, artifact: Path, command: Any, line: str) -> None:
    below = artifact / "store"
    why = command("--dir", below, *line.replace("FILE", str(artifact)).split()).refusal()
    assert "Not a directory" in why
    assert command("--dir", below, "list").status in (0, 1)


@pytest.mark.parametrize("line", ["publish FILE", "promote 1 --force", "rollback", "remove 1"])
@pytest.mark.usefixtures("validated_here")
def test_lock_that_cannot_be_had_is_named(store: Store, artifact: Path, command: Any, line: str) -> None:
    put(store, artifact, "1")
    (store.directory / ".lock").unlink()
    (store.directory / ".lock").mkdir()
    assert "the store cannot be written: " in command(*line.replace("FILE", str(artifact)).split()).refusal()


# --- several operators, and crashes; each in a process that forks others, which pytest's own with its threads may not


COMMON = """
import hashlib, json, os, random, resource, shutil, signal, sys, time
from pathlib import Path
from model.versions.routing import Routing
from model.versions.store import Store, StoreError, read_manifest

place = Path(sys.argv[1])
store, artifact = Store(place / "store"), place / "model.joblib"
artifact.write_bytes(os.urandom(300))

def publish(name=""):
    with store.new_version(artifact, name) as manifest:
        manifest.about.update(sample=[[1.0]], predictions=[1.0])

def check():
    "What can be seen is whole; return the routing."
    seen = os.listdir(store.directory)
    there = store.versions()
    assert {name for name in seen if name[0] != "."} <= {*there, "routing.json"}, seen
    for name in there:
        manifest = read_manifest(store.directory, name)
        assert hashlib.sha256(manifest.artifact.read_bytes()).hexdigest() == manifest.about["sha256"]
    routing = Routing.read(store.directory)
    assert {routing.stable, routing.canary} <= {*store.versions(), ""}, routing
    return routing

def forked(work, *arguments):
    pid = os.fork()
    if pid:
        return pid
    try:
        work(*arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)

def sweep():
    "The next command works, and what a crash left goes once it is old."
    for path in store.directory.glob(".*-*"):
        os.utime(path, (time.time() - 61,) * 2)
    publish("sweeper")
    store.remove("sweeper")
    assert {name for name in os.listdir(store.directory) if name[0] == "."} == {".lock"}
"""


def run_script(script: str, *arguments: Any, seconds: float = 120.0) -> Any:
    """Run a script after `COMMON`, and return what it prints, as JSON."""
    line = [sys.executable, "-c", COMMON + script, *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_operators_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    found = run_script(
        """
def operate(seed, into):
    dice, changes, published = random.Random(seed), 0, 0
    for _ in range(25):
        version = dice.choice(["1", "2", "3"])
        try:
            match dice.randrange(6):
                case 0 | 1:
                    store.promote(version)
                case 2 | 3:
                    store.canary(version, dice.uniform(1, 99), dice.random() < 0.5)
                case 4:
                    store.rollback()
                case 5:
                    publish()
                    published += 1
                    continue
            changes += 1
        except StoreError as error:
            assert any(words in str(error) for words in ("the stable one", "no earlier stable")), error
    os.write(into, json.dumps([changes, published]).encode())

def read():
    seen = 0
    while not (place / "done").exists():
        generation = check().generation
        assert generation >= seen
        seen = generation

for name in "123":
    publish(name)
store.promote("1")
reader = forked(read)
operators = []
for seed in range(6):
    out, into = os.pipe()
    operators.append((forked(operate, seed, into), out))
made = []
for pid, out in operators:
    assert os.waitpid(pid, 0)[1] == 0
    made.append(json.loads(os.read(out, 100)))
(place / "done").touch()
assert os.waitpid(reader, 0)[1] == 0
changes, published = map(sum, zip(*made))
generation = check().generation
print(json.dumps([changes, generation, published, sorted(map(int, store.versions()))]))
""",
        tmp_path,
    )
    changes, generation, published, versions = found
    assert generation == 1 + changes
    assert versions == list(range(1, 3 + published + 1))
    assert changes > 50
    assert published > 10


def test_process_that_is_killed_at_any_moment_leaves_a_whole_store(tmp_path: Path) -> None:
    kills = run_script(
        """
def operate(dice):
    while True:
        version = dice.choice(["a", "b", "c"])
        try:
            match dice.randrange(5):
                case 0:
                    store.promote(version)
                case 1:
                    store.canary(version, 5)
                case 2:
                    store.rollback()
                case 3:
                    publish(version)
                case 4:
                    store.remove(version)
        except StoreError:
            pass

dice, seen = random.Random(7), 0
publish("a")
store.promote("a")
for kill in range(30):
    pid = forked(operate, dice)
    time.sleep(dice.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    generation = check().generation
    assert generation >= seen
    seen = generation
    if kill % 5 == 0:
        sweep()
    dice.random()
print(json.dumps(kill + 1))
""",
        tmp_path,
    )
    assert kills == 30


AT_ANY_STEP = """
CALLS = ["open", "fsync", "rename", "mkdir", "chmod", "fchmod", "unlink", "rmdir", "sendfile"]

def at_call(work, nth, how):
    "Fail at the nth call that changes something, or be killed before or after it."
    count = 0

    def counting(real):
        def call(*arguments, **named):
            nonlocal count
            count += 1
            if count == nth and how == "fails":
                raise OSError(28, os.strerror(28))
            if count == nth and how == "before":
                os._exit(9)
            try:
                return real(*arguments, **named)
            finally:
                if count == nth and how == "after":
                    os._exit(9)

        return call

    for name in CALLS:
        setattr(os, name, counting(getattr(os, name)))
    try:
        work()
    except (StoreError, OSError):
        os._exit(8)
    os._exit(0 if count < nth else 7)  # 7: it failed, and nobody minded

def at_byte(work, size, how):
    "Fail, or be killed, where a file would get longer than so many bytes."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN if how == "full" else signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        work()
    except (StoreError, OSError):
        os._exit(8)

WORKS = {
    "publish": lambda: publish("d"),
    "promote": lambda: store.promote("c"),
    "canary": lambda: store.canary("c", 5),
    "rollback": lambda: store.rollback(),
    "remove": lambda: store.remove("c"),
}

def begin():
    shutil.rmtree(store.directory)
    shutil.copytree(place / "pristine", store.directory)

def facts():
    routing = check()
    return routing.generation, routing.stable, routing.previous, routing.canary, sorted(store.versions())

for name in "abc":
    publish(name)
store.promote("a")
store.promote("b")
shutil.copytree(store.directory, place / "pristine")
work = WORKS[sys.argv[2]]
before = facts()
work()
after = facts()
outcomes = {}
for trial, how in ((at_call, "fails"), (at_call, "before"), (at_call, "after"), (at_byte, "full"), (at_byte, "killed")):
    at = 1
    status = None
    while status != 0:
        begin()
        status = os.waitpid(forked(trial, work, at, how), 0)[1]
        outcomes.setdefault(how, []).append(status if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
        found = facts()
        assert found in (before, after), (how, at, found)
        sweep()
        if found == before:
            work()
        assert facts() == after, (how, at, found)
        at += 37 if trial is at_byte else 1  # a write fails alike at each of its bytes
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("work", ["publish", "promote", "canary", "rollback", "remove"])
def test_crash_or_full_disk_at_any_step_leaves_the_old_state_or_the_new(tmp_path: Path, work: str) -> None:
    outcomes = run_script(AT_ANY_STEP, tmp_path, work, seconds=600)
    steps = len(outcomes["before"])
    assert steps >= 6
    assert outcomes["before"] == outcomes["after"] == [9] * (steps - 1) + [0]
    assert set(outcomes["fails"]) <= {0, 7, 8}
    assert outcomes["fails"].count(8) >= 5
    if work != "remove":  # which writes nothing
        assert set(outcomes["full"]) == {0, 8}
        assert set(outcomes["killed"]) == {0, signal.SIGXFSZ}
