"""Versions of the model in a store (`MODEL_DIR`): published, promoted, tried as a canary and rolled back while serving.

python -m model --help
"""

import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from history import History
from worker_slot import WorkerSlot, slot_of

if TYPE_CHECKING:
    from flask import Flask

    from server import Service

log = logging.getLogger(__name__)


def init_app(app: "Flask", service: "Service") -> None:
    """Serve from the version store, unless MODEL_PATH names a file; and publish what each worker serves."""
    from .guard import Guard
    from .watcher import StoreWatcher

    settings = service.settings
    if settings.model_path is None:
        service.serving.source = StoreWatcher(settings.model_dir, settings.journal_dir)
        guard = Guard(settings.journal_dir, settings.model_dir, History(settings).note)
        service.every_second.append(partial(guard.watch, service))
        service.serving.on_describe.append(partial(guard.describe, service))
    service.serving.on_update.append(partial(publish_status, slot_of(app, service)))


def publish_status(slot: WorkerSlot, state: dict[str, Any]) -> None:
    """Publish in a worker's slot what it serves; a directory that cannot be written costs only this knowledge.

    Format: a JSON object with `pid`, `ready`, `error`, and `stable`, `canary` (versions or null), and `generation` and
    `changed` of the routing that is served.

    Args:
        slot: of this worker.
        state: what `Serving.describe` returns.
    """
    routing = state["routing"] or {}
    status = {"pid": os.getpid(), "ready": state["ready"], "error": state["error"]}
    status |= {name: state[name] and state[name]["version"] for name in ("stable", "canary")}
    status |= {name: routing.get(name) for name in ("generation", "changed")}
    try:
        slot.publish(status)
    except OSError as error:
        log.warning("`python -m model list` will not show what this worker serves: %s", error)


def worker_statuses(journal_dir: Path) -> list[dict[str, Any]]:
    """Return what the living workers of a service have published."""
    return [status for status in WorkerSlot.read(journal_dir / "workers").values() if status]
