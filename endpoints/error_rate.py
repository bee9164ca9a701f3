"""Figures of the prediction error rate, and how sure they are: from counts and sums, without a row or a prediction.

low, high = wilson(wrong=12, n=400)
Figures("classification", predicted_rows=1000, rows=400, wrong=12).describe()
"""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

Z = 1.96  # standard errors on both sides of a 95 % interval
CLASSIFICATION, REGRESSION = "classification", "regression"

# Upper ends of the buckets in which the ages of truths are counted: a minute, an hour, … thirty days.
AGE_SECONDS = (60, 3600, 6 * 3600, 86_400, 3 * 86_400, 7 * 86_400, 14 * 86_400, 30 * 86_400)


def wilson(wrong: float, n: float, z: float = Z) -> tuple[float, float]:
    """Return the Wilson score interval of a share, `wrong` of `n`; (0, 1) for n = 0.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927. Unlike `p ± z·s` it stays
    within 0 and 1, and holds for few rows and small shares.
    """
    if not n:
        return 0.0, 1.0
    share, square = wrong / n, z * z / n
    centre = share + square / 2
    spread = z * math.sqrt(share * (1 - share) / n + square / n / 4)
    low, high = (centre - spread) / (1 + square), (centre + spread) / (1 + square)
    return 0.0 if not wrong else max(0.0, low), 1.0 if wrong == n else min(1.0, high)


def mean_interval(total: float, total_of_squares: float, n: float, z: float = Z) -> tuple[float, float]:
    """Return the interval of a mean from the sum of n values and of their squares; all numbers for n < 2."""
    if n < 2:
        return -math.inf, math.inf
    mean = total / n
    variance = max(0.0, total_of_squares / n - mean * mean) * n / (n - 1)
    spread = z * math.sqrt(variance / n)
    return mean - spread, mean + spread


@dataclass
class Figures:
    """What is known of the predictions of one version and variant, on one host.

    Rows are labelled rows: those whose truth came, and was not null. Of a multi-output regression, a row's errors are
    the means over its outputs.
    """

    kind: str = ""  # CLASSIFICATION or REGRESSION; "" if nothing was predicted yet
    predicted_rows: int = 0  # that were answered with a receipt, since the version was first served
    rows: int = 0
    wrong: int = 0  # classification: rows whose truth is not the prediction
    unknown_labels: int = 0  # classification: those of them whose truth is a label that the model does not know
    abs_error: float = 0.0  # regression: the sum over rows of |prediction - truth| …
    squared_error: float = 0.0  # … of its square …
    signed_error: float = 0.0  # … and with its sign
    entries: int = 0  # accepted receipts
    age_sum: float = 0.0  # of their ages when the truth came, in seconds
    ages: list[int] = field(default_factory=lambda: [0] * (len(AGE_SECONDS) + 1))  # by bucket; the last beyond them all

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Figures":
        """Return the figures of a stored object. Fields that a later release added are ignored, after a rollback."""
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})

    def add(self, sums: Mapping[str, Any], age: float) -> None:
        """Add a receipt's sums, by the names that they have in its record, and its age in seconds; None counts as 0."""
        self.rows += sums["rows"]
        self.wrong += sums["wrong"] or 0
        self.unknown_labels += sums["unknown_labels"] or 0
        self.abs_error += sums["abs_error"] or 0.0
        self.squared_error += sums["sq_error"] or 0.0
        self.signed_error += sums["signed_error"] or 0.0
        self.entries += 1
        self.age_sum += age
        self.ages[bisect.bisect_left(AGE_SECONDS, age)] += 1

    @property
    def coverage(self) -> float:
        """Return labelled rows ÷ rows predicted with a receipt, at most 1: a truth may come to another host."""
        return min(1.0, self.rows / self.predicted_rows) if self.predicted_rows else float(self.rows > 0)

    def describe(self) -> dict[str, Any]:
        """Return what GET /model shows, as JSON values; None for what is not known yet."""
        found: dict[str, Any] = {"rows": self.rows, "coverage": self.coverage}
        n = self.rows or math.nan
        if self.kind == REGRESSION:
            mae_low, mae_high = mean_interval(self.abs_error, self.squared_error, self.rows)
            bias_low, bias_high = mean_interval(self.signed_error, self.squared_error, self.rows)
            found |= {"mae": self.abs_error / n, "mae_low": max(0.0, mae_low), "mae_high": mae_high}
            found |= {"rmse": math.sqrt(self.squared_error / n), "bias": self.signed_error / n}
            found |= {"bias_low": bias_low, "bias_high": bias_high}
            if self.rows < 2:
                found["mae_low"] = None
        else:
            low, high = wilson(self.wrong, self.rows) if self.rows else (math.nan, math.nan)
            found |= {"error_rate": self.wrong / n, "low": low, "high": high, "unknown_labels": self.unknown_labels}
        return {name: None if value is None or not math.isfinite(value) else value for name, value in found.items()}
