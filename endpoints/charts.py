"""Line charts as the points of SVG polylines, each with its table. Nothing is drawn here: a template does that.

    chart("Requests", "per second", ["06:00", "06:01", "06:02"], {"success": [4.0, None, 5.5]}, ["06:00", "06:02"])

An SVG of `WIDTH` by `HEIGHT` is stretched to the space that there is, so the labels stand beside it, as HTML, and keep
their size on a phone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 1000, 100  # of the SVG's coordinates; y points down

Values = Sequence[float | None]  # one for each time; None is a gap


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    total: str  # of the whole time, for the legend
    pieces: list[str]  # the points of its polylines: a gap ends one
    dots: list[str]  # the points that have a gap on both sides


@dataclass(frozen=True)
class Chart:
    """A chart, and the same as a table, the latest time first."""

    title: str
    unit: str
    lines: list[Line]
    y_labels: list[str]  # from top to bottom, at equal distances
    x_labels: Sequence[str]  # from left to right, at equal distances
    rows: list[tuple[str, list[str]]]  # a time, and its value of each line


def chart(
    title: str,
    unit: str,
    times: Sequence[str],
    series: Mapping[str, Values],
    x_labels: Sequence[str],
    totals: Mapping[str, str],
) -> Chart:
    """Lay out a chart of lines by name, with a total for each of them."""
    top = max(map(_top, series.values()), default=1.0)
    lines = [Line(name, totals.get(name, ""), *_pieces(values, top)) for name, values in series.items()]
    columns = [_column(values) for values in series.values()]
    rows = [(time, [column[at] for column in columns]) for at, time in enumerate(times)]
    y_labels = [f"{value:,.{_digits(top, 1)}f}" for value in (top, top / 2, 0)]
    return Chart(title, unit, lines, y_labels, x_labels, rows[::-1])


def _column(values: Values) -> list[str]:
    digits = _digits(_top(values), 2)
    return ["–" if each is None else f"{each:,.{digits}f}" for each in values]


def _top(values: Values) -> float:
    """Return the end of an axis: 1, 2, 4, 6, 8 or 10 times a power of ten, whose halves are round too; 1 for zeros."""
    value = max((each for each in values if each is not None), default=0.0)
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 4, 6, 8) if value <= step * power), 10 * power)


def _digits(top: float, more: int) -> int:
    """Return how many decimals to show of values up to `top`: one more digit than it has, or two."""
    return max(0, more - math.floor(math.log10(top)))


def _pieces(values: Values, top: float) -> tuple[list[str], list[str]]:
    """Return the points of polylines, and those of dots."""
    pieces: list[list[str]] = [[]]
    for at, value in enumerate(values):
        if value is None:
            pieces.append([])
        else:
            x, y = WIDTH * at / max(1, len(values) - 1), HEIGHT * (1 - value / top)
            pieces[-1].append(f"{x:.1f},{y:.2f}")
    return [" ".join(piece) for piece in pieces if len(piece) > 1], [piece[0] for piece in pieces if len(piece) == 1]
