"""The model in memory: loaded beside the traffic, validated with a sample, then swapped in as one reference.

serving = Serving(SingleFile(Path("model.joblib")))
serving.start()
serving.finished.wait()
model, variant = serving.choose()
model.predict(model.signature.validate([[5.1, 3.5, 1.4, 0.2]]))
"""

import gc
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from processes import TIMED_OUT, run_hooks

from .batching import Batcher, call_directly
from .formats import ModelLoadError
from .loaded import LoadedModel, load_model, read_sample
from .signature import BadRows

log = logging.getLogger(__name__)

SWITCH_INTERVAL = sys.getswitchinterval()  # Python's own: seconds until a thread that waits for the interpreter has it


@contextmanager
def short_turns() -> Iterator[None]:
    """Let requests have the interpreter sooner while this thread works for long."""
    sys.setswitchinterval(SWITCH_INTERVAL / 10)
    try:
        yield
    finally:
        sys.setswitchinterval(SWITCH_INTERVAL)  # not what it was: another thread may do the same


class ModelNotReady(Exception):
    """No version has been loaded and validated yet."""


@dataclass(frozen=True)
class Routes:
    """A snapshot of what is served. A request reads it once, so it never sees a mixture.

    A source may have its own kind of routes, such as a stable version with a canary beside it.
    """

    stable: LoadedModel

    def choose(self, key: str, version: str) -> tuple[LoadedModel, str]:
        """Return the model for a request, and its variant; see `Serving.choose`."""
        if version not in ("", self.stable.version):
            raise BadRows(f"X-Model-Version: no such version is served; there is: {self.stable.version}")
        return self.stable, "stable"

    def models(self) -> list[LoadedModel]:
        """Return the models that are served."""
        return [self.stable]

    def describe(self) -> dict[str, Any]:
        """Return what GET /model shows, as JSON values."""
        return {"stable": self.stable.describe(), "canary": None, "routing": None}

    def __str__(self) -> str:
        return f"version {self.stable}"


# What a source found: the routes to serve from now on, None to keep the present ones; and what went wrong.
Update = tuple[Routes | None, list[str]]


class Source(Protocol):
    """Where the models come from: `SingleFile`, or the version store (`model/versions/watcher.py`)."""

    interval: float | None  # seconds between two calls of `update`; None: it is called once

    def update(self, serving: "Serving") -> Update | None:
        """Load what is to be served with `serving.load`; return None if nothing has changed since the last call."""


@dataclass
class SingleFile:
    """One model file, named by `MODEL_PATH`, with a sample beside it or named by `MODEL_SAMPLE`."""

    path: Path | None
    sample: Path | None = None
    interval: float | None = None

    def update(self, serving: "Serving") -> Update:
        """Load the file, unless it was loaded before the fork."""
        if self.path is None:
            raise ModelLoadError("there is no model to serve: set MODEL_PATH=/path/to/model.joblib")
        loaded = serving.loaded()
        return Routes(loaded[0] if loaded else serving.load(partial(self.load, self.path))), []

    def load(self, path: Path, **options: Any) -> LoadedModel:
        """Load a model file with its sample; `options` are those of `load_model`. Raises: ModelLoadError."""
        beside = path.with_suffix(".sample.json")
        sample = self.sample or (beside if beside.is_file() else None)
        model = load_model(path, sample=read_sample(sample) if sample else None, **options)
        if sample:
            model.about["validated_with"] = f"the sample {sample.name}"
        return model


