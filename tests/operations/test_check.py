"""`python -m server check` finds what would keep a server from answering, and disturbs none that runs."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, gunicorn, write_users

SECRET = "never-to-be-seen"


def check(place: Path, *arguments: str, cwd: Path = ROOT, **settings: Any) -> Any:
    """Run the command with settings as in `gunicorn` of conftest.py."""
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(place),
        "USERS_FILE": str(place / "users.json"),
        "JOURNAL_DIR": str(place / "journal"),
        "ALIBABA_CLOUD_ACCESS_KEY_SECRET": SECRET,
    } | {name.upper(): str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "server", "check", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    return done


def files(place: Path) -> dict[str, int]:
    """Return what is below a directory, and when it changed."""
    return {str(path): path.stat().st_mtime_ns for path in place.rglob("*") if "__pycache__" not in path.parts}


def test_server_that_would_start_is_all_right_and_nothing_is_written(tmp_path: Path, iris_file: Path) -> None:
    write_users(tmp_path / "users.json")
    before = files(tmp_path)
    done = check(tmp_path, model_path=iris_file, web_concurrency=3)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith("FAIL")]
    assert [line.split()[1] for line in lines if line.startswith("ok ")] == [
        *("everything", "configuration:", "users:", "journal:", "model:")
    ]
    assert "3 workers" in done.stdout
    assert "LogisticRegression" in done.stdout
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"port": "many"}, "PORT='many': expected a whole number"),
        ({"extensions": "+gone_room"}, "EXTENSIONS: there is no module 'gone_room'"),
        ({"extensions": "+needs_more"}, "ModuleNotFoundError: No module named 'a_library_that_is_not_there'"),
        ({"extensions": "+broken"}, "SyntaxError"),
        ({"extensions": "+breaks"}, "RuntimeError: not today"),
        ({"gunicorn_cmd_args": "--keep-alivee 3"}, "gunicorn: error: unrecognized arguments: --keep-alivee"),
        ({"gunicorn_cmd_args": "--worker-class gone"}, "class uri 'gone' invalid"),
        ({"gunicorn_cmd_args": "--certfile gone.pem --keyfile gone.key"}, "gone.pem"),
        ({"users_file": "gone.json"}, "gone.json"),
        ({"users_file": "none.json"}, "none.json' has no users, so the server would not be ready"),
        ({"model_path": "gone.joblib"}, "gone.joblib"),
        ({"model_path": "broken.joblib"}, "broken.joblib does not load"),
        ({"model_path": ""}, "holds no version to serve"),
        ({"journal_dir": "/dev/null/journal"}, "/dev/null/journal"),
    ],
    ids=lambda value: next(iter(value.items()))[1] if isinstance(value, dict) else "",
)
def test_what_would_keep_it_from_answering_is_named(
    tmp_path: Path, iris_file: Path, settings: dict[str, str], expected: str
) -> None:
    write_users(tmp_path / "users.json")
    (tmp_path / "broken.joblib").write_bytes(b"not a model")
    (tmp_path / "none.json").write_text("{}")
    (tmp_path / "needs_more.py").write_text("import a_library_that_is_not_there")
    (tmp_path / "broken.py").write_text("def init_app(app, service:\n")
    (tmp_path / "breaks.py").write_text("def init_app(app, service):\n    raise RuntimeError('not today')\n")
    given = {"model_path": str(iris_file), "model_dir": str(tmp_path / "none")} | settings
    for name in ("users_file", "model_path"):
        if given.get(name, "").startswith(("gone", "broken", "none")):
            given[name] = str(tmp_path / given[name])
    del given["model_dir" if given["model_path"] else "model_path"]
    done = check(tmp_path, **given)
    assert done.returncode == 1
    assert expected in done.stdout + done.stderr
    assert done.stdout.count("FAIL") + done.stderr.count("server:") >= 1


@pytest.mark.parametrize("name", ["gone_room", "broken"])
def test_extension_that_does_not_load_is_one_failure(tmp_path: Path, iris_file: Path, name: str) -> None:
    write_users(tmp_path / "users.json")
    (tmp_path / "broken.py").write_text("def init_app(app, service:\n")
    done = check(tmp_path, model_path=iris_file, extensions=f"+{name}")
    assert [line[:4] for line in done.stdout.splitlines()] == ["FAIL", "ok  ", "ok  ", "1 of"]


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificate_that_cannot_be_read_is_noted(tmp_path: Path, iris_file: Path, content: str | None) -> None:
    pytest.importorskip("telemetry.certificate")
    write_users(tmp_path / "users.json")
    path = tmp_path / "certificate.pem"
    if content:
        path.write_text(content)
    done = check(tmp_path, model_path=iris_file, certificate_file=path)
    assert done.returncode == 0  # the server does not need it
    assert f"note  CERTIFICATE_FILE: {path} " in done.stdout


def test_users_file_that_is_broken_is_named(tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "users.json").write_text('{"alice": {"password": "' + SECRET + '", "roles": ["predict"]}}')
    done = check(tmp_path, model_path=iris_file)
    assert done.returncode == 1
    assert "user 'alice' has no password hash" in done.stdout
    assert "ok    model" in done.stdout  # what does not depend on it is checked as well


def test_server_that_runs_is_not_disturbed(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file) as server:
        assert server.predict([[5.1, 3.5, 1.4, 0.2]])[0] == 200
        workers, log = server.workers(), server.log.read_text()

        def state() -> set[str]:
            found = files(tmp_path / "journal")  # but what is being replaced, and what the server adds each minute
            return {name for name in found if "/." not in name and "/rollup" not in name}

        seen: list[set[str]] = []
        server.wait_until(lambda: seen.append(state()) or time.sleep(1.0) or (len(seen) > 3 and seen[-1] == seen[-4]))
        done = check(tmp_path, model_path=iris_file, port=server.port, feedback_key_file=tmp_path / "feedback.key")
        assert (done.returncode, done.stderr) == (0, "")
        assert state() == seen[-1]
        assert server.workers() == workers
        assert server.log.read_text() == log
        assert server.predict([[5.1, 3.5, 1.4, 0.2]])[0] == 200


@pytest.mark.long
def test_versions_that_are_routed_to_answer_their_samples(tmp_path: Path, iris_file: Path) -> None:
    store = pytest.importorskip("model.versions.store")
    publishing = pytest.importorskip("model.versions.publishing")
    write_users(tmp_path / "users.json")
    versions = store.Store(tmp_path / "models")
    for version in ("1", "2"):
        publishing.publish(versions, iris_file, version, [[5.1, 3.5, 1.4, 0.2]])
    versions.promote("1")
    versions.canary("2", 10.0)
    before = files(tmp_path)
    done = check(tmp_path, model_dir=tmp_path / "models")
    assert done.returncode == 0, done.stdout
    assert "model: version 1 (" in done.stdout
    assert "model: version 2 (" in done.stdout
    assert files(tmp_path) == before
    (artifact,) = (tmp_path / "models/2").glob("model.*")
    artifact.chmod(0o644)
    artifact.write_bytes(b"damaged")
    done = check(tmp_path, model_dir=tmp_path / "models")
    assert done.returncode == 1
    assert "models/2/model.joblib" in done.stdout


def test_help_and_wrong_usage() -> None:
    def run(*arguments: str) -> Any:
        command = [sys.executable, "-m", "server", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    for arguments in (("--help",), ("check", "--help")):
        assert run(*arguments).stdout.startswith("Usage: python -m server")
    assert "check" in run("--help").stdout
    assert run("check", "--reload", "x").returncode == 2
    assert run("chek").returncode == 2
    assert "make run" in run().stderr
