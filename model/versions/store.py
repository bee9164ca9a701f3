"""Model versions on disk.

    var/models/
        routing.json              which version is served, which beside it and how much, who changed that last, and why
        1/manifest.json           what version 1 is, and what it answered to its sample when it was published
        1/model.joblib            the artifact, read-only

A version never changes; it is there whole or not at all. Every file is written beside its place and renamed into it,
so a crash at any byte leaves the old state, and readers need no lock. Those who change something take turns (`flock` on
`.lock`).
"""

import fcntl
import getpass
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from ..formats import ModelLoadError

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class StoreError(Exception):
    """What the store was asked for cannot be done. The message is for the operator."""


@dataclass(frozen=True)
class Manifest:
    """What is known of a version before its artifact is read: `manifest.json`, or a bare file's path.

    Format: a JSON object with `version`, `artifact` (a file name), `format`, `size` (bytes), `sha256`, `signature` and
    `methods` and `classes` (as `GET /model` shows them), `sample` (rows, as in the "data" of a request), `sample_from`
    ("operator", or "synthetic" where none was given), `predictions` (what the model answered to the sample),
    `libraries` and `machine` (that it was published with), `memory` (bytes that loading it took, its libraries
    included), `published`, `by`, and what the publisher wants remembered: `metrics` and `note`.
    """

    artifact: Path
    version: str = ""  # empty: named by the artifact's hash
    about: dict[str, Any] = field(default_factory=dict)  # the whole of manifest.json

    @classmethod
    def read(cls, directory: Path, version: str) -> "Manifest":
        """Read the manifest of a version of the store.

        Raises:
            ModelLoadError: there is no such version, or its manifest does not make sense.
        """
        if not _VERSION.fullmatch(version):
            raise ModelLoadError(f"{version!r} is not the name of a version")
        path = directory / version / "manifest.json"
        try:
            about = orjson.loads(path.read_bytes())
            name, sha256 = about["artifact"], about["sha256"]
            if not _VERSION.fullmatch(name) or not re.fullmatch("[0-9a-f]{64}", sha256):
                raise ValueError("artifact is not the name of a file here, or sha256 is not one")
            if about["version"] != version:
                raise ValueError(f"it is that of version {about['version']!r}")
            if not isinstance(about["sample"], list) or about["predictions"] is None:
                raise ValueError("it has no sample, or no predictions")
            return cls(directory / version / name, version, about)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelLoadError(
                f"version {version}: {path} cannot be used: {type(error).__name__}: {error}"
            ) from error


@dataclass(frozen=True)
class Routing:
    """Which versions are served: `routing.json`.

    Format: a JSON object with `stable` (a version); `previous`, the stable versions before it, the latest first:
    rollback goes back to them, and a server falls back on them where the stable version does not load; `canary`, null
    or `{"version", "weight", "guard"}`, the weight in requests of a hundred; `generation`, which grows with each
    change; `changed` (UTC), `by`, and `why`, the change in words.
    """

    stable: str = ""
    previous: tuple[str, ...] = ()
    canary: str = ""
    weight: float = 0.0
    guard: bool = False
    generation: int = 0
    changed: str = ""
    by: str = ""
    why: str = ""

    @classmethod
    def read(cls, directory: Path, name: str = "routing.json") -> "Routing":
        """Read the routing of a store; one that has none yet routes nothing.

        Raises:
            ModelLoadError: it does not make sense.
        """
        path = directory / name
        try:
            given = orjson.loads(path.read_bytes())
            previous = given.get("previous", [])
            if not isinstance(previous, list):
                raise ValueError("previous is not a list")
            canary = given.get("canary") or {"version": "", "weight": 0, "guard": False}
            routing = cls(
                given["stable"],
                tuple(previous),
                canary["version"],
                float(canary["weight"]),
                canary["guard"] is True,
                int(given.get("generation", 0)),
                *(str(given.get(name, "")) for name in ("changed", "by", "why")),
            )
            names = [routing.stable, *routing.previous, *([routing.canary] if routing.canary else [])]
            if not all(isinstance(name, str) and _VERSION.fullmatch(name) for name in names):
                raise ValueError("it names what is no version")
            if not 0 <= routing.weight <= 100:
                raise ValueError("the canary's weight is not from 0 to 100")
            return routing
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{path} cannot be used: {type(error).__name__}: {error}") from error

    @property
    def mark(self) -> str:
        """Tell this routing from every other. The generation alone does not: one written by hand may repeat it."""
        return f"{self.generation} of {self.changed}: {self.canary} {self.weight:g}"

    def as_json(self) -> dict[str, Any]:
        """Return it as it is written."""
        canary = {"version": self.canary, "weight": self.weight, "guard": self.guard} if self.canary else None
        return {
            "generation": self.generation,
            "stable": self.stable,
            "previous": list(self.previous),
            "canary": canary,
            "changed": self.changed,
            "by": self.by,
            "why": self.why,
        }


