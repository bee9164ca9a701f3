"""What a version is expected to do in service: its error bound, and how its predictions are distributed."""

import math
from typing import Any

import numpy as np
import pytest

from model.versions.expectations import MAX_CLASS_BINS, error_bound, reference
from model.versions.store import StoreError

LABELS = ["no", "yes"]


@pytest.mark.parametrize(
    ("given", "metrics", "classes", "bound"),
    [
        (None, None, LABELS, None),
        (None, {"accuracy": 0.97}, LABELS, 0.03),
        (None, {"accuracy": 1}, LABELS, 0.0),
        (None, {"accuracy": 0.97, "error_rate": 0.05}, LABELS, 0.05),
        (0.1, {"accuracy": 0.97}, LABELS, 0.1),
        (0.0, None, LABELS, 0.0),
        (None, {"accuracy": 97}, LABELS, None),  # per cent, or something else
        (None, {"accuracy": "0.97"}, LABELS, None),
        (None, {"accuracy": True}, LABELS, None),
        (None, {"mae": 12.5}, LABELS, None),
        (None, {"mae": 12.5}, None, 12.5),
        (None, {"mean_absolute_error": 3}, None, 3.0),
        (None, {"mae": -1.0}, None, None),
        (None, {"accuracy": 0.97}, None, None),
        (1e9, {"mae": 12.5}, None, 1e9),
        (None, [0.97], LABELS, None),
        (None, 0.97, LABELS, None),
    ],
)
def test_bound_is_what_was_given_or_else_the_published_figure(
    given: float | None, metrics: Any, classes: Any, bound: float | None
) -> None:
    assert error_bound(given, metrics, classes) == bound


@pytest.mark.parametrize(
    ("given", "classes"), [(5.0, LABELS), (-0.1, LABELS), (-1.0, None), (math.nan, None), (math.inf, LABELS)]
)
def test_bound_that_is_none_is_refused_with_the_form_expected(given: float, classes: Any) -> None:
    with pytest.raises(StoreError, match=r"--error-bound \S+: expected (the share of wrong rows|a mean absolute)"):
        error_bound(given, None, classes)


def test_reference_of_a_classifier_counts_its_labels_and_everything_else() -> None:
    predictions = np.array([2] * 60 + [0] * 30 + [1] * 10)
    assert reference(predictions, [0, 1, 2]) == {"classes": [2, 0, 1], "counts": [60, 30, 10, 0]}
    assert reference(["b"] * 39 + ["a"] * 2, ["a", "b"]) == {"classes": ["b", "a"], "counts": [39, 2, 0]}
    assert reference([True] * 40, [False, True]) == {"classes": [True], "counts": [40, 0]}


def test_reference_of_many_labels_pools_the_rare_ones() -> None:
    found = reference([f"common {at % 30}" for at in range(900)] + [f"rare {at}" for at in range(100)], None)
    assert found is not None
    assert len(found["classes"]) == MAX_CLASS_BINS
    assert sum(found["counts"]) == 1000
    assert sum(label.startswith("common") for label in found["classes"]) == 30
    assert found["counts"][-1] == 100 - (MAX_CLASS_BINS - 30)


def test_reference_of_a_regression_has_ten_bins_of_equal_counts() -> None:
    predictions = np.random.default_rng(0).normal(size=1000)
    found = reference(predictions, None)
    assert found is not None
    assert len(found["edges"]) == 9
    assert found["counts"][-1] == 0
    assert all(90 <= count <= 110 for count in found["counts"][:-1])
    assert found["counts"][:-1] == np.histogram(predictions, [-np.inf, *found["edges"], np.inf])[0].tolist()


def test_reference_of_a_small_sample_has_fewer_bins_or_none() -> None:
    draw = np.random.default_rng(0)
    small = reference(draw.normal(size=100), None)
    assert small is not None
    assert len(small["edges"]) == 4
    assert reference(draw.normal(size=39), None) is None
    assert reference(["a"] * 39, ["a"]) is None


@pytest.mark.parametrize(
    "predictions",
    [np.zeros((100, 2)), ([1] * 100, [2] * 100), [[1, 2]] * 100, [{"a": 1}] * 100],
    ids=["two outputs", "a list of outputs", "lists", "objects"],
)
def test_several_outputs_have_no_reference(predictions: Any) -> None:
    assert reference(predictions, None) is None


def test_odd_predictions_have_a_reference_that_json_can_hold() -> None:
    constant = reference(np.full(100, 3.5), None)
    assert constant == {"edges": [3.5], "counts": [0, 100, 0]}
    gaps = reference(np.array([math.nan, math.inf] * 20 + [1.0, 2.0] * 30), None)
    assert gaps is not None
    assert gaps["counts"][-1] == 40
    assert reference([None] * 100, None) == {"classes": [], "counts": [100]}
    assert reference(np.arange(1000), None) is not None
    assert "edges" in (reference(np.arange(1000), None) or {})  # whole numbers, but more than labels would be
