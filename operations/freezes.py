"""A freeze kills no worker: a platform may stop all processes for a while, as between two requests.

An extension (EXTENSIONS in settings.py). gunicorn's master looks once a second which worker has not reported for
`timeout` seconds. If it was stopped itself, so were they: then each of them gets that time again, from now on.
gunicorn: wraps `murder_workers` of its master.
"""

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask import Flask

    from server import Service

STOPPED = 3.0  # seconds; a master that did not look for longer was stopped


def init_app(app: "Flask", service: "Service") -> None:
    """Do nothing: gunicorn's master judges the workers."""


def master_ready(server: Any) -> None:
    """Let gunicorn's master grant its workers their time again after a freeze."""
    murder_workers, looked = server.murder_workers, time.monotonic()

    def spare_and_murder() -> None:
        nonlocal looked
        now = time.monotonic()
        if now - looked > STOPPED:
            for worker in server.WORKERS.values():
                with suppress(OSError, ValueError):  # it has just ended
                    worker.tmp.notify()
        looked = now
        murder_workers()

    server.murder_workers = spare_and_murder
