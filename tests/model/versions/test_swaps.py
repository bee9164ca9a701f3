"""A model's life while it is served: real gunicorn of two workers, real traffic, a version store that changes.

The versions are named by what they predict, so that each answer tells which one gave it.
"""

import fcntl
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from conftest import CHEAP, ROOT, Answer, Gunicorn, Load, basic, gunicorn, records
from sklearn.datasets import load_iris
from sklearn.tree import DecisionTreeClassifier

from model.versions import publish_status, worker_statuses
from model.versions.guard import MIN_REQUESTS
from model.versions.loading import load_version, model_facts
from model.versions.routing import Routing
from model.versions.store import Store, write_json
from model.versions.watcher import share_of
from worker_slot import WorkerSlot

IRIS = load_iris().data
SAMPLE = IRIS[[60, 110]].tolist()
FORCE = ("--force", "--any-machine")  # the classes are others, and no machine is recorded
ROW = [[5.1, 3.5, 1.4, 0.2]]  # what Load asks about; not in the sample
BODY = json.dumps({"data": ROW}).encode()

# Models that misbehave. They stand in a module of their own, on the server's PYTHONPATH.
ODD_MODELS = """
import fcntl
import random
import time
from pathlib import Path

import numpy as np

class Odd:
    n_features_in_ = 4

    def __init__(self, number):
        self.number = number

    def predict(self, rows):
        return [self.number] * len(rows)

class Marking(Odd):  # whose unpickling leaves a mark
    def __setstate__(self, state):
        self.__dict__.update(state)
        with Path(__file__).with_name("unpickled").open("a") as file:
            file.write(f"{self.number} ")

class SlowToLoad(Odd):  # while a test holds the lock; gevent would turn a sleep into one that lets others run
    def __setstate__(self, state):
        self.__dict__.update(state)
        with Path(__file__).with_name("loading").open("a") as file:
            file.write("x")
        with Path(__file__).with_name("lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH)

class LoadsOnce(Odd):
    def __setstate__(self, state):
        self.__dict__.update(state)
        with Path(__file__).with_name("loads").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write("x")
            if file.tell() > 1:
                raise RuntimeError("loads once only")

class Large(Odd):  # 30 MB that are read, and 10 MB that are mapped
    def __init__(self, number):
        self.number = number
        self.ballast = bytes(30_000_000), np.zeros((10, 125_000))

class Failing(Odd):  # on some of the rows that its sample does not hold
    def predict(self, rows):
        if rows[0][0] == 5.1 and random.random() < 0.5:
            raise RuntimeError("odd")
        return super().predict(rows)

class Sluggish(Odd):
    def predict(self, rows):
        if rows[0][0] == 5.1:
            time.sleep(0.1)
        return super().predict(rows)
"""


class World:
    """A running server of two workers, and the store of versions that it serves from."""

    def __init__(self, server: Gunicorn, store: Store, odd: Any) -> None:
        self.server, self.store, self.odd = server, store, odd
        self._pristine = {version: store.directory.parent / f"pristine-{version}" for version in store.versions()}
        for version, copy in self._pristine.items():
            shutil.copytree(store.directory / version, copy)

    def reset(self) -> None:
        """Serve version 1 and nothing beside it, whatever a test has left behind."""
        for version, copy in self._pristine.items():
            shutil.rmtree(self.store.directory / version, ignore_errors=True)
            shutil.copytree(copy, self.store.directory / version)
        generation = max(each["generation"] for each in worker_statuses(self.server.journal_dir)) + 1
        routing = Routing("1", generation=generation, changed=now(), by="test", why="reset")
        write_json(self.store.directory / "routing.json", routing.to_json())
        settled(self.server, routing)
        self._log = self.server.log.stat().st_size
        self.began = time.time()

    def log(self) -> str:
        """Return what the server has logged in this test."""
        return self.server.log.read_bytes()[self._log :].decode()

    def events(self) -> list[dict[str, Any]]:
        """Return the rollbacks in the journal of this test."""
        found = [each for each in records(self.server.journal_dir) if each.get("event") == "rollback"]
        return [each for each in found if each["time"] >= self.began]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server that the tests of this file share, for time's sake: it must outlive whatever they do."""
    place = tmp_path_factory.mktemp("world")
    roles = {"chief": ["predict", "admin"], "predict": ["predict"], "admin": ["admin"]}
    users = {name: {"password": CHEAP, "roles": each} for name, each in roles.items()}
    (place / "users.json").write_text(json.dumps(users))
    with odd_models_in(place) as odd:
        store = filled(place)
        with serving(store) as server:
            server.wait_until(lambda: len(worker_statuses(server.journal_dir)) == 2)  # a moment after they serve
            yield World(server, store, odd)


