"""Clients that nobody here wrote, each in an environment of its own, against a real gunicorn: .ci/clients [NAME…].

A client is a script NAME.py in this directory, called with the server's URL and the path of a JSON file that holds the
truth: a user and a password, rows, and what the model itself answers to them. It ends with another status than 0 if
something is not as it should be. Comments at its top say what it needs:

    # needs: tritonclient[http]==2.73.0               what pip installs; the line may be repeated
    # model: iris                                     which of MODELS is served
    # server: EXTENSIONS=+endpoints.open_inference    settings of the server

Scripts that need no server, since their SDK speaks to a stand-in of their own, name no model and are called without
arguments.

Environments are kept in the directory CLIENTS_DIR, .clients by default; scripts that need the same share one.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
from conftest import PASSWORD, gunicorn  # noqa: E402

ONLINE = ("schemathesis_v2",)  # these need more than a package index
CACHE = Path(os.environ.get("CLIENTS_DIR") or HERE.parents[1] / ".clients").absolute()
FRAME = pd.DataFrame({"age": [22.0, 38, 26, 54], "city": ["Oslo", "Bergen", "Ås", "Oslo"], "rooms": [1, 2, 3, 4]})


def main(names: list[str]) -> int:
    """Run the clients that are named, or all; `--offline` leaves out ONLINE. Return 1 if one fails."""
    scripts = sorted(
        path for path in HERE.glob("*.py") if re.search("^# needs:", path.read_text("utf-8"), re.MULTILINE)
    )
    if "--offline" in names:
        names = [path.stem for path in scripts if path.stem not in ONLINE]
        print(f"left out, since there is no way to GitHub: {', '.join(ONLINE)}")
    if unknown := set(names) - {path.stem for path in scripts}:
        print(f"no such client: {', '.join(unknown)}; there is: {', '.join(path.stem for path in scripts)}")
        return 2
    failed = [path.stem for path in scripts if (not names or path.stem in names) and not run(path)]
    print(f"FAILED: {', '.join(failed)}" if failed else "all clients are content")
    return int(bool(failed))


def run(script: Path) -> bool:
    """Run one client; return whether it is content."""
    wanted: dict[str, list[str]] = {"needs": [], "model": [], "server": []}
    for key, value in re.findall(r"^# (needs|model|server): (.*)$", script.read_text("utf-8"), re.MULTILINE):
        wanted[key] += value.split()
    python, began = environment(wanted["needs"]), time.monotonic()
    environ = os.environ | {"CLIENTS_DIR": str(CACHE)}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        place, command, log = Path(directory), [python, script], Path(os.devnull)
        if wanted["model"]:
            model, truth = MODELS[wanted["model"][0]]()
            joblib.dump(model, place / "model.joblib")
            (place / "truth.json").write_text(json.dumps(truth | {"user": "predict", "password": PASSWORD}))
            settings = dict(each.split("=", 1) for each in wanted["server"])
            server = stack.enter_context(gunicorn(place, model_path=place / "model.joblib", **settings))
            command += [f"http://127.0.0.1:{server.port}", place / "truth.json"]
            log = server.log
        status = subprocess.run(command, cwd=place, env=environ).returncode
        print(f"{script.stem}: {'FAILED' if status else 'ok'}, {time.monotonic() - began:.1f} s", flush=True)
        if status:
            print(log.read_text()[-3000:])
    return status == 0


def environment(needs: list[str]) -> Path:
    """Return the Python of an environment that has some packages."""
    place = CACHE / hashlib.sha256("\n".join(needs).encode()).hexdigest()[:12]
    if not (place / "done").exists():
        print(f"making an environment with {' '.join(needs) or 'nothing'}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        pip = [place / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        if needs:
            subprocess.run([*pip, *needs], check=True)
        (place / "done").touch()
    return place / "bin/python"


def iris() -> tuple[Any, dict[str, Any]]:
    """Return a classifier of four columns of numbers, and the truth."""
    data, target = load_iris(return_X_y=True)
    model = LogisticRegression(max_iter=1000).fit(data, target)
    answers = {method: getattr(model, method)(data[::10]).tolist() for method in ("predict", "predict_proba")}
    return model, {"rows": data[::10].tolist()} | answers


def frame() -> tuple[Any, dict[str, Any]]:
    """Return a classifier that was fitted on a data frame with strings, and the truth; rows are objects."""
    columns = make_column_transformer((StandardScaler(), ["age", "rooms"]), (OneHotEncoder(), ["city"]))
    model = make_pipeline(columns, LogisticRegression()).fit(FRAME, ["yes", "no", "no", "yes"])
    answers = {method: getattr(model, method)(FRAME).tolist() for method in ("predict", "predict_proba")}
    return model, {"rows": FRAME.to_dict(orient="records")} | answers


MODELS = {"iris": iris, "frame": frame}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
