"""What a worker does once a second beside its requests: what must not wait for one, nor make one wait."""

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from auth import Users
from model.serving import Serving
from model.versions.guard import Guard, veto
from monitor import Journal, Tail, log_monitor
from settings import Settings
from sls import Presence
from telemetry.metrics import Metrics
from web.body import BodyReader

log = logging.getLogger(__name__)

SUMMARY_SECONDS = 60.0  # between the summary records of requests without a valid password


class Housekeeping:
    """One worker's. Its thread begins with `start`, since none survives a fork."""

    def __init__(
        self,
        settings: Settings,
        native: Callable[..., Any],
        users: Users | None,
        bodies: BodyReader,
        serving: Serving,
        metrics: Metrics,
        journal: Journal,
    ) -> None:
        """Remember what is to be looked after.

        Args:
            native: runs a function on a native thread and returns its result.
        """
        self._native, self._users, self._bodies = native, users, bodies
        self._serving, self._metrics, self._journal = serving, metrics, journal
        self._journal_dir, self._ships = settings.journal_dir, settings.ships
        self._predict_timeout = settings.predict_timeout
        self._guard = Guard(settings.journal_dir, settings.model_dir)
        self._tail: Tail | None = None  # of the journal, while this worker guards a canary
        self._strangers = itertools.count()  # requests without a valid password; next() is one step, so safe in threads

    def start(self) -> None:
        """Begin, in this process."""
        threading.Thread(target=self._run, name="housekeeping", daemon=True).start()

    def _run(self) -> None:
        summarised, complained = time.monotonic(), -60.0
        presence = Presence(self._journal_dir) if self._ships else None
        while True:
            time.sleep(1.0)
            try:
                self._end_if_stuck()
                self._bodies.sweep()
                self._metrics.join()
                if self._users is not None:
                    self._users.refresh()
                if time.monotonic() - summarised >= SUMMARY_SECONDS:
                    summarised = time.monotonic()
                    self.summarise_strangers()
                if presence:
                    presence.tick()
                self._watch_canary()
            except Exception:  # one bad round must not be the last
                if time.monotonic() - complained >= 60.0:  # seconds; it may be the same at every round
                    complained = time.monotonic()
                    log.exception("housekeeping failed")

    def _end_if_stuck(self) -> None:
        """End this process where a model hangs: what runs on a native thread cannot be stopped in any other way.

        gunicorn starts another. It would itself see only a loop that hangs, which this one does not.
        """
        seconds = self._serving.running_for()
        if seconds > self._predict_timeout:
            log.critical("the model has been at one call for %.0f seconds (PREDICT_TIMEOUT): this worker ends", seconds)
            os.kill(os.getpid(), signal.SIGKILL)

    def _watch_canary(self) -> None:
        """Honour a veto on the canary; and in one worker, come to one."""
        mark, reason = veto(self._journal_dir)
        self._serving.veto(mark, reason)
        routing = self._serving.guarded()
        if routing is None or routing.mark == mark:
            self._guard.let_go()  # for a worker that serves the canary
            self._tail = None
        if routing is None or routing.mark == mark or not self._guard.has_turn():
            return
        self._tail = self._tail or Tail(self._journal_dir, self._guard.since(routing))
        reason = self._native(self._look, routing)
        if reason:
            log.warning("the guard takes canary %s back: %s", routing.canary, reason)
            self._journal.append(
                {"event": "rollback", "model_version": routing.canary, "variant": "canary", "reason": reason}
            )

    def _look(self, routing: Any) -> str:
        assert self._tail is not None
        return self._guard.look(routing, self._tail.read())

    def count_stranger(self) -> None:
        """Count a request to /predict without a valid password."""
        next(self._strangers)

    def summarise_strangers(self) -> None:
        """Record those that were counted as one: a stranger must not be able to push real records out."""
        count = next(self._strangers)
        self._strangers = itertools.count()
        if count:
            log_monitor(
                0.0,
                False,
                "requests without a valid password",
                journal=self._journal,
                error_type="auth",
                status=401,
                path="/predict",
                method="",
                rows=0,
                model_version="",
                variant="",
                user="",
                request_id="",
                requests=count,
            )
