"""The README tells the truth: its settings, its files, its first commands, the snippet that it mends."""

import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, gunicorn
from flask import Flask, jsonify

from settings import Settings

README = (ROOT / "README.md").read_text("utf-8")


def test_settings_table_has_each_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([^|]*) \|", README, re.MULTILINE))
    assert list(rows) == [each.name.upper() for each in fields(Settings)]
    for each in fields(Settings):
        shown = rows[each.name.upper()].strip()
        if each.default is MISSING:
            assert shown == "usable cores"
        else:
            default = {None: "none", "": "none", False: "`0`"}.get(each.default, f"`{each.default}`")  # type: ignore[call-overload]
            assert shown.replace(".0`", "`") == default.replace(".0`", "`")


def test_linked_files_exist() -> None:
    for path in set(re.findall(r"\]\(([^)#:]+)\)", README)):
        assert (ROOT / path).exists(), path


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl: sudo apt install curl")
def test_first_curl_is_the_one_that_the_server_prints_and_answers_as_shown(tmp_path: Path) -> None:
    for module in ("auth", "model.demo"):
        arguments = ["--file", "var/users.json", "demo"] if module == "auth" else ["var/models"]
        subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            check=True,
            env={"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
    curl, shown = re.search(r"```sh\n(curl .*)\n```\n\n```json\n(.*)\n```", README).groups()  # type: ignore[union-attr]
    var = tmp_path / "var"
    with gunicorn(tmp_path, users_file=var / "users.json", model_dir=var / "models") as server:
        at_our_port = curl.replace(":5000", f":{server.port}")
        printed = re.search(r"^  (curl .*)$", server.log.read_text(), re.MULTILINE)[1]  # type: ignore[index]
        assert printed.replace(f"{tmp_path}/", "") == at_our_port
        answer = subprocess.run(at_our_port, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert answer.stdout.strip() == shown


def test_what_the_snippet_returns_is_indeed_not_json() -> None:
    app = Flask("snippet")
    with app.app_context(), pytest.raises(TypeError, match="not JSON serializable"):
        jsonify({"prediction": np.array([0])})