class Serving:
    """The served models of this process.

    `choose` may be called from any thread; one background thread asks the source for updates and loads. An old model is
    freed with its last request. One that cannot be loaded changes nothing, and is named in `describe()` and in the log.
    """

    def __init__(
        self,
        source: Source,
        run_in_thread: Callable[..., Any] = call_directly,
        max_wait: float = 1.0,
        **load_options: Any,
    ) -> None:
        """Remember the settings. Nothing is read before `start`; until then an extension may replace the source.

        `run_in_thread` runs a function on a native thread and returns its result; the caller's event loop goes on.
        `load_options` are handed on to `load_model`.
        """
        self.source, self.run_in_thread = source, run_in_thread
        self._max_wait, self._load_options = max_wait, load_options
        self.routes: Routes | None = None
        self.errors: list[str] = []
        self.finished = threading.Event()  # the first load has ended, successfully or not
        self._preloaded: list[LoadedModel] = []  # before the fork
        self._batchers: weakref.WeakSet[Batcher] = weakref.WeakSet()  # of all models that still answer
        # Hooks of extensions.
        self.on_batch: list[Callable[[int, float], None]] = []  # each call of a model: rows, seconds the first waited
        self.on_load_failure: list[Callable[[], None]] = []
        self.on_describe: list[Callable[[dict[str, Any]], None]] = []  # may add to what `describe` returns
        self.on_update: list[Callable[[dict[str, Any]], None]] = []  # each update: what `describe` returns

    # --- requests

    def choose(self, key: str = "", version: str = "") -> tuple[LoadedModel, str]:
        """Return the model that answers a request, and its variant, "stable" or "canary".

        Args:
            key: requests with the same key get the same version, on every worker and host; "" for no preference.
            version: the version to use, whatever the weights are; "" for no preference.

        Raises: ModelNotReady, no model is loaded; BadRows, that version is not served.
        """
        if routes := self.routes:
            return routes.choose(key, version)
        why = "the model did not load; the server's log says why" if self.errors else "the model is still loading"
        raise ModelNotReady(why)

    def describe(self) -> dict[str, Any]:
        """Return what is served, as JSON values."""
        routes = self.routes
        served = routes.describe() if routes else dict.fromkeys(("stable", "canary", "routing"))
        found = {"ready": routes is not None, "error": "; ".join(self.errors) or None} | served
        run_hooks(self.on_describe, found)
        return found

    def end_if_hung(self, timeout: float) -> None:
        """End this process if a call of a model takes `timeout` seconds longer than expected, once a second.

        A native thread cannot be stopped in any other way. gunicorn starts another worker; by itself it only notices an
        event loop that hangs, which this one does not.
        """
        seconds = max((batcher.tick() for batcher in list(self._batchers)), default=0)
        if seconds >= timeout:
            log.critical("the model has been at one call for %d seconds (PREDICT_TIMEOUT): this worker ends", seconds)
            os._exit(TIMED_OUT)

    # --- loading

    def start(self) -> None:
        """Load, and follow the source from then on, on a background thread."""
        threading.Thread(target=self._follow, name="models", daemon=True).start()

    def preload(self) -> None:
        """Load before a fork, and wait for it: the children share the memory that nobody writes to."""
        self._update()
        # Not as routes: a worker that is forked later has to find out what is to be served by then.
        self._preloaded, self.routes, self.errors = self.loaded(), None, []

    def loaded(self) -> list[LoadedModel]:
        """Return the models in memory: those that are served, or those that were loaded before the fork."""
        return self.routes.models() if self.routes else self._preloaded

    def load(self, loader: Callable[..., LoadedModel]) -> LoadedModel:
        """Load a model on a native thread; `loader` is `load_model` of a file, or the like. Raises: ModelLoadError."""
        try:
            model: LoadedModel = self.run_in_thread(self._load, loader)
        except ModelLoadError:
            run_hooks(self.on_load_failure)
            raise
        self._batchers.add(model.batcher)
        return model

    def _load(self, loader: Callable[..., LoadedModel]) -> LoadedModel:
        started, batcher = time.monotonic(), Batcher(self.run_in_thread, self._max_wait, self.on_batch)
        try:
            with short_turns():
                model = loader(batcher=batcher, **self._load_options)
                if model.batcher is batcher:  # else it was loaded before
                    model.time_calls()
        except ModelLoadError:
            raise
        except BaseException as error:  # a pickle runs code of its own, which may even raise SystemExit
            raise ModelLoadError(f"{type(error).__name__}: {error}") from error
        model.about.setdefault("load_seconds", round(time.monotonic() - started, 3))  # a kept model has it already
        return model

    # --- the background thread

    def _follow(self) -> None:
        while True:
            try:
                if self._update():
                    run_hooks(self.on_update, self.describe())
            except Exception:  # one bad round must not be the last
                log.exception("looking for a new model failed")
                self.errors = self.errors or ["looking for a new model failed"]
            if self.routes or self.errors:
                self.finished.set()
            if self.source.interval is None:
                return
            time.sleep(self.source.interval)

    def _update(self) -> bool:
        """Serve what the source asks for; return False if nothing has changed."""
        old = self.routes
        try:
            update = self.source.update(self)
        except ModelLoadError as error:
            update = None, [str(error)]
        if update is None:
            return False
        routes, self.errors = update
        if routes is not None:
            self.routes, self._preloaded = routes, []
        for message in self.errors:
            log.error("%s: %s", "NOT READY, no model is served" if self.routes is None else "not served", message)
        if self.routes is not None and str(old) != str(self.routes):
            log.info("serving %s", self.routes)
            # Collect now, and exempt what was loaded from later collections, which would each stop all requests for
            # 0.1 s. The first time not what was there before a fork: looking at it would write to shared memory.
            if old is not None:
                gc.unfreeze()
            gc.collect()
            gc.freeze()
        return True
