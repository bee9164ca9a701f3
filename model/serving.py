"""The model in memory: loaded beside the traffic, proved with a sample, then swapped in as one reference."""

import gc
import hashlib
import logging
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .batching import Batcher
from .formats import ModelLoadError
from .loaded import LoadedModel, check_bytes, load_version
from .versions import store as versions
from .versions.worker_status import Roster

log = logging.getLogger(__name__)

WATCH = 0.5  # seconds between two looks at the version store
BARE = "file"  # stands for the version of a bare file until its hash is known


class ModelNotReady(Exception):
    """No version has been loaded and proved yet."""


class UnknownVersion(Exception):
    """A version that was asked for outright is not served."""


@dataclass(frozen=True)
class Routes:
    """What is served at one moment. Requests read it once, so each sees one state and never a mixture."""

    stable: LoadedModel
    canary: LoadedModel | None
    routing: versions.Routing


class Serving:
    """The served versions of this process.

    `choose` may be called from any thread; one thread watches the version store and loads. New versions are loaded and
    proved beside those that serve, and are swapped in by setting one reference; an old one is freed with its last
    request. What cannot be loaded or read leaves all as it is, and is named in `describe()` and in the log.
    """

    def __init__(
        self,
        model_path: Path | None = None,
        model_dir: Path = Path("var/models"),
        allow_version_mismatch: bool = False,
        native: Callable[..., Any] = lambda function, *arguments: function(*arguments),
        roster: Roster | None = None,
        most_waiting: int = 50_000,
        observe: Callable[[int, float], None] = lambda rows, waited: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Remember where the model is; nothing is read before `start`.

        Args:
            model_path: one file to serve, or None to serve from the version store `model_dir`.
            native: runs a function on a native thread and returns its result, while the caller's event loop goes on.
            roster: is told what is served, and remembers it for a start without a routing that can be read.
            most_waiting: rows that may wait for a version.
            observe: is told of each call of a model; see Batcher.
            on_failure: is called when a version does not load.
        """
        self._path, self._dir = model_path, model_dir
        self._allow_version_mismatch = allow_version_mismatch
        self._native, self._roster = native, roster
        self._new_batcher = partial(Batcher, native, most_waiting, observe)
        self._on_failure = on_failure
        self._batchers: weakref.WeakSet[Batcher] = weakref.WeakSet()  # of all versions that still answer
        self._routes: Routes | None = None
        self._preloaded: list[LoadedModel] = []  # before the fork; served only where the routing asks for them
        self._errors: list[str] = []
        self._veto = "", ""  # the mark of the routing whose canary is not to be served, and why
        self._stale = False  # the routes are to be made again, though no file has changed
        self.finished = threading.Event()  # the first load has ended, well or badly

    def start(self) -> None:
        """Load, and watch the store from then on, on a thread of its own."""
        threading.Thread(target=self._watch, name="watch-models", daemon=True).start()

    def preload(self) -> None:
        """Load here and now, before a fork: the children share the memory, as long as nobody writes to it."""
        native, self._native = self._native, lambda function, *arguments: function(*arguments)
        try:
            self._refresh()
        finally:
            self._native = native
        # Not as routes: a worker that is forked later has to look for itself what is to be served by then.
        self._preloaded, self._routes, self._errors = self._loaded(), None, []

    def choose(self, key: str = "", version: str = "") -> tuple[LoadedModel, str]:
        """Return the version to answer a request with, and its variant, "stable" or "canary".

        Args:
            key: requests with the same key get the same version, on every worker and host; "" for no such wish.
            version: the version to have, whatever the weights say; "" for no such wish.

        Raises:
            ModelNotReady: none is loaded.
            UnknownVersion: that version is not served.
        """
        routes = self._routes
        if routes is None:
            raise ModelNotReady(
                "the model did not load; the server's log says why" if self._errors else "the model is still loading"
            )
        canary = routes.canary
        if version:
            for model, variant in (routes.stable, "stable"), (canary, "canary"):
                if model is not None and model.version == version:
                    return model, variant
            served = [model.version for model in (routes.stable, canary) if model]
            raise UnknownVersion(f"no such version is served; there are: {', '.join(served)}")
        if canary is not None and share_of(key, canary.version) < routes.routing.weight:
            return canary, "canary"
        return routes.stable, "stable"

    def running_for(self) -> float:
        """Return the seconds that some model has been at its present call: one that hangs never ends it."""
        return max((batcher.running_for() for batcher in list(self._batchers)), default=0.0)

    def describe(self) -> dict[str, Any]:
        """Describe what is served, as JSON values."""
        routes = self._routes
        return {
            "ready": routes is not None,
            "error": "; ".join(self._errors) or None,
            "stable": routes and _described(routes.stable),
            "canary": routes and routes.canary and _described(routes.canary),
            "routing": routes.routing.as_json() if routes and not self._path else None,
        }

    def veto(self, mark: str, reason: str) -> None:
        """Serve no canary under this generation of the routing: for a guard that cannot write the store."""
        if mark != self._veto[0]:
            self._veto = mark, reason
            self._stale = True

    def guarded(self) -> versions.Routing | None:
        """Return the routing as it is served, where it has a canary that is served and is to be guarded."""
        routes = self._routes
        if routes is None or routes.canary is None or not routes.routing.guard:
            return None
        return replace(routes.routing, stable=routes.stable.version)  # which may be one that was fallen back on

    # --- the watching thread

    def _watch(self) -> None:
        seen = None
        while True:
            try:
                marks = self._marks()
                if marks != seen or self._stale:
                    seen, self._stale = marks, False
                    self._refresh()
                    if self._roster:
                        self._roster.announce(self.describe())
            except Exception:  # one bad round must not be the last
                log.exception("watching the version store failed")
                self._errors = self._errors or ["watching the version store failed"]
            if self._routes or self._errors:
                self.finished.set()
            if self._path is not None:
                return
            time.sleep(WATCH)

    def _marks(self) -> tuple[Any, ...]:
        """Return what changes when a file that matters is replaced, repaired or removed."""
        if self._path is not None:
            return ()
        paths = [self._dir / "routing.json"]
        try:
            routing = versions.Routing.read(self._dir)
            for name in filter(None, (routing.stable, routing.canary)):
                paths += [self._dir / name / "manifest.json", *sorted((self._dir / name).glob("model.*"))]
        except (ModelLoadError, OSError):
            pass
        return tuple(map(_mark, paths))

    def _refresh(self) -> None:
        """Serve what the routing asks for, as far as it loads."""
        old = self._routes
        errors: list[str] = []
        try:
            routing = self._routing(errors)
            stable = self._load(routing.stable, errors)
            if stable is None and old is None:  # at boot: an earlier version is better than none
                for name in routing.previous:
                    if stable := self._load(name, errors):
                        log.error("version %s does not load, FALLING BACK on version %s", routing.stable, name)
                        break
            if stable is None and old is not None:
                stable = old.stable
            vetoed, reason = self._veto
            if routing.canary and routing.mark == vetoed:
                errors.append(f"canary {routing.canary} is taken back: guard, {reason}")
                canary = None
            else:
                canary = self._load(routing.canary, errors) if routing.canary else None
            if not self._is_wanted(routing):
                return  # the next look serves what is wanted now
            if stable is not None:
                self._routes = Routes(stable, canary, routing)
                self._preloaded = []
        except ModelLoadError as error:
            errors.append(str(error))
        self._errors = errors
        for message in errors:
            log.error("%s: %s", "NOT READY, no model is served" if self._routes is None else "not served", message)
        if self._routes is not None and (old is None or _names(old) != _names(self._routes)):
            log.info("serving %s", _names(self._routes))
            _collect_garbage(all_of_it=old is not None)

    def _routing(self, errors: list[str]) -> versions.Routing:
        """Return what is to be served. At boot, where that cannot be read, what was served last."""
        if self._path is not None:
            return versions.Routing(stable=BARE)
        try:
            found = versions.Routing.read(self._dir)
            if not found.stable:
                raise ModelLoadError(
                    f"{self._dir} holds no version to serve. Make the demo model with "
                    f"`python -m model.demo {self._dir}`, publish yours with `python -m model publish`, or serve a "
                    "file with MODEL_PATH=/path/to/model.joblib"
                )
            return found
        except ModelLoadError as error:
            last = self._roster.last() if self._roster and self._routes is None else None
            if last is None:
                raise
            errors.append(str(error))
            log.error("FALLING BACK on the routing that was served last, generation %d", last.generation)
            return last

    def _is_wanted(self, routing: versions.Routing) -> bool:
        """Tell whether what was loaded for a routing is still asked for, not taken back while it loaded."""
        now = self._routing([])
        return now.stable == routing.stable and routing.canary in ("", now.canary)

    def _load(self, version: str, errors: list[str]) -> LoadedModel | None:
        """Return a version, from memory or else from the disk; None if that fails.

        What is wrong with it on the disk is an error also where it is served from memory: a restart would not find it.
        """
        # Exceptions come back as values: a native thread must not log, and gevent would print them a second time.
        model, error = self._native(self._read, version, self._loaded())
        if error is not None:
            errors.append(str(error))
            self._on_failure()
        return model  # type: ignore[no-any-return]  # native() returns whatever the function does

    def _loaded(self) -> list[LoadedModel]:
        routes = self._routes
        return [model for model in (routes.stable, routes.canary) if model] if routes else self._preloaded

    def _read(self, version: str, loaded: list[LoadedModel]) -> tuple[LoadedModel | None, Exception | None]:
        interval = sys.getswitchinterval()
        kept = next((model for model in loaded if model.version == version), None)
        try:
            sys.setswitchinterval(0.0005)  # seconds: unpickling holds the interpreter; requests get their turn sooner
            started = time.monotonic()
            if self._path is not None:
                if loaded:  # before the fork
                    return loaded[0], None
                manifest = versions.Manifest(self._path)
            else:
                manifest = versions.Manifest.read(self._dir, version)
                if kept and kept.about["sha256"] == manifest.about["sha256"]:
                    check_bytes(manifest)
                    return kept, None
            model = load_version(manifest, self._allow_version_mismatch, self._new_batcher())
            self._batchers.add(model.batcher)
            model.about["load_seconds"] = round(time.monotonic() - started, 3)
            return model, None
        except ModelLoadError as error:
            return kept, error
        except BaseException as error:  # a pickle runs code of its own, which may even raise SystemExit
            return kept, ModelLoadError(f"{type(error).__name__}: {error}")
        finally:
            sys.setswitchinterval(interval)


def _collect_garbage(all_of_it: bool) -> None:
    """Collect now, and spare later collections what was loaded: each would stop all requests for 0.1 s.

    At first not what was there before a fork: looking at it would write to memory that processes share.
    """
    if all_of_it:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def _described(model: LoadedModel) -> dict[str, Any]:
    return model.about | {"calls": model.batcher.timings.describe()}


def share_of(key: str, version: str) -> float:
    """Return where a request falls, 0 to 100: at random, or by its key. Those below its weight are a canary's.

    The version is mixed in, so that one caller is not the first to meet every canary.
    """
    if not key:
        return random.random() * 100  # noqa: S311  # no secret
    digest = hashlib.blake2b(f"{version}:{key}".encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 * 100


def _names(routes: Routes) -> str:
    """Say which versions are served, for the log."""

    def name(model: LoadedModel) -> str:
        return f"version {model.version} ({model.about['estimator']}, proved with {model.about['proved_with']})"

    beside = f"; for {routes.routing.weight:g} of a hundred requests {name(routes.canary)}" if routes.canary else ""
    return name(routes.stable) + beside


def _mark(path: Path) -> tuple[str, Any]:
    try:
        found = path.stat()
        return str(path), (found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError:
        return str(path), None
