"""How long calls of a model take, so that slow ones run on a native thread."""

from typing import Any

SLOW = 0.002  # seconds of a call, from which on it runs on a native thread; the hand-over costs 0.15 ms
# Weight of the newest call in the moving average. A disturbance only makes a call longer, so the average falls fast and
# rises slowly.
_WEIGHT_IF_LESS, _WEIGHT_IF_MORE = 0.5, 0.1


class Timings:
    """How long calls of a model take, by method and by powers of two of their rows: moving averages, in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], float] = {}

    def note(self, method: str, rows: int, seconds: float) -> None:
        """Add a call to the averages."""
        key = method, rows.bit_length()
        before = self._seconds.get(key, seconds)
        self._seconds[key] = before + (_WEIGHT_IF_LESS if seconds < before else _WEIGHT_IF_MORE) * (seconds - before)

    def expect(self, method: str, rows: int) -> float:
        """Return the seconds that a call will take; for a size not seen yet, the most it may take by the others."""
        bits = rows.bit_length()
        if (found := self._seconds.get((method, bits))) is not None:
            return found
        seen = [(size, seconds) for (name, size), seconds in list(self._seconds.items()) if name == method]
        return min((seconds * 2 ** max(0, bits - size) for size, seconds in seen), default=float("inf"))

    def describe(self) -> list[dict[str, Any]]:
        """Return the averages as JSON values."""
        return [
            {
                "method": method,
                "rows": f"{2 ** (bits - 1)}-{2**bits - 1}" if bits > 1 else "1",
                "seconds": round(seconds, 6),
                "runs_on": "a native thread" if seconds > SLOW else "the worker's loop",
            }
            for (method, bits), seconds in sorted(self._seconds.items())
        ]
