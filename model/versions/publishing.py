"""Validates a version before it is published or promoted, in a process of its own.

The operator's process never unpickles a model. A fresh process loads it, infers its signature and lets it predict its
sample; a second one has to come to the same predictions (`python -m model.versions.publishing`, which reads the job
from its standard input).
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

import cli
from settings import Settings

from ..formats import ModelLoadError
from . import callers, expectations
from .loading import load_version, model_facts
from .store import Manifest, Store, StoreError

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 900.0  # seconds for a model to load and predict its sample


def publish(
    store: Store,
    artifact: Path,
    version: str = "",
    sample: list[Any] | None = None,
    metrics: Any = None,
    note: str = "",
    error_bound: float | None = None,
) -> str:
    """Make a version of a model file, once two fresh processes have loaded it and agreed on its predictions.

    Args:
        artifact: the model file.
        version: its name; by default the next whole number.
        sample: rows to validate it with; without them, a synthetic row.
        metrics, note: kept in the manifest, for people.
        error_bound: the error from which on it alerts; by default that of the metrics (see expectations.error_bound).

    Returns its name. Raises: StoreError, why there is no new version.
    """
    with cli.progressbar(3, "publishing") as bar:
        with store.new_version(artifact, version) as manifest:
            bar.update(1)
            manifest.about["sample"] = sample
            manifest.about.update(validate(manifest))
            bar.update(1)
            manifest.about.update(sample_from="operator" if sample else "synthetic", metrics=metrics, note=note)
            manifest.about["error_bound"] = expectations.error_bound(error_bound, metrics, manifest.about["classes"])
            validate(manifest)
        bar.update(1)
    return manifest.version


def validate(manifest: Manifest, callers_of: Manifest | None = None) -> dict[str, Any]:
    """Load a version in a fresh process, and return what its manifest has to record.

    `callers_of` is a version that it is to replace, or to be served beside; what the callers of that one would notice
    is returned as `differences` (see callers.py).

    Raises: StoreError, it does not load, or does not predict what its manifest records.
    """
    job = {"artifact": str(manifest.artifact), "version": manifest.version, "about": manifest.about}
    job |= {"callers_of": callers_of.about} if callers_of else {}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.NamedTemporaryFile() as result:  # not a pipe: a model may print
        try:
            done = subprocess.run(  # noqa: S603  # our own module
                [sys.executable, "-P", "-m", "model.versions.publishing", result.name],
                input=json.dumps(job).encode(),
                env=os.environ | {"PYTHONPATH": path},
                stdout=2,  # the operator sees what it prints
                check=False,
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            raise StoreError(f"{manifest.artifact.name} did not load and predict within {TIME_LIMIT:g} s") from None
        content = result.read()
    if done.returncode or not content:
        raise StoreError(f"{manifest.artifact.name}: the process that loaded it ended with {done.returncode}")
    found: dict[str, Any] = orjson.loads(content)
    if "error" in found:
        raise StoreError(found["error"])
    return found


def preflight(manifest: Manifest, workers: int, allow_version_mismatch: bool = False) -> list[tuple[bool, str]]:
    """Compare a version with this machine: memory, processor, Python, libraries; True for what fits."""
    found = []
    memory, free = manifest.about.get("memory"), free_memory()
    if workers and isinstance(memory, int) and free is not None:
        need = memory * workers
        needs = f"memory: {workers} workers of {memory / 1e6:.0f} MB need up to {need / 1e6:.0f} MB more"
        found.append((need <= free, f"{needs}, {free / 1e6:.0f} MB are free"))
    machine = manifest.about.get("machine")
    found.append((machine == platform.machine(), f"processor: published on {machine}, this is {platform.machine()}"))
    here = installed()
    libraries = manifest.about.get("libraries")
    for name, made in sorted(libraries.items()) if isinstance(libraries, dict) else []:
        # As in scikit-learn's own check: a patch release does not change how a model is stored.
        fits = str(made).split(".")[:2] == here.get(name, "").split(".")[:2]
        allowed = ", allowed by ALLOW_VERSION_MISMATCH=1" if allow_version_mismatch and not fits else ""
        words = f"{name}: published with {made}, here {here.get(name) or 'none'}{allowed}"
        found.append((fits or allow_version_mismatch, words))
    return found


def free_memory() -> int | None:
    """Return the bytes of free memory, of the machine or of this container; None if that is unknown."""
    with suppress(OSError, ValueError, LookupError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        with suppress(OSError, ValueError, LookupError):  # cgroup v2; "max" means no limit
            limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
            found = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            free = min(free, limit - used + int(found["inactive_file"]))  # the kernel frees cached files when needed
        return free
    return None


# The packages that models are made with.
PACKAGES = ("scikit-learn", "numpy", "scipy", "pandas", "joblib", "onnxruntime", "torch", "keras")


def installed(loaded_only: bool = False) -> dict[str, str]:
    """Return the versions of Python and of the `PACKAGES` that are installed, or of those that are imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        if not loaded_only or name.replace("scikit-learn", "sklearn") in sys.modules:
            with suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
    return found


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def validate_here(job: dict[str, Any]) -> dict[str, Any]:
    """Do the work of `validate` in this process."""
    before = _resident() if sys.platform == "linux" else None
    manifest = Manifest(Path(job["artifact"]), job["version"], job["about"])
    settings = Settings.load()
    model = load_version(manifest, allow_version_mismatch=settings.allow_version_mismatch)
    sample = job["about"].get("sample") or model.about["example"]["data"]
    predictions = model.call(model.signature.parse(sample))
    found = model_facts(model) | {
        "sample": sample,
        "predictions": predictions,
        "categories": callers.categories(model),
        "reference": expectations.reference(predictions, model.classes),
        "merges_requests": model.about["merges_requests"],
        "warnings": model.about["warnings"],
        "libraries": installed(loaded_only=True),
        "machine": platform.machine(),
        "memory": before and _resident() - before,
    }
    if old := job.get("callers_of"):
        found["differences"] = callers.compare(model, old, job["about"] | model_facts(model))
    return found


def main(result: str) -> None:
    """Validate what the standard input describes, and write the result to a file."""
    try:
        content = orjson.dumps(validate_here(json.load(sys.stdin)), option=orjson.OPT_SERIALIZE_NUMPY)
    except BaseException as error:  # a model runs code of its own
        known = isinstance(error, ModelLoadError)
        content = orjson.dumps({"error": str(error) if known else f"{type(error).__name__}: {error}"})
    Path(result).write_bytes(content)


if __name__ == "__main__":
    main(sys.argv[1])
