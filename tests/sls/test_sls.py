"""The shipper by itself, with the real SDK and a loopback SLS: what each failure does, progress, credentials."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, records
from ecs_metadata import EcsMetadata, Sts
from loopback_sls import LoopbackSLS
from sls_tools import clock, shipper, shippers, state, stored

from monitor import Journal, segments
from settings import Settings
from sls.__main__ import main
from sls.client import Client, find_credentials
from sls.console import Recipients
from sls.shipper import Progress, Shipper, SLSError


def journal_of(place: Path, count: int) -> Path:
    """Write records with the request ids "0", "1", … to a journal, and return its directory."""
    journal = Journal(place / "journal", 10**7)
    for n in range(count):
        journal.append({"request_id": str(n)})
    journal.close()
    return place / "journal"


@pytest.mark.parametrize("mode", ["throttled", "quota", "error500", "busy", "reset"])
def test_transient_errors_are_retried_soon(tmp_path: Path, sls: LoopbackSLS, mode: str) -> None:
    sls.mode = mode
    journal_of(tmp_path, 50)
    with shipper(tmp_path, sls, "--forever"):
        sls.wait_until(lambda: sls.outcomes.total() >= 3)
        assert state(tmp_path)["error"]
        assert not sls.logs
        sls.mode = "ok"
        sls.wait_until(lambda: len(stored(sls)) == 50)
        assert max(stored(sls).values()) == 1
        sls.wait_until(lambda: "SLS takes records again" in (tmp_path / "ship.log").read_text())
    assert (tmp_path / "ship.log").read_text().count("ERROR") == 1


@pytest.mark.parametrize(
    ("mode", "advice"),
    [
        ("wrong key", "check ALIBABA_CLOUD_ACCESS_KEY_ID"),
        ("no project", "check SLS_PROJECT"),
        ("no logstore", "check SLS_LOGSTORE"),
        ("skew", "set this machine's clock"),
    ],
)
def test_what_an_operator_must_fix_is_retried_slowly_and_logged_once(
    tmp_path: Path, sls: LoopbackSLS, mode: str, advice: str, monkeypatch: Any, caplog: Any
) -> None:
    sls.mode = mode
    monkeypatch.setattr("sls.shipper.SLOW_RETRY", 0.5)
    with in_thread(journal_of(tmp_path, 50), real_sender(sls)):
        sls.wait_until(lambda: sls.outcomes.total() >= 3)
        assert not sls.logs
        errors = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.ERROR]
        assert len(errors) == 1
        assert advice in errors[0]
        sls.mode = "ok"
        sls.wait_until(lambda: len(stored(sls)) == 50)


def test_batches_are_bounded_and_wait_for_more_only_when_they_are_not_full(tmp_path: Path, sls: LoopbackSLS) -> None:
    directory = journal_of(tmp_path, 10_000)
    with in_thread(directory, real_sender(sls)):
        sls.wait_until(lambda: len(sls.logs) == 10_000)
        assert sls.batches == [2048, 2048, 2048, 2048, 10_000 - 4 * 2048]
        wide = Journal(directory, 10**8)
        for _ in range(60):
            wide.append({"filling": "x" * 100_000})
        wide.close()
        sls.wait_until(lambda: len(sls.logs) == 10_060)
        assert max(sls.batch_bytes) < 3 * 10**6


def test_record_that_sls_rejects_for_its_content_is_a_dead_letter_and_the_others_arrive(
    tmp_path: Path, sls: LoopbackSLS
) -> None:
    sls.refuse(lambda entry: entry["request_id"] == "13")
    journal_of(tmp_path, 50)
    with shipper(tmp_path, sls) as process:
        assert process.wait(30) == 0
    assert set(stored(sls)) == {str(n) for n in range(50)} - {"13"}
    report = subprocess.run(
        [sys.executable, "-m", "telemetry.report", "--dir", str(tmp_path / "journal")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert re.search(r"^records refused by SLS +1$", report, re.MULTILINE)
    refused = json.loads((tmp_path / "journal/refused.json").read_text())
    assert (refused["request_id"], state(tmp_path)["refused"], state(tmp_path)["shipped"]) == ("13", 1, 50)


def test_dead_letters_are_bounded_and_the_latest_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sls.shipper.DEAD_LETTERS_BYTES", 1000)
    directory = journal_of(tmp_path, 40)

    def reject(batch: list[dict[str, Any]]) -> None:
        raise SLSError("PostBodyInvalid", "not this", 400)

    Shipper(directory, reject).run()
    kept = [directory / name for name in ("refused.old.json", "refused.json")]
    found = [json.loads(line)["request_id"] for path in kept for line in path.read_text().splitlines()]
    assert found == [str(n) for n in range(40)][-len(found) :]
    assert 5 < len(found) < 25
    progress = Progress.read(directory)
    assert progress
    assert progress.refused == 40
    assert progress.refused_bytes(directory) == sum(path.stat().st_size for path in kept) < 2500
    assert "the records in" in caplog.text


def test_second_shipper_of_a_journal_ends_at_once(tmp_path: Path, sls: LoopbackSLS) -> None:
    with shipper(tmp_path, sls, "--forever") as first:
        sls.wait_until(lambda: shippers(tmp_path / "journal") == [first.pid])
        with shipper(tmp_path, sls, "--forever") as second:
            assert second.wait(20) == 0
        assert first.poll() is None


def test_torn_lines_stop_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    directory.mkdir()
    (directory / "00000000000000000001-1.jsonl").write_bytes(
        b'{"time":1.5,"n":1}\n{"ti\n\n[1]\n{"time":2.5,"n":2}\n{"time":3'
    )
    sent: list[Any] = []
    Shipper(directory, sent.extend).run()
    assert [record["n"] for record in sent] == [1, 2]
    assert segments(directory) == []


@pytest.mark.parametrize(
    ("arguments", "status", "output"),
    [
        (["ship"], 2, "sls: set SLS_ENDPOINT, SLS_PROJECT and SLS_LOGSTORE\n"),
        ([], 2, "Usage: python -m sls [OPTIONS]"),
        (["setup", "--keep-days", "0"], 2, "Usage: python -m sls setup [OPTIONS]"),
        (["setup", "--language", "fr"], 2, "Usage: python -m sls setup [OPTIONS]"),
        (["-h"], 0, "Usage: python -m sls [OPTIONS]"),
        *(
            ([command, "--help"], 0, f"Usage: python -m sls {command}")
            for command in ("ship", "setup", "check", "test-alert")
        ),
    ],
)
def test_command_line_reports_usage_and_missing_settings(
    arguments: list[str], status: int, output: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("os.environ", {})
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert (printed.err if status else printed.out).startswith(output)


@pytest.mark.parametrize("arguments", [["setup", "--dry-run"], ["--help"]])
def test_output_that_is_not_read_ends_the_command_line_quietly(arguments: list[str], sls: LoopbackSLS) -> None:
    unread, output = os.pipe()
    os.close(unread)
    done = subprocess.run(
        [sys.executable, "-m", "sls", *arguments],
        cwd=ROOT, env=sls.environ(), stdout=output, stderr=subprocess.PIPE, timeout=60,
    )  # fmt: skip
    os.close(output)
    assert (done.returncode, done.stderr) == (1, b"")


def test_unknown_error_makes_no_dead_letters(tmp_path: Path) -> None:
    """It may be a wrong setting, and then every record would become one."""
    tries = []

    def refuse(records: list[Any]) -> None:
        tries.append(len(records))
        raise SLSError("SomethingNew", "never heard of", 400)

    with in_thread(journal_of(tmp_path, 5), refuse):
        wait_for(lambda: bool(tries))
        time.sleep(0.5)
    assert tries == [5]
    assert not (tmp_path / "journal/refused.json").exists()
    assert len(records(tmp_path / "journal")) == 5


@pytest.mark.long
@pytest.mark.parametrize("file", ["ship.json", "refused.json"])
def test_progress_that_cannot_be_written_stops_no_shipping(
    tmp_path: Path, file: str, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr("sls.shipper.SLOW_RETRY", 1.0)
    directory = journal_of(tmp_path, 5)
    (directory / file).mkdir()  # so nothing can be written there
    sent: list[str] = []

    def send(records: list[Any]) -> None:
        if file == "refused.json" and any(record["request_id"] == "3" for record in records):
            raise SLSError("PostBodyInvalid", "this one", 400)
        sent.extend(record["request_id"] for record in records)

    with in_thread(directory, send):
        wait_for(lambda: len(sent) >= 3)
        if file == "refused.json":
            time.sleep(0.5)
            assert sent == ["0", "1", "2"]  # what cannot be kept in refused.json is not lost
            assert len(records(directory)) == 5
            (directory / file).rmdir()
            wait_for(lambda: sent == ["0", "1", "2", "4"], 60)
        wait_for(lambda: not segments(directory))
    assert sum(str(directory) in entry.getMessage() or file in entry.getMessage() for entry in caplog.records) >= 1
    assert sorted(sent) == sorted(set(sent))


def test_segment_that_cannot_be_read_keeps_no_other_waiting(tmp_path: Path) -> None:
    directory = journal_of(tmp_path, 5000)  # several batches
    (directory / "00000000000000000001-1.jsonl").mkdir()
    sent: list[Any] = []
    Shipper(directory, sent.extend).run()
    assert [record["request_id"] for record in sent] == [str(n) for n in range(5000)]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"offsets": 1, "shipped": 0}', '{"shipped": 3}', "\udcff"])
def test_broken_progress_means_from_the_beginning(tmp_path: Path, text: str) -> None:
    directory = journal_of(tmp_path, 3)
    (directory / "ship.json").write_bytes(text.encode(errors="surrogateescape"))
    assert Progress.read(directory) is None
    sent: list[Any] = []
    Shipper(directory, sent.extend).run()
    assert len(sent) == 3


def test_progress_shows_what_waits_for_how_long_and_why(tmp_path: Path, sls: LoopbackSLS) -> None:
    directory = journal_of(tmp_path, 5)
    assert Progress.read(directory) is None
    written = records(directory)[0]["time"]
    size = sum(path.stat().st_size for path in segments(directory))
    sls.mode = "no logstore"
    with shipper(tmp_path, sls, "--forever"):
        sls.wait_until(lambda: Progress.read(directory) is not None)
        progress = Progress.read(directory)
        assert progress is not None
        assert (progress.shipped, *progress.waiting(directory)) == (0, size, written)
        assert progress.error is not None
        assert progress.error["message"].startswith("LogStoreNotExist")
        report = subprocess.run(
            [sys.executable, "-m", "telemetry.report", "--dir", str(directory)],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert re.search(rf"^bytes waiting +{size}$", report, re.MULTILINE)
        assert re.search(r"^waiting for +[0-9]+ s$", report, re.MULTILINE)
        assert re.search(r"^SLS, last error +LogStoreNotExist: logstore does not exist$", report, re.MULTILINE)
    sls.mode = "ok"
    with shipper(tmp_path, sls) as process:
        assert process.wait(30) == 0
    assert Progress.read(directory) == Progress(shipped=5)
    assert Progress().waiting(directory) == (0, None)


def test_shipper_needs_neither_flask_nor_a_model() -> None:
    code = "import sls.__main__, sls.client, sys; print({'flask', 'sklearn', 'numpy', 'gevent'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_worker_needs_no_sdk() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import server, sys; print({'aliyun', 'requests'} & {*sys.modules})"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "set()\n"


def test_keys_appear_in_no_repr() -> None:
    environ = {
        "ALIBABA_CLOUD_ACCESS_KEY_ID": "LTAI-findme",
        "ALIBABA_CLOUD_ACCESS_KEY_SECRET": "secret-findme",
        "ALIBABA_CLOUD_SECURITY_TOKEN": "token-findme",
        "SLS_ENDPOINT": "cn-test.log.aliyuncs.com",
        "SLS_PROJECT": "proj",
        "SLS_LOGSTORE": "ls",
        "SLS_ALERT_DINGTALK": "https://oapi.dingtalk.com/robot/send?access_token=findme",
        "SLS_ALERT_DINGTALK_SECRET": "SEC-findme",
    }
    client = Client(Settings.from_environ(environ), environ)
    held = client._credentials.get_credentials()
    shown = repr([client, vars(client), client._credentials, held])
    shown += repr([Recipients.from_environ(environ), Settings.from_environ(environ)])
    assert "findme" not in shown


# --- the network


def test_host_that_is_not_found_is_a_transient_error() -> None:
    settings = Settings(sls_endpoint="nowhere.invalid", sls_project="proj", sls_logstore="ls")
    environ = {"ALIBABA_CLOUD_ACCESS_KEY_ID": "fake", "ALIBABA_CLOUD_ACCESS_KEY_SECRET": "fake"}
    with pytest.raises(SLSError) as caught:
        Client(settings, environ).send([{"time": 1.5}])
    assert caught.value.is_transient
    assert "resolve" in str(caught.value)


def test_connection_without_tls_is_a_transient_error(monkeypatch: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    connection.recv(65536)
                    connection.sendall(b"this is no TLS record, and never will be one")

        thread = threading.Thread(target=speak)
        thread.start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        settings = Settings(sls_endpoint="cn-test.log.aliyuncs.com", sls_project="proj", sls_logstore="ls")
        environ = {"ALIBABA_CLOUD_ACCESS_KEY_ID": "fake", "ALIBABA_CLOUD_ACCESS_KEY_SECRET": "fake"}
        with pytest.raises(SLSError) as caught:
            Client(settings, environ).send([{"time": 1.5}])
        thread.join(10)
    assert caught.value.is_transient
    assert "SSL" in str(caught.value)


# --- credentials


def send_one(client: Client, name: str) -> None:
    client.send([{"time": time.time(), "request_id": name}])


def client_of(sls: LoopbackSLS, region: bool = True, **environ: str) -> Any:
    """Connect to the loopback SLS from this process, with these credentials' variables only."""
    places = {name: value for name, value in sls.environ().items() if name.startswith("SLS_")}
    if not region:
        del places["SLS_REGION"]
    client = Client(Settings.from_environ(places), environ)
    client._session.proxies["http"] = sls.environ()["http_proxy"]
    return client


