"""Triton's own client, on a model that was fitted on a data frame: an input for each column, strings among them."""

# needs: tritonclient[http]==2.73.0
# model: frame
# server: EXTENSIONS=+endpoints.open_inference MODEL_NAME=homes

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.http as http
import tritonclient.http.auth as auth

truth = json.loads(Path(sys.argv[2]).read_text())
client = http.InferenceServerClient(sys.argv[1].removeprefix("http://"))
client.register_plugin(auth.BasicAuth(truth["user"], truth["password"]))
described = client.get_model_metadata("homes")["inputs"]
assert [(each["name"], each["datatype"]) for each in described] == [
    *[("age", "FP64"), ("city", "BYTES")],
    ("rooms", described[2]["datatype"]),
], described
for binary_in, binary_out, width in itertools.product((False, True), (False, True), ([], [1])):
    inputs = []
    for each in described:
        dtype = {"FP64": float, "INT64": np.int64, "BYTES": object}[each["datatype"]]
        array = np.array([row[each["name"]] for row in truth["rows"]], dtype).reshape(-1, *width)
        inputs.append(http.InferInput(each["name"], list(array.shape), each["datatype"]))
        inputs[-1].set_data_from_numpy(array, binary_data=binary_in)
    outputs = [http.InferRequestedOutput(name, binary_data=binary_out) for name in ("predict_proba", "predict")]
    result = client.infer("homes", inputs, outputs=outputs)
    found = [each.decode() if isinstance(each, bytes) else each for each in result.as_numpy("predict")]
    assert found == truth["predict"], found
    assert result.as_numpy("predict_proba").tolist() == truth["predict_proba"]
