"""The metrics of feedback: how many predictions turned out wrong, or by how much, of each version and variant.

They are looked up when Prometheus asks, since the ledger has them for all workers of a host (endpoints/ledger.py).
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

if TYPE_CHECKING:
    from endpoints.error_rate import Figures

LABELS = ("model_version", "variant")
COUNTERS = {  # name → the attribute of Figures, the kind of models that have it, and the HELP line
    "receipt_rows": ("predicted_rows", "", "Rows whose answer had a receipt, with which their truth can be sent"),
    "feedback_rows": ("rows", "", "Rows whose truth came"),
    "feedback_wrong_rows": ("wrong", "classification", "Rows whose truth is not what was predicted"),
    "feedback_abs_error": ("abs_error", "regression", "Sum of the absolute errors of the rows whose truth came"),
    "feedback_squared_error": ("squared_error", "regression", "Sum of the squares of these errors"),
}


def families(figures: "Mapping[tuple[str, str], Figures]") -> Iterator[Metric]:
    """Yield the metrics of the figures of each (version, variant).

    Those of a version begin at zero with its first receipt: Prometheus sees no increase in a series that begins at one.
    """
    from endpoints.error_rate import AGE_SECONDS

    for name, (attribute, kind, text) in COUNTERS.items():
        counter = CounterMetricFamily(f"prediction_{name}", text, labels=LABELS)
        for key, each in figures.items():
            if kind in ("", each.kind):
                counter.add_metric(key, getattr(each, attribute))
        yield counter
    text = "Receipts whose truth came, by the time from the prediction to the truth"
    ages = HistogramMetricFamily("prediction_feedback_age_seconds", text, labels=LABELS)
    ends = [*(str(float(seconds)) for seconds in AGE_SECONDS), "+Inf"]
    for key, each in figures.items():
        ages.add_metric(key, list(zip(ends, accumulate(each.ages), strict=True)), each.age_sum)
    yield ages
