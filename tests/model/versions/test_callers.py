"""What callers of one version notice of another: `model/versions/callers.py`, and the commands that ask it."""

import json
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.svm import LinearSVC
from version_tools import validate_in_this_process

from model import __main__ as commands
from model.__main__ import main
from model.versions.callers import compare, differences
from model.versions.loading import SIGNATURE_FORM, load_version, model_facts
from model.versions.publishing import installed, validate_here
from model.versions.routing import Routing
from model.versions.store import Manifest, Store, read_manifest

IRIS = load_iris(as_frame=True)
ROWS = IRIS.data.iloc[[0, 60, 110]].to_numpy().tolist()
CITIES = pd.DataFrame({"city": ["oslo", "rome", "bern"] * 10, "size": np.arange(30.0)})
CITY_ROWS = [{"city": "rome", "size": 1.0}, {"city": "bern", "size": 20.0}]


def logistic(frame: Any = IRIS.data, target: Any = IRIS.target) -> Any:
    """Fit a logistic regression."""
    return LogisticRegression(max_iter=1000).fit(frame, target)


def by_city(frame: Any, handle_unknown: str) -> Any:
    """Fit a pipeline that knows the cities of a frame."""
    encode = make_column_transformer((OneHotEncoder(handle_unknown=handle_unknown), ["city"]), remainder="passthrough")
    return make_pipeline(encode, LogisticRegression()).fit(frame, frame["size"] > 15)


def texts(words: list[str]) -> Any:
    """Fit a model of strings."""
    return make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(words, [0, 1])


class Published:
    """A store whose versions are published by the functions of the product, in this process."""

    def __init__(self, place: Path) -> None:
        self.place, self.store = place, Store(place / "store")

    def publish(self, model: Any, version: str, sample: list[Any]) -> Manifest:
        """Publish a fitted model."""
        joblib.dump(model, self.place / "model.joblib")
        with self.store.new_version(self.place / "model.joblib", version) as manifest:
            manifest.about["sample"] = sample
            job = {"artifact": str(manifest.artifact), "version": version, "about": manifest.about}
            found = json.loads(json.dumps(validate_here(job), default=lambda value: value.tolist()))
            manifest.about.update(found, sample_from="operator", libraries=installed())
        return read_manifest(self.store.directory, version)

    def noticed(self, old: Any, new: Any, sample: list[Any], other_sample: list[Any] | None = None) -> list[str]:
        """Return what callers of the old model notice of the new one."""
        before = self.publish(old, "old", sample)
        now = self.publish(new, "new", other_sample or sample)
        loaded = load_version(now)
        return compare(loaded, before.about, now.about | model_facts(loaded))


@pytest.fixture
def published(tmp_path: Path) -> Published:
    """A store that nobody has written to yet."""
    return Published(tmp_path)