@pytest.mark.parametrize("region", [True, False], ids=["v4", "v1"])
@pytest.mark.parametrize("token", ["", "a-token"])
def test_credentials_from_the_environment(sls: LoopbackSLS, region: bool, token: str) -> None:
    sls.token = token or None
    variables = {name: value for name, value in sls.environ().items() if name.startswith("ALIBABA_")}
    send_one(client_of(sls, region, **variables), "it")
    assert set(stored(sls)) == {"it"}


def test_credentials_from_a_file_that_changes(tmp_path: Path, sls: LoopbackSLS) -> None:
    path = tmp_path / "credentials.ini"

    def write(key_id: str, secret: str, token: str = "", section: str = "default") -> None:
        path.write_text(
            f"[{section}]\naccess_key_id = {key_id}\naccess_key_secret = {secret}\nsecurity_token = {token}\n"
        )

    write(sls.key_id, sls.secret)
    client = client_of(sls, ALIBABA_CLOUD_CREDENTIALS_FILE=str(path))
    send_one(client, "first")
    sls.accept("second-id", "second%secret", "second-token")
    write("second-id", "second%secret", "second-token")
    sls.expire(sls.key_id)  # refused, so the file is read at once
    send_one(client, "second")
    path.write_text("[default\naccess_key_id = half-writt")
    send_one(client, "third")
    sls.expire("second-id")
    with pytest.raises(SLSError) as caught:
        send_one(client, "fourth")
    assert caught.value.code == "Unauthorized"
    assert "half" not in str(caught.value)
    assert set(stored(sls)) == {"first", "second", "third"}
    write("second-id", "second%secret", section="elsewhere")
    elsewhere = {"ALIBABA_CLOUD_CREDENTIALS_FILE": str(path), "ALIBABA_CLOUD_PROFILE": "elsewhere"}
    sls.accept("second-id", "second%secret")
    send_one(client_of(sls, **elsewhere), "fifth")


