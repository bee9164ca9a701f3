"""Row by row models run on one OpenMP thread; only the very large call of one that cannot be cut may use more.

Gradient boosting enters OpenMP at each tree, and there its threads wait for each other. On two cores beside busy
processes 20 trees for each of ten classes take 365 ms for a row with two threads and 2 ms with one; for 4,096 rows
5,918 and 158 ms. Setting the number costs 1 µs for each library.

threadpoolctl: `lib_controllers` of a `ThreadpoolController`, whose `set_num_threads` counts for the calling thread.
"""

import os
import re
from typing import Any

from threadpoolctl import ThreadpoolController

from model import loaded
from model.timings import MAX_BATCH_ROWS

_libraries: list[Any] = []


def limit_threads(model: Any) -> None:
    """Limit the threads of the OpenMP libraries that are loaded by now, if a worker may use several."""
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        _libraries[:] = ThreadpoolController().select(user_api="openmp").lib_controllers
        if _set_threads not in loaded.before_call:
            loaded.before_call.append(_set_threads)


def _set_threads(model: Any, rows: int) -> None:
    several = re.match(r"[1-9]\d{0,3}", os.environ["OMP_NUM_THREADS"].strip())  # it may be empty, or a list
    threads = int(several[0]) if several and rows > MAX_BATCH_ROWS else 1
    if not hasattr(model, "signatures"):  # a network has much to do for one row
        for library in _libraries:
            library.set_num_threads(threads)
