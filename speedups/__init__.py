"""Code that makes the server faster by reaching into other libraries. The server runs without any of it.

Each file opens with what it saves and which internals it relies on. It checks them when it is switched on; if they are
not as expected it is left off, and the library's own way is used. `python -m bench.cost --without speedups` measures
without all of them; the figures are medians of processor time, from Python 3.11 on a shared core.
"""

import logging
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask import Flask

    from server import Service

log = logging.getLogger(__name__)

WORKER_CLASSES = {"gevent": "speedups.gevent_worker.Worker"}  # by WORKER_CLASS; gunicorn.conf.py looks here


class UnexpectedInternals(Exception):
    """A library is not as a speedup expects. The message names what differs."""


def switch_on(name: str, function: str, *arguments: Any) -> Any:
    """Call the function that switches on the speedup of this name. If it fails, log that, and go on without."""
    try:
        return getattr(import_module(f"speedups.{name}"), function)(*arguments)
    except Exception as error:
        log.warning("%s is left off, since a library is not as it expects: %r", name, error)


import_sklearn = partial(switch_on, "lean_imports", "import_sklearn")
skip_validation = partial(switch_on, "sklearn_checks", "skip_validation")
limit_threads = partial(switch_on, "openmp", "limit_threads")


def init_app(app: "Flask", service: "Service") -> None:
    """Switch on what concerns requests and models; what concerns connections, gunicorn's `worker_class` does."""
    from model.formats import sklearn

    switch_on("slim_flask", "slim", app)
    app.extensions.setdefault("on_fast_path_difference", [])  # hooks, called when the fast path turns itself off
    if import_sklearn not in sklearn.before_import:  # there may be several applications in a process
        sklearn.before_import.append(import_sklearn)
        sklearn.after_load += skip_validation, limit_threads
