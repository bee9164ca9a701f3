"""A model that takes as many seconds to load as it was given, and for a row as many as it holds."""

import time
from typing import Any


class Slow:
    """Sleeps."""

    n_features_in_ = 1

    def __init__(self, loads: float = 0.0) -> None:
        self.loads = loads

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        time.sleep(self.loads)

    def predict(self, rows: Any) -> Any:
        """Return the rows' numbers after that time."""
        if rows[0][0] > 0:  # not NaN, which gevent would sleep for ever
            time.sleep(float(rows[0][0]))
        return rows[:, 0]
