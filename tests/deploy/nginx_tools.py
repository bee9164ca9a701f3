"""A real nginx with the files of deploy/nginx, for the tests."""

import http.client
import os
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import ROOT, Server, free_port

SHIPPED = ROOT / "deploy/nginx"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="needs nginx: sudo apt install nginx")

# What a distribution's nginx.conf does around ours, in a directory instead of /var and /run.
AROUND = """
daemon off;
worker_processes 2;
pid {place}/nginx.pid;
error_log {place}/error.log;
{user}
events {{ worker_connections 4000; }}
http {{
    access_log off;
    client_body_temp_path {place}/body;
    proxy_temp_path {place}/proxy;
    fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi;
    scgi_temp_path {place}/scgi;
    include {place}/conf.d/*.conf;
}}
"""


def certificate(place: Path, name: str = "localhost") -> tuple[Path, Path]:
    """Make a self-signed certificate as docs/operations.md does, and its key."""
    place.mkdir(parents=True, exist_ok=True)
    made, key = place / "prediction-server.pem", place / "prediction-server.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", f"/CN={name}"]
    names = ["-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", key, "-out", made], check=True, capture_output=True)
    return made, key


class Nginx(Server):
    """A running nginx; `port` is its HTTPS port."""

    def __init__(self, process: "subprocess.Popen[bytes]", place: Path, ports: tuple[int, int, int]) -> None:
        super().__init__(process, ports[0], place / "error.log")
        self.http_port, self.plain_port = ports[1:]
        self.place, self.access_log = place, place / "access.log"

    def connect(self, timeout: float = 30.0, source: str = "127.0.0.1") -> http.client.HTTPSConnection:
        """Open a connection that trusts the certificate that lies there now, and no other."""
        trusting = ssl.create_default_context(cafile=str(self.place / "prediction-server.pem"))
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=timeout, context=trusting, source_address=(source, 0)
        )

    def reload(self) -> None:
        """Let it read its files again."""
        self.process.send_signal(signal.SIGHUP)


def substitute(text: str, changes: Mapping[str, str]) -> str:
    """Change what is written in a shipped file; each part must be there."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def one_host(path: Path) -> str:
    """Return the upstream file for one host, whose socket is at `path`."""
    return substitute(
        (SHIPPED / "upstream-one-host.conf").read_text(),
        {"/run//": f"{path.parent}//", "/run/": f"{path.parent}/"} | {"prediction-server.sock": path.name},
    )


@contextmanager
def nginx(
    place: Path, upstream: str, changes: Mapping[str, str] | None = None, within: Sequence[str] = ()
) -> Iterator[Nginx]:
    """Run nginx with the shipped files in `place`; it ends with the block.

    What is changed in them: addresses and ports to listen on, with a port more that serves the same without TLS (for
    raw bytes); the paths of certificate and log; and `changes` of the test, of which each must be found.

    Args:
        upstream: the text of the upstream file.
        within: a command that runs the command behind it.
    """
    assert NGINX
    place.mkdir(parents=True, exist_ok=True)
    (place / "conf.d").mkdir()
    certificate(place)
    ports = free_port(), free_port(), free_port()
    text = substitute(
        (SHIPPED / "prediction-server.conf").read_text(),
        {
            "listen 80;": f"listen 127.0.0.1:{ports[1]};",
            "listen 443 ssl http2;": f"listen 127.0.0.1:{ports[0]} ssl http2; listen 127.0.0.1:{ports[2]};",
            "/etc/ssl/certs/": f"{place}/",
            "/etc/ssl/private/": f"{place}/",
            "/var/log/nginx/prediction-server.log": f"{place}/access.log",
        }
        | dict(changes or {}),
    )
    (place / "conf.d/prediction-server.conf").write_text(text)
    (place / "conf.d/upstream.conf").write_text(upstream)
    user = "user root;" if os.geteuid() == 0 else ""  # pytest's directories are closed to others
    (place / "nginx.conf").write_text(AROUND.format(place=place, user=user))
    with (place / "output.log").open("wb") as output:
        process = subprocess.Popen(
            [*within, NGINX, "-p", place, "-c", place / "nginx.conf"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = Nginx(process, place, ports)
    try:
        server.wait_until((place / "nginx.pid").exists)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
