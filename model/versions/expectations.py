"""What a version is expected to do in service, fixed when it is published: how often it errs, and what it predicts."""

import math
from collections import Counter
from typing import Any

import numpy as np

from .store import StoreError

ROWS_PER_BIN = 20  # of the sample; with fewer, chance alone makes the shares of the bins differ
MAX_QUANTILE_BINS, MAX_CLASS_BINS = 10, 50


def error_bound(given: float | None, metrics: Any, classes: Any) -> float | None:
    """Return the error from which on a version alerts: a share of wrong rows, or a mean absolute error.

    Args:
        given: by the operator; without it the published metrics count, `error_rate` or `accuracy`, or for a model
            without classes `mae` or `mean_absolute_error`.
        metrics: any JSON value.
        classes: of the model, None for a regression.

    Returns None if nothing says. Raises: StoreError, what was given is no such number.
    """
    if given is not None:
        if not 0 <= given < math.inf or (classes is not None and given > 1):
            form = "the share of wrong rows, from 0 to 1" if classes is not None else "a mean absolute error, 0 or more"
            raise StoreError(f"--error-bound {given:g}: expected {form}")
        return given
    names = ("error_rate", "accuracy") if classes is not None else ("mae", "mean_absolute_error")
    for name in names if isinstance(metrics, dict) else ():
        value = metrics.get(name)
        if type(value) in (int, float) and value >= 0 and (classes is None or value <= 1):
            return round(1 - value, 12) if name == "accuracy" else float(value)
    return None


def reference(predictions: Any, classes: Any) -> dict[str, Any] | None:
    """Return how the predictions for a sample are distributed, to compare those in service with; None for a few rows.

    Args:
        predictions: as `LoadedModel.call` returns them, one value per row.
        classes: of the model, None if it has none.

    Returns:
        `classes`, the labels that were predicted most often, or `edges`, the inner ends of ten quantile bins, each of
        which begins with its lower end; and `counts`, the rows of each and, last, of everything else. There are fewer
        bins for a small sample. None as well for a model with several outputs.
    """
    bins = len(predictions) // ROWS_PER_BIN
    values = predictions.tolist() if isinstance(predictions, np.ndarray) else predictions
    if bins < 2 or isinstance(values, tuple) or any(isinstance(value, (list, dict)) for value in values):
        return None
    numbers = [value for value in values if type(value) in (int, float) and math.isfinite(value)]
    labels = Counter(value for value in values if value is not None and value == value)
    is_whole = not any(type(value) is float for value in numbers)
    if classes is None and numbers and (not is_whole or len(labels) > bins):
        quantiles = np.arange(1, min(bins, MAX_QUANTILE_BINS)) / min(bins, MAX_QUANTILE_BINS)
        edges = np.unique(np.quantile(numbers, quantiles, method="inverted_cdf"))
        found = np.bincount(np.searchsorted(edges, numbers, side="right"), minlength=len(edges) + 1)
        return {"edges": edges.tolist(), "counts": [*found.tolist(), len(values) - len(numbers)]}
    common = labels.most_common(min(bins, MAX_CLASS_BINS))
    counts = [count for _, count in common]
    return {"classes": [label for label, _ in common], "counts": [*counts, len(values) - sum(counts)]}
