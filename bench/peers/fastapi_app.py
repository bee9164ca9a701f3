"""FastAPI with a typed body. `async def` holds up the loop, and still answers more than `def` does on its threads."""

import os

from fastapi import FastAPI
from loading import load
from pydantic import BaseModel

app = FastAPI()
predict = load(os.environ["MODEL_PATH"])


class Call(BaseModel):
    data: list[list[float]]


@app.post("/predict")
async def answer(call: Call):
    return {"prediction": predict(call.data).tolist()}
