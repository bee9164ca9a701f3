"""Model versions on disk.

    var/models/
        routing.json              the stable version, the canary and its share, who changed that last, and why
        1/manifest.json           what version 1 is, and what it predicted for its sample when it was published
        1/model.joblib            the artifact, read-only

A version never changes, and is either complete or absent. Every file is written under another name and then renamed, so
that a crash at any byte leaves the old state, and readers need no lock. Writers exclude each other with the lock of
`.lock`.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from history import as_owner_of, os_user
from processes import is_locked
from shared_files import FileLock, replace_file, sync_directory

from ..formats import ModelLoadError
from .routing import ROUTING, VERSION_NAME, Routing

LOCK = ".lock"  # of the store, and of a version while it is made
MAX_PREVIOUS = 10  # earlier stable versions that the routing remembers
MAX_SAMPLE_ROWS = 1000

Note = Callable[[str, str, str, str], None]  # of a change: command, before, after, version (history.py)


def unnoted(command: str, before: str, after: str, version: str) -> None:
    """Note nothing."""


class StoreError(Exception):
    """The store cannot do what it was asked to do. The message is for the operator."""


@dataclass(frozen=True)
class Manifest:
    """What is known of a version before it is loaded: its `manifest.json`.

    Format: a JSON object with `version`, `artifact` (a file name), `format`, `size` (bytes), `sha256`, `signature` and
    `methods` and `classes` (as `GET /model` shows them), `signature_form` (the number of the form that the signature
    is described in; none in the first), `sample` (rows, as in the "data" of a request), `sample_from` ("operator", or
    "synthetic" if none was given), `predictions` (the model's for the sample), `categories` (that each column's
    encoder has learned, see callers.py), `merges_requests` and `warnings` (as `GET /model` showed them then),
    `libraries` and `machine` (that it was published with), `memory` (bytes that loading it took, libraries included),
    `published`, `by`, the publisher's `metrics` and `note`, `error_bound` (from which on it alerts, null if that is
    unknown) and `reference` (how its predictions for the sample are distributed, null if the sample is too small; see
    expectations.py). Older versions lack the last two, and `categories`.
    """

    artifact: Path
    version: str
    about: dict[str, Any]  # the whole of manifest.json


def read_manifest(directory: Path, version: str) -> Manifest:
    """Read the manifest of a version. Raises: ModelLoadError, there is none, or it is not valid."""
    if not VERSION_NAME.fullmatch(version):
        raise ModelLoadError(f"{version!r} is not a valid version name")
    path = directory / version / "manifest.json"
    try:
        about = orjson.loads(path.read_bytes())
        name, sha256 = about["artifact"], about["sha256"]
        if not VERSION_NAME.fullmatch(name) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError("artifact is not the name of a file here, or sha256 is not a SHA-256 sum")
        if about["version"] != version:
            raise ValueError(f"it belongs to version {about['version']!r}")
        if not isinstance(about["sample"], list) or about["predictions"] is None:
            raise ValueError("it has no sample, or no predictions")
        return Manifest(directory / version / name, version, about)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"version {version}: {path} cannot be used: {type(error).__name__}: {error}") from error


class Store:
    """A version store, as its operators use it. Servers only read it (`read_manifest`, `Routing.read`)."""

    def __init__(self, directory: Path, note: Note = unnoted) -> None:
        """Remember the directory, and what is called with each change."""
        self.directory, self.note = directory, note

    def versions(self) -> list[str]:
        """List the versions in the order in which they were published."""
        found = []
        for path in self.directory.glob("*/manifest.json"):
            with suppress(OSError):  # removed just now
                if VERSION_NAME.fullmatch(path.parent.name):
                    found.append((path.stat().st_mtime_ns, path.parent.name))
        return [name for _, name in sorted(found)]

    def in_use(self) -> dict[str, str]:
        """Return the versions that are in use, and as what."""
        routing = Routing.read(self.directory)
        uses = dict.fromkeys(self.earlier(routing)[:1], "stable before")
        guarded = ", guarded" if routing.guard else ""
        uses |= {routing.canary: f"canary, {routing.weight:g} % of the requests{guarded}", routing.stable: "stable"}
        return {version: use for version, use in uses.items() if version}

    @contextmanager
    def new_version(self, artifact: Path, version: str = "") -> Iterator[Manifest]:
        """Copy an artifact, and make a version of it when the block ends. If the block raises, nothing is left.

        Args:
            artifact: the model file; its suffix names the format.
            version: its name; by default the next whole number.

        Yields its manifest, to whose `about` the block adds what is to be recorded.
        Raises: StoreError, the name is taken or invalid, or the file cannot be copied.
        """
        if version and (not VERSION_NAME.fullmatch(version) or version == ROUTING):
            raise StoreError(f"version {version!r}: expected 1 to 64 letters, digits, dots, dashes or underscores")
        self._remove_leftovers()
        with self._locked():
            version = version or self._next()
            self._check_new(version)
            with as_owner_of(self.directory):
                staging = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=self.directory))
                holder = FileLock(staging / LOCK)
                holder.acquire()  # until this process ends: see _remove_leftovers
        try:
            manifest = _copy(artifact, staging, version)
            yield manifest
            write_json(staging / "manifest.json", manifest.about | {"published": _now(), "by": os_user()})
            staging.chmod(0o755)
            with self._locked():
                self._check_new(version)
                holder.release()  # first: NFS keeps a removed file that is open under another name
                (staging / LOCK).unlink()
                staging.rename(self.directory / version)
                sync_directory(self.directory)
            self.note(f"model publish {version}", "", f"SHA-256 {manifest.about['sha256'][:12]}…", version)
        finally:
            holder.release()
            shutil.rmtree(staging, ignore_errors=True)

    def same_file(self, version: str) -> list[str]:
        """Return the other versions whose file is equal to that of this one."""
        sha256, found = self.manifest(version).about["sha256"], []
        for other in self.versions():
            with suppress(ModelLoadError):  # a manifest that cannot be read
                if other != version and read_manifest(self.directory, other).about["sha256"] == sha256:
                    found.append(other)
        return found

    def promoted(self, old: Routing, version: str) -> Routing:
        """Return the routing with a version as the stable one. Raises: StoreError, that cannot be."""
        self.manifest(version)
        if version == old.stable:
            raise StoreError(f"version {version} is already the stable one")
        previous = [name for name in (old.stable, *old.previous) if name and name != version]
        new = replace(old, stable=version, previous=tuple(previous[:MAX_PREVIOUS]), why=f"promote {version}")
        return _without_canary(new) if old.canary == version else new

    def promote(self, version: str, compared_with: str | None = None, was_canary: bool = False) -> Routing:
        """Make a version the stable one. If it was the canary, there is no canary any more.

        `compared_with` is the stable version that it was compared with; "" if there was none. `was_canary` is whether
        it was the canary then: the guard may have taken it back since. Raises: StoreError.
        """
        with self._locked():
            old = self._as_compared(compared_with)
            if was_canary and old.canary != version:
                raise StoreError(f"version {version} is no longer the canary ({old.why}); run it again, to promote it")
            return self._route(old, self.promoted(old, version))

    def with_canary(self, old: Routing, version: str, weight: float, guard: bool = False) -> Routing:
        """Return the routing with `weight` percent of the requests for a version. Raises: StoreError, it cannot be."""
        if not 0 < weight <= 100:
            raise StoreError(f"weight {weight:g}: expected a percentage of the requests, more than 0 and at most 100")
        self.manifest(version)
        if not old.stable:
            raise StoreError("there is no stable version to compare a canary with; promote one first")
        if version == old.stable:
            raise StoreError(f"version {version} is the stable one; the canary must be another version")
        why = f"canary {version} --weight {weight:g}" + (" --guard" if guard else "")
        return replace(old, canary=version, weight=weight, guard=guard, why=why)

    def canary(self, version: str, weight: float, guard: bool = False, compared_with: str | None = None) -> Routing:
        """Give a version `weight` percent of the requests; see `promote`. Raises: StoreError."""
        with self._locked():
            old = self._as_compared(compared_with)
            return self._route(old, self.with_canary(old, version, weight, guard))

    def rollback(self, why: str = "rollback", version: str = "", only: int | None = None) -> Routing:
        """Withdraw the canary; if there is none, return to the stable version before the last promotion.

        A second rollback in a row is refused, also after the guard's: the operator most likely does not know of the
        first, and it would take a good version back.

        Args:
            why: the reason, for those who read the routing.
            version: an earlier stable version to return to, whatever there is now.
            only: do nothing if the routing has another generation than this by now.

        Raises: StoreError, there is nothing to roll back.
        """
        with self._locked():
            old = Routing.read(self.directory)
            if only is not None and old.generation != only:
                return old
            if old.canary and version in ("", old.stable):
                return self._route(old, replace(_without_canary(old), why=f"{why}: canary {old.canary}"))
            new = _without_canary(self._back(old, version))
            return self._route(old, replace(new, why=f"{why}: from {old.stable} to {new.stable}"))

    def _back(self, old: Routing, version: str) -> Routing:
        """Return the routing with an earlier stable version. Raises: StoreError, it stays as it is."""
        earlier = self.earlier(old)
        names = ", ".join(earlier)
        if not version and old.why.startswith(("rollback", "guard,")):
            done = f"the last change was a rollback already, at {old.changed} by {old.by} ({old.why})"
            way_out = (
                f"To go further back, name one of {names}: python -m model rollback {earlier[0]}" if earlier else ""
            )
            raise StoreError(f"{done}. So version {old.stable} stays the stable one. {way_out}".rstrip())
        if version and version == old.stable:
            raise StoreError(f"version {version} is already the stable one, and there is no canary")
        if version and version not in earlier:
            others = f", as {names} was" if earlier else ""
            raise StoreError(f"version {version!r} was not the stable one lately{others}; promote it")
        if not earlier:
            raise StoreError("there is no canary, and no earlier stable version to return to")
        version = version or earlier[0]
        self.manifest(version)
        return replace(old, stable=version, previous=earlier[earlier.index(version) + 1 :])

    def remove(self, version: str) -> None:
        """Remove a version that is not in use. Raises: StoreError."""
        with self._locked():
            if version in self.in_use():
                raise StoreError(f"version {version} is in use: {self.in_use()[version]}")
            if not VERSION_NAME.fullmatch(version) or not (self.directory / version).is_dir():
                raise StoreError(f"there is no version {version!r}; there are {', '.join(self.versions()) or 'none'}")
            with as_owner_of(self.directory):
                removed = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=self.directory))
            try:
                (self.directory / version).rename(removed / "removed")
            except PermissionError as error:  # only its owner may move a directory
                removed.rmdir()
                owner = f"chown -R --reference={self.directory} {self.directory / version}"
                raise StoreError(f"version {version} belongs to another user; as root: {owner}") from error
            sync_directory(self.directory)
        self.note(f"model remove {version}", "published", "", version)
        shutil.rmtree(removed, ignore_errors=True)  # _remove_leftovers removes the rest

    def size(self, version: str) -> int:
        """Return the bytes that a version takes on the disk."""
        return sum(path.stat().st_size for path in (self.directory / version).iterdir())

    def prunable(self, keep: int, used: Iterable[str] = ()) -> list[str]:
        """Return the versions that are neither in use nor among the newest `keep` others; `used` are in use as well."""
        kept = {*self.in_use(), *used}
        others = [version for version in self.versions() if version not in kept]
        return others[: max(0, len(others) - keep)]

    def manifest(self, version: str) -> Manifest:
        """Read the manifest of a version. Raises: StoreError, it names the versions that exist."""
        try:
            return read_manifest(self.directory, version)
        except ModelLoadError as error:
            raise StoreError(f"{error}. There are: {', '.join(self.versions()) or 'none'}") from error

    def earlier(self, routing: Routing) -> tuple[str, ...]:
        """Return the earlier stable versions that have not been removed, the latest first."""
        return tuple(name for name in routing.previous if (self.directory / name).is_dir())

    def _as_compared(self, compared_with: str | None) -> Routing:
        """Return the routing. Raises: StoreError, its stable version is no longer the one that was compared with."""
        now = Routing.read(self.directory)
        if compared_with not in (None, now.stable):
            raise StoreError(
                f"version {now.stable} became the stable one meanwhile; run it again, to compare with that"
            )
        return now

    def _route(self, old: Routing, new: Routing) -> Routing:
        new = replace(new, generation=old.generation + 1, changed=_now(), by=os_user())
        write_json(self.directory / ROUTING, new.to_json())
        version = new.stable if new.stable != old.stable else new.canary or old.canary
        command = new.why if new.why.startswith("guard") else f"model {new.why}"
        self.note(command, str(old) if old.generation else "", str(new), version)
        return new

    def _check_new(self, version: str) -> None:
        if (self.directory / version).exists():
            raise StoreError(f"version {version} already exists, and versions do not change; choose another name")

    def _next(self) -> str:
        """Return the whole number after those of all versions, including those that are being published."""
        found = (re.fullmatch(r"\.?([0-9]{1,20})(-.{8})?", path.name) for path in self.directory.iterdir())
        return str(1 + max((int(each[1]) for each in found if each), default=0))

    def _remove_leftovers(self) -> None:
        """Remove what killed processes have left. One that is using a directory holds the lock of a file in it."""
        for path in self.directory.glob(".*-????????"):  # as tempfile names them
            with suppress(OSError):
                is_used = (path / LOCK).exists() and is_locked(path / LOCK)
                # A directory that was made just now is not locked yet; nor is one that is becoming a version.
                if not is_used and time.time() - path.stat().st_mtime > 60.0:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep others from changing the store meanwhile. Raises: StoreError, it cannot be written."""
        try:
            lock = FileLock(self.directory / LOCK, mode=0o666)  # less the umask
            with as_owner_of(self.directory):
                lock.acquire(wait=True)  # which makes the directory
            try:
                yield
            finally:
                lock.release()
        except OSError as error:
            raise StoreError(f"the store cannot be written: {error}") from error