@pytest.mark.parametrize("requires_token", [False, True])
@pytest.mark.parametrize("role", ["", "server-role"])
def test_credentials_of_the_ecs_role_are_renewed_while_it_runs(
    sls: LoopbackSLS, monkeypatch: Any, requires_token: bool, role: str
) -> None:
    forward = clock(monkeypatch)
    with EcsMetadata(sls.accept, lifetime=60, requires_token=requires_token) as metadata:
        monkeypatch.setattr("sls.client.METADATA", metadata.base)
        client = client_of(sls, **({"ALIBABA_CLOUD_ECS_METADATA": role} if role else {}))
        for n in range(25):
            send_one(client, str(n))
            forward(3)
        assert metadata.calls["credentials"] >= 2
        assert metadata.calls["role"] == (0 if role else metadata.calls["credentials"])
    assert len(stored(sls)) == 25
    assert sls.outcomes == {"ok": 25}


def test_credentials_of_a_service_account_are_renewed_with_its_new_tokens(
    tmp_path: Path, sls: LoopbackSLS, monkeypatch: Any
) -> None:
    forward, path = clock(monkeypatch), tmp_path / "token"
    path.write_text("a.jwt.token\n")
    with Sts(sls.accept, lifetime=60) as sts:
        given = sts.environ | {"ALIBABA_CLOUD_OIDC_TOKEN_FILE": str(path), "ALIBABA_CLOUD_CREDENTIALS_FILE": "/nowhere"}
        client = client_of(sls, **given)
        for n in range(20):
            send_one(client, str(n))
            forward(3)
            if n == 8:  # the kubelet replaces it
                sts.token = "another.jwt.token"
                path.write_text(sts.token)
        assert sts.calls["credentials"] >= 2
        assert sts.session == "prediction-server"
        send_one(client_of(sls, **given, ALIBABA_CLOUD_ROLE_SESSION_NAME="pod-7"), "20")
        assert sts.session == "pod-7"
    assert len(stored(sls)) == 21
    assert sls.outcomes == {"ok": 21}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ALIBABA_CLOUD_ROLE_ARN": ""}, "ALIBABA_CLOUD_ROLE_ARN not set; ALIBABA_CLOUD_OIDC_TOKEN_FILE, "),
        ({"ALIBABA_CLOUD_OIDC_PROVIDER_ARN": ""}, "ALIBABA_CLOUD_OIDC_PROVIDER_ARN not set; "),
        ({"ALIBABA_CLOUD_OIDC_TOKEN_FILE": ""}, "ALIBABA_CLOUD_OIDC_TOKEN_FILE not set; "),
        ({"ALIBABA_CLOUD_OIDC_TOKEN_FILE": "/nowhere"}, "No such file"),
        ({"ALIBABA_CLOUD_ROLE_ARN": "acs:ram::1:role/of-others"}, "STS answered 400 InvalidParameter.RoleArn"),
        ({"ALIBABA_CLOUD_ROLE_SESSION_NAME": "two words"}, "STS answered 400 InvalidParameter.RoleArn"),
        ({"mode": "expired"}, "STS answered 400 AuthenticationFail.OIDCToken.Expired"),
    ],
)
def test_service_account_without_credentials_is_reported_without_its_token(
    tmp_path: Path, sls: LoopbackSLS, changed: dict[str, str], message: str
) -> None:
    (tmp_path / "token").write_text("a.jwt.token")
    with Sts(sls.accept) as sts:
        if "mode" in changed:
            sts.token = "another.jwt.token"
        environ = sts.environ | {"ALIBABA_CLOUD_OIDC_TOKEN_FILE": str(tmp_path / "token")} | changed
        with pytest.raises(SLSError) as caught:
            send_one(client_of(sls, **environ), "never")
    assert caught.value.code == "NoCredentials"
    assert message in str(caught.value)
    assert "jwt" not in repr(caught.value)


