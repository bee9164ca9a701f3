"""Drift: what versions predict day by day, against their samples; counted by all workers, over kills and midnight."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Client, basic, gunicorn
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from test_metrics import scraped, total

from model.columns import Column
from model.loaded import Answer
from model.versions.expectations import reference
from telemetry import drift, drift_counts
from telemetry.drift import DAY, KEPT_DAYS, PLACES, Drift
from telemetry.drift_counts import MAX_COLUMNS, psi

NOON = 20_000 * DAY + DAY / 2  # 2024-10-04
LABELS = reference(["a"] * 60 + ["b"] * 40, ["a", "b"])
NUMBERS = reference(np.arange(1000) / 1000, None)


class Worker:
    """A worker that counts, beside others in one directory."""

    def __init__(self, directory: Path, number: int = 0) -> None:
        self.recorded: list[dict[str, Any]] = []
        self.drift = Drift(directory, SimpleNamespace(number=number), lambda call, *given: call(*given))  # type: ignore[arg-type]
        self.drift.tick(self.recorded.append)

    def predict(self, rows: Any, prediction: Any, version: str = "1", of: Any = LABELS, columns: Any = None) -> None:
        """Count an answer of a version."""
        about = {"sha256": f"of {version}", "reference": of}
        model = SimpleNamespace(version=version, about=about, signature=SimpleNamespace(columns=columns))
        self.drift.count(Answer(prediction, None, model, "predict", rows))  # type: ignore[arg-type]

    def shown(self, version: str = "1", of: Any = LABELS, columns: Any = ()) -> Any:
        """Return what GET /model would show of a version, by day."""
        self.drift._read = (-2.0, {})
        about = {"version": version, "sha256": f"of {version}", "reference": of}
        about["signature"] = {"columns": [column.describe() for column in columns]}
        served: dict[str, Any] = {"stable": about, "canary": None}
        self.drift.describe(served)
        return served["stable"]["drift"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets the time; at first it is noon."""

    def set_to(now: float) -> None:
        monkeypatch.setattr(drift.time, "time", lambda: now)

    set_to(NOON)
    return set_to


# --- the index


def test_psi_is_that_of_the_formula() -> None:
    p, q = [500.5 / 1001, 500.5 / 1001], [100.5 / 401, 300.5 / 401]
    expected = sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert psi([500, 500], [100, 300]) == pytest.approx(expected, rel=1e-12)
    assert psi([500, 500], [500, 500]) == 0
    assert 0.2 < psi([500, 500, 0], [450, 450, 100]) < math.inf  # a class that the sample did not have


@pytest.mark.parametrize("of", ["numbers", "labels"])
def test_same_population_is_no_drift_and_another_one_is(of: str) -> None:
    draw = np.random.default_rng(3)
    found = []
    for shift in [0.0] * 100 + [0.5] * 100:
        sample, day = draw.normal(size=1000), draw.normal(loc=shift, size=1000)
        if of == "labels":
            sample, day = (np.digitize(each, [-1.0, 0.0, 1.0]) for each in (sample, day))
        expected = reference(sample, [0, 1, 2, 3] if of == "labels" else None)
        assert expected is not None
        inner = expected.get("edges", [])
        bins = np.searchsorted(inner, day, side="right") if inner else [expected["classes"].index(x) for x in day]
        found.append(psi(expected["counts"], np.bincount(bins, minlength=len(expected["counts"]))))
    assert max(found[:100]) < 0.1
    assert min(found[100:]) > 0.1
    assert np.mean(found[100:]) > 0.2


# --- counting


def test_predictions_are_counted_in_their_bins(tmp_path: Path, clock: Any) -> None:
    worker = Worker(tmp_path)
    for label, count in (("a", 60), ("b", 40)):
        for _ in range(count):
            worker.predict([[1.0]], [label])
    assert worker.shown() == {"2024-10-04": {"rows": 100, "psi": 0.0, "missing": {}, "unknown": {}}}
    worker.predict([[1.0]] * 100, ["c"] * 50 + [None] * 50)
    assert worker.shown()["2024-10-04"]["psi"] == pytest.approx(psi([60, 40, 0], [60, 40, 100]))


