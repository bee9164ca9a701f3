"""The platforms: what each sets, by the environment in which it starts the server."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, free_port

from platforms import PLATFORMS, defaults_for
from settings import Settings, SettingsError, usable_cores

MB, MIB = 10**6, 2**20
CORES = usable_cores()
IN_TMP = Path("/tmp/prediction-server/journal")

# What a platform's environment has: port, drain, keep-alive, worker's and predict's time-out, body, journal, workers.
TABLE: dict[str, tuple[dict[str, str], tuple[int, ...], Path]] = {
    "sagemaker": ({"PLATFORM": "sagemaker"}, (8080, 25, 75, 65, 60, 25 * MB, 1000 * MB, CORES), IN_TMP),
    "sagemaker, batch": (
        {"PLATFORM": "sagemaker", "SAGEMAKER_BATCH": "true", "SAGEMAKER_MAX_PAYLOAD_IN_MB": "6"},
        (8080, 25, 75, 65, 600, 6 * MIB, 1000 * MB, CORES),
        IN_TMP,
    ),
    "ecs": ({"PLATFORM": "ecs"}, (8080, 25, 75, 30, 30, 16 * MIB, 1000 * MB, CORES), Path("var/journal")),
    "sae": ({"PLATFORM": "sae"}, (8080, 25, 75, 30, 30, 16 * MIB, 1000 * MB, CORES), Path("var/journal")),
    "vertex": ({"AIP_HTTP_PORT": "8085"}, (8085, 25, 75, 65, 60, 10 * MB, 200 * MB, CORES), Path("var/journal")),
    "cloud-run": (
        {"K_SERVICE": "iris", "PORT": "8087"},
        (8087, 8, 75, 0, 300, 32 * MIB, 64 * MB, CORES),
        Path("var/journal"),
    ),
    "function-compute": (
        {"FC_FUNCTION_NAME": "iris"},
        (9000, 5, 900, 0, 30, 32 * MB, 200 * MB, CORES),
        Path("var/journal"),
    ),
    "lambda": ({"AWS_LAMBDA_FUNCTION_NAME": "iris"}, (8080, 30, 900, 0, 900, 16 * MIB, 64 * MB, 1), IN_TMP),
    "eas": ({"PLATFORM": "eas"}, (8000, 25, 75, 65, 60, 16 * MIB, 1000 * MB, CORES), Path("var/journal")),
}
NAMES = ("port", "graceful_timeout", "keepalive", "worker_timeout", "predict_timeout", "max_body_bytes")
NAMES += ("journal_max_bytes", "web_concurrency")


def settings(environ: dict[str, str]) -> Settings:
    """Return the settings of a process that is started with this environment."""
    return Settings.from_environ({name: value for name, value in environ.items() if value} | defaults_for(environ)[0])


def test_table_has_each_platform() -> None:
    assert {name.partition(",")[0] for name in TABLE} == set(PLATFORMS)


@pytest.mark.parametrize("name", TABLE)
def test_defaults_of_a_platform(name: str) -> None:
    environ, values, journal = TABLE[name]
    found = settings(environ)
    assert tuple(getattr(found, each) for each in NAMES) == values
    assert (found.journal_dir, found.host, found.platform) == (journal, "0.0.0.0", name.partition(",")[0])
    assert found.auth == "basic"  # never switched off by itself
    assert found.extension_names()[: len(Settings().extensions)] == list(Settings().extensions)


def test_line_for_the_log_has_what_the_platform_changed_and_not_what_the_user_set() -> None:
    defaults, message = defaults_for({"K_SERVICE": "iris", "PORT": "8080", "JOURNAL_MAX_BYTES": "5000000"})
    assert message == (
        "platform: cloud-run (K_SERVICE): GRACEFUL_TIMEOUT=8 KEEPALIVE=75 WORKER_TIMEOUT=0 MAX_BODY_BYTES=33554432 "
        "PREDICT_TIMEOUT=300 REQUEST_ID_HEADERS=X-Request-ID,X-Cloud-Trace-Context/ HOST=0.0.0.0"
    )
    assert not {"PORT", "JOURNAL_MAX_BYTES"} & defaults.keys()
    for assignment in message.split()[3:]:  # as a user would write them
        name, _, value = assignment.partition("=")
        assert defaults[name] == value
    assert defaults_for({"PATH": "/bin"}) == ({}, "")


@pytest.mark.parametrize(
    ("environ", "platform"),
    [
        ({"AIP_HTTP_PORT": "1", "FC_FUNCTION_NAME": "f", "AWS_LAMBDA_FUNCTION_NAME": "f", "K_SERVICE": "s"}, "vertex"),
        ({"FC_FUNCTION_NAME": "f", "AWS_LAMBDA_FUNCTION_NAME": "f", "K_SERVICE": "s"}, "function-compute"),
        ({"AWS_LAMBDA_FUNCTION_NAME": "f", "K_SERVICE": "s"}, "lambda"),
        ({"K_SERVICE": "s"}, "cloud-run"),
        ({"K_SERVICE": "s", "PLATFORM": "eas"}, "eas"),
        ({"K_SERVICE": ""}, ""),
        ({"SAGEMAKER_BATCH": "true"}, ""),
    ],
)
def test_first_variable_counts_and_the_user_decides(environ: dict[str, str], platform: str) -> None:
    assert settings(environ).platform == platform


@pytest.mark.parametrize(
    ("environ", "port"),
    [
        ({"PORT": "1", "AIP_HTTP_PORT": "2"}, 1),
        ({"PORT": "", "AIP_HTTP_PORT": "2", "SAGEMAKER_BIND_TO_PORT": "3"}, 2),
        ({"SAGEMAKER_BIND_TO_PORT": "3", "FC_CUSTOM_LISTEN_PORT": "4", "PLATFORM": "sagemaker"}, 3),
        ({"FC_CUSTOM_LISTEN_PORT": "4", "FC_SERVER_PORT": "5", "FC_FUNCTION_NAME": "f"}, 4),
        ({"FC_SERVER_PORT": "5"}, 5),
        ({}, 5000),
    ],
)
def test_port_is_the_first_that_is_set(environ: dict[str, str], port: int) -> None:
    assert settings(environ).port == port


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"PLATFORM": "heroku"}, "PLATFORM='heroku': expected one of sagemaker, ecs,"),
        ({"PLATFORM": "Vertex"}, "PLATFORM='Vertex': expected one of"),
        ({"AIP_HTTP_PORT": "http"}, "AIP_HTTP_PORT='http': expected a whole number of a TCP port"),
        ({"FC_SERVER_PORT": "65536"}, "FC_SERVER_PORT='65536': expected"),
        (
            {"PLATFORM": "sagemaker", "SAGEMAKER_BATCH": "true", "SAGEMAKER_MAX_PAYLOAD_IN_MB": "6MB"},
            "SAGEMAKER_MAX_PAYLOAD_IN_MB='6MB': expected",
        ),
    ],
)
def test_wrong_value_stops_the_start_and_is_named(environ: dict[str, str], expected: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(expected)):
        settings(environ)


def test_batch_transform_without_a_limit_takes_what_the_server_can() -> None:
    environ = {"PLATFORM": "sagemaker", "SAGEMAKER_BATCH": "true", "SAGEMAKER_MAX_PAYLOAD_IN_MB": "0"}
    assert settings(environ).max_body_bytes == 2**31


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("", ["endpoints.sagemaker"]),
        ("+mine, -sls", ["endpoints.sagemaker", "mine"]),
        ("-endpoints.sagemaker", []),
        ("sls,telemetry", None),
    ],
)
def test_endpoint_of_the_platform_is_added_unless_the_user_names_the_whole_list(
    given: str, names: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platforms.find_spec", lambda name: object())
    environ = {"PLATFORM": "sagemaker", "EXTENSIONS": given}
    found = settings(environ).extension_names()
    kept = [name for name in Settings().extensions if name != "sls" or not given.startswith("+mine")]
    assert found == (["sls", "telemetry"] if names is None else [*kept, *names])
    assert ("EXTENSIONS=+endpoints.sagemaker" in defaults_for(environ)[1]) == bool(names)


def test_endpoint_that_was_removed_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platforms.find_spec", lambda name: None)
    defaults, message = defaults_for({"FC_FUNCTION_NAME": "f"})
    assert "EXTENSIONS" not in defaults
    assert message.endswith("(without endpoints.function_compute: its module is not installed)")


def test_request_without_an_id_gets_that_of_the_platform(serve: Any, iris_file: Path) -> None:
    names = settings({"K_SERVICE": "s"}).request_id_headers
    client = serve(iris_file, request_id_headers=names)

    def id_of(**headers: str) -> str:
        return str(client.post({"data": [[5.1, 3.5, 1.4, 0.2]]}, **headers).headers["X-Request-ID"])

    assert id_of(X_Cloud_Trace_Context="105445aa7843bc8bf206b12000100000/1;o=1") == "105445aa7843bc8bf206b12000100000"
    assert id_of(X_Cloud_Trace_Context="a/1", X_Request_ID="b/c") == "b/c"
    assert id_of(X_Cloud_Trace_Context="a", X_Request_ID="not sane") == "a"
    assert re.fullmatch("[0-9a-f]{32}", id_of(X_Cloud_Trace_Context="/1"))
    for platform, name in (("sagemaker", "X_Amzn_SageMaker_Inference_Id"), ("function-compute", "X_Fc_Request_Id")):
        client = serve(iris_file, request_id_headers=settings({"PLATFORM": platform}).request_id_headers)
        assert id_of(**{name: "one"}) == "one"


def test_cloud_function_has_the_defaults_of_cloud_run(tmp_path: Path, iris_file: Path) -> None:
    code = "import main; s = main.app.extensions['service'].settings; print(s.max_body_bytes, s.predict_timeout)"
    environ = {"K_SERVICE": "iris", "PORT": "8080", "AUTH": "off", "MODEL_PATH": str(iris_file)}
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=ROOT / "deploy/gcp", env=environ, capture_output=True, text=True, check=True)
    assert shown.stdout == f"{32 * MIB} 300.0\n"


# --- as a platform starts it

CLIENT = """
import json, sys, time, urllib.request
url, deadline = sys.argv[1], time.monotonic() + 60
body = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'
while True:
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        print(json.load(urllib.request.urlopen(request))["prediction"])
        break
    except OSError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.2)
