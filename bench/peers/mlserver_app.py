"""MLServer's own runtime for scikit-learn; for ONNX, of which it has none, the same with another model."""

from loading import OnnxLabels
from mlserver_sklearn import SKLearnModel


class Classifier(SKLearnModel):
    async def load(self):
        if not self.settings.parameters.uri.endswith(".onnx"):
            return await super().load()
        self._model = OnnxLabels(self.settings.parameters.uri)
        return True