def test_one_row_many_rows_and_arrays_are_counted_alike(tmp_path: Path, clock: Any) -> None:
    draw = np.random.default_rng(1)
    columns = (Column("a", nullable=True), Column("b"), Column("c", learned=(1.0, 2.0)))
    values = draw.integers(1, 4, size=(300, 3)).astype(float)
    values[draw.random(300) < 0.2, 0] = math.nan
    rows = [[None if value != value else value for value in row] for row in values.tolist()]
    predictions = np.append(draw.normal(0.5, 0.5, size=298), [math.nan, math.inf])
    found = []
    for name in "one by one", "at once", "as an array", "row by row of an array", "answers as a list":
        worker = Worker(tmp_path / name)
        sent: Any = values if "array" in name else rows
        answers: Any = [None if x != x else x for x in predictions.tolist()] if "list" in name else predictions
        step = 1 if "by" in name else 300
        for at in range(0, 300, step):
            worker.predict(sent[at : at + step], answers[at : at + step], of=NUMBERS, columns=columns)
        found.append(worker.shown(of=NUMBERS, columns=columns)["2024-10-04"])
    assert found[0] == {
        "rows": 300,
        "psi": psi(NUMBERS["counts"], expected_counts(predictions)) if NUMBERS else None,
        "missing": {"a": np.isnan(values[:, 0]).sum() / 300},
        "unknown": {"c": (values[:, 2] == 3).sum() / 300},
    }
    assert all(each == found[0] for each in found)


def expected_counts(predictions: Any) -> Any:
    """Count predictions in the bins of NUMBERS, what is not finite in the last one."""
    assert NUMBERS is not None
    finite = predictions[np.isfinite(predictions)]
    counts = np.histogram(finite, [-np.inf, *NUMBERS["edges"], np.inf])[0].tolist()
    return [*counts, len(predictions) - len(finite)]


def test_shares_of_wide_rows_are_those_of_a_sample_of_them(tmp_path: Path, clock: Any) -> None:
    columns = tuple(Column(f"c{at}", nullable=True) for at in range(MAX_COLUMNS + 50))
    row = [None if at % 2 else 1.0 for at in range(len(columns))]
    worker = Worker(tmp_path)
    for _ in range(2000):
        worker.predict([row], ["a"], columns=columns)
    worker.predict([row] * 2000, ["a"] * 2000, columns=columns)
    found = worker.shown(columns=columns)["2024-10-04"]
    assert found["rows"] == 4000
    assert found["missing"] == {f"c{at}": 1.0 for at in range(1, MAX_COLUMNS, 2)}