@pytest.mark.parametrize(
    ("environ", "host"),
    [
        ({}, "sts.aliyuncs.com"),
        ({"ALIBABA_CLOUD_STS_REGION": "cn-hangzhou"}, "sts.cn-hangzhou.aliyuncs.com"),
        (
            {"ALIBABA_CLOUD_STS_REGION": "cn-hangzhou", "ALIBABA_CLOUD_VPC_ENDPOINT_ENABLED": "true"},
            "sts-vpc.cn-hangzhou.aliyuncs.com",
        ),
    ],
)
def test_sts_is_asked_by_tls_in_its_region(
    tmp_path: Path, monkeypatch: Any, environ: dict[str, str], host: str
) -> None:
    (tmp_path / "token").write_text("a.jwt.token")
    asked: list[str] = []

    def send(self: Any, request: Any, **_: Any) -> None:
        asked.append(request.url)
        raise ConnectionRefusedError

    monkeypatch.setattr("requests.adapters.HTTPAdapter.send", send)
    roles = {"ALIBABA_CLOUD_ROLE_ARN": "r", "ALIBABA_CLOUD_OIDC_PROVIDER_ARN": "p"}
    with pytest.raises(ConnectionRefusedError):
        find_credentials(environ | roles | {"ALIBABA_CLOUD_OIDC_TOKEN_FILE": str(tmp_path / "token")})()
    assert asked == [f"https://{host}/"]


