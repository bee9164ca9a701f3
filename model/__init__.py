"""Everything about a model: files, signature, versions, and the versions in memory. Knows nothing of HTTP.

    serving = Serving(model_path=Path("model.joblib"))
    serving.start()
    serving.finished.wait()
    model, variant = serving.choose()
    model.predict(model.signature.parse(rows), "predict")

Arrows run one way: serving → versions, formats, learning → tensors → signature; guard → versions; publishing, export →
serving, learning, formats.
"""

from .formats import ModelLoadError
from .guard import Guard, veto
from .roster import Roster
from .serving import METHODS, LoadedModel, ModelFailed, ModelNotReady, RowsRefused, Serving, UnknownVersion
from .signature import BadRows, Signature

__all__ = [
    "METHODS",
    "BadRows",
    "Guard",
    "LoadedModel",
    "ModelFailed",
    "ModelLoadError",
    "ModelNotReady",
    "Roster",
    "RowsRefused",
    "Serving",
    "Signature",
    "UnknownVersion",
    "veto",
]
