"""How long calls of a model take: so that slow ones run on a native thread, and none gets more rows than it should."""

from math import inf
from typing import Any

SLOW = 0.002  # seconds of a call, from which on it runs on a native thread; the hand-over costs 0.15 ms
MAX_BATCH_ROWS = 4096  # of one call of the model …
CALL_SECONDS = 0.05  # … and the seconds that it should take at most, or twice what one row takes
# Weight of the newest call in the moving average. A disturbance only makes a call longer, so the average falls fast and
# rises slowly.
_WEIGHT_IF_LESS, _WEIGHT_IF_MORE = 0.5, 0.1
_UNKNOWN = [inf] * 32


class Timings:
    """Seconds per row of a model's calls, by method and by powers of two of their rows: moving averages.

    In a larger call a row takes no longer than in a smaller one. So a size that was not seen yet takes as much per row
    as a smaller one, at most; and an average of smaller calls that is below that of larger ones is out of date.
    """

    def __init__(self) -> None:
        self._tables: dict[str, list[float]] = {}  # method → by the bits of the rows
        self._bounds: dict[str, tuple[int, float]] = {}

    def note(self, method: str, rows: int, seconds: float) -> None:
        """Add a call to the averages."""
        table, at, each = self._tables.setdefault(method, _UNKNOWN.copy()), rows.bit_length(), seconds / rows
        before = table[at] if table[at] < inf else min(each, *table[:at])
        table[at] = before + (_WEIGHT_IF_LESS if each < before else _WEIGHT_IF_MORE) * (each - before)
        for smaller in range(at):
            if table[smaller] < table[at]:
                table[smaller] += _WEIGHT_IF_MORE * (table[at] - table[smaller])
        self._bounds.pop(method, None)

    def expect(self, method: str, rows: int, unknown: float = inf) -> float:
        """Return the seconds that a call will take at most; `unknown` if none was seen that is as small."""
        seconds = rows * min(self._tables.get(method, _UNKNOWN)[: rows.bit_length() + 1])
        return seconds if seconds < inf else unknown

    def bound(self, method: str) -> tuple[int, float]:
        """Return how many rows a call should have at most, and the seconds per row in such a call; 0 if not known."""
        if (found := self._bounds.get(method)) is None:
            table, found, each = self._tables.get(method, _UNKNOWN), (1, 0.0), inf
            seconds = max(CALL_SECONDS, 2 * table[1])
            for bits in range(1, MAX_BATCH_ROWS.bit_length() + 1):
                each = min(each, table[bits])
                if (rows := min(2**bits - 1, MAX_BATCH_ROWS, seconds / each)) >= 2 ** (bits - 1):
                    found = int(rows), each if each < inf else 0.0
            self._bounds[method] = found
        return found

    def describe(self) -> list[dict[str, Any]]:
        """Return the averages as JSON values."""
        return [
            {
                "method": method,
                "rows": f"{2 ** (bits - 1)}-{2**bits - 1}" if bits > 1 else "1",
                "seconds": round(seconds := each * 1.5 * 2 ** (bits - 1) if bits > 1 else each, 6),
                "runs_on": "a native thread" if seconds > SLOW else "the worker's loop",
            }
            for method, table in sorted(self._tables.items())
            for bits, each in enumerate(table)
            if each < inf
        ]
