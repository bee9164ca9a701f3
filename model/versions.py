"""Model versions on disk.

    var/models/
        routing.json              {"stable": "1"}: which version is served
        1/manifest.json           what version 1 is; written last, so a version with a manifest is whole
        1/model.joblib            the artifact, read-only; never changed, only replaced together with its version

Every file is written beside its place and renamed into it, so a crash at any byte leaves the old state.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .formats import ModelLoadError

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Manifest:
    """What is known of a version before its artifact is read."""

    artifact: Path
    version: str = ""  # empty: named by the artifact's hash
    sha256: str = ""  # empty: not recorded
    sample: list[Any] | None = None  # rows, as in the "data" of a request
    predictions: list[Any] | None = None  # what the model answered to them
    libraries: dict[str, str] | None = None  # name → version that the model was made with

    @classmethod
    def of_bare_file(cls, path: Path) -> "Manifest":
        """Describe a model file that is not in a version store."""
        return cls(artifact=path)

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
            known = json.loads(path.read_text("utf-8"))
            name, sha256 = known["artifact"], known["sha256"]
            if not _VERSION.fullmatch(name) or not re.fullmatch("[0-9a-f]{64}", sha256):
                raise ValueError("artifact is not the name of a file here, or sha256 is not one")
            artifact = directory / version / name
            return cls(artifact, version, sha256, known["sample"], known["predictions"], known["libraries"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelLoadError(
                f"version {version}: {path} cannot be used: {type(error).__name__}: {error}"
            ) from error


def stable(directory: Path) -> Manifest:
    """Read the manifest of the version that is to be served.

    Raises:
        ModelLoadError: none is, or it cannot be used.
    """
    path = directory / "routing.json"
    try:
        version = json.loads(path.read_text("utf-8"))["stable"]
    except FileNotFoundError:
        raise ModelLoadError(
            f"{directory} holds no version to serve ({path} is not there). Make the demo model with "
            f"`python -m model.demo {directory}`, or serve a file with MODEL_PATH=/path/to/model.joblib"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{path} cannot be used: {type(error).__name__}: {error}") from error
    return Manifest.read(directory, str(version))


def publish(directory: Path, artifact: Path, version: str, sample: list[Any], predictions: list[Any]) -> None:
    """Copy an artifact into the store as a new version, with a manifest that proves it."""
    if not _VERSION.fullmatch(version) or version == "routing.json":
        raise ValueError(f"version {version!r}: expected 1 to 64 letters, digits, dots, dashes or underscores")
    directory.mkdir(parents=True, exist_ok=True)
    place = directory / version
    if place.exists():
        raise FileExistsError(f"version {version} is there already, and versions do not change")
    beside = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=directory))
    try:
        copy = beside / f"model{artifact.suffix}"
        shutil.copyfile(artifact, copy)
        copy.chmod(0o444)
        write_json(
            beside / "manifest.json",
            {
                "version": version,
                "artifact": copy.name,
                "size": copy.stat().st_size,
                "sha256": hashlib.sha256(copy.read_bytes()).hexdigest(),
                "published": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "libraries": installed(),
                "sample": sample,
                "predictions": predictions,
            },
        )
        beside.chmod(0o755)
        beside.rename(place)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def promote(directory: Path, version: str) -> None:
    """Make a published version the one that is served."""
    Manifest.read(directory, version)
    write_json(directory / "routing.json", {"stable": version})


def installed() -> dict[str, str]:
    """Return the versions of Python and of the libraries that models are made with."""
    found = {"python": platform.python_version()}
    for name in ("scikit-learn", "numpy", "scipy", "pandas", "joblib"):
        if name.replace("scikit-learn", "sklearn") in sys.modules:
            found[name] = metadata.version(name)
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is there whole or not at all."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}-", delete=False
    ) as file:
        try:
            json.dump(value, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            os.rename(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
