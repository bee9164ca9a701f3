"""The first minutes: the command that the start prints, a start in another directory, and RELOAD=1."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import pytest
from conftest import PASSWORD, WORKER_CLASSES, Gunicorn, Load, basic, gunicorn, write_users
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from development import WatchedFile, fitting_netrc
from model.loaded import hash_file
from model.serving import Serving
from settings import Settings, SettingsError

ODD = """it's "odd" $HOME `id` \\ !! %s 年龄 🙂 \x7f\x9b\u202e\n\ttwo lines"""
IRIS = [[5.1, 3.5, 1.4, 0.2]]


def frame_model(path: Path) -> None:
    """Save a model whose column names, and the values in its sample, are hard to write in a shell."""
    rows = pd.DataFrame({ODD: [ODD, "it's"], "b": ["x", "y"]})
    joblib.dump(make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()).fit(rows, [0, 1]), path)
    path.with_suffix(".sample.json").write_text(json.dumps({"data": rows.to_dict("records")}))


def wide_model(path: Path, width: int) -> None:
    """Save a model with many columns."""
    rows = pd.DataFrame([[float(at) for at in range(width)]] * 2, columns=[f"column {at}" for at in range(width)])
    joblib.dump(LogisticRegression().fit(rows, [0, 1]), path)


def text_model(path: Path) -> None:
    """Save a model that takes strings."""
    joblib.dump(make_pipeline(CountVectorizer(), LogisticRegression()).fit(["good", "bad"], [1, 0]), path)


MODELS = {
    "odd": frame_model,
    "40 columns": lambda path: wide_model(path, 40),
    "2000 columns": lambda path: wide_model(path, 2000),
    "text": text_model,
}


def printed(server: Gunicorn) -> str:
    """Return the command that the start printed."""
    found: list[str] = []
    server.wait_until(
        lambda: found.extend(re.findall(r"serving; try\n\n  (.*?)\n\n", server.log.read_text(), re.S)) or found
    )
    return found[0]


def run(command: str, place: Path) -> Any:
    """Run a command in a shell, in a directory of its own, and return the JSON that it prints."""
    place.mkdir()
    done = subprocess.run(["sh", "-c", command], cwd=place, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["odd", *(pytest.param(name, marks=pytest.mark.long) for name in [*MODELS][1:])])
def test_printed_command_gets_a_prediction(tmp_path: Path, name: str) -> None:
    path = tmp_path / "it's mine" / "model.joblib"
    path.parent.mkdir()
    MODELS[name](path)
    users = write_users(path.with_name("users.json"))
    users.with_name("demo.netrc").write_text(f'machine 127.0.0.1 login predict password "{PASSWORD}"\n')
    with gunicorn(tmp_path, model_path=path, users_file=users, lc_all="C.UTF-8") as server:
        command = printed(server)
        assert "--netrc-file" in command
        assert command.replace("\n", "").isprintable()
        assert ("example.json" in command) == (name == "2000 columns")
        assert len(run(command, tmp_path / "there")["prediction"]) == 1
        assert f"or, in a browser, http://127.0.0.1:{server.port}/docs\n" in server.log.read_text()


@pytest.mark.long
def test_printed_command_is_right_without_passwords_for_a_socket_and_for_tls(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, auth="off") as server:
        assert " -u " not in printed(server)
        assert run(printed(server), tmp_path / "off") == {"prediction": [0]}
        assert "in a browser" in server.log.read_text()
    bind = ("--bind", f"unix:{tmp_path}/a socket")
    with gunicorn(tmp_path, *bind, model_path=iris_file) as server:
        assert "in a browser" not in server.log.read_text()
        command = printed(server).replace("-u NAME", shlex.join(["-u", f"predict:{PASSWORD}"]))
        assert run(command, tmp_path / "unix") == {"prediction": [0]}
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    new = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=models.example", "-days", "1"]
    subprocess.run(["openssl", *new, "-keyout", key, "-out", certificate], capture_output=True, check=True)
    with gunicorn(tmp_path, "--keyfile", str(key), "--certfile", str(certificate), model_path=iris_file) as server:
        command = printed(server).replace("-u NAME", shlex.join(["-u", f"predict:{PASSWORD}"]))
        assert run(command, tmp_path / "tls") == {"prediction": [0]}


