"""GET /readyz answers 200 once all workers of the first start have a model. From then on each answers for itself.

An extension (EXTENSIONS in settings.py). The workers accept from one listener: a load balancer that heard "ready" from
one of them would send requests to those that still load. A worker that comes later, after a death or a reload, does not
accept connections before it has its model, as long as another one has (gunicorn.conf.py).

The workers share memory that gunicorn's master makes: a cell for whether all were ready once; one for how many there
are to be, which the master writes, since signals change it (SIGTTIN, SIGTTOU); then the process ids of workers that
have had a model, by the order of their start. A cell has one writer, but for the first, which only ever becomes 1.
Without gunicorn, or with RELOAD=1, which forgets what the master made, each worker answers for itself. gunicorn: wraps
`manage_workers` of its master.
"""

import mmap
import os
from typing import TYPE_CHECKING, Any

from model.serving import ModelNotReady

if TYPE_CHECKING:
    from flask import Flask

    from server import Service
    from settings import Settings

MAX_WORKERS = 4096  # then the first places are taken again
ALL_WERE, EXPECTED, FIRST = range(3)  # the cells

_cells: memoryview | None = None
_place = 0  # of this worker


def before_fork(settings: "Settings") -> None:
    """Make what the workers share."""
    global _cells
    if not settings.reload:
        _cells = memoryview(mmap.mmap(-1, 4 * (FIRST + MAX_WORKERS))).cast("i")


def master_ready(server: Any) -> None:
    """Let gunicorn's master note how many workers there are to be, before it starts some or ends some."""
    manage_workers = server.manage_workers

    def note_and_manage() -> None:
        if _cells is not None:
            _cells[EXPECTED] = server.num_workers
        manage_workers()

    server.manage_workers = note_and_manage


def worker_starts(worker: Any) -> None:
    """Remember which of gunicorn's workers this is."""
    global _place
    _place = FIRST + worker.age % MAX_WORKERS


def init_app(app: "Flask", service: "Service") -> None:
    """Let readiness depend on all workers."""
    service.serving.on_update.append(note)
    service.on_ready.append(check)
    service.others_serve = others_serve


def note(state: dict[str, Any]) -> None:
    """Note that this worker has a model, and perhaps all; `state` is what `Serving.describe` returns."""
    if _cells is not None and _place and state["ready"]:
        _cells[_place] = os.getpid()
        _all_were()  # now: nobody may ask before one of them is gone (a death)


def check() -> None:
    """Check that all workers of the first start have had their model. Raises: ModelNotReady."""
    if not _all_were():
        raise ModelNotReady("another worker is still loading the model")


def _all_were() -> bool:
    """Return whether all workers have had a model once; those that a signal ends meanwhile are not waited for."""
    if _cells is None or not _place:
        return True
    if not _cells[ALL_WERE] and len(_ready_workers()) >= _cells[EXPECTED]:
        _cells[ALL_WERE] = 1
    return bool(_cells[ALL_WERE])


def others_serve() -> bool:
    """Return whether another worker has a model."""
    return any(pid != os.getpid() for pid in _ready_workers())


def _ready_workers() -> list[int]:
    return [pid for pid in (_cells[FIRST:] if _cells is not None else ()) if pid and _lives(pid)]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
