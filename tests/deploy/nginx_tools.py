"""A real nginx with the files of deploy/nginx, for the tests."""

import http.client
import os
import re
import resource
import shlex
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
DEBIAN = Path("/etc/nginx/nginx.conf")
needs_nginx = pytest.mark.skipif(
    NGINX is None or not DEBIAN.exists() or "modules-enabled" not in DEBIAN.read_text(),
    reason="needs nginx of Debian or Ubuntu: sudo apt install nginx",
)
OPERATIONS = (ROOT / "docs/operations.md").read_text("utf-8")


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
        self.place, self.access_log = place, place / "prediction-server.log"

    def connect(self, timeout: float = 30.0, source: str = "127.0.0.1") -> http.client.HTTPSConnection:
        """Open a connection that trusts the certificate that lies there now, and no other."""
        trusting = ssl.create_default_context(cafile=str(self.place / "prediction-server.pem"))
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=timeout, context=trusting, source_address=(source, 0)
        )


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


def debians_own(place: Path) -> None:
    """Copy /etc/nginx/nginx.conf, change it as docs/operations.md does, and have all of its paths in `place`.

    Two processes, whatever the machine has; root's, if these tests are, whose directories are closed to others; and no
    more descriptors than this machine lets anybody have.
    """
    main, (_, most) = place / "nginx.conf", resource.getrlimit(resource.RLIMIT_NOFILE)
    text = DEBIAN.read_text().replace("user www-data;", "user root;" if os.geteuid() == 0 else "")
    text = re.sub(r"worker_processes .*", "worker_processes 2;", text)
    text = re.sub(r" /etc/nginx/(conf\.d|modules-enabled|sites-enabled)/", rf" {place}/\1/", text)
    main.write_text(re.sub(r" /(var/log/nginx|run)/", f" {place}/", text))
    (change,) = re.findall(r"^sudo (sed .*) /etc/nginx/nginx.conf$", OPERATIONS, re.MULTILINE)
    subprocess.run([*shlex.split(change), main], check=True)
    for directory in ("conf.d", "modules-enabled"):
        (place / directory).mkdir()
    files = (SHIPPED / "descriptors.conf").read_text()
    files = re.sub(r"(?<=nofile )\d+", lambda found: str(min(int(found[0]), most)), files)
    (place / "modules-enabled/descriptors.conf").write_text(files)
    temporary = "".join(f"{n}_temp_path {place}/{n};" for n in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (place / "conf.d/temporary.conf").write_text(temporary)


@contextmanager
def nginx(
    place: Path, upstream: str, changes: Mapping[str, str] | None = None, within: Sequence[str] = ()
) -> Iterator[Nginx]:
    """Run nginx with Debian's nginx.conf and the shipped files in `place`; it ends with the block.

    What is changed in them: addresses and ports to listen on, with a port more that serves the same without TLS (for
    raw bytes); paths; and `changes` of the test, of which each must be found.

    Args:
        upstream: the text of the upstream file.
        within: a command that runs the command behind it.
    """
    assert NGINX
    place.mkdir(parents=True, exist_ok=True)
    certificate(place)
    debians_own(place)
    ports = free_port(), free_port(), free_port()
    text = substitute(
        (SHIPPED / "prediction-server.conf").read_text(),
        {
            "listen 80;": f"listen 127.0.0.1:{ports[1]};",
            "listen 443 ssl http2;": f"listen 127.0.0.1:{ports[0]} ssl http2; listen 127.0.0.1:{ports[2]};",
            "/etc/ssl/certs/": f"{place}/",
            "/etc/ssl/private/": f"{place}/",
            "/var/log/nginx/": f"{place}/",
        }
        | dict(changes or {}),
    )
    (place / "conf.d/prediction-server.conf").write_text(text)
    (place / "conf.d/upstream.conf").write_text(upstream)
    # systemd starts it with 1,024 file descriptors.
    started = ["sh", "-c", 'ulimit -Sn 1024; exec "$@"', "as-systemd", NGINX, "-g", "daemon off;"]
    with (place / "output.log").open("wb") as output:
        process = subprocess.Popen(
            [*within, *started, "-p", place, "-c", place / "nginx.conf"],
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
