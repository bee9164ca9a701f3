"""TLS as it is spoken: by nginx with the shipped files, and by gunicorn alone; looked at with sslyze."""

import contextlib
import http.client
import importlib.util
import json
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, WORKER_CLASSES, Gunicorn, basic, gunicorn, read_all
from nginx_tools import SHIPPED, certificate, needs_nginx, nginx, one_host, substitute
from test_bad_requests import BODY, LIMIT, chunk, chunked, sized

needs_sslyze = pytest.mark.skipif(importlib.util.find_spec("sslyze") is None, reason="needs sslyze: make test")
OPERATIONS = (ROOT / "docs/operations.md").read_text("utf-8")
ENDS = ("AES_128_GCM_SHA256", "AES_256_GCM_SHA384", "CHACHA20_POLY1305_SHA256")  # of the names of good cipher suites
OLD = ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1")


def scan(port: int, place: Path) -> tuple[dict[str, Any], set[str]]:
    """Scan a port with sslyze; return what it found, and where that departs from Mozilla's intermediate guidelines."""
    report = place / "sslyze.json"
    command = [sys.executable, "-W", "ignore", "-m", "sslyze", "--mozilla_config", "intermediate"]
    told = subprocess.run(
        [*command, "--json_out", report, f"127.0.0.1:{port}"], capture_output=True, text=True, check=False
    )
    assert "COMPLIANCE AGAINST TLS CONFIGURATION" in told.stdout, told.stderr
    (server,) = json.loads(report.read_text())["server_scan_results"]
    assert server["scan_status"] == "COMPLETED"
    departures = set(re.findall(r"^ +\* (\w+): ", told.stdout.partition("COMPLIANCE AGAINST")[2], re.MULTILINE))
    return {name: found["result"] for name, found in server["scan_result"].items()}, departures


def accepted(found: dict[str, Any], version: str) -> set[str]:
    """Return the cipher suites that were accepted in a version of the protocol."""
    return {each["cipher_suite"]["name"] for each in found[f"{version}_cipher_suites"]["accepted_cipher_suites"]}


@needs_nginx
@needs_sslyze
def test_nginx_speaks_mozillas_intermediate_and_nothing_older(tmp_path: Path) -> None:
    with nginx(tmp_path / "nginx", one_host(tmp_path / "nobody.sock")) as front:
        found, departures = scan(front.port, tmp_path)
    assert departures == {"certificate_path_validation"}  # it is a self-signed one
    for version in OLD:
        assert accepted(found, version) == set()
    assert accepted(found, "tls_1_2") == {f"TLS_ECDHE_RSA_WITH_{end}" for end in ENDS}  # the others are for ECDSA
    assert accepted(found, "tls_1_3") == {f"TLS_{end}" for end in ENDS}
    assert {each["name"] for each in found["elliptic_curves"]["supported_curves"]} == {
        *("X25519", "secp256r1", "secp384r1")
    }
    assert not found["session_renegotiation"]["is_vulnerable_to_client_renegotiation_dos"]


@needs_nginx
def test_nginx_and_the_hosts_speak_tls_with_the_documented_lines(tmp_path: Path, iris_file: Path) -> None:
    written = re.search(r"```nginx\n(proxy_pass https.*?)```", OPERATIONS, re.DOTALL)
    assert written
    made, key = certificate(tmp_path / "host", "hosts.internal")
    other, _ = certificate(tmp_path / "other", "hosts.internal")
    upstream = (SHIPPED / "upstream-several-hosts.conf").read_text()
    with gunicorn(tmp_path, "--certfile", str(made), "--keyfile", str(key), model_path=iris_file) as app:
        address = f"127.0.0.1:{app.port}"
        for number in (11, 12, 13):
            upstream = substitute(upstream, {f"10.0.0.{number}:5000": address})
        for trusted, status in ((made, 200), (other, 502)):
            lines = substitute(written[1], {"/etc/ssl/certs/hosts.pem": str(trusted)})
            place = tmp_path / f"nginx-{status}"
            with nginx(place, upstream, {"proxy_pass http://predictions;": lines}) as front:
                headers = {"Content_Type": "application/json", "Authorization": basic("predict")}
                assert front.ask("POST", "/predict", BODY, **headers)[0] == status


