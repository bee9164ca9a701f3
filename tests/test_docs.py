"""The documentation is true: its links, its settings, its list of modules, and its commands and code, run as shown."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
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

from model.serving import Serving, SingleFile
from settings import Settings
from web.decoding import decode_json

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in set(re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))):
        path, _, anchor = link.partition("#")
        if not path.startswith("https://"):
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_attacks_name_tests_that_exist() -> None:
    rows = re.findall(
        r"^\| [^|]+ \| [^|]+ \| (`[^|]+) \|$", (ROOT / "docs/security.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) > 15
    for row in rows:
        for name, word in re.findall(r"`([\w/]+\.py)`(?: `(\w+)`)?", row):
            assert re.search(rf"def test_\w*{word}", (ROOT / "tests" / name).read_text("utf-8")), row


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
            default = {None: "none", "": "none", False: "`0`", True: "`1`"}.get(value, f"`{value}`")  # type: ignore[call-overload]
            assert shown.replace(".0`", "`") == default.replace(".0`", "`")


def test_tour_has_each_module_once() -> None:
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    modules = [*ROOT.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]
    listed = re.findall(r"^\| \[`([^`]+\.py)`\]\(\.\./\1\) \|", TOUR, re.MULTILINE)
    assert Counter(listed) == Counter(path.relative_to(ROOT).as_posix() for path in modules)


def messages(node: ast.AST) -> Iterator[str]:
    """Yield the literal parts of each message in `raise ModelLoadError(…)` or `UnsupportedModel(…)`, joined."""
    for each in ast.walk(node):
        call = each.exc if isinstance(each, ast.Raise) else None
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("ModelLoadError", "UnsupportedModel"):
            parts = [part.value for part in ast.walk(call) if isinstance(part, ast.Constant)]
            text = "…".join(part for part in parts if isinstance(part, str))
            if re.search(r"\w{3} \w", text):
                yield text


def test_symptoms_of_a_model_that_does_not_load_are_messages_of_ours_and_all_of_them() -> None:
    sources = [path.read_text() for path in ROOT.glob("model/**/*.py")]
    code = "".join(re.sub(r'"\s*f?["\']', "", source) for source in sources)  # joins literals
    table = MODELS.partition("## If it does not load")[2].partition("\n## ")[0]
    symptoms = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    for symptom in symptoms:
        if not symptom.startswith(("Can't get attribute", "No module named")):  # Python's
            for words in re.split(r"[\d.]+|…", symptom):
                assert words in code, symptom
    shown = [words.strip(" …") for each in re.findall(r"`([^`]+)`", table) for words in re.split(r"\d[\d.]*|…", each)]
    for message in [message for source in sources for message in messages(ast.parse(source))]:
        assert any(len(words) > 5 and words in message for words in shown), message


# --- the examples of docs/models.md


def examples() -> list[Any]:
    """Return each program of docs/models.md that saves a model, and the command below it that asks it."""
    section = MODELS.partition("## By library and kind of column")[2].partition("\n## ")[0]
    pairs = re.findall(r"^```python\n([^`]*)^```\n\n^```sh\n(curl .*)\n```$", section, re.MULTILINE)
    first, *others = [pytest.param(*pair, id=pair[0].partition("\n")[0]) for pair in pairs]
    return [first, *(pytest.param(*other.values, id=other.id, marks=pytest.mark.long) for other in others)]


@pytest.mark.parametrize(("program", "curl"), examples())
def test_example_is_answered_as_its_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, curl: str
) -> None:
    for library in set(re.findall(r"^(?:from|import) (\w+)", program, re.MULTILINE)) - {"steps"}:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    prelude, *others = blocks(MODELS, "python")
    (steps,) = [each for each in others if each.startswith("# steps.py")]
    (tmp_path / "steps.py").write_text(steps)
    ending = "if 'X' in dir() and 'model' in dir(): print(np.asarray(model.predict(X[:1])).tolist())\n"
    environ = os.environ | {"KERAS_BACKEND": "torch"}
    command = [sys.executable, "-W", "ignore", "-c", f"{prelude}{program}{ending}"]
    done = subprocess.run(command, cwd=tmp_path, check=True, env=environ, stdout=subprocess.PIPE, text=True)
    monkeypatch.syspath_prepend(tmp_path)
    (path,) = [each for each in tmp_path.glob("model.*") if each.suffix != ".json"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        source = SingleFile(path)
        serving = Serving(source)
        loaded = source.update(serving)[0].stable  # type: ignore[union-attr]
        rows, method = decode_json(shlex.split(curl)[shlex.split(curl).index("-d") + 1].encode())
        answer = loaded.predict(loaded.signature.validate(rows), method)
    sys.modules.pop("steps", None)
    assert len(answer) == len(rows)
    if done.stdout:
        assert np.allclose(answer, json.loads(done.stdout))


def test_client_with_a_data_frame_adds_its_predictions(tmp_path: Path) -> None:
    columns = ["age", "city", "day"]
    frame = pd.DataFrame([[22.0, "Oslo", "2026-01-31"], [38.0, None, "2026-02-28"]] * 4, columns=columns)
    frame["day"] = pd.to_datetime(frame["day"])
    encode = make_column_transformer((StandardScaler(), ["age"]), (OneHotEncoder(), ["city", "day"]))
    joblib.dump(make_pipeline(encode, LogisticRegression()).fit(frame, [0, 1] * 4), tmp_path / "model.joblib")
    users = tmp_path / "users.json"
    users.write_text(json.dumps({"alice": {"password": CHEAP, "roles": ["predict"]}}))
    (client,) = [each for each in blocks(MODELS, "python") if "import requests" in each]
    with gunicorn(tmp_path, model_path=tmp_path / "model.joblib", users_file=users) as server:
        command = [sys.executable, "-c", client.replace("5000", str(server.port))]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in printed.splitlines()] == ["prediction", "0", "1"]


@pytest.mark.long
@needs_curl
def test_first_curl_is_the_one_that_the_server_prints_and_answers_as_shown(tmp_path: Path) -> None:
    for module in ("auth", "model.demo"):
        arguments = ["--file", "var/users.json", "demo"] if module == "auth" else ["var/models"]
        run_module(tmp_path, module, *arguments)
    curl, shown = re.search(r"```sh\n(curl .*)\n```\n\n```json\n(.*)\n```", README).groups()  # type: ignore[union-attr]
    var = tmp_path / "var"
    with gunicorn(tmp_path, users_file=var / "users.json", model_dir=var / "models") as server:
        at_our_port = curl.replace(":5000", f":{server.port}")
        form = re.compile(r"^  (curl .*/predict)$", re.MULTILINE)
        server.wait_until(lambda: form.search(server.log.read_text()))
        (printed,) = form.findall(server.log.read_text())
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


def test_what_the_snippet_returns_is_indeed_not_json() -> None:
    app = Flask("snippet")
    with app.app_context(), pytest.raises(TypeError, match="not JSON serializable"):
        jsonify({"prediction": np.array([0])})