FIVE = IRIS.data.assign(age=1.0)
NAMES = IRIS.target.map(dict(enumerate("abc")))
FITTING = {
    "retrained": (logistic(), logistic(IRIS.data[10:], IRIS.target[10:]), ROWS),
    "more methods": (LinearSVC().fit(IRIS.data, IRIS.target), logistic(), ROWS),
    "null is taken now": (
        LinearRegression().fit(IRIS.data, IRIS.target),
        DummyRegressor().fit(IRIS.data, IRIS.target),
        ROWS,
    ),
    "names at last": (logistic(IRIS.data.to_numpy()), logistic(), ROWS),
    "a category more": (by_city(CITIES[CITIES.city != "oslo"], "error"), by_city(CITIES, "error"), CITY_ROWS),
    "a category that is ignored": (
        by_city(CITIES, "error"),
        by_city(CITIES[CITIES.city != "oslo"], "ignore"),
        CITY_ROWS,
    ),
    "other words": (texts(["good day", "bad day"]), texts(["well done", "not well"]), ["good"]),
}
# Two models, a sample of each, and what is said.
NOT_FITTING: dict[str, tuple[Any, Any, list[Any], list[Any], list[str]]] = {
    "five columns": (
        logistic(),
        logistic(FIVE),
        ROWS,
        [[*row, 1.0] for row in ROWS],
        ['columns that are new, and that each row needs: "age"'],
    ),
    "four columns": (logistic(FIVE), logistic(), [[*ROWS[0], 1.0]], ROWS, ['columns that are gone: "age"']),
    "five values": (
        logistic(IRIS.data.to_numpy()),
        logistic(FIVE.to_numpy()),
        ROWS,
        [[*row, 1.0] for row in ROWS],
        ["a row had 4 values; it has 5"],
    ),
    "another order": (
        logistic(IRIS.data[["petal length (cm)", "petal width (cm)"]]),
        logistic(IRIS.data[["petal width (cm)", "petal length (cm)"]]),
        [[1.4, 0.2]],
        [[0.2, 1.4]],
        [
            'the columns were "petal length (cm)", "petal width (cm)"; they are "petal width (cm)", "petal length '
            '(cm)", so values in lists would mean others'
        ],
    ),
    "no names": (
        logistic(),
        logistic(IRIS.data.to_numpy()),
        ROWS,
        ROWS,
        ["the columns have no names any more, so rows that are objects are refused"],
    ),
    "no null": (
        DummyRegressor().fit(IRIS.data, IRIS.target),
        LinearRegression().fit(IRIS.data, IRIS.target),
        ROWS,
        ROWS,
        [f"column {name!r} took null; it takes none" for name in IRIS.feature_names],
    ),
    "another kind": (
        by_city(CITIES, "ignore"),
        by_city(CITIES.assign(city=CITIES["size"] % 3), "ignore"),
        CITY_ROWS,
        [{"city": 1.0, "size": 1.0}],
        ["column 'city' took"],
    ),
    "a category less": (
        by_city(CITIES, "error"),
        by_city(CITIES[CITIES.city != "oslo"], "error"),
        CITY_ROWS,
        CITY_ROWS,
        ["""column 'city' took "oslo"; it does not"""],
    ),
    "a sample that is refused": (
        by_city(CITIES, "error"),
        by_city(CITIES[CITIES.city != "rome"], "error"),
        CITY_ROWS,
        CITY_ROWS[1:],
        ["its recorded sample is refused: "],
    ),
    "a method less": (
        logistic(),
        LinearSVC().fit(IRIS.data, IRIS.target),
        ROWS,
        ROWS,
        ["methods that are gone: predict_proba, predict_log_proba"],
    ),
    "other classes": (
        logistic(),
        logistic(target=NAMES),
        ROWS,
        ROWS,
        ['the classes were 0, 1, 2; they are "a", "b", "c"', "a prediction was a number; it is a string"],
    ),
    "a class less": (
        logistic(),
        logistic(IRIS.data[:100], IRIS.target[:100]),
        ROWS,
        ROWS,
        ["the classes were 0, 1, 2; they are 0, 1"],
    ),
    "numbers of another kind": (
        logistic(),
        logistic(target=IRIS.target.astype(float)),
        ROWS,
        ROWS,
        ["the classes were 0, 1, 2; they are 0.0, 1.0, 2.0"],
    ),
    "two outputs": (
        DummyRegressor().fit(IRIS.data, IRIS.target),
        DummyRegressor().fit(IRIS.data, IRIS.data.iloc[:, :2]),
        ROWS,
        ROWS,
        ["a prediction was a number; it is a list of 2 values"],
    ),
    "strings": (
        logistic(),
        texts(["good day", "bad day"]),
        ROWS,
        ["good"],
        ["data was [[0.5, 0.5, 0.5, 0.5]]; it is ["],
    ),
}


@pytest.mark.parametrize("kind", FITTING)
def test_version_that_answers_what_the_other_answers_fits(published: Published, kind: str) -> None:
    assert published.noticed(*FITTING[kind]) == []


@pytest.mark.parametrize("kind", NOT_FITTING)
def test_what_callers_notice_is_said_in_words(published: Published, kind: str) -> None:
    *models, expected = NOT_FITTING[kind]
    found = published.noticed(*models)
    assert len(found) >= len(expected), found
    assert all(said.startswith(words) for said, words in zip(found, expected, strict=False)), found


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ([None], [None], []),
        ([28, 28], [28, 28], []),
        ([28, 28], [None, None], []),
        ([None, None], [28, 28], ["a row was any × any values; it is 28 × 28 values"]),
        ([28, 28], [32, 32], ["a row was 28 × 28 values; it is 32 × 32 values"]),
        ([4], [28, 28], ["data was [4]; it is [28, 28]"]),
        ([4], [4], []),
        ([4], [5], ["a row had 4 values; it has 5"]),
        ([], [], []),
    ],
)
def test_tensors_are_compared_by_their_shapes(before: Any, now: Any, expected: list[str]) -> None:
    assert differences(tensor(before), tensor(now)) == expected
    assert differences(tensor(before, "integer"), tensor(before)) == []
    place = f"column 0 took {'{}'}; it takes" if before == [4] else "the values took {}; it takes"
    refused = differences(tensor(before), tensor(before, "integer"))
    assert before == [None] or refused[0].startswith(place.format("a number"))


