"""Everything about a model: files, signature, versions, and the versions in memory. Knows nothing of HTTP.

    serving = Serving(model_path=Path("model.joblib"))
    serving.start()
    serving.finished.wait()
    model = serving.choose()
    model.predict(model.signature.parse(rows), "predict")

Arrows run one way: serving → versions, formats, learning → signature.
"""

from .formats import ModelLoadError
from .serving import METHODS, LoadedModel, ModelFailed, ModelNotReady, RowsRefused, Serving
from .signature import BadRows, Signature

__all__ = [
    "METHODS",
    "BadRows",
    "LoadedModel",
    "ModelFailed",
    "ModelLoadError",
    "ModelNotReady",
    "RowsRefused",
    "Serving",
    "Signature",
]
