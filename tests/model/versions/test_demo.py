"""`python -m model.demo`: the model of a first run."""

import os
import pkgutil
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from model import demo
from model.versions import publishing
from model.versions.loading import load_version
from model.versions.store import Manifest, Store, read_manifest

SETOSA = [5.1, 3.5, 1.4, 0.2]


def tree(directory: Path) -> list[str]:
    """List what is in a store, but the lock."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.name != ".lock")


def stop_at(step: str) -> Callable[..., Any]:
    """Return a stand-in for a function that stops this thread as Ctrl-C does; other threads go on with the function."""
    original, caller = pkgutil.resolve_name(step), threading.current_thread()

    def stop(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is caller:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    return stop


@pytest.fixture
def validated_here(monkeypatch: Any) -> None:
    """Validate in this process, if the fresh one is not the point."""

    def validate(manifest: Manifest) -> Any:
        job = {"artifact": manifest.artifact, "version": manifest.version, "about": manifest.about}
        found = publishing.validate_here(job)
        return orjson.loads(orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY))

    monkeypatch.setattr("model.versions.publishing.validate", validate)


@pytest.mark.usefixtures("validated_here")
def test_demo_is_published_and_promoted(tmp_path: Path, capsys: Any) -> None:
    assert demo.main([str(tmp_path / "models")]) == 0
    assert "published it as" in capsys.readouterr().out
    assert Store(tmp_path / "models").in_use() == {"1": "stable"}
    model = load_version(read_manifest(tmp_path / "models", "1"))
    names = [column.name for column in model.signature.columns or ()]
    for rows in ([SETOSA], [dict(zip(names, SETOSA, strict=True))]):
        assert model.call(model.signature.parse(rows)).tolist() == [0]
    before = tree(tmp_path)
    assert demo.main([str(tmp_path / "models")]) == 0
    assert (capsys.readouterr().out, tree(tmp_path)) == ("", before)  # nothing is done if a version is served


def test_demo_goes_on_after_a_stop_at_any_step(tmp_path: Path, monkeypatch: Any, validated_here: None) -> None:
    steps = ("shutil.copyfileobj", "json.dumps", "os.rename", "os.fsync", "model.versions.store.Store.promote")
    for step in steps:
        place = tmp_path / step
        with monkeypatch.context() as patch:
            patch.setattr(step, stop_at(step))
            assert demo.main([str(place)]) == 130
        demo.main([str(place)])
        assert tree(place) == ["1", "1/manifest.json", "1/model.joblib", "routing.json"]
        shutil.rmtree(place)


def test_demo_helps_and_makes_no_directory_of_that_name(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: python -m model.demo [OPTIONS] [DIRECTORY]")
    assert demo.main(["a", "b"]) == 2
    (tmp_path / "file").touch()
    capsys.readouterr()
    assert demo.main(["file"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == ["file"]
