"""compose.yaml, followed as docs/containers.md has it, by podman-compose."""

import shutil
import subprocess
from pathlib import Path

import pytest
import runbook
from conftest import ROOT, free_port
from nginx_tools import substitute
from podman_tools import IMAGE, PASSWORD, demo_model, podman

pytestmark = pytest.mark.skipif(
    shutil.which("podman-compose") is None, reason="needs podman-compose: .ci/containers has one"
)


def test_page_with_nginx_in_front_works_word_for_word(tmp_path: Path) -> None:
    """With podman-compose in the place of docker compose, ports that are free, and a password that is given.

    podman has no log driver of that name, and asks for nobody's health without systemd.
    """
    (block,) = runbook.commands(__file__, "containers.md", "With nginx in front")
    port, project = free_port(), f"test-{free_port()}"
    for path in ("deploy/docker/compose.yaml", "deploy/docker/upstream.conf", "deploy/nginx/prediction-server.conf"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    file = tmp_path / "deploy/docker/compose.yaml"
    changes = {
        "name: predictions": f"name: {project}",
        "image: prediction-server": f"image: {IMAGE}",
        "image: nginx:": "image: localhost/nginx:",
        '["80:80", "443:443"]': f'["127.0.0.1:{free_port()}:80", "127.0.0.1:{port}:443"]',
        "driver: local": "driver: k8s-file",
        "condition: service_healthy": "condition: service_started",
    }
    file.write_text(substitute(file.read_text(), changes))
    (tmp_path / "model.joblib").write_bytes(demo_model(tmp_path))
    shutil.move(tmp_path / "model.joblib", file.parent / "model.joblib")
    words = {
        "docker compose run --build": "docker compose run",
        "docker compose run": "docker compose run -T",
        "docker compose": "podman-compose",
        "-u alice": f"-u 'alice:{PASSWORD}' --silent --retry 30 --retry-all-errors --retry-delay 1",
        "https://localhost/": f"https://localhost:{port}/",
        "[[…]]": "[[5.1, 3.5, 1.4, 0.2]]",
    }
    script = "set -e\n" + substitute(block, words)
    try:
        ran = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, input=f"{PASSWORD}\n{PASSWORD}\n", capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
        assert ran.stdout.rstrip().endswith('{"prediction":[0]}')
        log = podman("logs", f"{project}_nginx_1").stdout
        assert '"request":"POST /predict","status":200' in log
        for private in ("/metrics", "/readyz"):
            command = ["curl", "-sk", "-o", "/dev/null", "-w", "%{http_code}", f"https://localhost:{port}{private}"]
            assert subprocess.run(command, capture_output=True, text=True).stdout == "404"
    finally:
        subprocess.run(["podman-compose", "down", "--volumes", "--timeout", "5"], cwd=file.parent, capture_output=True)
