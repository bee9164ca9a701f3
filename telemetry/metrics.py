"""Metrics for Prometheus: what the workers count, and what is looked up when it asks.

    metrics = Metrics(Path("var/journal"))
    metrics.join()                           # once in each process, after the fork
    metrics.answered(0.0021, record)         # the record that goes into the journal
    body, content_type = metrics.expose("", serving.describe())

`GET /metrics` shows them, of all workers together (slots.py). Labels hold our own words and versions that are served,
never what a caller sent.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from monitor import LOSSES, segments
from sls import Progress
from telemetry import shared_counters as slots

log = logging.getLogger(__name__)

RESPONSE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WAIT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
BATCH_ROWS = tuple(4**power for power in range(7))  # to batching.MOST_ROWS
OUTCOMES = {"": "success"} | {each: each for each in ("client", "auth", "model", "overload", "internal")}
AUTH_STATUSES = ("401", "403", "429")


class Metrics:
    """The metrics of a process. Counting may be called from any thread, also from native ones under gevent."""

    def __init__(
        self,
        journal_dir: Path,
        ships: bool = False,
        workers: Callable[[], list[dict[str, Any]]] = list,
        shared: Path | None = None,
    ) -> None:
        """Count in memory.

        Args:
            journal_dir: its size is looked up, and with `ships` what waits in it to be shipped.
            workers: returns what the living workers have announced; see model.Roster.
            shared: where processes that are summed keep their files, see `slots`; None where this one is alone.
        """
        self._journal_dir, self._ships, self._workers, self._shared = journal_dir, ships, workers, shared
        self._slot: slots.Slot | None = None
        self._complained = False
        self._registry = CollectorRegistry()
        self._make(self._registry)

    def join(self) -> None:
        """Count in files from now on, where processes are summed. Called again, make good what was removed."""
        if self._shared is None or (self._slot is not None and self._slot.is_there()):
            return
        try:
            self._slot = slots.Slot(self._shared)
        except OSError as error:
            if not self._complained:
                self._complained = True
                log.error("no metric has what this worker does, %s cannot be written: %s", self._shared, error)
            return
        self._complained = False
        self._slot.take_values()
        self._make(None)

    def _make(self, registry: CollectorRegistry | None) -> None:
        self._requests = Counter(
            "prediction_requests",
            "Requests to /predict; outcome is success or the error_type",
            ("outcome", "model_version", "variant"),
            registry=registry,
        )
        self._response_time = Histogram(
            "prediction_response_time_seconds",
            "Requests to /predict that succeeded, from their arrival to their answer",
            ("model_version", "variant"),
            buckets=RESPONSE_SECONDS,
            registry=registry,
        )
        self._of_version: dict[tuple[str, str], tuple[dict[str, Counter], Histogram]] = {}
        self._none = {error: self._requests.labels(outcome, "", "") for error, outcome in OUTCOMES.items() if error}
        self._in_flight = Gauge(
            "prediction_requests_in_flight",
            "Requests to /predict that are being worked on",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._rows = Histogram(
            "prediction_batch_rows", "Calls of the model, by their rows", buckets=BATCH_ROWS, registry=registry
        )
        self._wait = Histogram(
            "prediction_queue_wait_seconds",
            "Calls of the model, by how long their first rows waited for it",
            buckets=WAIT_SECONDS,
            registry=registry,
        )
        self._load_failures = Counter(
            "prediction_model_load_failures", "Versions that did not load, in each worker", registry=registry
        )
        auth_failures = Counter(
            "prediction_auth_failures", "Requests refused for their password or role", ("status",), registry=registry
        )
        self._auth_failures = {status: auth_failures.labels(status) for status in AUTH_STATUSES}
        dropped = Counter(
            "prediction_records_dropped", "Records lost before they could be shipped", ("reason",), registry=registry
        )
        self._dropped = {reason: dropped.labels(reason) for reason in LOSSES}

    # --- counting

    def answered(self, seconds: float, record: dict[str, Any]) -> None:
        """Count an answered request to /predict."""
        error, version = record["error_type"], record["model_version"]
        if not version:
            if error:  # else it is OPTIONS
                self._none[error].inc()
            return
        key = version, record["variant"]
        outcomes, response_time = self._of_version.get(key) or self._meet(*key)
        outcomes[error].inc()
        if not error:
            response_time.observe(seconds)

    def _meet(self, version: str, variant: str) -> tuple[dict[str, Counter], Histogram]:
        """Begin to count a version: all outcomes at once, since Prometheus sees no increase in what begins at 1."""
        labels = version if self._slot is None or self._slot.takes(version) else "other", variant
        outcomes = {error: self._requests.labels(outcome, *labels) for error, outcome in OUTCOMES.items()}
        found = self._of_version[version, variant] = outcomes, self._response_time.labels(*labels)
        return found

    def in_flight(self, view: Callable[[], Any]) -> Callable[[], Any]:
        """Return the view, counted while it is at work."""

        @wraps(view)
        def counted() -> Any:
            gauge = self._in_flight
            gauge.inc()
            try:
                return view()
            finally:
                gauge.dec()

        return counted

    def batched(self, rows: int, waited: float) -> None:
        """Count a call of the model, whose first rows waited so many seconds."""
        self._rows.observe(rows)
        self._wait.observe(waited)

    def load_failed(self) -> None:
        """Count a version that did not load."""
        self._load_failures.inc()

    def refused(self, status: int) -> None:
        """Count a request without the right password or role."""
        self._auth_failures[str(status)].inc()

    def dropped(self, reason: str, count: int) -> None:
        """Count records that the journal lost."""
        self._dropped[reason].inc(count)

    # --- showing

    def expose(self, accept: str, served: dict[str, Any]) -> tuple[bytes, str]:
        """Return all metrics in the text format that the Accept header asks for, and its content type.

        Args:
            served: what `Serving.describe` says.
        """
        encode, content_type = choose_encoder(accept)
        counted = slots.collect(self._shared) if self._shared else self._registry.collect()
        found = [*counted, *self._models(served), *self._journal()]
        return encode(_Found(found)), content_type

    def _models(self, served: dict[str, Any]) -> Iterator[Metric]:
        labels = ("model_version", "variant")
        ready = "Whether the worker that was asked is ready to predict"
        yield GaugeMetricFamily("prediction_ready", ready, float(served["ready"]))
        load = GaugeMetricFamily("prediction_model_load_seconds", "How long it took to load a version", labels=labels)
        for variant in ("stable", "canary"):
            if model := served[variant]:
                load.add_metric((model["version"], variant), model["load_seconds"])
        yield load
        workers = self._workers()
        count = GaugeMetricFamily("prediction_model_workers", "Workers that serve a version", labels=labels)
        for variant in ("stable", "canary"):
            for version in sorted({each[variant] for each in workers if each[variant]}):
                count.add_metric((version, variant), sum(each[variant] == version for each in workers))
        yield count
        failing = "Workers that do not serve all that they should; GET /model says why"
        yield GaugeMetricFamily("prediction_workers_with_error", failing, sum(bool(each["error"]) for each in workers))

    def _journal(self) -> Iterator[Metric]:
        size = 0
        for path in segments(self._journal_dir):
            with suppress(OSError):  # shipped meanwhile, or dropped to make room
                size += path.stat().st_size
        yield GaugeMetricFamily("prediction_journal_bytes", "Size of the journal", size)
        if not self._ships:
            return
        progress = Progress.read(self._journal_dir, expected=True)
        assert progress is not None
        waiting = "Bytes of the journal that wait to be shipped"
        yield GaugeMetricFamily("prediction_journal_waiting_bytes", waiting, progress.waiting)
        if progress.oldest is not None:
            oldest = "When the oldest record that waits was written, in seconds since 1970"
            yield GaugeMetricFamily("prediction_journal_oldest_waiting_timestamp_seconds", oldest, progress.oldest)
        yield CounterMetricFamily("prediction_records_shipped", "Records that SLS has stored", progress.shipped)
        refused = "Records that SLS does not take for what is in them"
        yield CounterMetricFamily("prediction_records_refused", refused, progress.refused)


@dataclass
class _Found:
    """Metrics that were collected, as prometheus_client takes them."""

    metrics: list[Metric]

    def collect(self) -> list[Metric]:
        return self.metrics
