"""Which workers of this host serve what: published by the workers, read by `python -m model` and the metrics.

Format: in the worker's slot (`JOURNAL_DIR/workers`), a JSON object with `pid`, `ready`, `error`, and `stable`, `canary`
(versions or null), and `generation` and `changed` of the routing that is served.
"""

import logging
import os
from pathlib import Path
from typing import Any

from worker_slot import WorkerSlot

log = logging.getLogger(__name__)


def publish(slot: WorkerSlot, state: dict[str, Any]) -> None:
    """Publish what `Serving.describe` returns. A directory that cannot be written costs only this knowledge."""
    routing = state["routing"] or {}
    status = {"pid": os.getpid(), "ready": state["ready"], "error": state["error"]}
    status |= {name: state[name] and state[name]["version"] for name in ("stable", "canary")}
    status |= {name: routing.get(name) for name in ("generation", "changed")}
    try:
        slot.publish(status)
    except OSError as error:
        log.warning("`python -m model list` will not show what this worker serves: %s", error)


def read(journal_dir: Path) -> list[dict[str, Any]]:
    """Return what the living workers of a service have published."""
    return [status for status in WorkerSlot.read(journal_dir / "workers").values() if status]