class Store:
    """A version store: what its operators do. Servers only read it (`Manifest.read`, `Routing.read`)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def versions(self) -> list[str]:
        """List the versions, in the order of their publication."""
        found = []
        for path in self.directory.glob("*/manifest.json"):
            with suppress(OSError):  # removed just now
                if _VERSION.fullmatch(path.parent.name):
                    found.append((path.stat().st_mtime_ns, path.parent.name))
        return [name for _, name in sorted(found)]

    @contextmanager
    def prepare(self, artifact: Path, version: str = "") -> Iterator[tuple[Manifest, Path]]:
        """Copy an artifact to where it can be tried out; `publish` makes a version of it. Else nothing stays.

        Args:
            artifact: the model file; its suffix says the format.
            version: its name; by default the next whole number.

        Raises:
            StoreError: the name is taken or is none, or the file cannot be copied.
        """
        if version and (not _VERSION.fullmatch(version) or version == "routing.json"):
            raise StoreError(f"version {version!r}: expected 1 to 64 letters, digits, dots, dashes or underscores")
        self._sweep()
        with self._turn():
            version = version or self._next()
            self._check_new(version)
            beside = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=self.directory))
            holder = os.open(beside, os.O_RDONLY)
        try:
            fcntl.flock(holder, fcntl.LOCK_EX)  # until we die: see _sweep
            copy = beside / f"model{artifact.suffix.lower()}"
            try:
                shutil.copyfile(artifact, copy)
                copy.chmod(0o444)
                with copy.open("rb") as file:
                    os.fsync(file.fileno())
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise StoreError(f"{artifact} cannot be copied into the store: {error}") from error
            about = {
                "version": version,
                "artifact": copy.name,
                "format": copy.suffix.lstrip("."),
                "size": copy.stat().st_size,
                "sha256": sha256,
            }
            yield Manifest(copy, version, about), beside
        finally:
            os.close(holder)
            shutil.rmtree(beside, ignore_errors=True)

    def publish(self, manifest: Manifest, beside: Path) -> None:
        """Make a version of what `prepare` gave and the caller has proved. Raises: StoreError, the name was taken."""
        about = manifest.about | {"published": _now(), "by": _me()}
        write_json(beside / "manifest.json", about)
        beside.chmod(0o755)
        with self._turn():
            self._check_new(manifest.version)
            beside.rename(self.directory / manifest.version)
            _sync(self.directory)

    def promote(self, version: str) -> Routing:
        """Make a version the stable one; a canary of it has then done its work."""
        with self._turn():
            old = self._routing()
            self._check_known(version)
            if version == old.stable:
                raise StoreError(f"version {version} is the stable one already")
            previous = [name for name in (old.stable, *old.previous) if name and name != version]
            new = replace(old, stable=version, previous=tuple(previous[:10]))
            if old.canary == version:
                new = replace(new, canary="", weight=0.0, guard=False)
            return self._route(old, new, f"promote {version}")

    def canary(self, version: str, weight: float, guard: bool = False) -> Routing:
        """Give a version a share of the requests, `weight` of a hundred, beside the stable one."""
        check_weight(weight)
        with self._turn():
            old = self._routing()
            self._check_known(version)
            if not old.stable:
                raise StoreError("there is no stable version to stand beside; promote one first")
            if version == old.stable:
                raise StoreError(f"version {version} is the stable one; a canary is another version")
            why = f"canary {version} --weight {weight:g}" + (" --guard" if guard else "")
            return self._route(old, replace(old, canary=version, weight=weight, guard=guard), why)

    def rollback(self, why: str = "rollback", only: int | None = None) -> Routing:
        """Take the canary back; where there is none, go back to the stable version before this one.

        Args:
            why: the reason, for those who read the routing.
            only: the generation that is meant; where the routing has moved on meanwhile, nothing is done.
        """
        with self._turn():
            old = self._routing()
            if only is not None and old.generation != only:
                return old
            if old.canary:
                return self._route(old, replace(old, canary="", weight=0.0, guard=False), f"{why}: canary {old.canary}")
            earlier = self._earlier(old)
            if not earlier:
                raise StoreError("there is no canary, and no earlier stable version to go back to")
            self._check_known(earlier[0])
            new = replace(old, stable=earlier[0], previous=earlier[1:])
            return self._route(old, new, f"{why}: from {old.stable} to {new.stable}")

    def remove(self, version: str) -> None:
        """Remove a version that is not in use."""
        with self._turn():
            if version in self.in_use():
                raise StoreError(f"version {version} is in use: {self.in_use()[version]}")
            if not _VERSION.fullmatch(version) or not (self.directory / version).is_dir():
                raise StoreError(f"there is no version {version!r}; there are {', '.join(self.versions()) or 'none'}")
            gone = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=self.directory))
            (self.directory / version).rename(gone / "removed")
            _sync(self.directory)
        shutil.rmtree(gone, ignore_errors=True)  # what stays of it is for _sweep

    def in_use(self) -> dict[str, str]:
        """Return the versions that are in use, and as what."""
        routing = self._routing()
        uses = dict.fromkeys(self._earlier(routing)[:1], "rollback goes back to it")
        if routing.canary:
            uses[routing.canary] = f"canary, {routing.weight:g} of a hundred requests"
        if routing.stable:
            uses[routing.stable] = "stable"
        return uses

    def _earlier(self, routing: Routing) -> tuple[str, ...]:
        """Return the earlier stable versions that have not been removed."""
        return tuple(name for name in routing.previous if (self.directory / name).is_dir())

    def _routing(self) -> Routing:
        try:
            return Routing.read(self.directory)
        except ModelLoadError as error:
            raise StoreError(f"{error}. Put it right, or remove it and promote a version") from error

    def _route(self, old: Routing, new: Routing, why: str) -> Routing:
        new = replace(new, generation=old.generation + 1, changed=_now(), by=_me(), why=why)
        write_json(self.directory / "routing.json", new.as_json())
        return new

    def _check_known(self, version: str) -> None:
        try:
            Manifest.read(self.directory, version)
        except ModelLoadError as error:
            there = ", ".join(self.versions()) or "none; publish one first"
            raise StoreError(f"{error}. There are: {there}") from error

    def _check_new(self, version: str) -> None:
        if (self.directory / version).exists():
            raise StoreError(f"version {version} is there already, and versions do not change; name another")

    def _next(self) -> str:
        """Return the whole number after those of all versions, also of those that somebody is about to publish."""
        found = (re.fullmatch(r"\.?([0-9]{1,20})(-.{8})?", path.name) for path in self.directory.iterdir())
        return str(1 + max((int(each[1]) for each in found if each), default=0))

    def _sweep(self) -> None:
        """Remove what somebody who was killed has left half done. Who is at work on a directory holds it."""
        for path in self.directory.glob(".*-????????"):  # as tempfile names them
            with suppress(OSError):
                holder = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if time.time() - path.stat().st_mtime > 60.0:  # one that was made just now is not held yet
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                finally:
                    os.close(holder)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Keep others from changing the store meanwhile. Raises: StoreError, it cannot be written."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.directory / ".lock", os.O_RDONLY | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(f"the store cannot be written: {error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        except OSError as error:
            raise StoreError(f"the store cannot be written: {error}") from error
        finally:
            os.close(lock)


def check_weight(weight: float) -> None:
    """Refuse what is no weight. Raises: StoreError."""
    if not 0 < weight <= 100:
        raise StoreError(f"weight {weight:g}: expected more than 0, and 100 at most: requests of a hundred")


def rows_from(path: Path) -> list[Any]:
    """Read the rows of a sample: a JSON list of 1 to 1000 rows, as in a request's "data". Raises: StoreError."""
    try:
        rows = orjson.loads(path.read_bytes())  # as strict as with a request
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as JSON: {error}") from error
    if isinstance(rows, dict) and "data" in rows:
        rows = rows["data"]  # a whole request body
    if not isinstance(rows, list) or not 1 <= len(rows) <= 1000:
        raise StoreError(f"{path}: expected a JSON list of 1 to 1000 rows, such as [[5.1, 3.5, 1.4, 0.2]]")
    return rows


def write_json(path: Path, value: Any, lasting: bool = True) -> None:
    """Write a JSON file that is there whole or not at all; `lasting` through a power cut as well."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}-", delete=False
    ) as file:
        try:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            if lasting:
                os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            os.rename(file.name, path)
            if lasting:
                _sync(path.parent)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(file.name)
            raise


def _sync(directory: Path) -> None:
    """Make what was renamed in a directory last through a power cut."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _me() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())
