"""What is proved before a version is published or promoted, in a process of its own.

The operator's process never unpickles a model. A fresh one loads it, learns what it takes and lets it answer its
sample; a second one has to come to the same answers (`python -m model.versions.publishing`, which reads the job
from its standard input).
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from ..formats import ModelLoadError
from .store import Manifest, Store, StoreError

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 900.0  # seconds for a model to load and answer its sample


def publish(
    store: Store,
    artifact: Path,
    version: str = "",
    sample: list[Any] | None = None,
    metrics: Any = None,
    note: str = "",
    allow_version_mismatch: bool = False,
) -> Manifest:
    """Make a version of a model file, once it has answered its sample in two fresh processes alike.

    Args:
        artifact: the model file.
        version: its name; by default the next whole number.
        sample: rows that it is to be proved with; without them, a synthetic one.
        metrics, note: kept in the manifest, for people.

    Raises:
        StoreError: saying why there is no new version.
    """
    with store.prepare(artifact, version) as (manifest, beside):
        known = prove(replace(manifest, about=manifest.about | {"sample": sample}), allow_version_mismatch)
        known |= {"sample_from": "operator" if sample else "synthetic", "metrics": metrics, "note": note}
        manifest = replace(manifest, about=manifest.about | known)
        prove(manifest, allow_version_mismatch)
        store.publish(manifest, beside)
    return Manifest.read(store.directory, manifest.version)


def verify(store: Store, version: str, allow_version_mismatch: bool = False) -> None:
    """Prove a published version again: its bytes, its signature, its answers. Raises: StoreError."""
    try:
        prove(Manifest.read(store.directory, version), allow_version_mismatch)
    except ModelLoadError as error:
        raise StoreError(str(error)) from error


def prove(manifest: Manifest, allow_version_mismatch: bool = False) -> dict[str, Any]:
    """Load a version in a fresh process, and return what its manifest is to say of it.

    Raises:
        StoreError: it does not load, or does not answer as its manifest says.
    """
    asked = {
        "artifact": str(manifest.artifact.resolve()),
        "version": manifest.version,
        "about": manifest.about,
        "allow_version_mismatch": allow_version_mismatch,
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.NamedTemporaryFile() as answer:  # not a pipe: a model may print
        try:
            done = subprocess.run(  # noqa: S603  # our own module
                [sys.executable, "-P", "-m", "model.versions.publishing", answer.name],
                input=json.dumps(asked).encode(),
                env=os.environ | {"PYTHONPATH": path},
                stdout=2,  # what it prints is for the operator's eyes
                check=False,
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            raise StoreError(f"{manifest.artifact.name}: it did not load and answer in {TIME_LIMIT:g} s") from None
        told = answer.read()
    if done.returncode or not told:
        raise StoreError(f"{manifest.artifact.name}: the process that was to load it ended with {done.returncode}")
    found: dict[str, Any] = orjson.loads(told)
    if "error" in found:
        raise StoreError(found["error"])
    return found


def preflight(manifest: Manifest, workers: int) -> list[tuple[bool, str]]:
    """Say whether a version fits this machine: memory, processor, Python, libraries; True where it does."""
    found = []
    memory, free = manifest.about.get("memory"), free_memory()
    if workers and isinstance(memory, int) and free is not None:
        need = memory * workers
        said = (
            f"memory: {workers} workers of {memory / 1e6:.0f} MB need up to {need / 1e6:.0f} MB beside what is loaded"
        )
        found.append((need <= free, f"{said}, {free / 1e6:.0f} MB are free"))
    machine = manifest.about.get("machine")
    found.append((machine == platform.machine(), f"processor: published on {machine}, this is {platform.machine()}"))
    here = installed()
    libraries = manifest.about.get("libraries")
    for name, made in sorted(libraries.items()) if isinstance(libraries, dict) else []:
        # As scikit-learn's own check: a patch release keeps what a model is made of.
        fits = str(made).split(".")[:2] == here.get(name, "").split(".")[:2]
        found.append((fits, f"{name}: published with {made}, here {here.get(name) or 'none'}"))
    return found


def free_memory() -> int | None:
    """Return the bytes that may still be used: the machine's, or what is left to our container; None if unknown."""
    with suppress(OSError, ValueError, LookupError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        with suppress(OSError, ValueError, LookupError):  # cgroup v2; "max" where there is no limit
            limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
            found = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            free = min(free, limit - used + int(found["inactive_file"]))  # what files take is given back when needed
        return free
    return None


# The libraries that a model of some format may be made with, by the names of their packages.
LIBRARIES = {
    "sklearn": "scikit-learn",
    "numpy": "numpy",
    "scipy": "scipy",
    "pandas": "pandas",
    "joblib": "joblib",
    "onnxruntime": "onnxruntime",
    "torch": "torch",
    "keras": "keras",
}


def installed(loaded_only: bool = False) -> dict[str, str]:
    """Return the versions of Python and of the libraries that are installed, or of those that are imported."""
    found = {"python": platform.python_version()}
    for module, name in LIBRARIES.items():
        if module in sys.modules or not loaded_only:
            with suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
    return found


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _prove_here(asked: dict[str, Any]) -> dict[str, Any]:
    """The fresh process's part."""
    from ..loaded import load_version

    before = _resident() if sys.platform == "linux" else None
    manifest = Manifest(Path(asked["artifact"]), asked["version"], asked["about"])
    model = load_version(manifest, asked["allow_version_mismatch"])
    sample = asked["about"].get("sample") or model.about["example"]["data"]
    return {
        "signature": model.signature.describe(),
        "methods": model.methods,
        "classes": model.classes,
        "sample": sample,
        "predictions": model.predict(model.signature.parse(sample)),
        "libraries": installed(loaded_only=True),
        "machine": platform.machine(),
        "memory": before and _resident() - before,
    }


def main(answer: str) -> None:
    """Prove what the standard input says, and write what was found to a file."""
    try:
        found = _prove_here(json.load(sys.stdin))
        told = orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY)
    except ModelLoadError as error:
        told = orjson.dumps({"error": str(error)})
    except BaseException as error:  # a model runs code of its own
        told = orjson.dumps({"error": f"{type(error).__name__}: {error}"})
    Path(answer).write_bytes(told)


if __name__ == "__main__":
    main(sys.argv[1])
