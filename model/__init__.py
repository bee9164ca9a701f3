"""Everything about a model: files, signature, versions, and the versions in memory. Knows nothing of HTTP.

    serving = Serving(model_path=Path("model.joblib"))
    serving.start()
    serving.finished.wait()
    model, variant = serving.choose()
    model.ask(model.signature.check(rows), "predict")

Arrows run one way: serving → loaded → batching, versions, formats, learning → tensors → signature; guard → versions;
publishing, export → loaded, learning, formats.
"""

from .batching import Overloaded
from .formats import ModelLoadError
from .guard import Guard, veto
from .loaded import METHODS, LoadedModel, ModelFailed, RowsRefused
from .roster import Roster
from .serving import ModelNotReady, Serving, UnknownVersion
from .signature import BadRows, Signature

__all__ = [
    "METHODS",
    "BadRows",
    "Guard",
    "LoadedModel",
    "ModelFailed",
    "ModelLoadError",
    "ModelNotReady",
    "Overloaded",
    "Roster",
    "RowsRefused",
    "Serving",
    "Signature",
    "UnknownVersion",
    "veto",
]
