"""The figures: intervals as in the textbooks, and they cover the true rate as often as they should."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from endpoints.error_rate import CLASSIFICATION, REGRESSION, Figures, mean_interval, wilson


@pytest.mark.parametrize("n", [1, 2, 10, 200, 10_000])
def test_interval_of_a_share_is_wilsons(n: int) -> None:
    for wrong in {0, 1, n // 7, n // 2, n - 1, n}:
        expected = binomtest(wrong, n).proportion_ci(method="wilson")
        assert wilson(wrong, n) == pytest.approx((expected.low, expected.high), abs=2e-5)  # its z has more digits
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_interval_covers_the_true_rate_on_most_days(rate: float) -> None:
    wrong = np.random.default_rng(7).binomial(600, rate, size=400)
    covered = [low <= rate <= high for low, high in (wilson(int(each), 600) for each in wrong)]
    assert np.mean(covered) >= 0.93


def test_interval_of_a_mean_covers_the_true_mean_on_most_days() -> None:
    days = np.random.default_rng(8).normal(0.5, 2.0, size=(400, 300))
    covered = [
        low <= 0.5 <= high
        for low, high in (mean_interval(float(day.sum()), float((day**2).sum()), len(day)) for day in days)
    ]
    assert np.mean(covered) >= 0.93


def test_interval_of_a_mean_is_that_of_the_standard_error() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    low, high = mean_interval(float(values.sum()), float((values**2).sum()), 4)
    spread = 1.96 * values.std(ddof=1) / 2
    assert (low, high) == pytest.approx((values.mean() - spread, values.mean() + spread))
    assert mean_interval(3.0, 9.0, 1) == (-math.inf, math.inf)


def test_what_is_not_known_yet_is_none() -> None:
    unknown = {"rows": 0, "coverage": 0.0, "error_rate": None, "low": None, "high": None, "unknown_labels": 0}
    assert Figures().describe() == Figures(CLASSIFICATION, predicted_rows=7).describe() == unknown
    regression = Figures(REGRESSION).describe()
    assert (regression.pop("rows"), regression.pop("coverage")) == (0, 0.0)
    assert set(regression) == {"mae", "mae_low", "mae_high", "rmse", "bias", "bias_low", "bias_high"}
    assert set(regression.values()) == {None}
    one = Figures(REGRESSION, 1, 1, abs_error=2.0, squared_error=4.0, signed_error=-2.0).describe()
    assert (one["mae"], one["mae_low"], one["mae_high"], one["rmse"], one["bias"]) == (2.0, None, None, 2.0, -2.0)


def test_coverage_is_never_above_one() -> None:
    assert Figures(predicted_rows=3, rows=5).coverage == 1.0  # the truth came to another host than the rows
    assert Figures(predicted_rows=0, rows=5).coverage == 1.0
    assert Figures(predicted_rows=8, rows=2).coverage == 0.25
