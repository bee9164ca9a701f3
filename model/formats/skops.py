"""scikit-learn's models by skops. Their types are checked before anything is built, so a file runs no code."""

from pathlib import Path
from typing import Any

from . import UnsupportedModel
from .sklearn import ready

# scikit-learn's compiled parts: arrays with methods. skops knows its Python classes and leaves these to the user.
_COMPILED = (
    "sklearn.tree._tree.",
    "sklearn.ensemble._hist_gradient_boosting.",
    "sklearn.metrics._dist_metrics.",
    "sklearn.neighbors._kd_tree.",
    "sklearn.neighbors._ball_tree.",
    "sklearn._loss.",
    "sklearn.linear_model._sgd_fast.",
)


def load_skops(path: Path, *, allow_version_mismatch: bool, immutable: bool) -> Any:
    """Load what `skops.io.dump` wrote. Raises: UnsupportedModel, types that are not known to be safe; as `ready`."""
    import skops.io

    found = skops.io.get_untrusted_types(file=path)
    if unknown := [name for name in found if not name.startswith(_COMPILED)]:
        raise UnsupportedModel(
            f"holds types that are not known to be safe: {', '.join(unknown)}. "
            "If you trust its author, save the model with joblib instead"
        )
    return ready(lambda: skops.io.load(path, trusted=found), allow_version_mismatch)
