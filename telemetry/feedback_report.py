"""The prediction errors in the report: those of the rows whose truth came within its time, by version and variant."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from endpoints.error_rate import CLASSIFICATION, REGRESSION, Figures
from endpoints.ledger import Ledger


class PredictionErrors:
    """The sums of the journal's feedback records."""

    def __init__(self) -> None:
        self._figures: dict[tuple[str, str], Figures] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Count a record. Raises: KeyError, TypeError, ValueError, it lacks something."""
        sums: dict[str, float] = {"rows": int(record["rows"])}
        sums |= {name: int(record[name] or 0) for name in ("wrong", "unknown_labels")}
        sums |= {name: float(record[name] or 0) for name in ("abs_error", "sq_error", "signed_error")}
        if not 0 <= sums["wrong"] <= sums["rows"]:
            raise ValueError("more rows are wrong than there are")
        key, age = (record["model_version"], record["variant"]), float(record["age"])
        kind = REGRESSION if record["wrong"] is None else CLASSIFICATION
        self._figures.setdefault(key, Figures(kind)).add(sums, age)

    def table(self, directory: Path) -> list[tuple[str, str]]:
        """Return the lines of the report; coverage is known to the ledger beside the journal in this directory."""
        since_served: dict[tuple[str, str], Figures] = {}
        with suppress(OSError):
            since_served = Ledger(directory, lambda record: None).figures()
        lines = []
        for key, figures in sorted(self._figures.items()):
            known = since_served.get(key)
            found = {
                **_errors(figures),
                "labelled rows": f"{figures.rows}",
                "coverage since first served": f"{100 * known.coverage:.2f} %" if known else "",
                "age of the labels": _duration(figures.age_sum / figures.entries),
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
