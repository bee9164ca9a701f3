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
    from settings import Settings

log = logging.getLogger(__name__)


def init_app(app: "Flask", service: "Service") -> None:
    """Serve from the version store, or the file that MODEL_PATH names; and publish what each worker serves."""
    from .guard import Guard
    from .single_file import KeptFile
    from .watcher import StoreWatcher

    settings = service.settings
    if settings.model_path is not None:
        service.serving.source = KeptFile(settings.model_path, settings.model_sample)
    else:
        service.serving.source = StoreWatcher(settings.model_dir, settings.journal_dir)
        guard = Guard(settings.journal_dir, settings.model_dir, History(settings).note)
        service.every_second.append(partial(guard.watch, service))
        service.serving.on_describe.append(partial(guard.describe, service))
    store = None if settings.model_path else os.path.realpath(settings.model_dir)
    service.serving.on_update.append(partial(publish_status, slot_of(app, service), store))


def before_fork(settings: "Settings") -> None:
    """Keep the file that MODEL_PATH names, for workers that start later."""
    from .kept_file import keep

    keep(settings)


on_reload = before_fork  # the workers that start from now on serve what the file holds now


def publish_status(slot: WorkerSlot, store: str | None, state: dict[str, Any]) -> None:
    """Publish in a worker's slot what it serves; a directory that cannot be written costs only this knowledge.

    Format: a JSON object with `pid`, `ready`, `error`, and `stable`, `canary` (versions or null), and `generation` and
    `changed` of the routing that is served; `store`, the path of the version store, null if a file is served; and
    `sha256`, the checksums of the files that are served, the stable version's first.

    Args:
        slot: of this worker.
        store: the path of the version store, None for a file.
        state: what `Serving.describe` returns.
    """
    routing = state["routing"] or {}
    status = {"pid": os.getpid(), "ready": state["ready"], "error": state["error"], "store": store}
    status |= {name: state[name] and state[name]["version"] for name in ("stable", "canary")}
    status["sha256"] = [state[name].get("sha256") for name in ("stable", "canary") if state[name]]
    status |= {name: routing.get(name) for name in ("generation", "changed")}
    try:
        slot.publish(status)
    except OSError as error:
        log.warning("`python -m model list` will not show what this worker serves: %s", error)


def living_workers(journal_dir: Path) -> list[dict[str, Any]]:
    """Return what the living workers of a service have published; {} for one that still loads."""
    return list(WorkerSlot.read(journal_dir / "workers").values())


def worker_statuses(journal_dir: Path) -> list[dict[str, Any]]:
    """Return what the living workers of a service have published."""
    return [status for status in living_workers(journal_dir) if status]
