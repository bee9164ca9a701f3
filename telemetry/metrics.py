"""The metrics of GET /metrics: what each worker counts, and what is looked up when Prometheus asks.

    metrics = Metrics(Path("var/journal"))
    metrics.join(slot)                       # in a worker, after the fork
    metrics.count_request(0.0021, record)    # the record that goes into the journal
    body, content_type = metrics.expose("", serving.describe())

What the workers count is summed (shared_counters.py). Labels hold only our own words and the versions that are served,
never anything that a caller sent.
"""

import logging
import os
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from monitor import LOSSES, segments
from processes import LogLimit, run_hooks
from telemetry import shipping_progress
from telemetry.shared_counters import SharedCounters, collect
from worker_slot import WorkerSlot

RESPONSE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WAIT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
BATCH_ROWS = tuple(4**power for power in range(7))  # to batching.MAX_BATCH_ROWS
OUTCOMES = {"": "success"} | {each: each for each in ("client", "auth", "model", "overload", "internal")}
AUTH_STATUSES = ("401", "403", "429")


class Metrics:
    """The metrics of a process. Its methods may be called from any thread, under gevent from native ones too."""

    def __init__(self, journal_dir: Path, ships: bool = False, journal_max_bytes: int = 10**9) -> None:
        """Begin to count in memory, alone.

        Args:
            journal_dir: the directory whose size is exposed, and in which workers keep what they count.
            ships: whether to expose how far shipping to SLS has come.
            journal_max_bytes: the bound of the journal, which is exposed.
        """
        self._journal_dir, self._ships, self._journal_max_bytes = journal_dir, ships, journal_max_bytes
        # Hooks of extensions, called with a function that takes their families of metrics, each time they are exposed.
        self.on_expose: list[Callable[[Callable[[Iterable[Metric]], None]], None]] = []
        self._is_alone = True
        self._shared: SharedCounters | None = None
        self._trouble = LogLimit(logging.getLogger(__name__), 3600.0)
        self._handled: set[object] = set()  # one for each request that is being handled
        self._registry = CollectorRegistry()
        self._make(self._registry)

    def join(self, slot: WorkerSlot) -> None:
        """Count together with the other workers from now on. Call it again to replace files that were removed."""
        self._is_alone = False
        if self._shared is not None and self._shared.number == slot.number and self._shared.exist():
            return
        directory = self._journal_dir / "metrics"
        try:
            if slot.number < 0:
                raise OSError("this worker has no slot")
            self._shared = SharedCounters(directory, slot.number)
        except OSError as error:
            self._trouble.error("", "GET /metrics lacks this worker, %s cannot be written: %s", directory, error)
            return
        self._trouble.reset()
        self._make(None)

    def _make(self, registry: CollectorRegistry | None) -> None:
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        self._requests = counter(
            "prediction_requests",
            "Prediction requests by their outcome: success, or the error_type of their record",
            ("outcome", "model_version", "variant"),
        )
        self._response_time = histogram(
            "prediction_response_time_seconds",
            "Prediction requests that succeeded, from their arrival to their answer",
            ("model_version", "variant"),
            buckets=RESPONSE_SECONDS,
        )
        self._by_version: dict[tuple[str, str], tuple[dict[str, Counter], Histogram]] = {}
        self._no_version = {error: self._requests.labels(OUTCOMES[error], "", "") for error in OUTCOMES if error}
        self._in_flight = Gauge(
            "prediction_requests_in_flight",
            "Prediction requests that are being handled",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._rows = histogram("prediction_batch_rows", "Model calls by their rows", buckets=BATCH_ROWS)
        self._wait = histogram(
            "prediction_queue_wait_seconds",
            "Model calls by how long the first of their rows waited",
            buckets=WAIT_SECONDS,
        )
        self._load_failures = counter(
            "prediction_model_load_failures", "Versions that could not be loaded, in each worker"
        )
        self._differences = counter(
            "prediction_fast_path_differences",
            "Requests that gunicorn reads differently from the fast path, which is then off",
        )
        rejected = counter("prediction_auth_failures", "Requests rejected for their password or role", ("status",))
        self._rejected = {status: rejected.labels(status) for status in AUTH_STATUSES}
        dropped = counter("prediction_records_dropped", "Records lost before they could be shipped", ("reason",))
        self._dropped = {reason: dropped.labels(reason) for reason in LOSSES}

    # --- counting

    def count_request(self, seconds: float, record: dict[str, Any]) -> None:
        """Count a prediction request that was answered after so many seconds."""
        error, version = record["error_type"], record["model_version"]
        if not version:
            if error:  # without one it was OPTIONS
                self._no_version[error].inc()
            return
        key = version, record["variant"]
        outcomes, response_time = self._by_version.get(key) or self._add_version(*key)
        outcomes[error].inc()
        if not error:
            response_time.observe(seconds)

    def _add_version(self, version: str, variant: str) -> tuple[dict[str, Counter], Histogram]:
        """Begin to count all outcomes of a version: Prometheus sees no increase in a series that begins at 1."""
        takes = self._shared is None or self._shared.takes(version, variant)
        labels = version if takes else "other", variant
        outcomes = {error: self._requests.labels(outcome, *labels) for error, outcome in OUTCOMES.items()}
        added = self._by_version[version, variant] = outcomes, self._response_time.labels(*labels)
        return added

    def in_flight(self, view: Callable[..., Any]) -> Callable[..., Any]:
        """Return a view that counts the requests it is handling."""

        @wraps(view)
        def counted(**arguments: Any) -> Any:
            handled = object()
            self._handled.add(handled)
            try:
                return view(**arguments)
            finally:
                self._handled.discard(handled)

        return counted

    def note_in_flight(self) -> None:
        """Publish how many requests are being handled. Once a second, since a shared gauge costs too much at each."""
        self._in_flight.set(len(self._handled))

    def count_batch(self, rows: int, waited: float) -> None:
        """Count a call of the model with so many rows, the first of which waited so many seconds."""
        self._rows.observe(rows)
        self._wait.observe(waited)

    def count_load_failure(self) -> None:
        """Count a version that could not be loaded."""
        self._load_failures.inc()

    def count_fast_path_difference(self) -> None:
        """Count a request that gunicorn reads differently from the fast path."""
        self._differences.inc()

    def count_rejected(self, http: Any, error: Exception, record: dict[str, Any]) -> None:
        """Count a request that failed, if it was without the right password or role."""
        if record["error_type"] == "auth":
            self._rejected[str(http.code)].inc()

    def count_loss(self, reason: str, count: int) -> None:
        """Count records that the journal lost, for one of monitor.LOSSES."""
        self._dropped[reason].inc(count)

    # --- exposing

    def expose(self, accept: str, served: dict[str, Any]) -> tuple[bytes, str]:
        """Return all metrics in the format that the Accept header asks for, and its content type.

        Args:
            accept: the header, or "".
            served: what `Serving.describe` returned, with `ready` as GET /readyz has it.
        """
        self.note_in_flight()
        workers = WorkerSlot.read(self._journal_dir / "workers")
        directory = self._journal_dir / "metrics"
        counted = self._registry.collect() if self._is_alone else collect(directory, workers.keys())
        found = [*counted, *_models(served, list(workers.values())), *self._journal()]
        run_hooks(self.on_expose, found.extend)
        encode, content_type = choose_encoder(accept)
        return encode(SimpleNamespace(collect=lambda: found)), content_type

    def _journal(self) -> Iterator[Metric]:
        size = 0
        for path in segments(self._journal_dir):
            with suppress(OSError):  # shipped meanwhile, or dropped to make room
                size += path.stat().st_size
        yield GaugeMetricFamily("prediction_journal_bytes", "Size of the journal", size)
        text = "Size from which on the journal's oldest records go"
        yield GaugeMetricFamily("prediction_journal_max_bytes", text, self._journal_max_bytes)
        with suppress(OSError):  # there is no such directory yet
            disk = os.statvfs(self._journal_dir)
            text = "Free space of the journal's disk"
            yield GaugeMetricFamily("prediction_journal_free_bytes", text, disk.f_bavail * disk.f_frsize)
        progress = shipping_progress(self._journal_dir, expected=True) if self._ships else None
        if progress is None:
            return
        waiting, oldest = progress.waiting(self._journal_dir)
        text = "Bytes of the journal that wait to be shipped"
        yield GaugeMetricFamily("prediction_journal_waiting_bytes", text, waiting)
        if oldest is not None:
            text = "When the oldest waiting record was written, in seconds since 1970"
            yield GaugeMetricFamily("prediction_journal_oldest_waiting_timestamp_seconds", text, oldest)
        yield CounterMetricFamily("prediction_records_shipped", "Records that SLS has stored", progress.shipped)
        rejected = "Records that SLS rejected for their content"
        yield CounterMetricFamily("prediction_records_refused", rejected, progress.refused)
        text = "Size of the records that SLS rejected, until someone removes refused.json and refused.old.json"
        size = progress.refused_bytes(self._journal_dir)
        yield GaugeMetricFamily("prediction_refused_records_bytes", text, size)


def _models(served: dict[str, Any], workers: list[dict[str, Any]]) -> Iterator[Metric]:
    labels = ("model_version", "variant")
    ready = "Whether GET /readyz answers 200: at the start, once all workers have a model"
    yield GaugeMetricFamily("prediction_ready", ready, float(served["ready"]))
    load = GaugeMetricFamily("prediction_model_load_seconds", "How long it took to load a version", labels=labels)
    count = GaugeMetricFamily("prediction_model_workers", "Workers that serve a version", labels=labels)
    text = "The error rate, or mean absolute error, from which on a version alerts"
    bound, bounds = GaugeMetricFamily("prediction_error_bound", text, labels=labels[:1]), {}
    for variant in ("stable", "canary"):
        if model := served[variant]:
            load.add_metric((model["version"], variant), model["load_seconds"])
            bounds[model["version"]] = model.get("error_bound")
        versions = Tally(each[variant] for each in workers if each.get(variant))
        for version, number in sorted(versions.items()):
            count.add_metric((version, variant), number)
    for version, value in bounds.items():
        if value is not None:
            bound.add_metric((version,), value)
    yield load
    yield count
    yield bound
    failing = "Workers that do not serve all that they should; GET /model says why"
    yield GaugeMetricFamily("prediction_workers_with_error", failing, sum(bool(each.get("error")) for each in workers))
