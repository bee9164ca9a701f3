"""The metrics of feedback: the figures that GET /model shows too, and a series from the start for each version."""

import time
from typing import Any

import pytest
from conftest import Client, basic
from prometheus_client.core import GaugeMetricFamily
from sklearn.linear_model import LinearRegression, LogisticRegression
from test_metrics import SERVED, Samples, samples, scraped, total

from telemetry.metrics import Metrics

STABLE = {("variant", "stable")}


def ask(client: Client, rows: list[list[float]]) -> tuple[str, list[Any]]:
    """Return the receipt of an answer, and its predictions."""
    answer = client.post({"data": rows})
    return answer.headers["X-Feedback"], answer.json["prediction"]


def send(client: Client, **truths: Any) -> dict[str, Any]:
    """Send truths by their receipts; return the answer."""
    body = {"feedback": [{"receipt": receipt, "truth": truth} for receipt, truth in truths.items()]}
    answer = client.post(body, "/feedback", Authorization=basic("feedback"))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json
    return found


def figures(found: Samples) -> dict[str, float]:
    """Return the samples of the only version without what comes before and after their names, but for the buckets."""
    return {
        name.removeprefix("prediction_").removesuffix("_total"): value
        for (name, labels), value in found.items()
        if ("receipt" in name or "feedback" in name) and labels >= STABLE and "_bucket" not in name
    }


def test_wrong_rows_are_counted_beside_all_rows_and_those_with_a_receipt(serve: Any) -> None:
    client = serve(LogisticRegression().fit([[0.0], [1.0]], [0, 1]), extensions=("telemetry", "endpoints.feedback"))
    first, prediction = ask(client, [[0.0], [0.1], [0.9], [1.0]])
    ask(client, [[0.0]])
    time.sleep(1.1)  # figures are a second old at most
    zero = dict.fromkeys(("feedback_rows", "feedback_wrong_rows", "feedback_age_seconds_count"), 0)
    assert figures(scraped(client)) == zero | {"receipt_rows": 5, "feedback_age_seconds_sum": 0}
    truth: list[Any] = [1 - prediction[0], *prediction[1:3], None]
    assert send(client, **{first: truth})["accepted"] == 1
    assert send(client, **{first: truth})["duplicates"] == 1
    found = scraped(client)
    seconds = figures(found).pop("feedback_age_seconds_sum")
    expected = {"receipt_rows": 5, "feedback_rows": 3, "feedback_wrong_rows": 1, "feedback_age_seconds_count": 1}
    assert figures(found) == expected | {"feedback_age_seconds_sum": seconds}
    assert 0 <= seconds < 60
    assert total(found, "prediction_feedback_age_seconds_bucket", le="60.0") == 1
    shown = client.get("/model").json["stable"]["feedback"]
    assert (shown["rows"], shown["coverage"], shown["error_rate"]) == (3, 3 / 5, 1 / 3)


def test_errors_of_a_regression_are_summed(serve: Any) -> None:
    model = LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0])
    client = serve(model, extensions=("endpoints.feedback", "telemetry"))  # in the other order as well
    receipt, prediction = ask(client, [[0.0], [1.0]])
    send(client, **{receipt: [prediction[0] + 3, prediction[1] - 0.5]})
    found = figures(scraped(client))
    assert found["feedback_rows"] == 2
    assert found["feedback_abs_error"] == pytest.approx(3.5)
    assert found["feedback_squared_error"] == pytest.approx(9.25)
    assert "feedback_wrong_rows" not in found


def test_feedback_is_taken_without_metrics_and_metrics_are_shown_without_feedback(serve: Any) -> None:
    model = LogisticRegression().fit([[0.0], [1.0]], [0, 1])
    client = serve(model, extensions=("endpoints.feedback",))
    receipt, prediction = ask(client, [[0.0]])
    assert send(client, **{receipt: prediction})["accepted"] == 1
    client = serve(model, extensions=("telemetry", "endpoints.feedback"), feedback=False)
    client.predict([[0.0]])
    assert figures(scraped(client)) == {}


def test_metrics_of_an_extension_that_fail_take_no_others_away(tmp_path: Any, caplog: Any) -> None:
    metrics = Metrics(tmp_path)
    metrics.on_expose += [lambda add: 1 / 0, lambda add: add([GaugeMetricFamily("mine", "Mine", 7)])]
    found = samples(metrics.expose("", SERVED)[0].decode())
    assert total(found, "mine") == 7
    assert total(found, "prediction_ready") == 1
    assert "ZeroDivisionError" in caplog.text


def test_error_bounds_are_those_of_the_versions_that_are_served(tmp_path: Any) -> None:
    model = {"load_seconds": 1.0}
    stable, canary = model | {"version": "7", "error_bound": 0.25}, model | {"version": "8", "error_bound": None}
    found = samples(Metrics(tmp_path).expose("", {"ready": True, "stable": stable, "canary": canary})[0].decode())
    assert {(name, labels) for name, labels in found if "bound" in name} == {
        ("prediction_error_bound", frozenset({("model_version", "7")}))
    }
    assert total(found, "prediction_error_bound") == 0.25
    both = {"ready": True, "stable": stable, "canary": stable}
    assert total(samples(Metrics(tmp_path).expose("", both)[0].decode()), "prediction_error_bound") == 0.25
