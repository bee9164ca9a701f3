"""How the peers load a model: in one line for scikit-learn, in a few for ONNX."""

import os

import joblib
import numpy as np


def load(path):
    """Return the model's `predict`: rows → array of labels."""
    return joblib.load(path).predict if path.endswith(".joblib") else OnnxLabels(path).predict


class OnnxLabels:
    """The labels of an ONNX classifier."""

    def __init__(self, path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])  # it counts cores that it may not use
        self.session = onnxruntime.InferenceSession(path, options)
        given = self.session.get_inputs()[0]
        self.input, self.dtype = given.name, np.float64 if given.type == "tensor(double)" else np.float32
        self.label, self.n_features_in_ = self.session.get_outputs()[0].name, given.shape[1]

    def predict(self, rows):
        return self.session.run([self.label], {self.input: np.asarray(rows, self.dtype)})[0]
