"""How the peers load a model: in one line for scikit-learn, in a few for ONNX."""

import os

import joblib
import numpy as np


def load(path):
    """Return the model's `predict`: rows → array of labels."""
    return joblib.load(path).predict if path.endswith(".joblib") else OnnxLabels(path)


class OnnxLabels:
    """The labels of an ONNX classifier. Pickled, which is how KServe hands models to its workers, it is its path."""

    def __init__(self, path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])  # it counts cores that it may not use
        self.path, self.session = path, onnxruntime.InferenceSession(path, options)
        given = self.session.get_inputs()[0]
        self.input, self.dtype = given.name, np.float64 if given.type == "tensor(double)" else np.float32
        self.label = self.session.get_outputs()[0].name

    def __call__(self, rows):
        return self.session.run([self.label], {self.input: np.asarray(rows, self.dtype)})[0]

    def __reduce__(self):
        return OnnxLabels, (self.path,)
