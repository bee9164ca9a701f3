"""Serves from the version store: loads what `routing.json` asks for, twice a second if any of its files has changed.

New versions are loaded and validated beside those that serve. A version that does not load, or a file that cannot be
read, changes nothing in what is served; it is reported in `GET /model` and in the log.
"""

import hashlib
import logging
import random
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from shared_files import replace_file

from ..formats import ModelLoadError
from ..loaded import LoadedModel
from ..serving import Routes, Serving, Update
from ..signature import BadRows
from .loading import check_bytes, load_version
from .routing import LOCAL_ROLLBACK, ROUTING, Routing
from .store import as_json, read_manifest

log = logging.getLogger(__name__)


class StoreWatcher:
    """The version store as a source of `Serving`."""

    interval: float | None = 0.5  # seconds

    def __init__(self, directory: Path, journal_dir: Path) -> None:
        """Nothing is read yet. `journal_dir` holds this host's rollback, and the routing that was served last."""
        self._directory, self._journal_dir = directory, journal_dir
        self._seen: dict[Path, Any] = {}

    def update(self, serving: Serving) -> Update | None:
        """Load what the routing asks for; None if nothing has changed. Raises: ModelLoadError, it cannot be used."""
        etags = serving.run_in_thread(self._etags)  # each reading of the store: it may hang
        if etags == self._seen and (serving.routes or serving.errors):  # neither at first, also after a fork
            return None
        self._seen = etags
        errors: list[str] = []
        routing = self._routing(serving, errors)
        stable = self._stable(serving, routing, errors)
        canary = self._canary(serving, routing, errors)
        if not self._is_wanted(serving, routing):
            return None  # the next update serves what is wanted now
        if stable is None:
            return None, errors
        if not errors:
            self._remember(routing)
        return StoreRoutes(stable, canary, routing), errors

    def _etags(self) -> dict[Path, Any]:
        """Return what changes when a file that matters is replaced, repaired or removed."""
        paths = [self._directory / ROUTING, self._journal_dir / LOCAL_ROLLBACK]
        with suppress(ModelLoadError, OSError):
            routing = Routing.read(self._directory)
            for name in filter(None, (routing.stable, routing.canary)):
                paths += [self._directory / name / "manifest.json", *sorted((self._directory / name).glob("model.*"))]
        etags = {}
        for path in paths:
            with suppress(OSError):
                found = path.stat()
                etags[path] = found.st_ino, found.st_size, found.st_mtime_ns
        return etags

    def _routing(self, serving: Serving, errors: list[str]) -> Routing:
        """Return the routing; at boot, if it cannot be read, the one that was served last. Raises: ModelLoadError."""
        try:
            return self._read(serving)
        except ModelLoadError as error:
            if serving.routes or not (last := self._remembered()).stable:
                raise
            errors.append(str(error))
            log.error("FALLING BACK on the routing that was served last, generation %d", last.generation)
            return last

    def _read(self, serving: Serving) -> Routing:
        routing: Routing = serving.run_in_thread(Routing.read, self._directory)
        if not routing.stable:
            raise ModelLoadError(
                f"{self._directory} holds no version to serve. Make the demo model with "
                f"`python -m model.demo {self._directory}`, publish yours with `python -m model publish`, or serve a "
                "file with MODEL_PATH=/path/to/model.joblib"
            )
        return routing

    def _stable(self, serving: Serving, routing: Routing, errors: list[str]) -> LoadedModel | None:
        """Return the stable version; if it does not load, the one that is served; at boot, an earlier one."""
        for version in [routing.stable, *(() if serving.routes else routing.previous)]:
            if model := self._load(serving, version, errors):
                if version != routing.stable:
                    log.error("version %s does not load, FALLING BACK on version %s", routing.stable, version)
                return model
        return serving.routes.stable if serving.routes else None

    def _canary(self, serving: Serving, routing: Routing, errors: list[str]) -> LoadedModel | None:
        if not routing.canary:
            return None
        if reason := routing.local_rollback(self._journal_dir):
            errors.append(f"canary {routing.canary} was rolled back on this host: guard, {reason}")
            return None
        return self._load(serving, routing.canary, errors)

    def _load(self, serving: Serving, version: str, errors: list[str]) -> LoadedModel | None:
        """Return a version, from memory or else from the disk; None if that fails.

        A damaged file is an error even if its version is served from memory: a restart could not load it.
        """
        kept = next((model for model in serving.loaded() if model.version == version), None)
        try:
            return serving.load(partial(_load, self._directory, version, kept))
        except ModelLoadError as error:
            errors.append(str(error))
            return kept

    def _is_wanted(self, serving: Serving, routing: Routing) -> bool:
        """Return whether what was loaded is still asked for: it may have been rolled back while it loaded."""
        try:
            now = self._read(serving)
        except ModelLoadError:  # which the next update reports, if this one has not
            return True
        return now.stable == routing.stable and routing.canary in ("", now.canary)

    def _remembered(self) -> Routing:
        """Return the routing of this store that was served last, an empty one if that is unknown."""
        with suppress(ModelLoadError, OSError, ValueError, KeyError, TypeError):
            if orjson.loads((self._journal_dir / ROUTING).read_bytes())["store"] == str(self._directory.resolve()):
                return Routing.read(self._journal_dir)
        return Routing()

    def _remember(self, routing: Routing) -> None:
        remembered = routing.to_json() | {"store": str(self._directory.resolve())}
        try:
            self._journal_dir.mkdir(parents=True, exist_ok=True)
            # Not durable: this runs in the event loop, and what a power failure may cost is only a hint.
            replace_file(self._journal_dir / ROUTING, as_json(remembered), durable=False, keep_owner=False)
        except OSError as error:
            log.warning("a start with a broken routing.json will not know what was served last: %s", error)


