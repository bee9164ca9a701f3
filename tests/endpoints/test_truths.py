"""Predictions against the truth: counted as scikit-learn's metrics do, with a clear answer to what is wrong."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, mean_absolute_error, mean_squared_error

from endpoints.error_rate import CLASSIFICATION, REGRESSION
from endpoints.truths import BadTruth, compare, kind_of, labels_of

RNG = np.random.default_rng(3)
CASES = [
    ([0, 1, 2], [0, 2, 2], [0, 1, 2], (3, 1, 0)),
    ([0, 1, 2], [0.0, 1.0, 2.0], [0, 1, 2], (3, 0, 0)),
    ([0, 1, 2], [0, None, 3], [0, 1, 2], (2, 1, 1)),
    (["a", "b"], ["a", "new"], ["a", "b"], (2, 1, 1)),
    ([True, False], [True, True], [False, True], (2, 1, 0)),
    ([1.5, 2.5], [1.5, 7], [1.5, 2.5], (2, 1, 1)),
    ([3, None], [3.0, 3], [3, 4], (2, 1, 0)),  # the model answered null
    (["ja", "nein"], ["ja", "ja"], [0, 1], (2, 1, 0)),  # an extension renames the labels
    ([7, 8], [7, 9], None, (2, 1, None)),  # the labels of the version are not known here
    ([[0, 1], [1, 1]], [[0, 1], [0, 1]], [[0, 1], [0, 1]], (2, 1, 0)),  # a label or an output each
    ([[0, "x"], [1, "y"]], [[0, "z"], None], [[0, 1], ["x", "y"]], (1, 1, 1)),
    ([[0, 1, 1]], [[0, 1, 2]], [0, 1, 2], (1, 1, 1)),  # multi-label: the classes name the columns
    ([{"a": 1}], [{"a": 1.0}], None, (1, 0, None)),
]


@pytest.mark.parametrize(("prediction", "truth", "classes", "expected"), CASES)
def test_rows_of_a_classification(prediction: Any, truth: Any, classes: Any, expected: Any) -> None:
    found = compare(prediction, truth, CLASSIFICATION, labels_of(classes))
    assert (found.rows, found.wrong, found.unknown_labels) == expected
    assert (found.abs_error, found.sq_error, found.signed_error) == (None, None, None)


@pytest.mark.parametrize("shape", [(300,), (300, 4)])
def test_error_rate_is_scikit_learns(shape: tuple[int, ...]) -> None:
    answered, true = RNG.integers(0, 2, shape), RNG.integers(0, 2, shape)
    true = np.where(RNG.random(shape) < 0.8, answered, true)
    found = compare(answered.tolist(), true.tolist(), CLASSIFICATION, labels_of([0, 1]))
    assert (found.rows - (found.wrong or 0)) / 300 == accuracy_score(true, answered)


@pytest.mark.parametrize("shape", [(300,), (300, 1), (300, 3), (300, 2, 2)])
def test_errors_are_scikit_learns(shape: tuple[int, ...]) -> None:
    answered, true = RNG.normal(size=shape), RNG.normal(size=shape)
    found = compare(answered.tolist(), true.tolist(), REGRESSION, None)
    flat = answered.reshape(300, -1), true.reshape(300, -1)
    assert (found.rows, found.wrong, found.unknown_labels) == (300, None, None)
    assert (found.abs_error or 0) / 300 == pytest.approx(mean_absolute_error(flat[1], flat[0]))
    assert (found.sq_error or 0) / 300 == pytest.approx(mean_squared_error(flat[1], flat[0]))
    assert (found.signed_error or 0) / 300 == pytest.approx(np.mean(answered - true))


def test_row_of_a_regression_without_prediction_is_not_counted() -> None:
    found = compare([1.0, None, [1.0, None], 4], [2, 3.0, [1.0, 2.0], None], REGRESSION, None)
    assert (found.rows, found.abs_error, found.signed_error) == (1, 1.0, -1.0)


WRONG = [
    ([0], 0, CLASSIFICATION, [0, 1], "truth is a number; send a list"),
    ([0], None, CLASSIFICATION, [0, 1], "truth is null"),
    ([0], [], CLASSIFICATION, [0, 1], "0 entries, the prediction 1 rows"),
    ([0], [0, 1], CLASSIFICATION, [0, 1], "2 entries"),
    ([0], ["0"], CLASSIFICATION, [0, 1], "row 0 is a string, where the model answers a number"),
    ([0, 1], [0, True], CLASSIFICATION, [0, 1], "row 1 is true or false, where the model answers a number"),
    (["a"], [1], CLASSIFICATION, ["a", "b"], "row 0 is a number, where the model answers a string"),
    ([True], [1], CLASSIFICATION, [False, True], "where the model answers true or false"),
    (["a"], [1], CLASSIFICATION, None, "where the model answers a string"),
    ([0], [[0]], CLASSIFICATION, [0, 1], "row 0 is a list"),
    ([0], [{}], CLASSIFICATION, [0, 1], "row 0 is an object"),
    ([[0, 1]], [0], CLASSIFICATION, [[0, 1]] * 2, "row 0 is a number; send a list of 2"),
    ([[0, 1]], [[0]], CLASSIFICATION, [[0, 1]] * 2, "row 0 is a list of 1; send a list of 2"),
    ([[0, 1]], [[0, None]], CLASSIFICATION, [[0, 1]] * 2, "row 0 is null"),
    ([0, 0], [None, None], CLASSIFICATION, [0, 1], "no row's truth is known"),
    ([None], [1.0], REGRESSION, None, "no row's truth is known"),
    (["n/a"], [1.0], REGRESSION, None, "no row's truth is known"),  # what an extension made of a prediction
    ([{"low": 1.0}, True], [1.0, 1.0], REGRESSION, None, "no row's truth is known"),
    ([1.0], ["1"], REGRESSION, None, "row 0 is a string; send a number"),
    ([1.0], [False], REGRESSION, None, "row 0 is true or false; send a number"),
    ([1.0], [1e200], REGRESSION, None, "further from the prediction"),
]


@pytest.mark.parametrize(("prediction", "truth", "kind", "classes", "words"), WRONG)
def test_truth_that_cannot_be_compared(prediction: Any, truth: Any, kind: str, classes: Any, words: str) -> None:
    with pytest.raises(BadTruth, match=words):
        compare(prediction, truth, kind, labels_of(classes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)


@given(st.lists(JSON, min_size=1, max_size=3), JSON, st.sampled_from([CLASSIFICATION, REGRESSION]), JSON)
def test_any_json_is_counted_or_refused(prediction: Any, truth: Any, kind: str, classes: Any) -> None:
    try:
        found = compare(prediction, truth, kind, labels_of(classes))
    except BadTruth:
        return
    assert 0 < found.rows <= len(prediction)
    assert (found.wrong or 0) <= found.rows


def test_kind_of_a_model() -> None:
    assert kind_of(np.array([0.5]), [0.5, 1.5]) == CLASSIFICATION
    assert kind_of(np.array([0.5]), None) == REGRESSION
    assert kind_of(np.array([[0.5, 1.0]], dtype=np.float32), None) == REGRESSION
    assert kind_of(np.array([1]), None) == CLASSIFICATION  # clusters, or outliers
    assert kind_of(["a"], None) == CLASSIFICATION
    assert kind_of([1, 2.5, None], None) == REGRESSION
