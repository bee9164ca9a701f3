"""BentoML with its adaptive batching, which decides by itself how long to wait. Its bound counts rows, not requests."""

import os

import bentoml
import numpy as np
from loading import load


@bentoml.service(workers=int(os.environ["WORKERS"]), logging={"access": {"enabled": False}})
class Classifier:
    def __init__(self) -> None:
        self.run = load(os.environ["MODEL_PATH"])

    @bentoml.api(batchable=True, max_batch_size=6400)
    def predict(self, data: np.ndarray) -> np.ndarray:
        return self.run(data)