@pytest.fixture
def world(running: World) -> World:
    """The shared server, serving version 1."""
    running.reset()
    return running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with the versions 1, 2 and 3, of which 1 is served; for a server of the test's own."""
    return filled(tmp_path)


@contextmanager
def odd_models_in(place: Path) -> Iterator[Any]:
    """Write the module of misbehaving models where a server finds it as well, and import it."""
    path = place / "odd_models.py"
    path.write_text(ODD_MODELS)
    before = sys.modules.pop("odd_models", None)
    spec = importlib.util.spec_from_file_location("odd_models", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["odd_models"] = module  # where pickle looks for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["odd_models"]
    if before:
        sys.modules["odd_models"] = before


def filled(place: Path) -> Store:
    """Make a store with the versions 1, 2 and 3, and promote 1."""
    store = Store(place / "store")
    for number in (1, 2, 3):
        publish(store, constant(number), str(number))
    store.promote("1")
    return store


def now() -> str:
    """Return the time as a routing holds it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def constant(number: int) -> DecisionTreeClassifier:
    """Fit a model that always predicts the number."""
    return DecisionTreeClassifier().fit(IRIS, np.full(len(IRIS), number))


def publish(store: Store, model: Any, version: str) -> Path:
    """Publish as `python -m model publish` does, without its two fresh processes; return the version's directory."""
    artifact = store.directory.parent / "model.joblib"
    joblib.dump(model, artifact)
    with store.new_version(artifact, version) as manifest:
        manifest.about["sample"] = SAMPLE
        loaded = load_version(manifest)
        answers = np.asarray(loaded.call(loaded.signature.parse(SAMPLE))).tolist()
        manifest.about.update(model_facts(loaded), predictions=answers)
    return store.directory / version


def serving(store: Store, **settings: Any) -> AbstractContextManager[Gunicorn]:
    """Serve a store with two workers, which refuse nothing because the machine is busy."""
    defaults = {"web_concurrency": 2, "max_wait": 30}
    return gunicorn(store.directory.parent, model_dir=store.directory, **defaults | settings)


def command(server: Gunicorn, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `python -m model` with the server's settings."""
    environ = os.environ | {
        "MODEL_DIR": str(server.place / "store"),
        "JOURNAL_DIR": str(server.journal_dir),
        "WEB_CONCURRENCY": "2",
        "PYTHONPATH": str(server.place),
    }
    return subprocess.run(
        [sys.executable, "-m", "model", *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def all_workers(server: Gunicorn, met: Callable[[dict[str, Any]], Any], seconds: float = 120.0) -> list[dict[str, Any]]:
    """Wait until what all workers say of themselves meets a condition; return what they say."""
    found: list[dict[str, Any]] = []

    def agreed() -> bool:
        found[:] = worker_statuses(server.journal_dir)
        return len(found) == server.count and all(met(each) for each in found)

    try:
        server.wait_until(agreed, seconds)
    except AssertionError as error:
        raise AssertionError(f"the workers say {found}; {error}") from None
    return found


def settled(server: Gunicorn, routing: Routing) -> None:
    """Wait until all workers serve a routing without a complaint."""
    wanted = {"generation": routing.generation, "stable": routing.stable, "canary": routing.canary or None}
    all_workers(server, lambda told: told | wanted == told and not told["error"])


def model_page(server: Gunicorn) -> Any:
    """GET /model as an admin."""
    status, _, body = server.ask("GET", "/model", Authorization=basic("admin"))
    assert status == 200
    return json.loads(body)


def predict(server: Gunicorn, user: str = "predict", **headers: str) -> tuple[int, str | None, Any]:
    """Ask for a prediction; return the status, the version that the answer names, and the decoded answer."""
    status, told, body = server.ask(
        "POST", "/predict", BODY, Content_Type="application/json", Authorization=basic(user), **headers
    )
    return status, told["X-Model-Version"], json.loads(body)


def ask_many(server: Gunicorn, callers: int, headers: list[dict[str, str]]) -> list[tuple[int, str | None]]:
    """Ask once with each of the headers, on a few connections that are kept; return statuses and versions in order."""
    found: list[Any] = [None] * len(headers)
    common = {"Content-Type": "application/json", "Authorization": basic("predict")}

    def call(first: int) -> None:
        connection = server.connect()
        for index in range(first, len(headers), callers):
            connection.request("POST", "/predict", BODY, common | headers[index])
            answer = connection.getresponse()
            answer.read()
            found[index] = answer.status, answer.headers["X-Model-Version"]
        connection.close()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def assert_true(answers: list[Answer]) -> None:
    """Check that every request was answered, by the version that the answer names."""
    assert len(answers) > 20
    assert Counter(answer.status for answer in answers) == {200: len(answers)}
    assert all(json.loads(answer.body) == {"prediction": [int(answer.version or 0)]} for answer in answers)


def versions_of(answers: list[Answer], since: float, until: float = float("inf")) -> set[str | None]:
    """Return which versions answered what was asked in a time."""
    return {answer.version for answer in answers if since <= answer.began < until}


def only(load: Load, versions: set[str], since: float, seconds: float = 20.0) -> None:
    """Wait until each of these versions, and never another, has answered what was asked since a time."""
    deadline = time.monotonic() + seconds
    while versions_of(load.answers, since) < versions and time.monotonic() < deadline:
        time.sleep(0.05)
    assert versions_of(load.answers, since) == versions


def serves_one_alone(load: Load, server: Gunicorn) -> None:
    """Check that version 1 alone answers what is asked from now on; many answers, since a canary gives few of them."""
    since = time.monotonic()
    server.wait_until(lambda: sum(answer.began >= since for answer in load.answers) > 100)
    assert versions_of(load.answers, since) == {"1"}


# --- publish, canary, promote, rollback


def live(server: Gunicorn, store: Store, load: Load, version: int, by_hand: bool) -> list[float]:
    """Lead a new version through its life; return the seconds that each change took to reach all workers.

    With `by_hand` publish through the command line, which proves the version in two fresh processes.
    """
    took = []
    before = Routing.read(store.directory).stable

    def run(*arguments: str) -> float:
        done = command(server, *arguments, "--wait")
        assert done.returncode == 0, done.stderr
        said = re.search(r"all 2 workers serve it, after ([0-9.]+) s", done.stdout)
        assert said, done.stdout
        took.append(float(said[1]))
        return time.monotonic()

    if by_hand:
        artifact, sample = server.place / f"new-{version}.joblib", server.place / "rows.json"
        joblib.dump(constant(version), artifact)
        sample.write_text(json.dumps(SAMPLE))
        done = command(server, "publish", str(artifact), "--version", str(version), "--sample", str(sample))
        assert done.returncode == 0, done.stderr
    else:
        publish(store, constant(version), str(version))
    only(load, {before, str(version)}, since=run("canary", str(version), "--weight", "10", *FORCE))
    promoted = run("promote", str(version), *FORCE)
    only(load, {str(version)}, since=promoted)
    until = time.monotonic()
    rolled_back = run("rollback")
    only(load, {before}, since=rolled_back)
    assert versions_of(load.answers, promoted, until) == {str(version)}
    return took


def assert_fast(lives: list[list[float]]) -> None:
    """Check that each kind of change is fast; at its best, since a busy machine makes some late."""
    assert max(map(min, zip(*lives, strict=True))) < 2.0, lives


@pytest.mark.long
@pytest.mark.parametrize("worker_class", ["gevent", "gthread"])
def test_many_lives_of_versions_fail_no_request(store: Store, worker_class: str) -> None:
    with serving(store, worker_class=worker_class) as server, Load(server, callers=2, pause=0) as load:
        workers, took = server.workers(), []
        for number in range(5):
            took.append(live(server, store, load, 10 + number, number == 0))
        assert server.workers() == workers
    assert_fast(took)
    assert load.errors == []
    assert_true(load.answers)
    recorded = Counter(each["model_version"] for each in records(server.journal_dir) if "event" not in each)
    assert recorded == Counter(answer.version for answer in load.answers)


@pytest.mark.long
def test_waiting_says_that_a_version_is_not_served_and_is_not_deceived_by_what_was_before(world: World) -> None:
    publish(world.store, world.odd.LoadsOnce(47), "47")
    (world.server.place / "loads").write_text("")  # again, in the fresh process that proves it, and not in a worker
    done = command(world.server, "promote", "47", *FORCE, "--wait", "60")
    assert done.returncode == 1
    assert done.stderr.count("loads once only") == 2
    assert "0 of 2 workers serve it" in done.stderr
    assert predict(world.server)[1] == "1"
    done = command(world.server, "promote", "3", *FORCE, "--wait", "60")
    assert (done.returncode, done.stderr) == (0, "")
    assert "all 2 workers serve it" in done.stdout
    assert predict(world.server)[1] == "3"


def test_worker_that_publishes_its_status_is_never_missed_nor_considered_dead(tmp_path: Path) -> None:
    slot, ending = WorkerSlot(tmp_path / "workers"), threading.Event()
    state: dict[str, Any] = {"ready": True, "error": None, "stable": None, "canary": None, "routing": None}
    publish_status(slot, None, state)

    def publish() -> None:
        while not ending.is_set():
            publish_status(slot, None, state | {"error": "x" * random.randrange(10_000)})

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        assert [len(worker_statuses(tmp_path)) for _ in range(500)] == [1] * 500
    finally:
        ending.set()
        thread.join()


# --- the canary's share


def test_canary_gets_its_share(world: World) -> None:
    settled(world.server, world.store.canary("2", 10))
    answers = Counter(ask_many(world.server, 4, [{}] * 2000))
    assert set(answers) == {(200, "1"), (200, "2")}
    assert answers[200, "2"] == pytest.approx(200, abs=70)  # five standard deviations


@pytest.mark.long
def test_canary_gets_its_share_of_ten_thousand(world: World) -> None:
    settled(world.server, world.store.canary("2", 10))
    answers = Counter(ask_many(world.server, 4, [{}] * 10_000))
    assert set(answers) == {(200, "1"), (200, "2")}
    assert answers[200, "2"] == pytest.approx(1000, abs=150)


def test_key_sticks_to_its_version_on_every_worker_and_host_and_as_the_canary_grows(world: World) -> None:
    keys = [f"customer {number}" for number in range(200)]
    chosen = {}
    for weight in (10, 40):
        routing = world.store.canary("2", weight)
        settled(world.server, routing)
        asked = [{"X-Routing-Key": key, "X-Request-ID": f"{routing.generation}:{key.split()[1]}"} for key in keys]
        pids = defaultdict(set)
        for _ in range(20):  # until the kernel has given connections to both workers
            answers = ask_many(world.server, 8, asked)
            assert {status for status, _ in answers} == {200}
            # Another process, as on another host or after a restart, comes to the same.
            assert [version == "2" for _, version in answers] == [share_of(key, "2") < weight for key in keys]
            for record in records(world.server.journal_dir):
                pids[record.get("request_id", "")].add(record["pid"])
            if sum(len(pids[each["X-Request-ID"]]) == 2 for each in asked) > 20:
                break
        else:
            pytest.fail("one worker has answered everything")
        chosen[weight] = {key for key, (_, version) in zip(keys, answers, strict=True) if version == "2"}
    assert chosen[10] < chosen[40]  # who had the canary keeps it
    assert len(chosen[10]) == pytest.approx(20, abs=12)
    assert len(chosen[40]) == pytest.approx(80, abs=20)


def test_admin_who_predicts_may_have_a_version_outright(world: World) -> None:
    server = world.server
    settled(server, world.store.canary("2", 50))
    for version in ("1", "2") * 8:
        answer = predict(server, "chief", X_Model_Version=version)
        assert answer == (200, version, {"prediction": [int(version)]})
    for version in ("1", "2", "3"):
        status, _, told = predict(server, "predict", X_Model_Version=version)
        assert (status, "needs the role admin" in told["detail"]) == (403, True)
        assert predict(server, "admin", X_Model_Version=version)[0] == 403  # it may not predict
    for version in ("3", "nonsense"):
        status, named, told = predict(server, "chief", X_Model_Version=version)
        assert (status, named) == (422, None)
        assert told["detail"] == "X-Model-Version: no such version is served; there are: 1, 2"
    assert {predict(server, "chief")[1] for _ in range(40)} == {"1", "2"}  # and without the header it has no wish


# --- broken stores


def broken(store: Store, version: str, damage: Callable[[Path], object]) -> None:
    """Do damage to a version, whose files are read-only by design."""
    there = store.directory / version
    (there / "model.joblib").chmod(0o644)
    damage(there)


def cut(percent: int) -> Callable[[Path], object]:
    """Return a damage: the artifact ends after so much of its length."""

    def truncate(there: Path) -> None:
        os.truncate(there / "model.joblib", (there / "model.joblib").stat().st_size * percent // 100)

    return truncate


def flip(there: Path) -> None:
    """Do a damage: one byte of the artifact is another."""
    whole = bytearray((there / "model.joblib").read_bytes())
    whole[len(whole) // 2] ^= 1
    (there / "model.joblib").write_bytes(whole)


def lie(**lies: Any) -> Callable[[Path], object]:
    """Return a damage: the manifest says otherwise."""

    def write(there: Path) -> None:
        write_json(there / "manifest.json", json.loads((there / "manifest.json").read_text()) | lies)

    return write


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "is not the file that was published"),
    **{f"cut-{percent}": (cut(percent), "is not the file that was published") for percent in range(0, 100, 10)},
    "sha256": (lie(sha256="0" * 64), "is not the file that was published"),
    "no-sha256": (lie(sha256=None), "TypeError"),
    "elsewhere": (lie(artifact="../1/model.joblib"), "is not the name of a file here"),
    "another": (lie(version="1"), "it belongs to version '1'"),
    "no-sample": (lie(sample=None), "it has no sample"),
    "no-predictions": (lie(predictions=None), "no predictions"),
    "no-artifact": (lambda there: (there / "model.joblib").unlink(), "cannot be read"),
    "half-manifest": (lambda there: os.truncate(there / "manifest.json", 200), "JSONDecodeError"),
    "no-manifest": (lambda there: (there / "manifest.json").unlink(), "FileNotFoundError"),
}


def route(store: Store, stable: str, canary: str = "", **more: Any) -> Routing:
    """Write a routing as the command line never would: it checks first."""
    old = Routing.read(store.directory)
    routing = replace(old, stable=stable, canary=canary, weight=50.0 * bool(canary), generation=old.generation + 1)
    write_json(store.directory / "routing.json", replace(routing, **more).to_json())
    return replace(routing, **more)


def spoil(store: Store, source: Path, damages: dict[str, tuple[Callable[[Path], object], str]]) -> None:
    """Make a version of each damage, from a good one."""
    for name, (damage, _) in damages.items():
        shutil.rmtree(store.directory / name, ignore_errors=True)
        shutil.copytree(source, store.directory / name)
        lie(version=name)(store.directory / name)
        broken(store, name, damage)


def complaints(world: World, routing: Routing) -> list[str]:
    """Wait until all workers have seen a routing; return what they complain of, and what GET /model says."""
    told = all_workers(world.server, lambda told: told["generation"] == routing.generation)
    return [each["error"] or "" for each in told] + [model_page(world.server)["error"] or ""]


def test_damaged_versions_are_named_and_neither_unpickled_nor_served(world: World) -> None:
    unpickled = world.server.place / "unpickled"
    good = publish(world.store, world.odd.Marking(9), "9")
    spoil(world.store, good, DAMAGES)
    unpickled.unlink()  # left by publishing
    with Load(world.server, callers=2) as load:
        for name, beside in zip(*[iter(DAMAGES)] * 2, strict=True):  # in pairs, for time's sake
            errors = complaints(world, route(world.store, name, beside))
            for damaged in (name, beside):
                assert all(f"/{damaged}/" in error and DAMAGES[damaged][1] in error for error in errors), errors
                assert f"/{damaged}/" in world.log()
            page = model_page(world.server)
            assert (page["stable"]["version"], page["canary"], page["ready"]) == ("1", None, True)
        assert not unpickled.exists()
        assert world.server.is_ready()

        # A version that nobody asks for meanwhile: what loads while the routing changes is loaded once more.
        settled(world.server, route(world.store, "1"))
        spoil(world.store, good, {beside: (lambda there: None, "")})  # mended, without a restart
        mended = time.monotonic()
        settled(world.server, route(world.store, "1", beside))
        only(load, {"1", beside}, since=time.monotonic())
        assert unpickled.read_text() == "9 9 "  # once in each worker
    assert load.errors == []
    assert set(load.statuses) == {200}
    assert versions_of(load.answers, 0.0, mended) == {"1"}


def test_manifest_that_lies_about_the_model_keeps_it_from_being_served(world: World) -> None:
    signature = json.loads((world.store.directory / "2/manifest.json").read_text())["signature"]
    lies = {
        "lies-predictions": (lie(predictions=[2, 3]), "answers its recorded sample differently"),
        "lies-fewer": (lie(predictions=[2]), "answers its recorded sample differently"),
        "lies-signature": (lie(signature=signature | {"layout": "list"}), "than its manifest records"),
        "lies-sample": (lie(sample=[[1.0, 2.0]]), "refuses its recorded sample"),
    }
    spoil(world.store, world.store.directory / "2", lies)
    with Load(world.server, callers=2) as load:
        for name, beside in (("lies-predictions", "lies-fewer"), ("lies-signature", "lies-sample")):
            errors = complaints(world, route(world.store, name, beside))
            assert all(lies[name][1] in error and lies[beside][1] in error for error in errors), errors
            assert f"version {name} " in world.log()
        settled(world.server, route(world.store, "1", "2"))
        only(load, {"1", "2"}, since=time.monotonic())
    assert load.errors == []
    assert_true(load.answers)


def test_routing_that_makes_no_sense_is_named_and_leaves_all_as_it_is(world: World) -> None:
    path = world.store.directory / "routing.json"
    settled(world.server, world.store.canary("2", 50))
    good = path.read_text()
    asks = json.loads(good)
    cases: list[tuple[str | None, str]] = [  # what is written, and what is said of it
        (good[: len(good) // 2], "JSONDecodeError"),
        ("\0" * len(good), "JSONDecodeError"),
        (None, "holds no version to serve"),
        ("", "JSONDecodeError"),
        ("[1]", "AttributeError"),
        ("{}", "KeyError: 'stable'"),
        (json.dumps(asks | {"stable": "nowhere"}), "/nowhere/manifest.json"),
        (json.dumps(asks | {"stable": "../1"}), "it contains an invalid version name"),
        (json.dumps(asks | {"canary": {"version": "4", "weight": 101, "guard": False}}), "weight is not from 0"),
        (json.dumps(asks | {"canary": {"version": "none", "weight": 10, "guard": False}}), "/none/manifest.json"),
    ]
    with Load(world.server, callers=2) as load:
        last = None
        for written, said in cases:
            if written is None:
                path.unlink()
            else:
                path.write_text(written)  # in place, as an editor would
            told = all_workers(
                world.server,
                lambda told, said=said, last=last: said in (told["error"] or "") and told["error"] != last,
            )
            last = told[0]["error"]
            assert said in model_page(world.server)["error"]
            assert said in world.log()
            assert model_page(world.server)["stable"]["version"] == "1"
        body = world.server.ask("GET", "/model", Authorization=basic("predict"))[2]
        assert json.loads(body)["error"] == "something is wrong with the versions; the server's log says why"
        changed = time.monotonic()
        path.write_text(good.replace('"stable": "1"', '"stable": "3"'))
        settled(world.server, Routing.read(world.store.directory))
        only(load, {"2", "3"}, since=time.monotonic())
    assert load.errors == []
    assert_true(load.answers)
    assert versions_of(load.answers, 0.0, changed) == {"1", "2"}


def test_versions_whose_directories_go_while_they_are_served_go_on_from_memory(world: World) -> None:
    directory = world.store.directory
    settled(world.server, world.store.canary("2", 50))
    with Load(world.server, callers=2) as load:
        for version in ("1", "2"):
            (directory / version).rename(directory / f".gone-{version}")
        told = all_workers(world.server, lambda told: all(f"/{name}/" in (told["error"] or "") for name in "12"))
        assert [(each["stable"], each["canary"]) for each in told] == [("1", "2")] * 2
        page = model_page(world.server)
        assert (page["stable"]["version"], page["canary"]["version"]) == ("1", "2")
        for version in ("1", "2"):
            assert f"/{version}/manifest.json" in page["error"]
            assert f"/{version}/manifest.json" in world.log()
        only(load, {"1", "2"}, since=time.monotonic())
        for version in ("1", "2"):
            (directory / f".gone-{version}").rename(directory / version)
        settled(world.server, Routing.read(directory))
    assert load.errors == []
    assert_true(load.answers)


@pytest.mark.long
def test_worker_that_comes_back_to_a_broken_stable_version_serves_the_one_before(store: Store) -> None:
    store.promote("2")
    promoted = store.promote("3")
    with serving(store) as server:
        broken(store, "3", flip)
        broken(store, "2", flip)
        told = all_workers(server, lambda told: "is not the file that was published" in (told["error"] or ""))
        assert [each["stable"] for each in told] == ["3", "3"]  # it goes on from memory, and says so
        with Load(server, callers=2) as load:
            killed = server.workers()[0]
            os.kill(killed, signal.SIGKILL)
            told = all_workers(server, lambda told: told["pid"] != killed and told["error"])
            assert sorted(each["stable"] for each in told) == ["1", "3"]
            only(load, {"1", "3"}, time.monotonic())
        assert_true(load.answers)
        assert len(load.errors) <= 2  # what the killed worker was about to answer
        assert "version 3 does not load, FALLING BACK on version 1" in server.log.read_text()
        assert server.stop() == 0
    with serving(store) as server:
        told = all_workers(server, lambda told: told["ready"])
        assert {each["stable"] for each in told} == {"1"}
        assert server.log.read_text().count("FALLING BACK on version 1") == 2
        assert predict(server) == (200, "1", {"prediction": [1]})
        page = model_page(server)
        assert (page["stable"]["version"], page["routing"]["stable"]) == ("1", "3")
        assert "/3/model.joblib is not the file that was published" in page["error"]
        assert "/2/model.joblib is not the file that was published" in page["error"]
        broken(store, "3", flip)  # twice is never
        settled(server, promoted)
        assert predict(server) == (200, "3", {"prediction": [3]})


# --- the guard


@pytest.mark.parametrize("kind", ["Failing", pytest.param("Sluggish", marks=pytest.mark.long)])
def test_guard_rolls_a_worse_canary_back_and_says_why(world: World, kind: str) -> None:
    version = {"Failing": "41", "Sluggish": "42"}[kind]
    publish(world.store, getattr(world.odd, kind)(int(version)), version)
    with Load(world.server, callers=4 if kind == "Failing" else 12, pause=0) as load:
        done = command(world.server, "canary", version, "--weight", "30", "--guard", *FORCE)
        assert done.returncode == 0, done.stderr
        world.server.wait_until(lambda: not Routing.read(world.store.directory).canary)
        settled(world.server, Routing.read(world.store.directory))
        serves_one_alone(load, world.server)
    assert load.errors == []
    assert {answer.status for answer in load.answers if answer.version == "1"} == {200}
    tried = Counter(answer.status for answer in load.answers if answer.version == version)
    assert tried.total() >= MIN_REQUESTS
    assert set(tried) == ({200, 500} if kind == "Failing" else {200})

    routing = Routing.read(world.store.directory)
    words = "requests failed, of stable's 0.0 %" if kind == "Failing" else "answers took longer than"
    assert re.match(rf"guard, [0-9.]+ % of its [0-9]+ {words}.*: canary {version}$", routing.why), routing.why
    assert (routing.stable, routing.canary) == ("1", "")
    settled(world.server, routing)
    assert model_page(world.server)["routing"]["why"] == routing.why
    listed = command(world.server, "list")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert routing.why in listed.stdout
    world.server.wait_until(world.events)  # after the store was written
    (event,) = world.events()
    assert (event["event"], event["model_version"]) == ("rollback", version)
    assert event["reason"] in routing.why
    assert world.log().count(f"the guard rolls back canary {version}: ") == 1


@pytest.mark.long
def test_guard_that_cannot_write_the_store_holds_on_this_host_and_through_a_workers_death(world: World) -> None:
    publish(world.store, world.odd.Failing(46), "46")
    lock = world.store.directory / ".lock"
    lock.unlink()
    before = route(world.store, "1", "46", weight=30.0, guard=True, changed=now())
    lock.mkdir()  # stands for a store that is mounted read-only; what chmod closes, root would write
    try:
        with Load(world.server, callers=4, pause=0) as load:
            told = all_workers(world.server, lambda told: "guard, " in (told["error"] or ""))
            assert [each["canary"] for each in told] == [None, None]
            rolled_back = time.monotonic()
            killed = world.server.workers()[0]
            os.kill(killed, signal.SIGKILL)
            all_workers(world.server, lambda told: told["pid"] != killed and "guard, " in (told["error"] or ""))
            serves_one_alone(load, world.server)
        assert len(load.errors) <= 4  # what the killed worker was about to answer
        assert "46" in versions_of(load.answers, 0.0)
        assert versions_of(load.answers, rolled_back) == {"1"}
        assert {answer.status for answer in load.answers if answer.version == "1"} == {200}
        assert Routing.read(world.store.directory) == before
        (event,) = world.events()
        assert f"canary 46 was rolled back on this host: guard, {event['reason']}" in model_page(world.server)["error"]
        assert "the canary was rolled back on this host: guard, " in command(world.server, "list").stdout
    finally:
        lock.rmdir()
    settled(world.server, world.store.canary("2", 50))  # the rollback was of that canary, not of what comes after it
    assert {predict(world.server)[1] for _ in range(30)} == {"1", "2"}


@pytest.mark.long
def test_guard_leaves_a_good_canary_alone(world: World) -> None:
    routing = world.store.canary("2", 30, guard=True)
    settled(world.server, routing)
    with Load(world.server, callers=4, pause=0) as load:
        time.sleep(30.0)
        world.server.wait_until(lambda: sum(answer.version == "2" for answer in load.answers) > 2 * MIN_REQUESTS)
    assert_true(load.answers)
    assert Routing.read(world.store.directory) == routing
    settled(world.server, routing)
    assert world.events() == []


# --- what must not be disturbed


def test_bare_file_is_served_without_any_of_this(store: Store, tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    write_json(tmp_path / "journal/guard.json", {"routing": Routing().etag, "canary": "2", "reason": "of another time"})
    path = tmp_path / "bare.joblib"
    shutil.copy(store.directory / "1/model.joblib", path)
    with gunicorn(tmp_path, model_path=path) as server:
        status, version, answer = predict(server)
        assert (status, answer) == (200, {"prediction": [1]})
        page = model_page(server)
        assert version == page["stable"]["sha256"][:12]
        assert (page["canary"], page["routing"], page["error"]) == (None, None, None)
        shutil.copy(store.directory / "2/model.joblib", path)
        time.sleep(1.5)
        assert predict(server) == (200, version, {"prediction": [1]})
        assert server.log.read_text().count("serving version") == 1


def test_version_that_loads_for_long_keeps_nobody_waiting_and_is_not_served_once_rolled_back(world: World) -> None:
    publish(world.store, world.odd.SlowToLoad(43), "43")
    loading = world.server.place / "loading"
    with (world.server.place / "lock").open("a") as lock, Load(world.server, callers=2) as load:
        for rolls_back in (True, False):
            loading.write_text("")
            fcntl.flock(lock, fcntl.LOCK_EX)
            routing = world.store.promote("43")
            world.server.wait_until(lambda: loading.read_text() == "xx")  # in both workers
            for probe in ("/healthz", "/readyz") * 10:
                assert world.server.ask("GET", probe)[0] == 200
            answered = len(load.answers)
            world.server.wait_until(lambda answered=answered: len(load.answers) > answered + 20)
            if rolls_back:
                routing = world.store.rollback()
            fcntl.flock(lock, fcntl.LOCK_UN)
            settled(world.server, routing)
            if rolls_back:
                assert versions_of(load.answers, 0.0) == {"1"}
        only(load, {"43"}, since=time.monotonic())
    assert load.errors == []
    assert_true(load.answers)


@pytest.mark.long
def test_versions_that_are_no_longer_served_are_freed(world: World) -> None:
    for number in (44, 45):
        publish(world.store, world.odd.Large(number), str(number))

    def swap(version: str) -> None:
        settled(world.server, world.store.promote(version))

    def resident() -> dict[int, float]:
        pages = {pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in world.server.workers()}
        return {pid: count * os.sysconf("SC_PAGE_SIZE") / 1e6 for pid, count in pages.items()}  # MB

    with Load(world.server, callers=2) as load:
        for version in ("44", "45"):
            swap(version)
        before = resident()
        for _ in range(5):
            swap("44")
            swap("45")
        after = resident()
    assert_true(load.answers)
    assert after.keys() == before.keys()
    # Ten versions that were kept would be 300 MB. glibc may keep the room of one for each thread that has loaded some.
    assert all(after[pid] - before[pid] < 120 for pid in after), (before, after)
    for pid in after:
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert ("/45/model.joblib" in maps, "/44/model.joblib" in maps) == (True, False)
