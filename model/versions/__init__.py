"""Versions of the model in a store (`MODEL_DIR`): published, promoted, tried as a canary and rolled back while serving.

python -m model --help
"""

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from server import Service


def init_app(app: "Flask", service: "Service") -> None:
    """Serve from the version store, unless MODEL_PATH names a file; and publish what each worker serves."""
    from worker_slot import slot_of

    from .guard import Guard
    from .watcher import StoreWatcher
    from .worker_status import publish

    settings = service.settings
    if settings.model_path is None:
        service.serving.source = StoreWatcher(settings.model_dir, settings.journal_dir)
        service.every_second.append(partial(Guard(settings.journal_dir, settings.model_dir).watch, service))
    service.serving.on_update.append(partial(publish, slot_of(app, service)))
