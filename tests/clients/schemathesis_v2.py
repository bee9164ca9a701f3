"""Schemathesis on the protocol's public OpenAPI file, which is fixed first, since it cannot be used as it is.

Its paths are written `/v2/models/${MODEL_NAME}/…`, it demands `data` of each input, and it documents no other errors
than 400. The file is downloaded into CLIENTS_DIR; where that is not possible, put it there under the name below.
"""

# needs: schemathesis==4.32.5
# model: iris
# server: EXTENSIONS=+endpoints.open_inference

import base64
import hashlib
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import yaml

COMMIT = "ff934734c2675b80102abdeb9c2ea2d712026a41"
SOURCE = "https://raw.githubusercontent.com/kserve/open-inference-protocol"
SHA256 = "719644d1cec52d1c98268ee16f3b75d6de7f523c6686463cbf06bf79134edbb2"
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("negative_data_rejection", "unsupported_method", "ignored_auth"),
)
OPTIONS = ("--phases", "examples,coverage,fuzzing", "--max-examples", "100", "--seed", "1")

url, truth = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
password = f"{truth['user']}:{truth['password']}"

path = Path(os.environ["CLIENTS_DIR"]) / "open_inference_rest.yaml"
if not path.exists():
    with urllib.request.urlopen(f"{SOURCE}/{COMMIT}/specification/protocol/open_inference_rest.yaml") as answer:
        path.write_bytes(answer.read())
assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256, f"{path} is not the file of that commit"
spec = yaml.safe_load(path.read_text("utf-8"))

headers = {"Authorization": "Basic " + base64.b64encode(password.encode()).decode()}
with urllib.request.urlopen(urllib.request.Request(f"{url}/v2/models/model", headers=headers)) as answer:
    (version,) = json.load(answer)["versions"]

# Models and versions are filled in; the paths without a version, which the file lacks, are added.
paths = {}
for given, described in spec["paths"].items():
    described.pop("parameters", None)
    for found in ("/versions/${MODEL_VERSION}", ""):
        copy = json.loads(json.dumps(described).replace('"operationId": "', f'"operationId": "{len(paths)}-'))
        filled = given.replace("/versions/${MODEL_VERSION}", found and f"/versions/{version}")
        paths[filled.replace("${MODEL_NAME}", "model")] = copy
schemas = spec["components"]["schemas"]
spec |= {"paths": paths, "security": [{"basic": []}]}
spec["components"]["securitySchemes"] = {"basic": {"type": "http", "scheme": "basic"}}
schemas["request_input"]["required"].remove("data")
boolean = {"type": "boolean"}
for name, members in (("live", ["live"]), ("ready", ["live", "ready"])):
    form = {"type": "object", "required": members, "properties": dict.fromkeys(members, boolean)}
    paths[f"/v2/health/{name}"]["get"]["responses"]["200"]["content"] = {"application/json": {"schema": form}}
    paths[f"/v2/health/{name}"]["get"]["security"] = []
error = {"application/json": {"schema": {"$ref": "#/components/schemas/inference_error_response"}}}
schemas["inference_error_response"]["required"] = ["error"]
for where, described in paths.items():
    for operation in described.values():
        operation["responses"] |= {str(status): {"description": "", "content": error} for status in (400, 401, 405)}
        if where.endswith("/ready"):
            operation["security"] = []
# A request that the model takes, so that answers are seen as well.
tensor = {"name": "input", "shape": [1, 4], "datatype": "FP64", "data": truth["rows"][0]}
for where, described in paths.items():
    if where.endswith("/infer"):
        described["post"]["requestBody"]["required"] = True
        described["post"]["requestBody"]["content"]["application/json"]["example"] = {"inputs": [tensor]}
Path("fixed.json").write_text(json.dumps(spec))
command = [Path(sys.executable).with_name("schemathesis"), "run", "fixed.json", "--url", url, "--auth", password]
sys.exit(subprocess.run([*command, "--checks", ",".join(CHECKS), *OPTIONS]).returncode)
