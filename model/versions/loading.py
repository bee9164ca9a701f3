"""Loads a version of the store: checks its bytes first, then that it answers its sample as when it was published."""

import math
from typing import Any

import numpy as np

from ..formats import ModelLoadError
from ..loaded import LoadedModel, hash_file, load_model
from .store import Manifest


def load_version(manifest: Manifest, **options: Any) -> LoadedModel:
    """Load a version as `load_model` does with these options, and compare it with what its manifest records.

    Raises: ModelLoadError, what is wrong with it.
    """
    about = manifest.about
    sample, recorded = about.get("sample"), about.get("predictions")
    model = load_model(
        manifest.artifact, version=manifest.version, sha256=check_bytes(manifest), sample=sample, **options
    )
    if recorded is not None and not same_predictions(model.call(model.signature.parse(sample)), recorded):
        raise ModelLoadError(
            f"version {model.version} answers its recorded sample differently than when it was published"
        )
    for name, found in model_facts(model).items():
        if name in about and about[name] != found:
            raise ModelLoadError(f"version {model.version} has another {name} than its manifest records")
    model.about["made_with"] = about.get("libraries")
    model.about.update({name: about.get(name) for name in ("published", "metrics", "note")})
    if sample and about.get("sample_from") != "synthetic":
        model.about["validated_with"] = "its recorded sample"
    return model


def model_facts(model: LoadedModel) -> dict[str, Any]:
    """Return what a manifest records of the model itself, as JSON values."""
    return {"signature": model.signature.describe(), "methods": list(model.methods), "classes": model.classes}


def check_bytes(manifest: Manifest) -> str:
    """Return the sha256 of a version's artifact.

    Raises: ModelLoadError, it cannot be read, or is not the file that was published.
    """
    try:
        sha256 = hash_file(manifest.artifact)
    except ModelLoadError as error:
        raise ModelLoadError(f"version {manifest.version}: {error}") from error
    published = manifest.about["sha256"]
    if sha256 != published:
        why = f"its sha256 is {sha256}, its manifest records {published}"
        raise ModelLoadError(f"{manifest.artifact} is not the file that was published: {why}")
    return sha256


def same_predictions(now: Any, recorded: Any, tolerance: float = 1e-9) -> bool:
    """Compare predictions: labels exactly, floats within 1e-9 relative (another CPU may round the last bits).

    Arrays of float32, which networks return, are compared within 1e-5; of float16 within 1e-2.
    """
    if isinstance(now, np.ndarray):
        tolerance = {"float32": 1e-5, "float16": 1e-2}.get(now.dtype.name, tolerance)
        now = now.tolist()
    if isinstance(now, list) and isinstance(recorded, list):
        pairs = zip(now, recorded, strict=False)
        return len(now) == len(recorded) and all(same_predictions(a, b, tolerance) for a, b in pairs)
    if isinstance(now, float) and isinstance(recorded, (int, float)):
        close = math.isclose(now, recorded, rel_tol=tolerance, abs_tol=max(1e-12, tolerance / 100))
        return close or (math.isnan(now) and math.isnan(recorded))
    if isinstance(now, float) and recorded is None:
        return not math.isfinite(now)  # as JSON keeps it
    return bool(now == recorded)