def _copy(artifact: Path, staging: Path, version: str) -> Manifest:
    """Copy an artifact into a directory, and describe the copy. Raises: StoreError."""
    copy = staging / f"model{artifact.suffix.lower()}"
    try:
        if not artifact.is_file() and artifact.exists():  # opening a pipe would wait for its writer
            raise StoreError(f"{artifact} cannot be copied into the store: it is not a file")
        with artifact.open("rb") as source, as_owner_of(staging), copy.open("xb") as target:
            shutil.copyfileobj(source, target, 2**20)
        copy.chmod(0o444)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StoreError(f"{artifact} cannot be copied into the store: {error}") from error
    known = {"artifact": copy.name, "format": copy.suffix.lstrip("."), "size": size, "sha256": sha256}
    return Manifest(copy, version, {"version": version} | known)


def read_rows(path: str | Path) -> list[Any]:
    """Read the rows of a sample: a JSON list of 1 to 1000 rows, as in a request's "data". Raises: StoreError."""
    try:
        rows = orjson.loads(Path(path).read_bytes())  # as strict as with a request
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as JSON: {error}") from error
    if isinstance(rows, dict) and "data" in rows:
        rows = rows["data"]  # a whole request body
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_SAMPLE_ROWS:
        raise StoreError(f"{path}: expected a JSON list of 1 to 1000 rows, such as [[5.1, 3.5, 1.4, 0.2]]")
    return rows


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that anyone who may write to its directory can replace."""
    with as_owner_of(path.parent):
        replace_file(path, as_json(value), keep_owner=False)


def as_json(value: Any) -> bytes:
    """Return JSON for people to read."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _without_canary(routing: Routing) -> Routing:
    return replace(routing, canary="", weight=0.0, guard=False)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
