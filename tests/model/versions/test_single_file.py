"""MODEL_PATH with several workers: until a reload all serve what it held at the start."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import Gunicorn, Load, gunicorn, no_file_beyond
from sklearn.datasets import load_iris
from sklearn.tree import DecisionTreeClassifier

from model.formats import ModelLoadError
from model.serving import Serving
from model.versions import kept_file, worker_statuses
from model.versions.single_file import KeptFile
from settings import Settings

IRIS = load_iris().data


def constant(path: Path, number: int) -> Path:
    """Save a model that always predicts a number."""
    joblib.dump(DecisionTreeClassifier().fit(IRIS, [number] * len(IRIS)), path)
    return path


def predictions(load: Load, server: Gunicorn) -> set[Any]:
    """Return what is answered to many requests from now on."""
    before = len(load.answers)
    server.wait_until(lambda: len(load.answers) > before + 100)
    return {json.loads(answer.body)["prediction"][0] for answer in load.answers[before + 10 :]}


@pytest.mark.long
@pytest.mark.parametrize("how", ["in place", "renamed", "removed", "sample"])
def test_worker_that_replaces_another_serves_what_the_others_do(tmp_path: Path, how: str) -> None:
    path, sample = constant(tmp_path / "model.joblib", 1), tmp_path / "model.sample.json"
    sample.write_text(json.dumps(IRIS[:2].tolist()))
    with gunicorn(tmp_path, model_path=path, web_concurrency=2, max_wait=30) as server, Load(server, callers=2) as load:
        server.wait_until(lambda: len(worker_statuses(server.journal_dir)) == 2)
        (sha256,) = worker_statuses(server.journal_dir)[0]["sha256"]
        if how == "sample":
            sample.write_text("[[1, 2, 3, null]]")
        elif how == "removed":
            path.unlink()
        else:
            new = constant(path if how == "in place" else tmp_path / "new.joblib", 2)
            new.rename(path)
        killed = server.workers()[0]
        os.kill(killed, signal.SIGKILL)

        def others() -> list[Any]:
            found = worker_statuses(server.journal_dir)
            return found if len(found) == 2 and killed not in {each["pid"] for each in found} else []

        server.wait_until(others)
        assert [each["sha256"] for each in others()] == [[sha256]] * 2
        assert predictions(load, server) == {1}
        assert "this worker serves what the others do" in server.log.read_text()
        sample.unlink()
        constant(path, 3)
        old = {each["pid"] for each in others()}
        os.kill(server.process.pid, signal.SIGHUP)
        server.wait_until(lambda: others() and not old & {each["pid"] for each in others()})
        server.wait_until(lambda: predictions(load, server) == {3})
    assert len(load.errors) <= 2  # what the killed worker was about to answer
    assert set(load.statuses) == {200}


def settings_for(path: Path, **given: Any) -> Settings:
    """Return settings of a server of two workers."""
    known = {"model_path": path, "journal_dir": path.parent / "journal", "web_concurrency": 2}
    return Settings(**known | given)


@pytest.fixture
def path(tmp_path: Path) -> Any:
    """A model file; what was kept of it is forgotten afterwards."""
    yield constant(tmp_path / "model.joblib", 1)
    kept_file.kept = None


@pytest.mark.parametrize(
    "given", [{"web_concurrency": 1}, {"preload": True}, {"reload": True}, {"model_path": None}], ids=str
)
def test_nothing_is_kept_where_workers_cannot_disagree(path: Path, given: dict[str, Any]) -> None:
    kept_file.keep(settings_for(path))
    assert kept_file.kept
    kept_file.keep(settings_for(path, **given))
    assert kept_file.kept is None


@pytest.mark.parametrize("why", ["too large", "no room", "copy is gone", "copy is another"])
def test_worker_that_cannot_serve_what_the_others_do_serves_nothing_and_names_the_way(
    path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    journal = path.parent / "journal"
    if why == "too large":
        monkeypatch.setattr(kept_file, "MAX_COPIED", 10)
    elif why == "no room":
        journal.write_text("")  # no directory can be made below a file
    kept_file.keep(settings_for(path))
    assert ("a worker that starts later will serve nothing" in caplog.text) is (why == "no room")
    assert KeptFile(path).load(path).about["sha256"] == kept_file.checksums(path, None)[0]
    constant(path, 2)
    if why == "copy is gone":
        shutil.rmtree(journal / "model")
    elif why == "copy is another":
        shutil.copy(path, journal / "model")
    with pytest.raises(ModelLoadError, match=r"is not what the other workers serve\. .*reload the server"):
        Serving(KeptFile(path)).load(lambda **options: KeptFile(path).load(path, **options))


def test_copy_that_a_full_disk_cuts_off_is_removed(path: Path) -> None:
    with no_file_beyond(100):
        kept_file.keep(settings_for(path))
    assert kept_file.kept == kept_file.Kept(kept_file.checksums(path, None), None)
    assert list((path.parent / "journal").iterdir()) == []


def test_copy_is_closed_to_others_and_there_is_one(path: Path) -> None:
    for number in (1, 2):
        kept_file.keep(settings_for(constant(path, number)))
    copy = path.parent / "journal/model"
    assert copy.stat().st_mode & 0o777 == 0o700
    assert [each.name for each in copy.parent.rglob("*")] == ["model", "model.joblib"]
    assert (copy / "model.joblib").read_bytes() == path.read_bytes()