@pytest.mark.long
def test_command_is_printed_once_and_stale_password_is_reported(tmp_path: Path, iris_file: Path) -> None:
    write_users(tmp_path / "users.json")
    (tmp_path / "demo.netrc").write_text("machine 127.0.0.1 login predict password of-yesterday\n")
    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=2) as server:
        command = printed(server).replace("-u NAME", shlex.join(["-u", f"predict:{PASSWORD}"]))
        assert run(command, tmp_path / "there") == {"prediction": [0]}
        assert f"demo.netrc no longer fits {tmp_path}/users.json" in server.log.read_text()
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(lambda: server.log.read_text().count("serving version") >= 4)
        server.wait_until(lambda: server.log.read_text().count("Worker exiting") >= 2)
        assert server.log.read_text().count("serving; try") == 1


@pytest.mark.parametrize(
    ("content", "host", "fits"),
    [
        (f'machine 127.0.0.1 login predict password "{PASSWORD}"', "127.0.0.1", True),
        (f'machine 127.0.0.1 login predict password "{PASSWORD}"', "10.0.0.1", False),  # not stale, just for others
        ("machine 127.0.0.1 login predict password wrong", "127.0.0.1", None),
        (f'machine 127.0.0.1 login gone password "{PASSWORD}"', "127.0.0.1", None),
        (f'machine 127.0.0.1 login metrics password "{PASSWORD}"', "127.0.0.1", None),  # another role
        ("machine", "127.0.0.1", None),
        ("machine 127.0.0.1 login predict password \xff\xfe", "127.0.0.1", None),
        (None, "127.0.0.1", False),
    ],
)
def test_netrc_is_used_only_if_it_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None, host: str, fits: bool | None
) -> None:
    users = write_users(tmp_path / "users.json")
    if content is not None:
        (tmp_path / "demo.netrc").write_bytes(content.encode("latin-1"))
    assert fitting_netrc(users, host) == (tmp_path / "demo.netrc" if fits else None)
    assert ("no longer fits" in caplog.text) == (fits is None)


# --- RELOAD=1


def change(server: Gunicorn, path: Path, old: str, new: str) -> None:
    """Change a source file as an editor does, and wait until another worker serves."""
    served = server.log.read_text().count("serving version")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    saved = time.monotonic()

    def is_served() -> bool:
        nonlocal saved
        since = server.log.read_text().rpartition("Booting worker")[2]
        if time.monotonic() - saved > 10.0 and "modified" not in since:
            os.utime(path)  # saved again: the worker had not looked at the file before
            saved = time.monotonic()
        return server.log.read_text().count("serving version") > served

    server.wait_until(is_served)


@pytest.mark.long
@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_changed_code_is_served_and_fails_no_request(
    tmp_path: Path, copy: Path, iris_file: Path, worker_class: str
) -> None:
    (copy / "endpoints/templates").mkdir(parents=True, exist_ok=True)
    (copy / "endpoints/templates/mine.html").write_text("first")
    settings = {"model_path": iris_file, "reload": 1, "worker_class": worker_class}
    with gunicorn(tmp_path, within=("env", "-C", str(copy)), **settings) as server:
        with Load(server) as load:
            change(server, copy / "server.py", '{"status": "ok"}', '{"status": "changed"}')  # only workers import it
            assert server.ask("GET", "/healthz")[2] == b'{"status":"changed"}\n'
            change(server, copy / "auth.py", 'NAME"\n', 'YOU"\n')  # the master does, too
            assert b"curl -u YOU" in server.ask("POST", "/predict", b"{}")[2]
            change(server, copy / "endpoints/templates/mine.html", "first", "second")
            change(server, copy / "telemetry/__init__.py", '"/metrics"', '"/figures"')  # an extension
        assert load.errors == []
        assert set(load.statuses) == {200}
        status, _, figures = server.ask("GET", "/figures", Authorization=basic("metrics"))
        assert (status, b"\nprediction_requests_total{" in figures) == (200, True)  # its before_fork was called again
        text = (copy / "auth.py").read_text()
        (copy / "auth.py").write_text(text.replace("def require(", "def require(("))
        server.wait_until(lambda: server.ask("GET", "/healthz")[0] == 500)  # gunicorn answers with the syntax error
        change(server, copy / "auth.py", "def require((", "def require(")
        assert server.predict(IRIS) == (200, {"prediction": [0]})


