"""KServe's custom model, asked in version 1 of its protocol."""

import argparse
import os

from kserve import Model, ModelServer, model_server
from loading import load


class Classifier(Model):
    def __init__(self, name):
        super().__init__(name)
        self.run = load(os.environ["MODEL_PATH"])
        self.ready = True

    def predict(self, payload, headers=None):
        return {"predictions": self.run(payload["instances"]).tolist()}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(parents=[model_server.parser]).parse_args()
    ModelServer().start([Classifier(arguments.model_name)])
