"""The compose file: against its schema, the image, and the nginx configuration that it puts in front."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, basic, gunicorn
from nginx_tools import needs_nginx, nginx, substitute

from settings import Settings

HERE = ROOT / "deploy/docker"
COMPOSE: dict[str, Any] = yaml.safe_load((HERE / "compose.yaml").read_text())
SERVER, FRONT = COMPOSE["services"]["server"], COMPOSE["services"]["nginx"]
DOCKERFILE = (HERE / "Dockerfile").read_text()
NGINX = (ROOT / "deploy/nginx/prediction-server.conf").read_text()
UPSTREAM = (HERE / "upstream.conf").read_text()


def test_compose_file_is_as_its_schema_defines_it(tmp_path: Path) -> None:
    checker = shutil.which("check-jsonschema", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if checker is None:
        pytest.skip("needs check-jsonschema: pip install check-jsonschema")
    wrong = tmp_path / "compose.json"
    wrong.write_text(json.dumps(COMPOSE | {"service": {}}))
    for path, status in ((HERE / "compose.yaml", 0), (wrong, 1)):
        command = [checker, "--builtin-schema", "vendor.compose-spec", str(path)]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == status, ran.stdout + ran.stderr


def test_server_is_built_here_and_writes_where_the_image_expects() -> None:
    assert (HERE / SERVER["build"]["context"]).resolve() == ROOT
    assert ROOT / SERVER["build"]["dockerfile"] == HERE / "Dockerfile"
    (volume,) = re.findall(r"^VOLUME (.+)$", DOCKERFILE, re.MULTILINE)
    assert SERVER["volumes"] == [f"state:{volume}"]
    assert "state" in COMPOSE["volumes"]
    assert SERVER["read_only"] is True
    assert SERVER["tmpfs"] == ["/tmp"]
    assert SERVER["cap_drop"] == ["ALL"]
    assert "ports" not in SERVER  # nginx alone is asked from outside


def test_settings_are_the_servers() -> None:
    given = {name: str(value) for name, value in SERVER["environment"].items()}
    assert given.keys() <= {name.upper() for name in Settings.__dataclass_fields__}
    assert Settings.from_environ(given).trusted_proxies == 1
    seconds = int(SERVER["stop_grace_period"].removesuffix("s"))
    assert seconds > 2 * Settings.from_environ(given).graceful_timeout  # workers, then the shipper


def test_nginx_finds_its_files_its_certificate_and_the_server() -> None:
    placed = [each.split(":") for each in FRONT["volumes"]]
    assert {(HERE / source).resolve() for source, _, _ in placed} == {
        HERE / "upstream.conf",
        ROOT / "deploy/nginx/prediction-server.conf",
    }
    assert all(re.fullmatch(r"/etc/nginx/conf\.d/[a-z-]+\.conf", target) for _, target, _ in placed)
    assert {options for _, _, options in placed} == {"ro"}
    certificates = dict(re.findall(r"^\s*(ssl_certificate(?:_key)?)\s+(\S+);", NGINX, re.MULTILINE))
    secrets = {each["source"]: each["target"] for each in FRONT["secrets"]}
    assert secrets == {"certificate": certificates["ssl_certificate"], "key": certificates["ssl_certificate_key"]}
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for secret in COMPOSE["secrets"].values():
        assert f"/deploy/docker/{Path(secret['file']).parent}/" in ignored
    for each in SERVER["env_file"]:
        assert f"/deploy/docker/{each['path']}" in ignored
    (log,) = re.findall(r"^\s*access_log (\S+) ", NGINX, re.MULTILINE)
    assert log in FRONT["command"][-1]
    ports = {f"{port}:{port}" for port in re.findall(r"^\s*listen (\d+)", NGINX, re.MULTILINE)}
    assert set(FRONT["ports"]) == ports
    servers = re.findall(r"^\s*server (\S+):(\d+) ", UPSTREAM, re.MULTILINE)
    (name,) = {name for name, _ in servers}
    assert COMPOSE["services"][name] is SERVER
    assert {int(port) for _, port in servers} == {Settings().port}
    assert FRONT["depends_on"][name]["condition"] == "service_healthy"
    assert "HEALTHCHECK" in DOCKERFILE


@needs_nginx
def test_nginx_with_this_upstream_leads_to_the_server(tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "app").mkdir()
    with gunicorn(tmp_path / "app", model_path=iris_file, trusted_proxies=1) as app:
        upstream = substitute(UPSTREAM, {"server:5000": f"127.0.0.1:{app.port}"})
        with nginx(tmp_path / "nginx", upstream) as front:
            status, _, answer = front.ask(
                "POST",
                "/predict",
                b'{"data": [[5.1, 3.5, 1.4, 0.2]]}',
                Content_Type="application/json",
                Authorization=basic("predict"),
            )
    assert (status, json.loads(answer)) == (200, {"prediction": [0]})
