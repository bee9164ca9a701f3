"""LitServe with batches."""

import os

import litserve
import numpy as np
from loading import load


class Classifier(litserve.LitAPI):
    def setup(self, device):
        self.run = load(os.environ["MODEL_PATH"])

    def decode_request(self, request):
        return np.asarray(request["data"])

    def batch(self, inputs):
        self.ends = np.cumsum([len(rows) for rows in inputs])
        return np.concatenate(inputs)

    def predict(self, rows):
        return self.run(rows)

    def unbatch(self, output):
        return np.split(output, self.ends[:-1])

    def encode_response(self, output):
        return {"prediction": output.tolist()}


if __name__ == "__main__":
    api = Classifier(max_batch_size=int(os.environ["BATCH"]), batch_timeout=float(os.environ["WAIT"]))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(os.environ["WORKERS"]))
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning", generate_client_file=False)