"""


def can_unshare() -> bool:
    """Return whether a process may have a network of its own here."""
    try:
        return (
            subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0
        )
    except FileNotFoundError:
        return False


@pytest.mark.long
@pytest.mark.parametrize("name", TABLE)
def test_server_starts_in_the_environment_of_a_platform(tmp_path: Path, iris_file: Path, name: str) -> None:
    if not can_unshare():
        pytest.skip("needs root, util-linux and iproute2: ports are the platform's, and so the network a process' own")
    environ, values, journal = TABLE[name]
    # What a deploy file adds: the model, who authenticates, and here, not to leave anything, where to write.
    given = {"MODEL_PATH": str(iris_file), "AUTH": "off"}
    if not journal.is_absolute():
        given["JOURNAL_DIR"] = str(tmp_path / "journal")
    command = ["env", "-i", *(f"{key}={value}" for key, value in (environ | given).items())]
    start = [*command, sys.executable, "-m", "gunicorn"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        inside = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *start]
        process = subprocess.Popen(inside, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{values[0]}/predict"
        deadline = time.monotonic() + 120
        while "Listening at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        ask = ["nsenter", "--net", "--target", str(process.pid), sys.executable, "-c", CLIENT, url]
        asked = subprocess.run(ask, capture_output=True, text=True, timeout=90)
        assert asked.stdout == "[0]\n", asked.stderr + log.read_text()
        text = log.read_text()
        assert f"Listening at: http://0.0.0.0:{values[0]} " in text
        (line,) = re.findall(r"platform: (.*)", text)
        assert line.startswith(name.partition(",")[0])
        assert not {"MODEL_PATH", "AUTH", *environ} & {each.partition("=")[0] for each in line.split()}
        while log.read_text().count("Booting worker") < values[-1]:  # another may have answered already
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert log.read_text().count("Booting worker") == values[-1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(values[1] + 2) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # gunicorn's own settings, as it prints them.
    shown = subprocess.run([*start, "--print-config"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"^(\w+) += (.*)$", shown, re.MULTILINE))
    timeout = values[3] and max(values[3], values[4])
    assert [int(found[each]) for each in ("graceful_timeout", "keepalive", "timeout", "workers")] == [
        *(values[1], values[2], timeout, values[7])
    ]


def test_server_on_a_platform_logs_it_once_and_an_unknown_one_stops_the_start(tmp_path: Path, iris_file: Path) -> None:
    port = str(free_port())
    environ = {"K_SERVICE": "iris", "PORT": port, "MODEL_PATH": str(iris_file), "AUTH": "off", "WEB_CONCURRENCY": "2"}
    environ |= {"JOURNAL_DIR": str(tmp_path / "journal"), "HOST": "127.0.0.1", "LOG_FORMAT": "json"}
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "gunicorn"]
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=file, start_new_session=True)
    try:
        asked = subprocess.run(
            [sys.executable, "-c", CLIENT, f"http://127.0.0.1:{port}/predict"], capture_output=True, text=True
        )
        assert json.loads(asked.stdout) == [0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    first, *others = [json.loads(line)["message"] for line in log.read_text().splitlines()]
    assert not [line for line in others if "platform: " in line]
    line = first.removeprefix("platform: ")
    assert line.startswith("cloud-run (K_SERVICE): GRACEFUL_TIMEOUT=8 KEEPALIVE=75 WORKER_TIMEOUT=0 MAX_BODY_BYTES=33")
    assert "HOST" not in line
    refused = subprocess.run(command, cwd=ROOT, env=environ | {"PLATFORM": "heroku"}, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "cannot start: PLATFORM='heroku': expected one of" in refused.stderr
    assert "Traceback" not in refused.stderr
