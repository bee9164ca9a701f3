"""Extensions are taken from the setting, hook into the service, and may be taken away."""

import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import basic, gunicorn, records

from settings import EXTENSIONS, Settings, SettingsError

ROW = [5.1, 3.5, 1.4, 0.2]
MINE = """
import logging

def init_app(app, service):
    service.before_predict = before
    service.after_predict = after
    service.observers.append(lambda seconds, record: logging.info("observed %s", record["request_id"]))
    service.every_second.append(tick)
    app.add_url_rule("/mine", view_func=lambda: "mine")

def before(rows, record):
    return [[value / 10 for value in row] for row in rows]

def after(answer, record):
    answer.prediction = [f"class {label}" for label in answer.prediction.tolist()]
    record["mine"] = len(answer.prediction)
    return answer

def tick():
    raise RuntimeError("every second")

def before_fork(settings):
    logging.info("before the fork, PORT=%d", settings.port)
"""


def names(value: str) -> list[str]:
    """Return the extensions that a value of EXTENSIONS names."""
    return Settings.from_environ({"EXTENSIONS": value}).extension_names()


def test_signs_change_the_default_list_and_names_without_replace_it() -> None:
    assert names("") == list(EXTENSIONS)
    assert names("+mine.room") == [*EXTENSIONS, "mine.room"]
    assert names("-sls,-telemetry") == [name for name in EXTENSIONS if name not in ("sls", "telemetry")]
    assert names("sls, mine") == ["sls", "mine"]
    assert names("mine,+other") == ["mine", "other"]
    assert names("+sls") == list(EXTENSIONS)


@pytest.mark.parametrize("value", ["a b", "1", "+", "a..b", "os;x", "-mine", "../x", "+-sls", "++sls"])
def test_what_is_no_list_of_modules_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=r"EXTENSIONS=.*expected"):
        names(value)


def test_default_extension_that_was_removed_is_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("settings.EXTENSIONS", ("gone_room", "web"))
    caplog.set_level(logging.INFO)
    with pytest.raises(SettingsError, match=r"'web' has no init_app"):
        Settings(extensions=sys.modules["settings"].EXTENSIONS).load_extensions()
    assert [record.getMessage() for record in caplog.records] == [
        "without the extension gone_room: its module is not installed"
    ]


def test_directory_that_is_left_of_a_removed_room_is_no_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone_room/__pycache__").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("settings.EXTENSIONS", ("gone_room",))
    assert Settings(extensions=sys.modules["settings"].EXTENSIONS).load_extensions() == []


@pytest.mark.parametrize("name", ["gone_room", "gone.room", "model.gone"])
def test_extension_that_was_named_must_be_there(name: str) -> None:
    with pytest.raises(SettingsError, match=f"EXTENSIONS: there is no module '{re.escape(name)}'"):
        Settings(extensions=(f"+{name}",)).load_extensions()


def test_library_that_an_extension_lacks_is_not_taken_for_the_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import a_library_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        Settings(extensions=("needs_more",)).load_extensions()


def test_module_of_a_user_changes_rows_and_answers(tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    with gunicorn(tmp_path, model_path=iris_file, extensions="+mine") as server:
        assert server.predict([[value * 10 for value in ROW]]) == (200, {"prediction": ["class 0"]})
        assert server.ask("GET", "/mine")[2] == b"mine"
        log = server.log.read_text()
        (record,) = records(server.journal_dir)
        assert record["mine"] == 1
        assert f"observed {record['request_id']}" in log
        assert f"before the fork, PORT={server.port}" in log
        server.wait_until(lambda: "RuntimeError: every second" in server.log.read_text())
        time.sleep(2.5)
        assert server.log.read_text().count("RuntimeError: every second") == 1  # again after a minute
        wrong = b'{"data": [["x"]]}'
        status, _, answer = server.ask(
            "POST", "/predict", wrong, Content_Type="application/json", Authorization=basic("predict")
        )
        assert (status, b"the server failed" in answer) == (500, True)  # the hook's own fault


def test_named_extension_that_is_not_there_stops_the_start(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, extensions="+mine.room", ready=False) as server:
        assert server.process.wait(30) != 0
        assert "cannot start: EXTENSIONS: there is no module 'mine.room'" in server.log.read_text()


def test_answer_of_a_hook_without_a_form_in_json_is_the_models_fault(serve: Any, iris_file: Path) -> None:
    client = serve(iris_file)

    def after(answer: Any, record: dict[str, Any]) -> Any:
        answer.prediction = {1, 2}
        return answer

    client.service.after_predict = after
    assert client.post({"data": [ROW]}).status_code == 500


def test_hook_that_fails_harms_nobody(serve: Any, iris_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = serve(iris_file)
    service = client.service

    def fail(*_: Any) -> None:
        raise SystemExit("a hook")

    for hooks in (service.observers, service.on_error, service.every_second, service.journal.on_loss):
        hooks.insert(0, fail)
    service.serving.on_batch.insert(0, fail)
    assert client.predict([ROW]) == {"prediction": [0]}
    assert client.post({"data": []}).status_code == 422
    assert client.http.get("/nowhere").status_code == 404
    assert [record["status"] for record in records(client.journal_dir)] == [200, 422]
    assert "a hook failed" in caplog.text


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_server_without_any_extra_predicts_and_records(tmp_path: Path, iris_file: Path, worker_class: str) -> None:
    without = ",".join(f"-{name}" for name in EXTENSIONS)
    with gunicorn(tmp_path, model_path=iris_file, worker_class=worker_class, extensions=without) as server:
        assert server.predict([ROW]) == (200, {"prediction": [0]})
        assert server.ask("GET", "/metrics")[0] == 404
        assert server.ask("POST", "/feedback", b"{}")[0] == 404
        assert server.ask("POST", "/predict", b"{}")[0] == 401
        (record,) = records(server.journal_dir)
        assert (record["status"], record["user"]) == (200, "predict")
        log = server.log.read_text()
        assert ("a predict blocks this worker's other requests" in log) == (worker_class == "gevent")
        assert f"Using worker: {'GeventWorker' if worker_class == 'gevent' else 'ThreadWorker'}\n" in log