@pytest.fixture(scope="module", params=WORKER_CLASSES)
def server(request: Any, iris_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """A gunicorn that speaks TLS itself, for each worker class."""
    place = tmp_path_factory.mktemp(request.param)
    made, key = certificate(place)
    arguments = ["--certfile", str(made), "--keyfile", str(key)]
    with gunicorn(
        place,
        *arguments,
        model_path=iris_file,
        worker_class=request.param,
        body_timeout=2,
        max_body_bytes=LIMIT,
    ) as running:
        yield running


def trusting(server: Gunicorn) -> ssl.SSLContext:
    """Return a client's context that trusts the server's certificate and no other."""
    return ssl.create_default_context(cafile=str(server.place / "prediction-server.pem"))


def ask(server: Gunicorn, context: ssl.SSLContext, body: bytes = BODY) -> tuple[int, bytes]:
    """POST a body over TLS."""
    connection = http.client.HTTPSConnection("localhost", server.port, timeout=20, context=context)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json", "Authorization": basic("predict")}
        connection.request("POST", "/predict", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


@needs_sslyze
def test_gunicorn_alone_speaks_tls_12_and_13_only(server: Gunicorn, tmp_path: Path) -> None:
    assert ask(server, trusting(server)) == (200, b'{"prediction":[0]}\n')
    found, _ = scan(server.port, tmp_path)
    for version in OLD:
        assert accepted(found, version) == set()
    assert accepted(found, "tls_1_2") == {f"TLS_ECDHE_RSA_WITH_{end}" for end in ENDS}
    assert accepted(found, "tls_1_3") == {f"TLS_{end}" for end in ENDS}


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_gunicorn_answers_in_either_version(version: ssl.TLSVersion, server: Gunicorn) -> None:
    context = trusting(server)
    context.minimum_version = context.maximum_version = version
    assert ask(server, context) == (200, b'{"prediction":[0]}\n')


def test_line_to_paste_is_for_https(server: Gunicorn) -> None:
    assert f"https://127.0.0.1:{server.port}/predict" in server.log.read_text()


ENDLESS = {  # how a body begins, what comes again and again, and the status
    "half a body, then silence": (sized(1000) + BODY, b"", 408),
    "half a chunk, then silence": (chunked() + b"1000\r\n{", b"", 408),
    "a byte now and then": (sized(1000), b" ", 408),
    "a chunk now and then": (chunked(), chunk(b" "), 408),
    "too long by its header": (sized(LIMIT + 1), b" ", 413),
    "a stranger's": (sized(1000, user=None), b" ", 401),
}


def send_without_end(server: Gunicorn, first: bytes, again: bytes) -> tuple[bytes, float]:
    """Send a body that does not end; return what came back, and after how many seconds the connection ended."""
    received, began = b"", time.monotonic()
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    with trusting(server).wrap_socket(raw, server_hostname="localhost") as connection:
        connection.sendall(first)
        connection.settimeout(0.3)
        while time.monotonic() - began < 18:
            try:
                new = connection.recv(65536)
            except TimeoutError:
                new = None
            except OSError:
                break
            if new == b"":
                break
            received += new or b""
            with contextlib.suppress(OSError):
                connection.sendall(again)
    return received, time.monotonic() - began


def test_body_that_does_not_end_is_answered_under_tls_as_without(server: Gunicorn) -> None:
    with ThreadPoolExecutor(len(ENDLESS)) as pool:
        running = {name: pool.submit(send_without_end, server, *sent) for name, (*sent, _) in ENDLESS.items()}
    for name, (_, _, status) in ENDLESS.items():
        received, seconds = running[name].result()
        assert received.startswith(b"HTTP/1.1 %d " % status), name
        assert b"application/problem+json" in received
        assert received.endswith(b"}\n")  # whole
        assert seconds < 15  # keepalive would end it after 20
    assert ask(server, trusting(server))[0] == 200


def test_body_larger_than_the_limit_is_answered_while_it_comes(server: Gunicorn) -> None:
    with contextlib.suppress(ssl.SSLError, BrokenPipeError, ConnectionResetError):  # it may not read it to the end
        status, body = ask(server, trusting(server), b" " * (LIMIT + 1))
        assert (status, json.loads(body)["status"]) == (413, 413)
    assert ask(server, trusting(server), BODY.ljust(LIMIT))[0] == 200


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"])
@pytest.mark.parametrize("server", ["gevent"], indirect=True)
def test_connections_that_speak_no_tls_keep_nobody_waiting(sent: bytes, server: Gunicorn) -> None:
    with contextlib.ExitStack() as silent:
        for _ in range(100):
            silent.enter_context(socket.create_connection(("127.0.0.1", server.port))).sendall(sent)
        began = time.monotonic()
        assert ask(server, trusting(server))[0] == 200
        assert time.monotonic() - began < 15


def test_password_in_clear_is_not_taken_on_the_tls_port(server: Gunicorn) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(sized(len(BODY)) + BODY)
        assert b"200" not in read_all(connection)
