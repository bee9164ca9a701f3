"""KServe's client, version 2 of the protocol: JSON and binary."""

# needs: kserve==0.21.0
# model: iris
# server: EXTENSIONS=+endpoints.open_inference

import asyncio
import itertools
import json
import sys
from pathlib import Path

import httpx
import numpy as np
from kserve import InferenceRESTClient, RESTConfig
from kserve.protocol.infer_type import InferInput, InferRequest, RequestedOutput

URL, TRUTH = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
ROWS = np.array(TRUTH["rows"])


def request(datatype: str, binary_in: bool, binary_out: bool, rows: np.ndarray = ROWS) -> InferRequest:
    """Return a request for two outputs."""
    tensor = InferInput("input", list(rows.shape), datatype)
    tensor.set_data_from_numpy(rows.astype({"FP64": "f8", "FP32": "f4", "FP16": "f2"}[datatype]), binary_in)
    names = ("predict", "predict_proba")
    outputs = [RequestedOutput(name, parameters={"binary_data": binary_out}) for name in names]
    return InferRequest("model", [tensor], request_id="7", request_outputs=outputs)


async def main() -> None:
    """Ask in every form."""
    auth = httpx.BasicAuth(TRUTH["user"], TRUTH["password"])
    client = InferenceRESTClient(RESTConfig(protocol="v2", auth=auth))
    assert await client.is_server_live(URL) is True
    assert await client.is_server_ready(URL) is True
    assert await client.is_model_ready(URL, "model") is True
    for form in itertools.product(("FP64", "FP32", "FP16"), (False, True), (False, True)):
        if form[:2] == ("FP16", False):
            continue  # which the client refuses
        result = await client.infer(URL, request(*form), model_name="model")
        assert result.id == "7", form
        found = {each.name: each.as_numpy() for each in result.outputs}
        assert found["predict_proba"].shape == (len(ROWS), 3), form
        if form[0] != "FP16":
            assert found["predict"].tolist() == TRUTH["predict"], form
        assert form[0] != "FP64" or found["predict_proba"].tolist() == TRUTH["predict_proba"], form
    for name, rows, words in (("other", ROWS, "no model 'other'"), ("model", ROWS[:, :3], "expected (rows, 4)")):
        try:
            await client.infer(URL, request("FP64", True, False, rows), model_name=name)
        except httpx.HTTPStatusError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"not refused: {words}")


asyncio.run(main())
