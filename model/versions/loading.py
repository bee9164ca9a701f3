"""Loads a version of the store: checks its bytes first, then that it answers its sample as when it was published."""

import math
from typing import Any

import numpy as np

from ..answers import ModelFailed
from ..formats import ModelLoadError
from ..loaded import LoadedModel, RowsRefused, hash_file, load_model
from ..signature import BadRows
from .store import Manifest

# Counts the forms that descriptions of signatures have had: 2 knows categories, dates, and more booleans, 3
# categories that are passed on to a booster.
SIGNATURE_FORM = 3


def load_version(manifest: Manifest, **options: Any) -> LoadedModel:
    """Load a version as `load_model` does with these options, and compare it with what its manifest records.

    Raises: ModelLoadError, what is wrong with it.
    """
    about = manifest.about
    sample, recorded = about.get("sample"), about.get("predictions")
    shown = None if about.get("sample_from") == "synthetic" else sample  # a made-up row shows no kinds of columns
    model = load_model(
        manifest.artifact,
        version=manifest.version,
        sha256=check_bytes(manifest),
        sample=shown,
        nullable=_nullable(about),
        **options,
    )
    if recorded is not None and not same_predictions(_answer(model, sample), recorded):
        raise ModelLoadError(
            f"version {model.version} answers its recorded sample differently than when it was published"
        )
    for name, found in model_facts(model).items():
        if name in about and not _is_same(name, found, about):
            raise ModelLoadError(f"version {model.version} has another {name} than its manifest records")
    model.about["made_with"] = about.get("libraries")
    model.about.update({name: about.get(name) for name in ("published", "metrics", "note", "error_bound", "reference")})
    if shown:
        model.about["validated_with"] = "its recorded sample"
    return model


def _answer(model: LoadedModel, sample: Any) -> Any:
    try:
        return model.call(model.signature.parse(sample))
    except (BadRows, RowsRefused, ModelFailed) as error:
        raise ModelLoadError(f"the model refuses its recorded sample ({type(error).__name__}: {error})") from error


def model_facts(model: LoadedModel) -> dict[str, Any]:
    """Return what a manifest records of the model itself, as JSON values."""
    signature = {"signature": model.signature.describe(), "signature_form": SIGNATURE_FORM}
    return signature | {"methods": list(model.methods), "classes": model.classes}


def _is_same(name: str, found: Any, about: dict[str, Any]) -> bool:
    """Compare a fact with what a manifest records of it.

    A manifest of an older form may describe the same column otherwise, as a number and not as a boolean, say. Of those
    the names of the columns are compared; the file's hash and its predictions are compared in any case.
    """
    if about.get("signature_form") == SIGNATURE_FORM:
        return bool(about[name] == found)
    if name == "signature":
        return bool(_column_names(about[name]) == _column_names(found))
    return name == "signature_form" or bool(about[name] == found)


def _nullable(about: dict[str, Any]) -> list[bool] | None:
    """Return which columns may be missing: what was found at publishing, since a slow model is not tried to the end."""
    signature = about.get("signature") if about.get("signature_form") == SIGNATURE_FORM else None
    columns = signature.get("columns") if isinstance(signature, dict) else None
    return [column.get("nullable") is True for column in columns] if columns else None


def _column_names(signature: Any) -> Any:
    columns = signature.get("columns") if isinstance(signature, dict) else None
    return columns and [column.get("name") for column in columns]


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