def test_shipper_renews_credentials_from_a_uri_and_outlives_its_failure(tmp_path: Path, sls: LoopbackSLS) -> None:
    with EcsMetadata(sls.accept, lifetime=3) as metadata:
        environ = {"ALIBABA_CLOUD_ACCESS_KEY_ID": "", "ALIBABA_CLOUD_CREDENTIALS_URI": metadata.credentials_uri}
        with shipper(tmp_path, sls, "--forever", **environ):
            journal = Journal(tmp_path / "journal", 10**7)
            for n in range(40):
                journal.append({"request_id": str(n)})
                time.sleep(0.2)
                if n in (10, 20):
                    metadata.mode = "garbage" if n == 10 else "ok"
            sls.wait_until(lambda: len(stored(sls)) == 40, 60)
            assert metadata.calls["credentials"] >= 3
    written = (tmp_path / "ship.log").read_text() + (tmp_path / "journal/ship.json").read_text()
    assert not any(key in written for key in (*sls.credentials, *(secret for secret, _, _ in sls.credentials.values())))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ALIBABA_CLOUD_ACCESS_KEY_ID": "alone"}, "ALIBABA_CLOUD_ACCESS_KEY_SECRET are not both set"),
        ({"ALIBABA_CLOUD_CREDENTIALS_FILE": "/nowhere"}, "No such file"),
        ({"ALIBABA_CLOUD_CREDENTIALS_FILE": "requirements.txt"}, "MissingSectionHeaderError"),
        ({"ALIBABA_CLOUD_CREDENTIALS_URI": "http://127.0.0.1:1/secret-path"}, "ConnectionError"),
        ({}, "ConnectionError"),
    ],
)
def test_missing_credentials_are_reported(
    sls: LoopbackSLS, environ: dict[str, str], message: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("sls.client.METADATA", "http://127.0.0.1:1/latest")
    monkeypatch.chdir(ROOT)
    with pytest.raises(SLSError) as caught:
        send_one(client_of(sls, **environ), "never")
    assert caught.value.code == "NoCredentials"
    assert message in str(caught.value)
    assert "secret-path" not in str(caught.value)
    assert not caught.value.is_transient
    assert not caught.value.is_content


@pytest.mark.parametrize("mode", ["no role", "garbage"])
def test_metadata_without_a_role_is_reported(sls: LoopbackSLS, monkeypatch: Any, mode: str) -> None:
    with EcsMetadata(sls.accept) as metadata:
        metadata.mode = mode
        monkeypatch.setattr("sls.client.METADATA", metadata.base)
        with pytest.raises(SLSError) as caught:
            send_one(client_of(sls), "never")
    assert caught.value.code == "NoCredentials"
    assert "html" not in str(caught.value)


# --- helpers


def real_sender(sls: LoopbackSLS) -> Callable[[list[dict[str, Any]]], None]:
    """Return what sends to the loopback SLS from this process."""
    variables = {name: value for name, value in sls.environ().items() if name.startswith("ALIBABA_")}
    send: Callable[[list[dict[str, Any]]], None] = client_of(sls, **variables).send
    return send


@contextmanager
def in_thread(directory: Path, send: Callable[[list[Any]], None]) -> Iterator[Shipper]:
    """Run a shipper in a thread of this process until the block ends, or in vain."""
    shipper = Shipper(directory, send, forever=True)
    ended = threading.Event()

    def until_the_end(records: list[Any]) -> None:
        if ended.is_set():
            raise SystemExit
        send(records)

    def run() -> None:
        with suppress(SystemExit):
            shipper.run()

    shipper._send = until_the_end
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield shipper
    finally:
        ended.set()
        shipper.stop()
        thread.join(10)
        assert not thread.is_alive()


def wait_for(met: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until `met()` is true."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.02)
