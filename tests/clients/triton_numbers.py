"""Triton's own client, on a model of numbers: JSON, binary, compressed, with passwords, and asynchronous."""

# needs: tritonclient[http]==2.73.0
# model: iris
# server: EXTENSIONS=+endpoints.open_inference

import asyncio
import contextlib
import io
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as http
import tritonclient.http.aio as aio
import tritonclient.http.aio.auth as aio_auth
import tritonclient.http.auth as http_auth
from tritonclient.utils import InferenceServerException

URL, TRUTH = sys.argv[1].removeprefix("http://"), json.loads(Path(sys.argv[2]).read_text())
ROWS = np.array(TRUTH["rows"])
FORMS = list(itertools.product((False, True), (False, True, None), (None, "gzip", "deflate"), ("FP64", "FP32")))


def call(binary_in: bool, binary_out: bool | None, compression: str | None, datatype: str) -> dict[str, Any]:
    """Return the arguments of a request; without outputs the client asks for bytes."""
    rows = ROWS.astype("float32") if datatype == "FP32" else ROWS
    tensor = http.InferInput("input", list(rows.shape), datatype)
    tensor.set_data_from_numpy(rows, binary_data=binary_in)
    names = ("predict", "predict_proba")
    outputs = None
    if binary_out is not None:
        outputs = [http.InferRequestedOutput(name, binary_data=binary_out) for name in names]
    return {"model_name": "model", "inputs": [tensor], "outputs": outputs, "request_compression_algorithm": compression}


def check(result: Any, form: tuple[Any, ...]) -> None:
    """Check a result: of float64 it is the truth to the bit."""
    assert result.as_numpy("predict").tolist() == TRUTH["predict"], form
    proba = result.as_numpy("predict_proba")
    if form[1] is not None:
        assert np.allclose(proba, TRUTH["predict_proba"], rtol=1e-5), form
        assert form[3] == "FP32" or proba.tolist() == TRUTH["predict_proba"], form


def refused(function: Any, *words: str) -> None:
    """Check that a call is refused, and that the client shows why."""
    try:
        function()
    except InferenceServerException as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"not refused: {words}")


def main() -> None:
    """Ask in every form."""
    client = http.InferenceServerClient(URL)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("model")
    assert not client.is_model_ready("other")
    refused(lambda: client.infer(**call(*FORMS[0])), "401", "basic auth")
    client.register_plugin(http_auth.BasicAuth(TRUTH["user"], TRUTH["password"]))
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("model")
    assert metadata["inputs"] == [{"name": "input", "datatype": "FP64", "shape": [-1, 4]}]
    (version,) = metadata["versions"]
    for form in FORMS:
        check(client.infer(**call(*form)), form)
    check(client.infer(**call(*FORMS[0]), model_version=version, request_id="7", priority=1, timeout=10**6), FORMS[0])
    assert client.infer(**call(*FORMS[0]), request_id="7").get_response()["id"] == "7"
    (form,) = [each for each in FORMS if each == (True, True, "gzip", "FP64")]
    check(client.async_infer(**call(*form)).get_result(), form)
    check(client.infer(**call(*form), response_compression_algorithm="gzip"), form)
    best = http.InferRequestedOutput("predict_proba", class_count=2)
    found = client.infer("model", call(*FORMS[0])["inputs"], outputs=[best]).as_numpy("predict_proba")
    assert found.shape == (len(ROWS), 2)
    assert [int(row[0].split(b":")[1]) for row in found] == TRUTH["predict"]

    other = call(*FORMS[0]) | {"model_name": "other"}
    refused(lambda: client.infer(**other), "404", "no model 'other'")
    refused(lambda: client.infer(**call(*FORMS[0]), model_version="9"), "404", "version '9' is not served")
    refused(client.get_inference_statistics, "404")
    wrong = http.InferInput("input", [1, 3], "FP64").set_data_from_numpy(np.ones((1, 3)))
    refused(lambda: client.infer("model", [wrong]), "400", "expected (rows, 4)")


async def main_aio() -> None:
    """Ask in every form, asynchronously."""
    async with aio.InferenceServerClient(URL) as client:
        client.register_plugin(aio_auth.BasicAuth(TRUTH["user"], TRUTH["password"]))
        assert await client.is_server_ready()
        assert (await client.get_model_metadata("model"))["name"] == "model"
        for form in FORMS:
            check(await client.infer(**call(*form)), form)


def run_documented() -> None:
    """Run the program of docs/protocols.md."""
    page = (Path(__file__).parents[2] / "docs/protocols.md").read_text("utf-8")
    (program,) = re.findall(r"^```python\n(import numpy.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for shown, real in (("127.0.0.1:5000", URL), ("alice", TRUTH["user"]), ("correct horse", TRUTH["password"])):
        assert shown in program
        program = program.replace(shown, real)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program, {})
    assert printed.getvalue() == "[0]\n"


main()
asyncio.run(main_aio())
run_documented()