def test_only_predict_is_counted(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    worker.drift.count(Answer([[0.1, 0.9]], ["a", "b"], None, "predict_proba", [[1.0]]))  # type: ignore[arg-type]
    assert worker.shown() == {}


ODD: list[Any] = [
    *(None, 5, "x", [], {}, {"counts": []}, {"classes": [], "counts": []}, {"classes": ["a"], "counts": [1]}),
    *({"classes": ["a"], "counts": [1, -1]}, {"classes": ["a"], "counts": [0, 0]}),
    *({"classes": [[]], "counts": [1, 1]}, {"edges": ["x"], "counts": [1, 1, 1]}, {"edges": None, "counts": [1]}),
    *({"classes": ["a"], "counts": [1, None]}, {"classes": ["a"], "counts": [1, 2**63]}),
    {"classes": [str(at) for at in range(99)], "counts": [1] * 100},
]


@pytest.mark.parametrize("of", ODD, ids=str)
def test_version_without_a_sound_reference_has_no_index_and_no_error(tmp_path: Path, of: Any) -> None:
    worker = Worker(tmp_path)
    worker.predict([[1.0]], ["a"], of=of)
    worker.predict([[1.0]] * 2, ["a", "b"], of=of)
    (found,) = worker.shown(of=of).values()
    assert found == {"rows": 3, "psi": None, "missing": {}, "unknown": {}}


@pytest.mark.parametrize("prediction", [[[1, 2]], [{}], [None], ["x"], [True], [10**400], ([1], [2]), [math.nan], []])
@pytest.mark.parametrize("of", [LABELS, NUMBERS], ids=["labels", "numbers"])
def test_whatever_is_predicted_is_counted_or_left_out(tmp_path: Path, prediction: Any, of: Any) -> None:
    worker = Worker(tmp_path)
    for times in 1, 3:
        worker.predict([[1.0]] * times, prediction * times, of=of)
    (found,) = worker.shown(of=of).values()
    assert found["rows"] == 4


# --- workers and days


def test_workers_count_together_and_their_successors_go_on(tmp_path: Path, clock: Any) -> None:
    workers = [Worker(tmp_path, number) for number in range(3)]
    for worker in workers:
        worker.predict([[1.0]] * 2, ["a", "b"])
    Worker(tmp_path, 1).predict([[1.0]] * 4, ["b"] * 4)  # that of a killed one
    for worker in workers:
        assert worker.shown()["2024-10-04"]["rows"] == 10
        assert worker.shown()["2024-10-04"]["psi"] == pytest.approx(psi([60, 40, 0], [3, 7, 0]))


def test_each_day_has_its_figures_for_a_week(tmp_path: Path, clock: Any) -> None:
    worker = Worker(tmp_path)
    for day in range(PLACES + 20):
        clock(NOON + day * DAY)
        worker.drift.tick(worker.recorded.append)
        worker.predict([[1.0]] * (day + 1), ["a"] * (day + 1))
    found = worker.shown()
    assert len(found) == KEPT_DAYS
    assert [each["rows"] for each in found.values()] == list(range(PLACES + 20, PLACES + 20 - KEPT_DAYS, -1))
    assert list(found) == sorted(found, reverse=True)


def test_name_that_is_used_again_begins_anew(tmp_path: Path, clock: Any) -> None:
    worker = Worker(tmp_path)
    worker.predict([[1.0]] * 5, ["a"] * 5)
    worker.drift.begin_again()
    worker.predict([[1.0]], np.array([0.5]), of=NUMBERS)
    assert worker.shown()["2024-10-04"]["rows"] == 5
    assert worker.shown(of=NUMBERS)["2024-10-04"]["rows"] == 1


def test_more_versions_than_there_is_room_for_harm_no_figure(tmp_path: Path, clock: Any) -> None:
    worker = Worker(tmp_path)
    for _ in range(3):
        for version in range(PLACES + 5):
            worker.predict([[1.0]], ["a"], version=str(version))
    counted = [worker.shown(version=str(version)) for version in range(PLACES + 5)]
    assert [each["2024-10-04"]["rows"] for each in counted if each] == [3] * PLACES


def test_finished_day_is_recorded_once_by_one_of_the_workers(tmp_path: Path, clock: Any) -> None:
    workers = [Worker(tmp_path, number) for number in range(3)]
    for worker in workers:
        worker.predict([[1.0]] * 2, ["a", "b"])
    for seconds in DAY / 2, DAY / 2 + 2, DAY / 2 + 6, DAY / 2 + 7, DAY:
        clock(NOON + seconds)
        for worker in workers:
            worker.drift.tick(worker.recorded.append)
        if seconds == DAY / 2:
            workers[0].predict([[1.0]], ["a"])
        assert sum(len(worker.recorded) for worker in workers) == (seconds > DAY / 2 + 5)
    (record,) = [record for worker in workers for record in worker.recorded]
    known = {"event": "drift", "model_version": "1", "variant": "", "day": "2024-10-04", "rows": 6}
    assert record == known | {"psi": pytest.approx(psi([60, 40, 0], [3, 3, 0]))}
    assert Worker(tmp_path).recorded == []  # after a restart


def test_directory_that_cannot_be_written_or_was_removed_stops_nothing(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").touch()
    worker = Worker(tmp_path / "file")
    worker.predict([[1.0]], ["a"])
    assert worker.shown() == {}
    assert "drift is not counted" in caplog.text
    worker = Worker(tmp_path)
    (tmp_path / "drift/counts-0").write_bytes(b"of another form")
    assert Worker(tmp_path, 1).shown() == {}
    (tmp_path / "drift/counts-0").unlink()
    worker.drift.tick(worker.recorded.append)
    worker.predict([[1.0]], ["a"])
    assert [each["rows"] for each in worker.shown().values()] == [1]


# --- as a user sees it


def drifted(client: Client) -> Any:
    """Return what GET /model shows of today."""
    time.sleep(1.1)  # figures are a second old at most
    (found,) = client.get("/model").json["stable"]["drift"].values()
    return found


def test_missing_values_and_unknown_categories_are_shown_by_column(serve: Any) -> None:
    frame = pd.DataFrame({"city": ["Oslo", "Rome"] * 20, "size": range(40)})
    encoder = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["city"]), remainder="passthrough")
    model = make_pipeline(encoder, HistGradientBoostingRegressor()).fit(frame, frame["size"])
    client = serve(model)
    client.predict([{"city": "Oslo", "size": 1}, {"city": "Bonn", "size": None}])
    client.predict([{"city": "Rome", "size": 3}])
    client.predict([{"city": "Rome", "size": 3}])
    assert drifted(client) == {"rows": 4, "psi": None, "missing": {"size": 0.25}, "unknown": {"city": 0.25}}


