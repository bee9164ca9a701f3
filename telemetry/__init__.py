"""Metrics, drift, roll-ups and the journal's report. An extension (EXTENSIONS in settings.py)."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker_slot import WorkerSlot, slot_of

if TYPE_CHECKING:
    from flask import Flask

    from server import Service
    from settings import Settings
    from sls.shipper import Progress

_has_workers = False  # whether this process is gunicorn's master or one of its workers, which count together


def before_fork(settings: "Settings") -> None:
    """Let the workers of this master count together: from zero, unless a worker of an earlier master still lives."""
    global _has_workers
    _has_workers = True
    with suppress(OSError):  # a worker will log that the directory cannot be written
        if not WorkerSlot.read(settings.journal_dir / "workers"):
            for path in (settings.journal_dir / "metrics").glob("*.db*"):
                path.unlink()


def init_app(app: "Flask", service: "Service") -> None:
    """Count what the service does, and answer GET /metrics."""
    from flask import Response, request

    from auth import require
    from telemetry import certificate, drift, rollup_writer
    from telemetry.metrics import Metrics

    settings = service.settings
    metrics, slot = Metrics(settings.journal_dir, settings.ships, settings.journal_max_bytes), slot_of(app, service)
    # Whatever comes first, this or an extension that has metrics of its own, makes the list.
    metrics.on_expose = app.extensions.setdefault("on_metrics", metrics.on_expose)
    app.extensions.setdefault("on_fast_path_difference", []).append(metrics.count_fast_path_difference)
    service.observers.append(metrics.count_request)
    service.serving.on_batch.append(metrics.count_batch)
    service.serving.on_load_failure.append(metrics.count_load_failure)
    service.journal.on_loss.append(metrics.count_loss)
    service.on_error.append(metrics.count_rejected)
    service.every_second.append(metrics.note_in_flight)
    drift.watch(service, slot, metrics.on_expose)
    rollup_writer.watch(service)
    if path := settings.certificate_file:
        metrics.on_expose.append(lambda add: add(certificate.families(path)))

    def join() -> None:
        if _has_workers:
            metrics.join(slot)

    def start() -> None:
        join()
        # Not by before_request and teardown_request, which would take 5 µs of each request instead of 0.4 µs.
        for name in service.recorded:
            app.view_functions[name] = metrics.in_flight(app.view_functions[name])

    service.on_start.append(start)
    service.every_second.append(join)

    app.extensions.setdefault("on_openapi", []).append(describe)

    @app.get("/metrics")
    @require("metrics")
    def expose() -> Response:
        accept = request.headers.get("Accept", "")
        body, content_type = service.run_in_thread(metrics.expose, accept, what_is_served(service))
        return Response(body, content_type=content_type)


def what_is_served(service: "Service") -> dict[str, Any]:
    """Return what `Serving.describe` does, with `ready` as GET /readyz has it."""
    from model.serving import ModelNotReady

    served = service.serving.describe()
    try:
        for hook in service.on_ready:
            hook()
    except ModelNotReady:
        served["ready"] = False
    return served


def describe(api: Any) -> None:
    """Describe the route, where endpoints.docs is on."""
    answer: dict[str, Any] = {"text/plain": {}, "application/openmetrics-text": {}}
    api.add("GET", "/metrics", "The metrics of all workers, summed", role="metrics", answer=answer)


def shipping_progress(journal_dir: Path, expected: bool = False) -> "Progress | None":
    """Return how far shipping to SLS has come; None if `sls` was removed, or has not run and is not `expected` to."""
    try:
        from sls.shipper import Progress
    except ModuleNotFoundError:
        return None
    return Progress.read(journal_dir) or (Progress() if expected else None)
