"""How the peers load a model: in one line for scikit-learn, in a few for ONNX."""

import os

import numpy as np


def load(path):
    """Return the model's `predict`: rows → array of labels."""
    if path.endswith(".joblib"):
        import joblib

        return joblib.load(path).predict
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])  # it counts cores that it may not use
    session = onnxruntime.InferenceSession(path, options)
    given, label = session.get_inputs()[0], session.get_outputs()[0].name
    dtype = np.float64 if given.type == "tensor(double)" else np.float32
    return lambda rows: session.run([label], {given.name: np.asarray(rows, dtype)})[0]