def tensor(shape: list[int | None], kind: str = "number") -> dict[str, Any]:
    """Return a manifest of a model that takes tensors."""
    signature = {"layout": "tensor", "columns": [], "form": str(shape), "shape": shape, "type": kind}
    return manifest(signature)


def manifest(signature: Any, **changes: Any) -> dict[str, Any]:
    """Return what is compared of a manifest."""
    known = {"methods": ["predict"], "classes": None, "predictions": [1.0], "signature_form": SIGNATURE_FORM}
    return known | {"signature": signature} | changes


def rows_of(*columns: Any) -> Any:
    """Return a signature of columns, each with its name, type and whether it may be null."""
    described = [dict(zip(("name", "type", "nullable"), column, strict=True)) for column in columns]
    return {"layout": "frame", "columns": described, "form": "[[…]]"}


def test_array_and_tensor_of_one_dimension_take_the_same() -> None:
    array = manifest(rows_of(*[(None, "number", False)] * 4))
    assert differences(array, tensor([4])) == differences(tensor([4]), array) == []
    named = manifest(rows_of(*[(name, "number", False) for name in "abcd"]))
    assert "no names any more" in differences(named, tensor([4]))[0]


def test_older_description_is_compared_by_names_only() -> None:
    new = manifest(rows_of(("a", "boolean", False), ("b", "integer", False)))
    old = manifest(rows_of(("a", "number", True), ("b", "number", True)), signature_form=2)
    assert differences(old, new) == []
    assert len(differences(old | {"signature_form": SIGNATURE_FORM}, new)) == 4
    assert differences(manifest(rows_of(("b", "number", True), ("a", "number", True)), signature_form=1), new) != []
    assert differences(old, new | {"classes": [0, 1]}) == ["the classes were none; they are 0, 1"]


def test_order_of_classes_matters_to_methods_that_have_a_column_for_each() -> None:
    signature = rows_of(("a", "number", False))
    old, new = manifest(signature, classes=["n", "y"]), manifest(signature, classes=["y", "n"])
    assert differences(old, new) == []
    proba = {"methods": ["predict", "predict_proba"]}
    assert "so are the columns of predict_proba" in differences(old | proba, new | proba)[0]


ODD: list[Any] = [..., None, True, 0, -1, 1.5, "", "x", [], [None], [[]], {}, {"x": {}}, ["1"] * 3]


def test_manifests_of_odd_values_are_compared_without_an_exception() -> None:
    sound = manifest(rows_of(("a", "category", False)))
    described = sound["signature"]["columns"][0]
    odd = [
        {key: value for key, value in (sound | {name: each}).items() if value is not ...}
        for name in sound
        for each in ODD
    ]
    odd += [
        manifest(sound["signature"] | {name: each})
        for name in ("layout", "columns", "form", "shape", "type")
        for each in ODD
    ]
    for name in ("name", "type", "nullable", "categories"):
        odd += [manifest(sound["signature"] | {"columns": [described | {name: each}]}) for each in ODD]
    for each in odd:
        for said in (*differences(sound, each), *differences(each, sound), *differences(each, each)):
            assert isinstance(said, str)
    assert differences(sound, sound) == []


# --- the commands


@pytest.fixture
def validated_here(monkeypatch: Any) -> None:
    """Let what proves a version run in this process, where a fresh one is not the point."""
    validate_in_this_process(monkeypatch)


