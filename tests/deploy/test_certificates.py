"""docs/operations.md, "Certificates", typed word for word: certbot asks an authority of our own, which asks nginx."""

import json
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import runbook
from conftest import free_port
from nginx_tools import NGINX, SHIPPED, Nginx, certificate, needs_nginx, nginx, one_host, substitute

(PAGE,) = runbook.commands(__file__, "operations.md", "Certificates")
DOMAIN = "predictions.example.com"
PROGRAMS = ("certbot", "pebble", "pebble-challtestsrv")
# certbot asks the authority that Debian's pebble is, and no questions. Without a terminal it would wait for up to eight
# minutes before it renews. Nothing of it is outside of its directory.
CLI = """
server = https://127.0.0.1:{port}/dir
agree-tos = true
register-unsafely-without-email = true
non-interactive = true
no-random-sleep-on-renew = true
config-dir = {place}/etc
work-dir = {place}/work
logs-dir = {place}/log
"""

pytestmark = [
    pytest.mark.long,
    needs_nginx,
    pytest.mark.skipif(
        not all(map(shutil.which, PROGRAMS)) or os.geteuid() != 0, reason="needs root: sudo apt install certbot pebble"
    ),
]


@contextmanager
def authority(place: Path, http_port: int) -> Iterator[int]:
    """Run an authority that looks for its challenges at a port of this machine, whatever the domain; yield its port."""
    made, key = certificate(place)
    port, names = free_port(), free_port()
    told = {"listenAddress": f"127.0.0.1:{port}", "managementListenAddress": f"127.0.0.1:{free_port()}"}
    told |= {"certificate": str(made), "privateKey": str(key)}
    (place / "pebble.json").write_text(json.dumps({"pebble": told | {"httpPort": http_port, "tlsPort": 1}}))
    off = [f"-{each}=" for each in ("http01", "https01", "tlsalpn01", "management", "defaultIPv6")]
    environ = os.environ | {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0"}
    with (place / "log").open("wb") as log:
        running = [
            subprocess.Popen(command, env=environ, stdout=log, stderr=log)
            for command in (
                ["pebble-challtestsrv", "-dns01", f"127.0.0.1:{names}", "-defaultIPv4", "127.0.0.1", *off],
                ["pebble", "-config", place / "pebble.json", "-dnsserver", f"127.0.0.1:{names}"],
            )
        ]
    try:
        yield port
    finally:
        for each in running:
            each.kill()
            each.wait()


def shown(front: Nginx) -> str:
    """Return the certificate that a caller of nginx sees."""
    return ssl.get_server_certificate(("127.0.0.1", front.port))


def answers(port: int) -> bool:
    """Tell whether something listens at a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_certbot_gets_a_certificate_and_renews_it_as_the_page_says(tmp_path: Path) -> None:
    place = tmp_path / "certbot"
    (place / "letsencrypt").mkdir(parents=True)
    (tmp_path / "acme").mkdir()
    changes = {"/var/www/acme;": f"{tmp_path}/acme;"}
    with (
        nginx(tmp_path / "nginx", one_host(tmp_path / "nobody.sock"), changes) as front,
        authority(tmp_path / "acme", front.http_port) as port,
    ):
        front.wait_until(lambda: answers(port))
        (place / "letsencrypt/cli.ini").write_text(CLI.format(port=port, place=place))
        programs = {
            "sudo": 'exec "$@"',
            "nginx": f'exec {NGINX} -p {front.place} -c {front.place}/nginx.conf "$@"',
            "systemctl": f'[ "$*" = "reload nginx" ] && kill -HUP {front.process.pid}',
        }
        for name, script in programs.items():
            (place / name).write_text(f"#!/bin/sh\n{script}\n")
            (place / name).chmod(0o755)
        (place / "deploy/nginx").mkdir(parents=True)
        paths = {"/etc/ssl/certs/": f"{front.place}/", "/etc/ssl/private/": f"{front.place}/"}
        hook = substitute((SHIPPED / "certificate.sh").read_text(), paths)
        (place / "deploy/nginx/certificate.sh").write_text(hook)
        typed = substitute(PAGE, {"/var/www/acme": f"{tmp_path}/acme", "/etc/nginx/": f"{place}/"})
        *until_first, rehearsal, again = typed.strip().splitlines()
        environ = {"PATH": f"{place}:{os.environ['PATH']}", "XDG_CONFIG_HOME": str(place)}
        environ |= {"REQUESTS_CA_BUNDLE": str(tmp_path / "acme/prediction-server.pem"), "HOME": str(place)}

        def type_in(commands: str) -> str:
            done = subprocess.run(["bash", "-ec", commands], cwd=place, env=environ, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "acme/log").read_text()
            return done.stdout

        seen = [shown(front)]
        type_in("\n".join(until_first))
        front.wait_until(lambda: shown(front) != seen[0])
        seen.append(shown(front))
        assert f"live/{DOMAIN}/fullchain.pem (success)" in type_in(rehearsal)
        assert shown(front) == seen[1]  # all but the hook
        type_in(again)
        front.wait_until(lambda: shown(front) != seen[1])
        made, live = front.place / "prediction-server.pem", place / f"etc/live/{DOMAIN}/fullchain.pem"
        assert made.read_text() == live.read_text()
        assert live.read_text().startswith(shown(front).strip())
