"""FastAPI with the work that this server does: a password, checked rows, a line of JSON for each answer, metrics.

A password's scrypt is verified once, and a proof of it kept in memory, as here.
"""

import hashlib
import hmac
import json
import os
import secrets
import time
from functools import partial
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from loading import load
from prometheus_fastapi_instrumentator import Instrumentator
from pydantic import BaseModel, Field, FiniteFloat

app = FastAPI()
Instrumentator().instrument(app).expose(app)
predict = load(os.environ["MODEL_PATH"])
width = predict.__self__.n_features_in_
journal = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
salt, key, verified = secrets.token_bytes(16), secrets.token_bytes(32), set()
scrypt = partial(hashlib.scrypt, salt=salt, n=2**15, r=8, p=1, maxmem=2**26)
users = {"bench": scrypt(os.environb[b"PASSWORD"])}


class Call(BaseModel):
    data: list[Annotated[list[FiniteFloat], Field(min_length=width, max_length=width)]]


async def user(given: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]):
    proof = hmac.digest(key, f"{given.username}:{given.password}".encode(), "sha256")
    if proof not in verified:
        if not hmac.compare_digest(scrypt(given.password.encode()), users.get(given.username, b"")):
            raise HTTPException(401, headers={"WWW-Authenticate": "Basic"})
        verified.add(proof)
    return given.username


@app.post("/predict")
async def answer(call: Call, name: Annotated[str, Depends(user)]):
    began, record = time.time(), {"request_id": secrets.token_hex(16), "path": "/predict", "status": 200}
    prediction = predict(call.data).tolist()
    record |= {"time": began, "user": name, "rows": len(prediction), "response_time": time.time() - began}
    os.write(journal, json.dumps(record).encode() + b"\n")
    return {"prediction": prediction}
