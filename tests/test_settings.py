"""The settings: defaults, every variable, and what a wrong one does to the boot."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import CHEAP, gunicorn, write_users

import settings as settings_module
from settings import Settings, SettingsError, usable_cores


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """What is needed to start."""
    return {"USERS_FILE": str(write_users(tmp_path / "users.json"))}


def test_defaults_are_those_of_a_first_run(environ: dict[str, str]) -> None:
    got = Settings.from_environ(environ)
    wanted = {
        "host": "127.0.0.1",
        "port": 5000,
        "web_concurrency": usable_cores(),
        "worker_class": "gevent",
        "trusted_proxies": 0,
        "model_path": None,
        "model_dir": Path("var/models"),
        "model_name": "model",
        "allow_version_mismatch": False,
        "auth": "basic",
        "journal_dir": Path("var/journal"),
        "journal_max_bytes": 10**9,
    }
    assert {name: getattr(got, name) for name in wanted} == wanted
    assert Settings().users_file == Path("var/users.json")


def test_every_variable_is_read(environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.joblib").touch()
    given = {
        "host": ("0.0.0.0", "0.0.0.0"),
        "port": ("8080", 8080),
        "web_concurrency": ("3", 3),
        "worker_class": ("gthread", "gthread"),
        "preload": ("1", True),
        "reload": ("0", False),
        "platform": ("cloud-run", "cloud-run"),
        "graceful_timeout": ("10", 10),
        "keepalive": ("900", 900),
        "fast_path": ("0", False),
        "worker_timeout": ("0", 0),
        "request_id_headers": ("X-Request-ID, X-Trace/", ("X-Request-ID", "X-Trace/")),
        "trusted_proxies": ("2", 2),
        "extensions": ("-sls, +mine.room", ("-sls", "+mine.room")),
        "model_path": ("~/model.joblib", tmp_path / "model.joblib"),
        "model_dir": ("~/models", tmp_path / "models"),
        "model_name": ("iris-1.0", "iris-1.0"),
        "model_sample": ("~/rows.json", tmp_path / "rows.json"),
        "allow_version_mismatch": ("1", True),
        "extra_columns": ("ignore", "ignore"),
        "auth": ("off", "off"),
        "users_file": ("/etc/users.json", Path("/etc/users.json")),
        "max_rows": ("10", 10),
        "max_wait": ("2.5", 2.5),
        "merge_requests": ("never", "never"),
        "predict_timeout": ("12.5", 12.5),
        "max_body_bytes": ("1000", 1000),
        "body_timeout": ("2.5", 2.5),
        "log_format": ("json", "json"),
        "journal_dir": ("/var/log/journal-of-predictions", Path("/var/log/journal-of-predictions")),
        "journal_max_bytes": ("2000000", 2_000_000),
        "certificate_file": ("/etc/ssl/c.pem", Path("/etc/ssl/c.pem")),
        "feedback": ("0", False),
        "feedback_key_file": ("~/feedback.key", tmp_path / "feedback.key"),
        "feedback_max_age": ("86400", 86_400),
        "aip_health_route": ("/health", "/health"),
        "aip_predict_route": ("/v1/models/m:predict", "/v1/models/m:predict"),
        "sls_endpoint": ("cn-test.log.aliyuncs.com", "cn-test.log.aliyuncs.com"),
        "sls_project": ("a-project", "a-project"),
        "sls_logstore": ("a-logstore", "a-logstore"),
        "sls_region": ("cn-test", "cn-test"),
    }
    assert set(given) == {field.name for field in fields(Settings)}
    for without in ("model_path", "model_dir"):  # both at once are refused
        wanted = {name: value for name, value in given.items() if name != without}
        got = Settings.from_environ({name.upper(): text for name, (text, _) in wanted.items()})
        assert {name: getattr(got, name) for name in wanted} == {name: value for name, (_, value) in wanted.items()}


def test_empty_variable_counts_as_unset(environ: dict[str, str]) -> None:
    empty = {field.name.upper(): "" for field in fields(Settings)} | environ
    assert Settings.from_environ(empty) == Settings.from_environ(environ)


WRONG = [  # variable, value, what was expected
    ("PORT", "http", "0 to 65535"),
    ("PORT", "65536", "0 to 65535"),
    ("PORT", "-1", "0 to 65535"),
    ("PORT", "80.0", "whole number"),
    ("PORT", "tcp://10.0.0.7:5000", "whole number"),  # what Kubernetes sets for a service that is named "port"
    ("WEB_CONCURRENCY", "0", "from 1"),
    ("WEB_CONCURRENCY", "auto", "worker processes"),
    ("WORKER_CLASS", "sync", "gevent or gthread"),
    ("GRACEFUL_TIMEOUT", "30s", "seconds"),
    ("KEEPALIVE", "-1", "seconds"),
    ("WORKER_TIMEOUT", "never", "seconds"),
    ("REQUEST_ID_HEADERS", "X Request", "names of headers"),
    ("REQUEST_ID_HEADERS", "X-Request-ID,X_Trace", "names of headers"),
    ("TRUSTED_PROXIES", "yes", "proxies"),
    ("TRUSTED_PROXIES", "-1", "from 0"),
    ("ALLOW_VERSION_MISMATCH", "true", "1 (on) or 0 (off)"),
    ("AUTH", "none", "basic or off"),
    ("AUTH", "OFF", "basic or off"),
    ("MAX_ROWS", "0", "rows"),
    ("MAX_ROWS", "1e5", "whole number"),
    ("MAX_BODY_BYTES", "16M", "bytes"),
    ("BODY_TIMEOUT", "0", "seconds"),
    ("BODY_TIMEOUT", "nan", "seconds"),
    ("BODY_TIMEOUT", "inf", "seconds"),
    ("JOURNAL_MAX_BYTES", "1000", "bytes"),
    ("JOURNAL_MAX_BYTES", "1GB", "bytes"),
    ("MODEL_PATH", "/nowhere/model.joblib", "model file"),
    ("MODEL_PATH", "/", "model file"),
    ("MODEL_PATH", "~no-such-user/model.joblib", "path"),
    ("MODEL_PATH", "x" * 300, "model file"),  # longer than a file's name may be
    ("USERS_FILE", "/nowhere/users.json", "python -m auth add"),
    ("USERS_FILE", "/", "python -m auth add"),
    ("USERS_FILE", "~no-such-user/users.json", "USERS_FILE"),
]


@pytest.mark.parametrize(("variable", "value", "expected"), WRONG)
def test_wrong_value_names_variable_value_and_what_was_expected(
    environ: dict[str, str], variable: str, value: str, expected: str
) -> None:
    with pytest.raises(SettingsError) as refusal:
        Settings.from_environ(environ | {variable: value}).check_files()
    for part in (variable, value, expected):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_two_sources_of_the_model_are_refused(environ: dict[str, str], iris_file: Path) -> None:
    with pytest.raises(SettingsError, match=r"MODEL_PATH.*MODEL_DIR"):
        Settings.from_environ(environ | {"MODEL_PATH": str(iris_file), "MODEL_DIR": "var/models"})
    assert Settings.from_environ(environ | {"MODEL_PATH": str(iris_file), "MODEL_DIR": ""}).model_path == iris_file


@pytest.mark.parametrize("variable", ["USERS_FILE", "MODEL_PATH"])
def test_file_in_a_directory_that_is_closed_to_the_server_is_explained(
    environ: dict[str, str], tmp_path: Path, variable: str
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "file").touch()
    closed.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # modes do not bind root
    try:
        with pytest.raises(SettingsError, match=variable):
            # AUTH=off, so that the users file of the fixture, which is closed as well, does not come into it.
            Settings.from_environ(
                {"AUTH": "off" if variable == "MODEL_PATH" else ""} | {variable: str(closed / "file")}
            ).check_files()
    finally:
        if root:
            os.seteuid(0)
        closed.chmod(0o700)


def test_auth_off_needs_no_users_file(tmp_path: Path) -> None:
    Settings.from_environ({"AUTH": "off", "USERS_FILE": str(tmp_path / "none.json")}).check_files()


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("400000 100000", 4), ("150000 100000", 1), ("50000 100000", 1), ("9900000 100000", 8)],
)
def test_usable_cores_are_those_that_a_container_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(settings_module, "Path", lambda _: tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores() == cores


def test_there_is_a_usable_core() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


# --- a real server


def refusal(place: Path, **settings: Any) -> str:
    """Start a server that must not come up; return its log."""
    with gunicorn(place, ready=False, **settings) as server:
        assert server.process.wait(60) != 0
        return server.log.read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": "http"},
        {"web_concurrency": "0"},
        {"model_path": "/nowhere/model.joblib"},
        {"users_file": "/"},
        {"model_path": __file__, "model_dir": "var/models"},
    ],
    ids=lambda wrong: "+".join(wrong),
)
def test_server_with_a_wrong_setting_ends_with_one_clear_line(tmp_path: Path, wrong: dict[str, str]) -> None:
    *before, line = refusal(tmp_path, **wrong).splitlines()
    assert not [each for each in before if "INFO" not in each]  # without log_format.py it is another form
    for variable, value in wrong.items():
        assert variable.upper() in line
        assert value in line or len(wrong) > 1


@pytest.mark.parametrize(
    "content",
    ["", '{"alice": {"password": "' + CHEAP, json.dumps({"alice": {"password": CHEAP, "roles": ["king"]}})],
    ids=["empty", "cut off", "unknown role"],
)
def test_server_with_a_broken_users_file_ends_with_a_clear_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "users.json").write_text(content)
    log = refusal(tmp_path, auth="basic")
    assert "Traceback" not in log
    assert str(tmp_path / "users.json") in log
    assert CHEAP not in log


@pytest.mark.parametrize("arguments", [[], ["server:app"]], ids=["gunicorn", "gunicorn server:app"])
def test_server_starts_with_and_without_its_name(tmp_path: Path, iris_file: Path, arguments: list[str]) -> None:
    with gunicorn(tmp_path, *arguments, model_path=iris_file) as server:
        assert server.predict([[5.1, 3.5, 1.4, 0.2]]) == (200, {"prediction": [0]})