def test_index_is_shown_and_is_a_metric(serve: Any) -> None:
    client = serve(LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]))
    client.service.serving.routes.stable.about["reference"] = NUMBERS
    for value in np.random.default_rng(0).random(200):
        client.predict([[float(value)]])
    assert drifted(client)["rows"] == 200
    assert 0 < drifted(client)["psi"] < 0.1
    client.predict([[5.0]] * 800)
    assert drifted(client)["psi"] > 0.2
    found = scraped(client)
    assert total(found, "prediction_drift_psi") == pytest.approx(psi(NUMBERS["counts"], counted(client)))  # type: ignore[index]
    assert total(found, "prediction_drift_rows") == 1000


def counted(client: Client) -> Any:
    """Return the counts per bin of the only version."""
    ((days),) = drift_counts.read(client.journal_dir / "drift", 0).values()
    (sums,) = days.values()
    return sums.predicted


@pytest.mark.long
def test_published_version_has_its_reference_and_killed_workers_lose_no_count(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    sample = draw.normal(size=(1000, 2)).tolist()
    joblib.dump(LinearRegression().fit(sample, [sum(row) for row in sample]), tmp_path / "model.joblib")
    (tmp_path / "rows.json").write_text(json.dumps(sample))
    line = ["publish", "model.joblib", "--sample", "rows.json", "--version", "7", "--metrics", '{"mae": 0.25}']
    for arguments in (line, ["promote", "7"]):
        command = [sys.executable, "-m", "model", "--dir", "store", *arguments]
        subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    with gunicorn(tmp_path, web_concurrency=2, model_dir=tmp_path / "store") as server:

        def shown(rows: int) -> Any:
            """Return what one of the workers shows of the version, once it has counted so many rows."""
            found: list[Any] = []

            def is_counted() -> bool:
                found.append(json.loads(server.ask("GET", "/model", Authorization=basic("predict"))[2])["stable"])
                return [day["rows"] for day in found[-1]["drift"].values()] == [rows]

            server.wait_until(is_counted)
            return found[-1]["error_bound"], *(day["psi"] for day in found[-1]["drift"].values())

        def send(rows: Any) -> None:
            for at in range(0, len(rows), 7):
                assert server.predict(rows[at : at + 7])[0] == 200

        send(draw.normal(size=(1050, 2)).tolist())
        bound, before = shown(1050)
        assert bound == 0.25
        assert before < 0.1
        workers, served = server.workers(), server.log.read_text().count("serving version")
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        server.wait_until(lambda: server.log.read_text().count("serving version") >= served + len(workers))
        send(draw.normal(1.0, size=(2100, 2)).tolist())
        assert shown(3150)[1] > 0.2
        time.sleep(1.1)  # figures are a second old at most
        found = scraped(server)
        assert total(found, "prediction_drift_psi", model_version="7") > 0.2
        assert total(found, "prediction_drift_rows", model_version="7") == 3150
        assert total(found, "prediction_error_bound", model_version="7") == 0.25
