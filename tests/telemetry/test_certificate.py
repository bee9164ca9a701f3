"""When a certificate expires: read as openssl reads it, and shown to operators."""

import random
import re
import shutil
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import basic

from telemetry.certificate import NoCertificate, expiry

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl: sudo apt install openssl")


def make(path: Path, days: int, *options: str) -> Path:
    """Make a self-signed certificate."""
    command = ["openssl", "req", "-x509", "-nodes", "-days", f"{days}", "-subj", "/CN=localhost", *options]
    subprocess.run([*command, "-keyout", "/dev/null", "-out", str(path)], check=True, capture_output=True)
    return path


@needs_openssl
@pytest.mark.parametrize(
    ("days", "options"),
    [
        (30, ("-newkey", "rsa:2048")),
        (40_000, ("-newkey", "rsa:2048")),  # beyond 2049 times have another form
        (1, ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-addext", "subjectAltName=DNS:localhost")),
        (90, ("-newkey", "ed25519", "-subj", f"/O={'long ' * 10}/CN=localhost")),
    ],
)
def test_expiry_is_what_openssl_says(tmp_path: Path, days: int, options: tuple[str, ...]) -> None:
    path = make(tmp_path / "certificate.pem", days, *options)
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-enddate", "-in", path], capture_output=True, text=True
    ).stdout
    expected = ssl.cert_time_to_seconds(shown.strip().removeprefix("notAfter="))
    assert expiry(path) == expected
    chain = tmp_path / "fullchain.pem"  # with text and another certificate behind it
    chain.write_text("Bag Attributes\n" + path.read_text() + make(tmp_path / "other", 5, *options).read_text())
    assert expiry(chain) == expected


@needs_openssl
def test_file_that_is_damaged_is_no_certificate(tmp_path: Path) -> None:
    good = ssl.PEM_cert_to_DER_cert(make(tmp_path / "good.pem", 30, "-newkey", "rsa:2048").read_text())
    path = tmp_path / "bad.pem"
    for content in (b"", b"\xff\xfe", b"-----BEGIN CERTIFICATE-----\n", b"-----BEGIN CERTIFICATE-----\nAAAA\n"):
        path.write_bytes(content)
        with pytest.raises(NoCertificate, match="holds no certificate"):
            expiry(path)
    for seed in range(300):
        chance = random.Random(seed)
        damaged = bytearray(good[: chance.randrange(len(good))] if seed % 2 else good)
        for _ in range(3):
            if damaged:
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_text(ssl.DER_cert_to_PEM_cert(bytes(damaged)))
        with suppress(NoCertificate):
            expiry(path)
    with pytest.raises(NoCertificate, match="cannot be read: No such file"):
        expiry(tmp_path / "absent.pem")


@needs_openssl
def test_operators_see_when_it_expires(serve: Any, iris_file: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "certificate.pem", 30, "-newkey", "rsa:2048")
    client = serve(iris_file, certificate_file=path)
    shown = client.http.get("/metrics", headers={"Authorization": basic("metrics")}).text
    found = re.search(r"^prediction_certificate_expiry_timestamp_seconds (\S+)$", shown, re.MULTILINE)
    assert found is not None
    assert float(found[1]) == expiry(path)

    def page() -> str:
        return str(serve(iris_file, certificate_file=path).http.get("/monitor", headers=headers).text)

    headers = {"Authorization": basic("monitor")}
    assert '<p class="ok">The certificate expires in 30 days.</p>' in page()
    make(path, 10, "-newkey", "rsa:2048")
    assert '<p class="warning">The certificate expires in 10 days.</p>' in page()
    path.unlink()
    assert '<p class="warning">When the certificate expires is not known' in page()
    client = serve(iris_file, certificate_file=path)
    shown = client.http.get("/metrics", headers={"Authorization": basic("metrics")}).text
    assert "prediction_certificate" not in shown
