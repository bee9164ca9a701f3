"""Code that makes the server faster by reaching into other libraries. The server runs without any of it.

Each file opens with what it saves and which internals it relies on. It checks them when it is switched on; if they are
not as expected it is left off (`optional`), and the library's own way is used. `python -m bench.speedups` measures
with and without; the figures are medians of processor time, from Python 3.11 on a shared core.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask import Flask

    from server import Service

log = logging.getLogger(__name__)

WORKER_CLASSES = {"gevent": "speedups.gevent_worker.Worker"}  # by WORKER_CLASS; gunicorn.conf.py looks here


def init_app(app: "Flask", service: "Service") -> None:
    """Switch on what concerns requests and models; what concerns connections, gunicorn's `worker_class` does."""
    from model.formats import sklearn

    with optional("slim_flask"):
        from .slim_flask import slim

        slim(app)
    if _import_sklearn not in sklearn.before_import:  # there may be several applications in a process
        sklearn.before_import.append(_import_sklearn)
        sklearn.after_load.append(_skip_validation)


def _import_sklearn() -> None:
    with optional("lean_imports"):
        from .lean_imports import import_sklearn

        import_sklearn()


def _skip_validation(model: Any) -> None:
    with optional("sklearn_checks"):
        from .sklearn_checks import skip_validation  # imports scikit-learn

        skip_validation(model)


class UnexpectedInternals(Exception):
    """A library is not as a speedup expects. The message names what differs."""


@contextmanager
def optional(name: str) -> Iterator[None]:
    """Log an error of the code inside, which switches on the speedup of this name, and go on without it."""
    try:
        yield
    except Exception as error:
        log.warning("%s is left off, since a library is not as it expects: %r", name, error)
