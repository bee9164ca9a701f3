"""The figures of the monitor page: what telemetry's roll-ups add up to in a time, in steps, by version and by user."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endpoints.charts import Chart, Values, chart
from endpoints.error_rate import CLASSIFICATION, REGRESSION, Figures

if TYPE_CHECKING:
    from telemetry.rollups import Sums

MINUTE, HOUR, DAY = 60, 3600, 86_400  # seconds
KEPT = 35 * DAY
LATE = 10  # seconds; so often workers write what they have counted
STEPS = ((2 * HOUR, MINUTE), (DAY, 5 * MINUTE), (14 * DAY, HOUR), (KEPT, 6 * HOUR))  # how long a time may be, its step
SUCCESS, OTHER = "success", "other"  # errors beyond those that a roll-up names are others
TRAILING = 12  # steps; a single one may see few truths
VARIANTS = ("stable", "canary")
QUANTILES = {"p50": 0.5, "p99": 0.99}
OUTCOMES = (SUCCESS, "client", "auth", "model", "overload", "internal", OTHER)


@dataclass(frozen=True)
class Span:
    """The time that is shown, in steps."""

    name: str
    until: float  # seconds since 1970
    step: int  # seconds
    starts: list[int]  # of the steps, in seconds since 1970; the last one is under way

    @classmethod
    def last(cls, name: str, seconds: float, until: float) -> "Span":
        """Return the last so many seconds, of those for which roll-ups are kept."""
        seconds = min(seconds, KEPT)
        step = next(step for longest, step in STEPS if seconds <= longest)
        end = int(until // step) * step
        return cls(name, until, step, [end - step * back for back in range(max(2, round(seconds / step)))][::-1])

    def seconds(self, start: int) -> float | None:
        """Return how long a step is, or has been so far; None if its requests cannot all be known."""
        elapsed = self.until - start
        return min(elapsed, self.step) if elapsed >= MINUTE + LATE else None

    def label(self, start: float) -> str:
        """Return a time as tables show it, in UTC."""
        return time.strftime("%H:%M" if self.step == MINUTE else "%d %b %H:%M", time.gmtime(start))

    @property
    def x_labels(self) -> list[str]:
        """Return five times at equal distances, as charts show them."""
        form, first, last = "%H:%M" if self.step < HOUR else "%d %b", self.starts[0], self.starts[-1]
        return [time.strftime(form, time.gmtime(first + (last - first) * part / 4)) for part in range(5)]


@dataclass
class Traffic:
    """The sums of a span: in total, by version and variant, by step, and by variant and step."""

    span: Span
    total: "Sums"
    versions: dict[tuple[str, str], "Sums"]  # by (version, variant), the most asked first
    steps: dict[int, "Sums"]  # by the start of the step
    variants: dict[str, dict[int, "Sums"]]

    @classmethod
    def read(cls, directory: Path, span: Span) -> "Traffic":
        """Read them from JOURNAL_DIR."""
        from telemetry.rollups import Sums, read

        found = cls(span, Sums(), {}, {}, {})
        for key, steps in read(directory, span.starts[0], span.until, span.step).items():
            version, by_variant = Sums(), found.variants.setdefault(key[1], {})
            for start, sums in steps.items():
                version.add(sums)
                for by_step in (found.steps, by_variant):
                    by_step.setdefault(start, Sums()).add(sums)
            found.total.add(version)
            if version.requests or version.feedback:
                found.versions[key] = version
        found.versions = dict(sorted(found.versions.items(), key=lambda item: -item[1].requests))
        return found

    @property
    def rate(self) -> float:
        """Return requests per second since the first, which is known to the minute, or as exactly as it was kept."""
        return self.total.requests / max(MINUTE, self.span.until - max(self.total.first, self.span.starts[0]))

    @property
    def first(self) -> float:
        """Return the step with the first requests, or the beginning of the span."""
        return min(self.steps, default=self.span.starts[0])

    def series(self) -> dict[str, Any]:
        """Return the values of each step as JSON values: counts of requests, and response times in milliseconds.

        The prediction error, of the truths that came in the `TRAILING` steps until then, is the share of wrong rows, or
        the mean absolute error. What is not known is None.
        """
        starts = self.span.starts
        counts = [outcomes(self.steps[start]) if start in self.steps else Counter[str]() for start in starts]
        times = {name: [_milliseconds(self.steps.get(start), q) for start in starts] for name, q in QUANTILES.items()}
        found = {"step": self.span.step, "time": starts, "milliseconds": times}
        found["requests"] = {name: [each[name] for each in counts] for name in OUTCOMES}
        for variant in VARIANTS:
            steps = [self.variants.get(variant, {}).get(start) for start in starts]
            found[variant] = {
                "requests": [each.requests if each else 0 for each in steps],
                "errors": [each.requests - each.success if each else 0 for each in steps],
                "p99_milliseconds": [_milliseconds(each, QUANTILES["p99"]) for each in steps],
                "prediction_error": _prediction_errors(steps),
            }
        return found

    def charts(self) -> list[Chart]:
        """Lay out the charts of the span."""
        found, counts = self.series(), outcomes(self.total)
        kinds = [name for name in OUTCOMES if counts[name] or name == SUCCESS]
        all_requests = [sum(step) for step in zip(*found["requests"].values(), strict=True)]
        totals = {name: f"{counts[name]:,}" for name in kinds}
        rates = {name: self._rates(found["requests"][name]) for name in kinds}
        errors = {name: _percent(found["requests"][name], all_requests) for name in kinds if name != SUCCESS}
        quantiles = {name: as_milliseconds(self.total.quantile(q)) for name, q in QUANTILES.items()}
        charts: list[tuple[str, str, dict[str, Values], dict[str, str]]] = [
            ("Requests", "per second", rates, totals),
            ("Response time", "ms", found["milliseconds"], quantiles),
            ("Errors by type", "% of requests", errors, totals),
        ]
        variants = {name: found[name] for name in VARIANTS if name in self.variants}
        if len(variants) > 1:
            shares = {name: _percent(each["errors"], each["requests"]) for name, each in variants.items()}
            times = {name: each["p99_milliseconds"] for name, each in variants.items()}
            charts += [("Errors, stable beside canary", "% of requests", shares, {})]
            charts += [("p99, stable beside canary", "ms", times, {})]
        if self.total.feedback:
            wrong = {name: each["prediction_error"] for name, each in variants.items()}
            title, unit = "Mean absolute error", "of the rows whose truth came"
            if not self.total.feedback.get("regressions"):
                title, unit = "Wrong predictions", f"% {unit}"
                wrong = {name: [each and 100 * each for each in values] for name, values in wrong.items()}
            charts += [(title, f"{unit}, within {duration(TRAILING * self.span.step)}", wrong, {})]
        labels = [self.span.label(start) for start in self.span.starts]
        return [chart(title, unit, labels, lines, self.span.x_labels, texts) for title, unit, lines, texts in charts]

    def _rates(self, counts: list[int]) -> Values:
        """Return counts per second, from the first step with requests on."""
        found: list[float | None] = []
        for start, count in zip(self.span.starts, counts, strict=True):
            seconds = self.span.seconds(start) if start >= self.first else None
            found.append(None if seconds is None else count / seconds)
        return found


def outcomes(sums: "Sums") -> Counter[str]:
    """Return requests by outcome: success, or the type of the error."""
    found = Counter({SUCCESS: sums.success})
    for error, count in sums.errors.items():
        kind = error.partition(" ")[0]
        found[kind if kind in OUTCOMES else OTHER] += count
    return found


def prediction_error(feedback: Mapping[str, float]) -> Figures:
    """Return how the predictions turned out whose truth came; of 0 rows if none did."""
    names = ("rows", "wrong", "unknown_labels", "abs_error", "sq_error", "signed_error")
    found = Figures(REGRESSION if feedback.get("regressions") else CLASSIFICATION)
    found.add({name: feedback.get(name, 0) for name in names}, 0.0)
    return found


def _prediction_errors(steps: list["Sums | None"]) -> Values:
    found = []
    for at in range(len(steps)):
        recent = Counter[str]()
        for each in filter(None, steps[max(0, at + 1 - TRAILING) : at + 1]):
            recent.update(each.feedback)
        error = prediction_error(recent).describe()
        found.append(error["mae"] if "mae" in error else error["error_rate"])
    return found


def error_text(sums: "Sums") -> tuple[str, str]:
    """Return the prediction error as words, and its 95 % interval; "–", and why, if no truth came."""
    figures = prediction_error(sums.feedback)
    found, n = figures.describe(), f"n\u00a0=\u00a0{figures.rows:,.0f}"
    if not figures.rows:
        return "–", "no truth came"
    if figures.kind == REGRESSION:
        low, high = ("?" if found[name] is None else f"{found[name]:.4g}" for name in ("mae_low", "mae_high"))
        return f"{found['mae']:.4g}", f"{low} to {high}, {n}"
    rate, low, high = (f"{100 * found[name]:.2f}" for name in ("error_rate", "low", "high"))
    return f"{rate} %", f"{low} to {high} %, {n}"


def utc(at: float) -> str:
    """Return a time as words."""
    return time.strftime("%d %b %H:%M:%S", time.gmtime(at))


def duration(seconds: float) -> str:
    """Return a time as words, such as `3 h`."""
    for unit, length in (("days", DAY), ("h", HOUR), ("min", MINUTE)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def as_milliseconds(seconds: float | None) -> str:
    """Return a time as words."""
    return "–" if seconds is None else f"{1000 * seconds:,.2f} ms"


def as_percent(part: int, whole: int) -> str:
    """Return a share as words, never 100 % of less than all."""
    if not whole:
        return "–"
    share = 100 * part / whole
    return f"{share if part in (0, whole) else min(max(share, 0.01), 99.99):.2f} %"


def _milliseconds(sums: "Sums | None", q: float) -> float | None:
    seconds = sums.quantile(q) if sums else None
    return None if seconds is None else 1000 * seconds


def _percent(parts: list[int], wholes: list[int]) -> Values:
    return [100 * part / whole if whole else None for part, whole in zip(parts, wholes, strict=True)]