def _load(directory: Path, version: str, kept: LoadedModel | None, **options: Any) -> LoadedModel:
    """Return a version, from memory if it is kept there and its file is as it was. Raises: ModelLoadError."""
    manifest = read_manifest(directory, version)
    if kept and kept.about["sha256"] == manifest.about["sha256"]:
        check_bytes(manifest)
        return kept
    return load_version(manifest, **options)


@dataclass(frozen=True)
class StoreRoutes(Routes):
    """A stable version, and perhaps a canary beside it."""

    canary: LoadedModel | None
    routing: Routing

    def choose(self, key: str, version: str) -> tuple[LoadedModel, str]:
        """Return the version for a request: the one that it asks for, or by its key, or at random."""
        if version:
            for model, variant in zip(self.models(), ("stable", "canary"), strict=False):
                if model.version == version:
                    return model, variant
            served = ", ".join(model.version for model in self.models())
            raise BadRows(f"X-Model-Version: no such version is served; there are: {served}")
        if self.canary is not None and share_of(key, self.canary.version) < self.routing.weight:
            return self.canary, "canary"
        return self.stable, "stable"

    def models(self) -> list[LoadedModel]:
        """Return the versions that are served."""
        return [self.stable, self.canary] if self.canary else [self.stable]

    def describe(self) -> dict[str, Any]:
        """Return what GET /model shows, as JSON values."""
        canary = self.canary and self.canary.describe()
        return super().describe() | {"canary": canary, "routing": self.routing.to_json()}

    def __str__(self) -> str:
        canary = f"; for {self.routing.weight:g} % of the requests version {self.canary}" if self.canary else ""
        return f"{super().__str__()}{canary}"


def share_of(key: str, version: str) -> float:
    """Return where a request falls, in percent: at random, or by its key. Requests below its weight are a canary's.

    The version is mixed in, so that one caller is not the first to meet every canary.
    """
    if not key:
        return random.random() * 100  # noqa: S311  # no secret
    digest = hashlib.blake2b(f"{version}:{key}".encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 * 100
