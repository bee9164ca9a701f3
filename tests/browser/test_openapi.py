"""What other people's readers of OpenAPI make of ours: a validator, and Schemathesis, which tries to break it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import pytest
from conftest import PASSWORD, Client, gunicorn, write_users
from onnx import TensorProto, helper
from openapi_spec_validator import OpenAPIV31SpecValidator
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from auth import ROLES
from browser.test_docs_page import FRAME

PROTOCOLS = ",".join(
    f"+endpoints.{name}" for name in ("open_inference", "sagemaker", "vertex", "function_compute", "eas")
)
# Arrays as numpy.save writes them, of which Schemathesis knows nothing.
HOOKS = """
import io, numpy, schemathesis
from hypothesis import strategies as st

def save(row):
    file = io.BytesIO()
    numpy.save(file, numpy.array([row]))
    return file.getvalue()

rows = st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4)
schemathesis.openapi.media_type("application/x-npy", rows.map(save))
"""
# By default 413 is no way to reject what a schema forbids, such as more entries than one request may have.
CONFIG = "[checks.negative_data_rejection]\nexpected-statuses = [400, 401, 403, 404, 405, 406, 413, 415, 422]\n"


def iris(place: Path) -> Path:
    """Write a classifier of four named numbers."""
    data = load_iris(as_frame=True)
    return dump(LogisticRegression(max_iter=1000).fit(data.data, data.target), place)


def frame(place: Path) -> Path:
    """Write a classifier of numbers and of strings, which rejects unknown ones."""
    columns = make_column_transformer((StandardScaler(), ["age"]), (OneHotEncoder(), ["city"]), remainder="passthrough")
    return dump(make_pipeline(columns, LogisticRegression()).fit(FRAME, ["yes", "no", "no", "yes"]), place)


def text(place: Path) -> Path:
    """Write a classifier of strings."""
    model = make_pipeline(TfidfVectorizer(), LogisticRegression())
    return dump(model.fit(["good day", "bad day", "fine", "awful"], [1, 0, 1, 0]), place)


def image(place: Path) -> Path:
    """Write an ONNX model of images with one channel, which answers the sum of the pixels."""
    return write_onnx([None, 1, 8, 8], place)


def numbers(place: Path) -> Path:
    """Write an ONNX model of four numbers, which answers their sum."""
    return write_onnx([None, 4], place)


def dump(model: Any, place: Path) -> Path:
    """Write a model of scikit-learn."""
    joblib.dump(model, place / "model.joblib")
    return place / "model.joblib"


def write_onnx(shape: list[int | None], place: Path) -> Path:
    """Write an ONNX model that sums each row."""
    axes = helper.make_tensor("axes", TensorProto.INT64, [len(shape) - 1], list(range(1, len(shape))))
    node = helper.make_node("ReduceSum", ["input", "axes"], ["sum"], keepdims=0)
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
    answer = helper.make_tensor_value_info("sum", TensorProto.FLOAT, [None])
    graph = helper.make_graph([node], "sums", [given], [answer], [axes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), place / "model.onnx")
    return place / "model.onnx"


@pytest.mark.parametrize("write", [iris, frame, text, image, numbers])
def test_document_of_each_kind_of_model_is_valid_and_its_example_is_answered(
    serve: Any, tmp_path: Path, write: Any
) -> None:
    client: Client = serve(write(tmp_path), extensions=tuple(PROTOCOLS.split(",")))
    document = client.get("/openapi.json").json
    OpenAPIV31SpecValidator(document).validate()
    content = document["paths"]["/predict"]["post"]["requestBody"]["content"]
    for example in content["application/json"]["examples"].values():
        answer = client.post(example["value"])
        assert answer.status_code == 200, answer.text
    assert ("application/x-npy" in content) == (write in (iris, image, numbers))
    if "application/x-npy" in content:
        file = io.BytesIO()
        rows = content["application/json"]["examples"].get("lists") or content["application/json"]["examples"]["rows"]
        np.save(file, np.array(rows["value"]["data"]))
        assert client.post(file.getvalue(), Content_Type="application/x-npy").status_code == 200


@pytest.mark.parametrize(
    ("write", "options", "settings"),
    [
        (iris, ["--auth", f"everyone:{PASSWORD}"], {}),
        (iris, [], {"auth": "off", "worker_class": "gthread", "extensions": "-speedups"}),
        (frame, ["--auth", f"everyone:{PASSWORD}"], {"max_rows": 20}),
        (text, [], {"auth": "off"}),
        # No schema says that a tensor has as many values as its shape, nor what the fields of CSV are. And the path /
        # of eas takes GET as well, which leads people to the page.
        (
            iris,
            ["--auth", f"everyone:{PASSWORD}", "--exclude-checks", "positive_data_acceptance", "--exclude-path", "/"],
            {"extensions": PROTOCOLS, "aip_predict_route": "/vertex:predict", "aip_health_route": "/vertex"},
        ),
    ],
    ids=["iris", "without auth, gthread", "frame", "text", "protocols"],
)
def test_schemathesis_finds_nothing(tmp_path: Path, write: Any, options: list[str], settings: dict[str, Any]) -> None:
    (tmp_path / "hooks.py").write_text(HOOKS)
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    users = write_users(tmp_path / "users.json")
    entries = json.loads(users.read_text())
    entries["everyone"] = {"password": entries["predict"]["password"], "roles": list(ROLES)}
    users.write_text(json.dumps(entries))
    # Schemathesis expects 401 for each wrong password that it sends; after ten in a minute it would be 429.
    (tmp_path / "patient.py").write_text("import auth\ndef init_app(app, service): auth.FAILURES_ALLOWED = 10**6\n")
    settings = settings | {"extensions": ",".join(filter(None, [settings.get("extensions"), "+patient"]))}
    environ = os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}
    program = Path(sys.executable).with_name("schemathesis")
    chosen = ["--checks", "all", "--phases", "examples,coverage,fuzzing", "--max-examples", "50", "--seed", "1"]
    with gunicorn(tmp_path, model_path=write(tmp_path), **settings) as server:
        command = [program, "run", f"http://127.0.0.1:{server.port}/openapi.json", *chosen, *options]
        done = subprocess.run(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True)
    print(done.stdout[-20_000:])
    assert done.returncode == 0
    assert "No issues found" in done.stdout
