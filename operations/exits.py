"""What ended workers that nobody asked to end: counted for GET /metrics, logged, and recorded in the journal.

    prediction_worker_exits_total{reason="killed"} 3

An extension (EXTENSIONS in settings.py). Only gunicorn's master learns how a worker ended. It counts since its own
start and writes JOURNAL_DIR/workers/exits.json, which every worker reads for GET /metrics. The worker that is started
next records the event. gunicorn: wraps `reap_workers` and `manage_workers` of its master.
"""

import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import TIMED_OUT, LogLimit
from shared_files import replace_file
from worker_slot import WorkerSlot, slot_of

if TYPE_CHECKING:
    from flask import Flask
    from prometheus_client import Metric

    from server import Service
    from settings import Settings

# Why a worker ended: by a signal, as the kernel sends it when memory is short; by a fault in native code; at
# PREDICT_TIMEOUT; by gunicorn, since its loop was blocked for WORKER_TIMEOUT; or by an exception.
REASONS = KILLED, CRASHED, PREDICT_TIMEOUT, HANG, ERROR = "killed", "crashed", "predict_timeout", "hang", "error"
FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
ASKED_FOR = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT}

log = logging.getLogger(__name__)

_limit = LogLimit(log, 3600.0)
_file = Path()
_deaths: list[dict[str, Any]] = []  # since the master forked last; in a worker, those that it is to record


def before_fork(settings: "Settings") -> None:
    """Remember where to write the counts."""
    global _file
    _file = settings.journal_dir / "workers/exits.json"


def master_ready(server: Any) -> None:
    """Count how the workers of gunicorn's master end, and write that and how many it is to have."""
    exits = dict.fromkeys(REASONS, 0)
    written: dict[str, Any] = {}
    reap_workers, manage_workers, waitpid = server.reap_workers, server.manage_workers, os.waitpid

    def noting_waitpid(pid: int, options: int) -> tuple[int, int]:
        ended, status = waitpid(pid, options)
        worker = server.WORKERS.get(ended)
        if worker and (reason := reason_of(status, worker.aborted)):
            exits[reason] += 1
            log.error("worker (pid %s) died: %s", ended, reason)  # to gunicorn, most signals are warnings
            _deaths.append({"event": "worker_exit", "reason": reason, "worker_pid": ended})
        return ended, status

    def reap_and_note() -> None:
        os.waitpid = noting_waitpid  # the master has one thread
        try:
            reap_workers()
        finally:
            os.waitpid = waitpid

    def write_and_manage() -> None:  # once a second, and after each death; no longer when the server stops
        nonlocal written
        state = {"configured": server.num_workers, "exits": dict(exits)}
        if state != written and _write(state):
            written = state
        manage_workers()

    server.reap_workers, server.manage_workers = reap_and_note, write_and_manage
    os.register_at_fork(after_in_parent=_deaths.clear)


def reason_of(status: int, aborted: bool) -> str:
    """Return why a worker ended, one of REASONS, or "" if it was asked to.

    Args:
        status: what `os.waitpid` returned.
        aborted: whether gunicorn ended it because its loop was blocked.
    """
    code = os.waitstatus_to_exitcode(status)
    if aborted:
        return HANG
    if code == 0 or -code in ASKED_FOR:
        return ""
    if code == TIMED_OUT:
        return PREDICT_TIMEOUT
    if code > 0:
        return ERROR
    return CRASHED if -code in FAULTS else KILLED


def _write(state: dict[str, Any]) -> bool:
    try:
        _file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(_file, json.dumps(state).encode(), durable=False)
    except OSError as error:
        _limit.error("", "GET /metrics lacks workers that ended, %s cannot be written: %s", _file, error)
        return False
    return True


def init_app(app: "Flask", service: "Service") -> None:
    """Record what ended earlier workers when this one starts, and add to GET /metrics."""
    slot_of(app, service)
    directory = service.settings.journal_dir / "workers"
    app.extensions.setdefault("on_metrics", []).append(lambda add: add(families(directory)))

    def record_deaths() -> None:
        while _deaths:
            service.journal.append({"model_version": "", "variant": "", **_deaths.pop(0)})

    service.on_start.append(record_deaths)


def families(directory: Path) -> Iterator["Metric"]:
    """Yield the metrics; none if gunicorn's master has not written its file in this directory of slots."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    try:
        state = json.loads((directory / "exits.json").read_bytes())
    except FileNotFoundError:
        return
    ended = "Workers that ended although nobody asked them to, by what ended them"
    exits = CounterMetricFamily("prediction_worker_exits", ended, labels=["reason"])
    for reason, number in state["exits"].items():
        exits.add_metric([reason], number)
    yield exits
    yield GaugeMetricFamily("prediction_workers_configured", "Workers that there should be", state["configured"])
    alive = len(WorkerSlot.read(directory))
    yield GaugeMetricFamily("prediction_workers_alive", "Workers that live, those that a stop drains too", alive)