@pytest.fixture
def command(published: Published, validated_here: None, capfd: Any, monkeypatch: Any) -> Any:
    """Return a function that runs `python -m model`."""
    monkeypatch.delenv("MODEL_PATH", raising=False)
    monkeypatch.setenv("MODEL_DIR", str(published.store.directory))
    monkeypatch.setenv("JOURNAL_DIR", str(published.place / "journal"))

    def run(line: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return main(line.split()), *capfd.readouterr()

    return run


def test_version_that_callers_cannot_use_is_served_by_force_only_and_rollback_needs_none(
    published: Published, command: Any
) -> None:
    published.publish(logistic(), "1", ROWS)
    published.publish(logistic(FIVE), "2", [[*row, 1.0] for row in ROWS])
    published.store.promote("1")
    difference = 'callers of version 1: columns that are new, and that each row needs: "age"\n'
    for line in ("promote 2", "canary 2 --weight 5"):
        status, out, err = command(line)
        assert (status, err) == (
            1,
            "model: version 2 does not fit the callers of version 1; --force serves it anyway\n",
        )
        assert out.endswith(f"DOES NOT FIT  {difference}")
    assert Routing.read(published.store.directory).generation == 1
    status, out, err = command("promote 2 --force")
    assert (status, err) == (0, "")
    assert out.endswith(f"DOES NOT FIT  {difference}generation 2: stable 2\n")
    assert command("rollback") == (
        0,
        'back to version 1, from version 2\ncallers notice: columns that are gone: "age"\ngeneration 3: stable 1\n',
        "",
    )
    status, out, err = command("promote 1")
    assert (status, out, err) == (1, "", "model: version 1 is already the stable one\n")


def test_force_does_not_skip_the_proof(published: Published, command: Any) -> None:
    for version in "1", "2":
        published.publish(logistic(), version, ROWS)
    published.store.promote("1")
    path = published.store.directory / "2/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"predictions": [2, 1, 0]}))
    for line in ("promote 2 --force --any-machine", "canary 2 --weight 5 --force --any-machine"):
        assert "answers its recorded sample differently" in command(line)[2]
    assert Routing.read(published.store.directory).generation == 1


def test_stable_version_that_nobody_can_read_is_compared_with_by_force_only(published: Published, command: Any) -> None:
    for version in "1", "2":
        published.publish(logistic(), version, ROWS)
    published.store.promote("1")
    published.store.promote("2")
    (published.store.directory / "2/manifest.json").write_text("{")
    assert "DOES NOT FIT  callers of version 2: nobody knows what they send: " in command("promote 1")[1]
    status, out, _ = command("rollback")
    assert status == 0
    assert "callers notice: nobody knows what: version 2: " in out


def test_canary_that_the_guard_takes_back_during_the_proof_is_not_promoted(
    published: Published, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in "1", "2":
        published.publish(DummyClassifier().fit(ROWS, [0, 1, 2]), version, ROWS)
    published.store.promote("1")
    published.store.canary("2", 5, guard=True)
    prove = commands.validate

    def prove_slowly(*arguments: Any) -> Any:
        published.store.rollback("guard, 9 % of its requests failed")
        return prove(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("model.__main__.validate", prove_slowly)
        status, _, err = command("promote 2 --any-machine")
    assert status == 1
    assert "no longer the canary (guard, 9 % of its requests failed: canary 2)" in err
    assert Routing.read(published.store.directory).stable == "1"
    assert command("promote 2 --any-machine")[0] == 0


def test_version_that_was_compared_with_another_stable_one_is_not_promoted(published: Published, command: Any) -> None:
    for version in "1", "2", "3":
        published.publish(DummyClassifier().fit(ROWS, [0, 1, 2]), version, ROWS)
    published.store.promote("1")
    published.store.promote("2")
    for act in (published.store.promote, lambda version, stable: published.store.canary(version, 5, False, stable)):
        with pytest.raises(Exception, match="version 2 became the stable one meanwhile"):
            act("3", "1")
    assert published.store.promote("3", "2").stable == "3"


def test_allow_version_mismatch_allows_what_the_server_would_serve(
    published: Published, command: Any, monkeypatch: Any
) -> None:
    published.publish(logistic(), "1", ROWS)
    path = published.store.directory / "1/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"libraries": {"numpy": "1.26.4"}}))
    assert command("promote 1")[0] == 1
    monkeypatch.setenv("ALLOW_VERSION_MISMATCH", "1")
    status, out, err = command("promote 1")
    assert (status, err) == (0, "")
    assert "numpy: published with 1.26.4, here" in out
    assert "allowed by ALLOW_VERSION_MISMATCH=1" in out
