"""MLServer's custom runtime for ONNX; scikit-learn models are served by its own."""

from loading import load
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class OnnxModel(MLModel):
    async def load(self):
        self.run = load(self.settings.parameters.uri)
        return True

    async def predict(self, payload):
        labels = self.run(self.decode(payload.inputs[0], default_codec=NumpyCodec))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("predict", labels)])