def test_preload_and_reload_contradict_each_other() -> None:
    with pytest.raises(SettingsError, match="RELOAD=1 and PRELOAD=1"):
        Settings.from_environ({"RELOAD": "1", "PRELOAD": "1"})
    assert Settings.from_environ({"RELOAD": "1", "PRELOAD": "0"}).reload


def number_model(path: Path, answer: str) -> None:
    """Save, as one step, a model that answers every row with the same string."""
    joblib.dump(DummyClassifier(strategy="constant", constant=answer).fit([[0.0] * 4, [1.0] * 4], ["a", answer]), path)


@pytest.mark.long
@pytest.mark.parametrize("name", ["model.sample.json", "other.json"])
def test_replaced_file_and_changed_sample_are_served_and_a_broken_one_is_not(tmp_path: Path, name: str) -> None:
    path, sample = tmp_path / "model.joblib", tmp_path / name
    number_model(path, "b")
    given = {"model_sample": sample} if name == "other.json" else {}
    sample.write_text("[[1.0, 1.0, 1.0, 1.0]]")
    with gunicorn(tmp_path, model_path=path, reload=1, **given) as server:

        def answer() -> Any:
            status, body = server.predict(IRIS)
            assert status == 200
            return body["prediction"]

        def state() -> Any:
            return json.loads(server.ask("GET", "/model", Authorization=basic("admin"))[2])

        with Load(server) as load:
            assert answer() == ["b"]
            number_model(tmp_path / "next.joblib", "c")
            os.replace(tmp_path / "next.joblib", path)
            server.wait_until(lambda: answer() == ["c"])
            whole = path.read_bytes()
            path.write_bytes(whole[:-20])  # half-written
            server.wait_until(lambda: "model.joblib does not load" in server.log.read_text())
            assert "model.joblib does not load" in state()["error"]
            assert answer() == ["c"]
            assert server.ask("GET", "/readyz")[0] == 200
            path.unlink()
            server.wait_until(lambda: "cannot be read" in (state()["error"] or ""))
            number_model(path, "d")  # in place
            server.wait_until(lambda: answer() == ["d"])
            server.wait_until(lambda: state()["error"] is None)
            sample.write_text("[[2.0, 1.0, 1.0, 1.0]]")
            server.wait_until(lambda: state()["stable"]["example"] == {"data": [[2.0, 1.0, 1.0, 1.0]]})
            sample.write_text('[["x"]]')
            server.wait_until(lambda: state()["error"] is not None)
            assert answer() == ["d"]
            sample.write_text("[[3.0, 1.0, 1.0, 1.0]]")
            server.wait_until(lambda: state()["stable"]["example"] == {"data": [[3.0, 1.0, 1.0, 1.0]]})
        assert load.errors == []
        assert set(load.statuses) == {200}
        assert server.log.read_text().count("does not load") == 1  # not at each look


RESTLESS = """
import os
from pathlib import Path

class Restless:
    n_features_in_ = 4

    def __setstate__(self, state):
        os.replace(Path(__file__).with_name("next.joblib"), Path(__file__).with_name("model.joblib"))

    def __getstate__(self):
        return {"some": "state"}

    def predict(self, rows):
        return ["a mixture"] * len(rows)
"""


def test_file_that_is_replaced_while_it_is_loaded_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "restless.py").write_text(RESTLESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    from restless import Restless  # type: ignore[import-not-found]  # just written

    joblib.dump(Restless(), tmp_path / "model.joblib")
    number_model(tmp_path / "next.joblib", "b")
    serving = Serving(WatchedFile(tmp_path / "model.joblib", None))
    serving.start()
    assert serving.finished.wait(60)
    sys.modules.pop("restless")
    model, _ = serving.choose()
    assert list(model.predict(model.signature.validate(IRIS))) == ["b"]
    assert model.version == hash_file(tmp_path / "model.joblib")[:12]
