"""FastAPI, as its documentation shows it: a typed body, and a plain function for what blocks."""

import os

from fastapi import FastAPI
from loading import load
from pydantic import BaseModel

app = FastAPI()
predict = load(os.environ["MODEL_PATH"])


class Call(BaseModel):
    data: list[list[float]]


@app.post("/predict")
def answer(call: Call):
    return {"prediction": predict(call.data).tolist()}
