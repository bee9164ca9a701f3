"""A server to look at: two workers, a canary, three callers, some of their mistakes, and the truths of their rows."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import joblib
from conftest import CHEAP, Gunicorn, basic, gunicorn
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from model.versions.store import Store

IRIS = load_iris(as_frame=True)
ROWS, TRUTHS = IRIS.data.to_numpy().tolist(), IRIS.target.tolist()
ROLES = {"shop": ["predict"], "batch": ["predict", "feedback"], "alice": ["predict", "monitor"]}
NOTES = {"7": "logistic regression, trained on November's data", "8": "a tree of depth 2 instead"}


def publish(models: Path) -> None:
    """Make version 7, which is stable, and version 8, a canary for a fifth of the requests."""
    models.mkdir()
    estimators = {"7": LogisticRegression(max_iter=1000), "8": DecisionTreeClassifier(max_depth=2, random_state=0)}
    for version, estimator in estimators.items():
        file = models.with_name(f"{version}.joblib")
        joblib.dump(estimator.fit(IRIS.data, IRIS.target), file)
        sample = ROWS[::30]
        with Store(models).new_version(file, version) as manifest:
            predictions = estimator.predict(IRIS.data)[::30].tolist()
            manifest.about.update({"sample": sample, "predictions": predictions, "note": NOTES[version]})
    Store(models).promote("7")
    Store(models).canary("8", 20)


@contextmanager
def busy_server(place: Path) -> Iterator[Gunicorn]:
    """Run the server."""
    publish(place / "models")
    users = {name: {"password": CHEAP, "roles": roles} for name, roles in ROLES.items()}
    (place / "users.json").write_text(json.dumps(users))
    (place / "users.json").chmod(0o600)
    with gunicorn(place, model_dir=place / "models", web_concurrency=2) as server:
        yield server


def call(server: Gunicorn, requests: int, seed: int = 0) -> None:
    """Send requests; every tenth has a mistake, and of the others the truth is sent."""
    dice, receipts = random.Random(seed), []
    for number in range(requests):
        user = dice.choices(list(ROLES), (6, 3, 1))[0]
        at = dice.randrange(len(ROWS))
        row = ROWS[at][:3] if number % 10 == 9 else ROWS[at]
        headers = {"Content_Type": "application/json", "Authorization": basic(user)}
        status, told, _ = server.ask("POST", "/predict", json.dumps({"data": [row]}).encode(), **headers)
        assert status == (422 if number % 10 == 9 else 200)
        if status == 200:
            receipts.append({"receipt": told["X-Feedback"], "truth": [TRUTHS[at]]})
    body = json.dumps({"feedback": receipts}).encode()
    headers = {"Content_Type": "application/json", "Authorization": basic("batch")}
    status, _, answer = server.ask("POST", "/feedback", body, **headers)
    assert (status, json.loads(answer)["accepted"]) == (200, len(receipts))
