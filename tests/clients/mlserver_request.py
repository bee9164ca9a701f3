"""The one request that `mlserver infer` sends (1.7.1, deprecated): it calls a body of bytes JSON."""

# needs:
# model: iris
# server: EXTENSIONS=+endpoints.open_inference

import base64
import json
import struct
import sys
import urllib.request
from pathlib import Path

truth = json.loads(Path(sys.argv[2]).read_text())
values = [value for row in truth["rows"] for value in row]
raw = struct.pack(f"<{len(values)}d", *values)
tensor = {"name": "input", "shape": [len(truth["rows"]), 4], "datatype": "FP64"}
tensor["parameters"] = {"binary_data_size": len(raw)}
head = json.dumps({"id": "7", "parameters": {"binary_data_output": True}, "inputs": [tensor]}).encode()
headers = {
    "Content-Type": "application/json",
    "Inference-Header-Content-Length": str(len(head)),
    "seldon-puid": "7",
    "x-request-id": "7",
    "Authorization": "Basic " + base64.b64encode(f"{truth['user']}:{truth['password']}".encode()).decode(),
}
request = urllib.request.Request(f"{sys.argv[1]}/v2/models/model/infer", head + raw, headers)
with urllib.request.urlopen(request) as answer:
    body, length = answer.read(), int(answer.headers["Inference-Header-Content-Length"])
assert json.loads(body[:length])["id"] == "7"
assert list(struct.unpack(f"<{len(truth['predict'])}q", body[length:])) == truth["predict"]
