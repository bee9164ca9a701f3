"""The documentation is true: its links, its settings, its list of modules, and its commands and code, run as shown."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import CHEAP, PASSWORD, ROOT, Gunicorn, gunicorn
from flask import Flask, jsonify
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from settings import Settings

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
README, API, MODELS, SETTINGS, TOUR = (
    (ROOT / path).read_text("utf-8")
    for path in ("README.md", "docs/api.md", "docs/models.md", "docs/settings.md", "docs/tour.md")
)
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl: sudo apt install curl")


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in set(re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))):
        path, _, anchor = link.partition("#")
        if not path.startswith("https://"):
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_page_is_linked_from_the_readme() -> None:
    for page in ROOT.glob("docs/*.md"):
        assert f"](docs/{page.name}" in README, page.name


def test_settings_table_has_each_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([^|]*) \|", SETTINGS, re.MULTILINE))
    assert list(rows) == [each.name.upper() for each in fields(Settings)]
    for each in fields(Settings):
        shown = rows[each.name.upper()].strip()
        if each.default is MISSING:
            assert shown == "usable cores"
        else:
            value = ",".join(each.default) if isinstance(each.default, tuple) else each.default
            default = {None: "none", "": "none", False: "`0`"}.get(value, f"`{value}`")  # type: ignore[call-overload]
            assert shown.replace(".0`", "`") == default.replace(".0`", "`")


def test_tour_has_each_module_once() -> None:
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    modules = [*ROOT.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]
    listed = re.findall(r"^\| \[`([^`]+\.py)`\]\(\.\./\1\) \|", TOUR, re.MULTILINE)
    assert Counter(listed) == Counter(path.relative_to(ROOT).as_posix() for path in modules)


def test_symptoms_of_a_model_that_does_not_load_are_messages_of_ours() -> None:
    code = "".join(re.sub(r'"\s*f?"', "", path.read_text()) for path in ROOT.glob("model/**/*.py"))  # joins literals
    table = MODELS.partition("## If it does not load")[2].partition("\n## ")[0]
    symptoms = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    ours = [each for each in symptoms if not each.startswith(("Can't get attribute", "No module named"))]  # Python's
    assert len(ours) == 5
    for symptom in ours:
        for words in re.split(r"[\d.]+", symptom):
            assert words in code, symptom


@needs_curl
def test_first_curl_is_the_one_that_the_server_prints_and_answers_as_shown(tmp_path: Path) -> None:
    for module in ("auth", "model.demo"):
        arguments = ["--file", "var/users.json", "demo"] if module == "auth" else ["var/models"]
        run_module(tmp_path, module, *arguments)
    curl, shown = re.search(r"```sh\n(curl .*)\n```\n\n```json\n(.*)\n```", README).groups()  # type: ignore[union-attr]
    var = tmp_path / "var"
    with gunicorn(tmp_path, users_file=var / "users.json", model_dir=var / "models") as server:
        at_our_port = curl.replace(":5000", f":{server.port}")
        printed = re.search(r"^  (curl .*)$", server.log.read_text(), re.MULTILINE)[1]  # type: ignore[index]
        assert printed.replace(f"{tmp_path}/", "") == at_our_port
        assert shell(at_our_port, tmp_path).strip() == shown


def run_module(place: Path, module: str, *arguments: Any) -> str:
    """Run a command of ours in a directory; return what it prints."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environ = {"PYTHONPATH": f"{ROOT}:{place}"}
    return subprocess.run(command, cwd=place, check=True, env=environ, stdout=subprocess.PIPE, text=True).stdout


def shell(command: str, place: Path) -> str:
    """Run a shell command in a directory; return what it prints."""
    return subprocess.run(command, shell=True, cwd=place, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """A server of the model that the README asks, with its user alice and an extension from docs/api.md."""
    place = tmp_path_factory.mktemp("own")
    frame = pd.DataFrame({"age": [22.0, 38, 26, 54], "fare": [7.25, 71.3, 7.9, 51.9], "sex": ["male", "female"] * 2})
    columns = make_column_transformer((StandardScaler(), ["age", "fare"]), (OneHotEncoder(), ["sex"]))
    joblib.dump(make_pipeline(columns, LogisticRegression()).fit(frame, [0, 1, 1, 0]), place / "model.joblib")
    users = place / "users.json"
    users.write_text(json.dumps({"alice": {"password": CHEAP, "roles": ["predict"]}}))
    (place / "rounding.py").write_text(blocks(API, "python")[-1])
    with gunicorn(place, model_path=place / "model.joblib", users_file=users, extensions="+rounding") as server:
        yield server


@needs_curl
def test_commands_for_a_model_of_ones_own_are_answered(own_model: Gunicorn) -> None:
    curls = [line for line in blocks(README, "sh")[2].splitlines() if line.startswith("curl ")]
    prepared = [
        each.replace("-u alice", f"-u 'alice:{PASSWORD}'").replace("5000", str(own_model.port)) for each in curls
    ]
    shown, answer = (json.loads(shell(each, own_model.place)) for each in prepared)
    assert [column["name"] for column in shown["stable"]["signature"]["columns"]] == ["age", "fare", "sex"]
    assert list(answer) == ["prediction"]


def test_client_in_python_prints_probabilities_that_the_extension_rounded(own_model: Gunicorn) -> None:
    (client,) = blocks(README, "python")
    command = [sys.executable, "-c", client.replace("5000", str(own_model.port))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.fullmatch(r"\[\[([0-9.]+), ([0-9.]+)\]\] \[0, 1\]\n", printed)
    assert found
    assert all(len(each) <= len("0.12") for each in found.groups())


def test_dates_are_strings_once_the_model_is_published_with_a_sample(tmp_path: Path) -> None:
    module, training = blocks(MODELS, "python")
    (tmp_path / "dates.py").write_text(module)
    names = "from sklearn.preprocessing import FunctionTransformer\nimport dates\n"
    (tmp_path / "train.py").write_text(
        "import joblib, pandas\nfrom sklearn.compose import make_column_transformer\n"
        "from sklearn.linear_model import LogisticRegression\nfrom sklearn.pipeline import make_pipeline\n"
        f"from sklearn.preprocessing import StandardScaler\n{names}"
        "frame = pandas.DataFrame({'fare': [7.0, 70, 8, 53], 'day': ['2026-01-01', '2026-02-01'] * 2})\n"
        f"target = [0, 1, 0, 1]\n{training}joblib.dump(model, 'model.joblib')\n"
    )
    (tmp_path / "rows.json").write_text('[{"fare": 7.25, "day": "2026-01-01"}]')
    run_module(tmp_path, "train")
    run_module(tmp_path, "model", "publish", "model.joblib", "--version", "1", "--sample", "rows.json")
    manifest = json.loads(run_module(tmp_path, "model", "show", "1"))
    assert [column["type"] for column in manifest["signature"]["columns"]] == ["number", "text"]


def test_what_the_snippet_returns_is_indeed_not_json() -> None:
    app = Flask("snippet")
    with app.app_context(), pytest.raises(TypeError, match="not JSON serializable"):
        jsonify({"prediction": np.array([0])})
