"""The prediction errors in the report: those of the rows whose truth came within its time, by version and variant."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from endpoints.error_rate import CLASSIFICATION, REGRESSION, Figures
from endpoints.ledger import Ledger


def prediction_errors(
    feedback: Mapping[tuple[str, str], Mapping[str, float]], directory: Path
) -> list[tuple[str, ...]]:
    """Return the lines of the report about feedback by version and variant, as rollups.Sums adds it up.

    Coverage is known to the ledger beside the journal in this directory.
    """
    since_served: dict[tuple[str, str], Figures] = {}
    with suppress(OSError):
        since_served = Ledger(directory, lambda record: None).figures()
    lines: list[tuple[str, ...]] = []
    for key, sums in sorted((key, sums) for key, sums in feedback.items() if sums):
        figures, known = Figures(REGRESSION if sums["regressions"] else CLASSIFICATION), since_served.get(key)
        figures.add(sums, 0.0)
        found = {
            **_errors(figures),
            "labelled rows": f"{figures.rows}",
            "coverage since first served": f"{100 * known.coverage:.2f} %" if known else "",
            "age of the labels": _duration(sums["age"] / sums["entries"]),
        }
        lines += [(f"{name}, {' '.join(key)}", value) for name, value in found.items() if value]
    return lines


def _errors(figures: Figures) -> dict[str, str]:
    found = figures.describe()
    if figures.rows < 2:  # no mean, or none with an interval
        return {}
    if figures.kind == REGRESSION:
        return {
            "mean absolute error": "{mae:.4g} ({mae_low:.4g} to {mae_high:.4g})".format_map(found),
            "RMSE": "{rmse:.4g}".format_map(found),
            "bias": "{bias:.4g} ({bias_low:.4g} to {bias_high:.4g})".format_map(found),
        }
    percents = {name: 100 * found[name] for name in ("error_rate", "low", "high")}
    return {
        "prediction errors": "{error_rate:.2f} % ({low:.2f} to {high:.2f} %)".format_map(percents),
        "labels unknown to the model": f"{figures.unknown_labels or ''}",
    }


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
