"""The version store as a source: what is served at a start and after changes, whatever is in its files."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import pytest
from sklearn.datasets import load_iris
from sklearn.neighbors import KNeighborsClassifier

from model.serving import ModelNotReady, Serving
from model.versions import publish_status
from model.versions.routing import Routing
from model.versions.store import Store, write_json
from model.versions.watcher import StoreRoutes, StoreWatcher
from worker_slot import WorkerSlot

IRIS = load_iris()
SAMPLE = [[5.1, 3.5, 1.4, 0.2], [7.0, 3.2, 4.7, 1.4], [6.3, 3.3, 6.0, 2.5]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with the versions 1 and 2, of which 1 is stable."""
    store, artifact = Store(tmp_path / "store"), tmp_path / "model.joblib"
    joblib.dump(KNeighborsClassifier().fit(IRIS.data, IRIS.target), artifact)
    for version in ("1", "2"):
        with store.new_version(artifact, version) as manifest:
            manifest.about.update(sample=SAMPLE, predictions=[0, 1, 2])
    store.promote("1")
    return store


def started(store: Store, journal_dir: Path) -> Serving:
    """Start serving from a store, and wait for the first load."""
    serving = Serving(StoreWatcher(store.directory, journal_dir))
    serving.start()
    assert serving.finished.wait(60)
    return serving


def wait_until(met: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_empty_store_says_how_to_fill_it(tmp_path: Path) -> None:
    error = started(Store(tmp_path), tmp_path / "journal").describe()["error"]
    assert re.search(r"python -m model\.demo .*MODEL_PATH=", error)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"stable": null}', "\xff"], ids=ascii)
def test_broken_routing_is_named_and_nothing_is_served(store: Store, tmp_path: Path, content: str) -> None:
    (store.directory / "routing.json").write_text(content, "latin-1")
    serving = started(store, tmp_path / "journal")
    assert "routing.json cannot be used" in serving.describe()["error"]
    with pytest.raises(ModelNotReady):
        serving.choose()


@pytest.mark.parametrize("content", ["", "{", '{"stable": "2"'])
def test_start_with_a_broken_routing_serves_what_was_served_last(store: Store, tmp_path: Path, content: str) -> None:
    assert started(store, tmp_path / "journal").describe()["error"] is None
    (store.directory / "routing.json").write_text(content)
    serving = started(store, tmp_path / "journal")
    assert serving.choose()[0].version == "1"
    assert "routing.json cannot be used" in serving.describe()["error"]
    write_json(store.directory / "routing.json", {"stable": "2"})
    wait_until(lambda: serving.describe()["error"] is None)
    assert serving.choose()[0].version == "2"


def test_routing_that_another_store_was_served_by_is_not_taken(store: Store, tmp_path: Path) -> None:
    started(store, tmp_path / "journal")
    other = Store(tmp_path / "other")
    shutil.copytree(store.directory, other.directory)
    (other.directory / "routing.json").write_text("{")
    serving = started(other, tmp_path / "journal")
    assert "other/routing.json cannot be used" in serving.describe()["error"]
    with pytest.raises(ModelNotReady):
        serving.choose()


def test_routing_that_was_removed_does_not_stop_a_start(store: Store, tmp_path: Path) -> None:
    started(store, tmp_path / "journal")
    (store.directory / "routing.json").unlink()
    serving = started(store, tmp_path / "journal")
    assert serving.choose()[0].version == "1"
    assert "holds no version" in serving.describe()["error"]


def test_journal_directory_that_cannot_be_written_stops_nothing(store: Store, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "journal").write_text("a file")
    serving = started(store, tmp_path / "journal")
    assert (serving.choose()[0].version, serving.describe()["error"]) == ("1", None)
    assert "will not know what was served last" in caplog.text
    publish_status(WorkerSlot(tmp_path / "journal/workers"), None, serving.describe())
    assert "will not show what this worker serves" in caplog.text


def test_preloaded_version_is_served_only_if_the_routing_still_asks_for_it(store: Store, tmp_path: Path) -> None:
    store.canary("2", 100)
    serving = Serving(StoreWatcher(store.directory, tmp_path / "journal"))
    serving.preload()
    with pytest.raises(ModelNotReady):
        serving.choose()  # a worker that is forked later has to look at the routing itself
    preloaded = serving.loaded()[0]
    store.rollback()
    serving.start()
    assert serving.finished.wait(60)
    assert {serving.choose()[0].version for _ in range(20)} == {"1"}
    assert serving.choose()[0] is preloaded  # it was not loaded again


def test_worker_that_is_forked_after_a_preload_loads_though_no_file_has_changed(store: Store, tmp_path: Path) -> None:
    serving = Serving(StoreWatcher(store.directory, tmp_path / "journal"))
    serving.preload()
    serving.start()
    assert serving.finished.wait(60)
    assert serving.choose()[0].version == "1"


def test_unchanged_store_is_no_update(store: Store, tmp_path: Path) -> None:
    watcher = StoreWatcher(store.directory, tmp_path / "journal")
    serving = Serving(watcher)
    update = watcher.update(serving)
    assert update
    serving.routes = update[0]
    assert watcher.update(serving) is None
    store.canary("2", 5)
    update = watcher.update(serving)
    assert update
    routes, _ = update
    assert isinstance(routes, StoreRoutes)
    assert routes.canary
    assert (routes.canary.version, routes.routing.weight) == ("2", 5)
    assert routes.stable is serving.routes.stable  # type: ignore[union-attr]


def test_version_that_is_rolled_back_while_it_loads_is_not_served(store: Store, tmp_path: Path) -> None:
    watcher = StoreWatcher(store.directory, tmp_path / "journal")
    serving = Serving(watcher)
    store.promote("2")
    load = serving.load

    def load_slowly(loader: Any) -> Any:
        if loader.args[1] == "2":
            store.rollback()
        return load(loader)

    serving.load = load_slowly  # type: ignore[method-assign]
    assert watcher.update(serving) is None
    update = watcher.update(serving)
    assert update
    assert update[0]
    assert update[0].stable.version == "1"


def test_rollback_of_this_host_is_honoured_from_the_start_and_ends_with_its_file(store: Store, tmp_path: Path) -> None:
    routing = store.canary("2", 50, guard=True)
    path = tmp_path / "journal/guard.json"
    path.parent.mkdir()
    # As every release has written it: an upgrade honours it.
    etag = f"{routing.generation} of {routing.changed}: 2 50"
    path.write_text(json.dumps({"routing": etag, "canary": "2", "reason": "too slow"}))
    serving = started(store, path.parent)
    described = serving.describe()
    assert (described["stable"]["version"], described["canary"]) == ("1", None)
    assert described["error"] == "canary 2 was rolled back on this host: guard, too slow"
    path.unlink()
    wait_until(lambda: serving.describe()["canary"] is not None)
    assert serving.describe()["error"] is None


def test_failed_load_is_counted_once(store: Store, tmp_path: Path) -> None:
    failures: list[str] = []
    watcher = StoreWatcher(store.directory, tmp_path / "journal")
    serving = Serving(watcher)
    serving.on_load_failure.append(lambda: failures.append("failed"))
    artifact = store.directory / "1/model.joblib"
    artifact.chmod(0o644)
    artifact.write_bytes(b"damaged")
    update = watcher.update(serving)
    assert update
    routes, errors = update
    assert routes is None
    assert [re.sub(".*/", "", error)[:12] for error in errors] == ["model.joblib"]
    assert failures == ["failed"]
    write_json(store.directory / "routing.json", Routing("gone").to_json())
    watcher.update(serving)
    assert failures == ["failed"] * 2
