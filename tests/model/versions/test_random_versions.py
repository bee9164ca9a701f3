"""Random models, published and loaded by the version store, or exported as ONNX, answer as they did before.

`make test-all` tries some. By hand, with the seeds 1000 to 1999, through the store or as ONNX files:

    PYTHONPATH=.:tests:tests/model/frames python tests/model/versions/test_random_versions.py store 1000 2000
    PYTHONPATH=.:tests:tests/model/frames python tests/model/versions/test_random_versions.py onnx 1000 2000
"""

import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import orjson
import pytest
from conftest import Gunicorn, basic, gunicorn
from random_checks import MAX_WAIT, Tally, asks, check, check_all, check_at_once, main, need_boosters
from random_models import FORMS, ONNX_KINDS, Case, sample_of

from model.batching import Batcher
from model.formats import ModelLoadError
from model.loaded import LoadedModel, load_model
from model.serving import Serving
from model.signature import BadRows
from model.versions import publishing
from model.versions.store import Store, StoreError
from model.versions.watcher import StoreWatcher


def sample(case: Case, seed: int) -> list[Any] | None:
    """Return the sample that a model is published or exported with: for every other one there is none."""
    return sample_of(case, random.Random(seed)) if seed % 2 else None


def publish(store: Store, path: Path, rows: list[Any] | None, fresh: bool) -> str:
    """Publish a file; without `fresh`, with what the fresh processes do done here, which takes 4 seconds less."""
    if fresh:
        return publishing.publish(store, path, sample=rows)
    with store.new_version(path) as manifest:
        manifest.about["sample"] = rows
        job = {"artifact": str(manifest.artifact), "version": manifest.version, "about": manifest.about}
        found = orjson.dumps(publishing.validate_here(job), option=orjson.OPT_SERIALIZE_NUMPY)
        manifest.about.update(orjson.loads(found))
        manifest.about.update(sample_from="operator" if rows else "synthetic", metrics=None, note="")
    return manifest.version


def published(case: Case, seed: int, place: Path, store: Store, tally: Tally, fresh: bool) -> str:
    """Publish a case and make it the stable version; return its name, or "" if it is refused."""
    joblib.dump(case.model, place / "model.joblib")
    try:
        version = publish(store, place / "model.joblib", sample(case, seed), fresh)
    except (ModelLoadError, StoreError) as error:
        tally.add(case, f"refused: at publish, {error}")
        tally.counts["refused"] += len(FORMS) - 1
        return ""
    store.promote(version)
    return version


def watched(store: Store, journal_dir: Path) -> LoadedModel:
    """Load the stable version as a server does."""
    watcher = StoreWatcher(store.directory, journal_dir)
    update = watcher.update(Serving(watcher, max_wait=MAX_WAIT))
    assert update is not None
    routes, errors = update
    assert routes is not None, errors
    return routes.stable


def check_in_store(case: Case, seed: int, place: Path, tally: Tally, fresh: bool = False) -> None:
    """Publish a model, load it as a server does, and check it."""
    store = Store(place / "models")
    if published(case, seed, place, store, tally, fresh):
        check(case, seed, asks(watched(store, place)), tally)


def check_exported(case: Case, seed: int, place: Path, tally: Tally) -> None:
    """Export a model as ONNX if that is possible, load the file, and compare it with the model."""
    from model.versions.onnx_export import NotExported, export

    joblib.dump(case.model, place / "model.joblib")
    try:
        export(place / "model.joblib", place / "model.onnx", sample(case, seed))
    except NotExported as error:
        tally.add(case, f"not exported: {error}")
        return
    except ModelLoadError:  # the model itself: test_random_models.py counts those
        return
    tally.counts["exported"] += 1
    check(
        replace(case, exported=True),
        seed,
        asks(load_model(place / "model.onnx", batcher=Batcher(max_wait=MAX_WAIT))),
        tally,
    )


@pytest.mark.long
def test_random_models_that_were_published_are_answered_as_they_answer_themselves(tmp_path: Path) -> None:
    check_all(check_in_store, range(2000, 2040), tmp_path).assert_right(40)


@pytest.mark.long
def test_random_models_of_other_libraries_that_were_published_are_answered_so(tmp_path: Path) -> None:
    need_boosters()
    check_all(check_in_store, range(2060, 2100), tmp_path, foreign=True).assert_right(40)


@pytest.mark.long
def test_random_models_that_fresh_processes_published_are_answered_so(tmp_path: Path) -> None:
    check_all(partial(check_in_store, fresh=True), range(2120, 2125), tmp_path).assert_right(5)


@pytest.mark.long
def test_random_models_that_were_exported_are_answered_so(tmp_path: Path) -> None:
    """Most have no ONNX form, and the export says so."""
    pytest.importorskip("skl2onnx", reason="skl2onnx is not installed: pip install -r requirements/onnx.txt")
    tally = check_all(check_exported, range(3000, 3200), tmp_path, kinds=ONNX_KINDS)
    assert not tally.faults, "\n".join(tally.faults[:10])
    assert tally.counts["exported"] >= 12
    assert tally.counts["right"] > 45


class Versions:
    """Random models in one store, which a gunicorn serves one after the other."""

    def __init__(self, server: Gunicorn, store: Store) -> None:
        self.server, self.store = server, store
        self.pairs = 0  # of a model and a form

    def check(self, case: Case, seed: int, place: Path, tally: Tally) -> None:
        """Publish and promote a model, wait until it is served, and let eight callers ask it at once."""
        version = published(case, seed, place, self.store, tally, fresh=False)
        if not version:
            return
        self.server.wait_until(lambda: self.served() == version)
        before = tally.asked
        check_at_once(case, seed, partial(self.ask, version), tally)
        self.pairs += min(tally.asked - before, len(FORMS))

    def served(self) -> str:
        """Return the version that GET /model shows, "" while nobody listens yet."""
        try:
            _, _, body = self.server.ask("GET", "/model", Authorization=basic("admin"))
        except ConnectionRefusedError:
            return ""
        found: dict[str, Any] = json.loads(body)["stable"] or {}
        return str(found.get("version"))

    def ask(self, version: str, data: Any) -> Any:
        """Ask as callers do. Raises: BadRows, a 422."""
        body = json.dumps({"data": data}).encode()
        headers = {"Content_Type": "application/json", "Authorization": basic("predict")}
        status, answered, answer = self.server.ask("POST", "/predict", body, **headers)
        decoded = json.loads(answer)
        if status == 422:
            raise BadRows(decoded["detail"])
        assert status == 200, decoded
        assert answered["X-Model-Version"] == version
        return decoded["prediction"]


@pytest.mark.long
def test_random_models_are_answered_so_by_a_gunicorn_that_swaps_them(tmp_path: Path) -> None:
    """More than a hundred pairs of a model and a form."""
    with gunicorn(tmp_path, model_dir=tmp_path / "models", ready=False, max_wait=MAX_WAIT) as server:
        versions = Versions(server, Store(tmp_path / "models"))
        tally = check_all(versions.check, range(1100, 1126), tmp_path)
    tally.assert_right(20)
    assert versions.pairs > 100


if __name__ == "__main__":
    if sys.argv.pop(1) == "onnx":
        main(check_exported, kinds=ONNX_KINDS)
    main(check_in_store)
