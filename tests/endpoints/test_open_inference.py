"""The Open Inference Protocol, version 2, with the models themselves as the truth."""

import gzip
import io
import json
import re
import shlex
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import CHEAP, ROOT, Client, basic, gunicorn, records, write_users
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from endpoints import tensors
from settings import Settings, SettingsError

LIMIT = 100_000  # bytes of a body
LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/model/infer"
X, Y = load_iris(return_X_y=True)
IRIS = LogisticRegression(max_iter=1000).fit(*load_iris(return_X_y=True, as_frame=True))
HUGE = 2**53 + 1  # a float64 has no such number
IDS = pd.DataFrame({"id": [HUGE, HUGE + 1, -(2**63), 2**63 - 1]})
FRAME = pd.DataFrame(
    {
        "age": [22.0, 38, 26, 54],
        "city": ["Oslo", "Bergen", "Oslo", "Ås"],
        "member": [True, False, True, False],
        "day": pd.to_datetime(["2026-01-31", "2026-02-28", "2026-03-31", "2026-04-30"]),
    }
)
FRAME_JSON = FRAME.assign(day=FRAME["day"].dt.strftime("%Y-%m-%d")).to_dict(orient="records")
TEXTS = ["good news", "bad news", "good æøå", "bad luck"]


class Logarithm(LinearRegression):
    """Answers NaN where there is no logarithm."""

    def predict(self, X: Any) -> Any:  # noqa: N803
        with np.errstate(invalid="ignore"):
            return np.log(X)


MODELS: dict[str, Any] = {
    "iris": IRIS,
    "frame": make_pipeline(
        make_column_transformer(
            (StandardScaler(), ["age"]), (OneHotEncoder(), ["city", "day"]), ("passthrough", ["member"])
        ),
        LogisticRegression(),
    ).fit(FRAME, ["yes", "no", "yes", "no"]),
    "ids": make_pipeline(OneHotEncoder(), DecisionTreeClassifier()).fit(IDS, IDS["id"]),
    "text": make_pipeline(CountVectorizer(), LogisticRegression()).fit(TEXTS, ["+", "-", "+", "-"]),
    "unnamed": make_pipeline(OrdinalEncoder(), DecisionTreeClassifier()).fit(
        np.array([["a", 1], ["b", 2]], dtype=object), [0, 1]
    ),
    "two outputs": MultiOutputClassifier(LogisticRegression()).fit(X[:100, :2], np.column_stack([Y, Y[::-1]])[:100]),
    "log": Logarithm().fit([[1.0]], [0.0]),
    "missing": DecisionTreeRegressor(max_depth=2).fit(pd.DataFrame({"a": [1, np.nan, 3], "b": [0.5, 1, 2]}), [1, 2, 3]),
}


class Tensor(NamedTuple):
    """A tensor of a request."""

    name: str
    datatype: str
    array: Any

    def json(self) -> dict[str, Any]:
        """Return it with its data as JSON, nested."""
        return self._head | {"data": self.array.tolist()}

    def flat(self) -> dict[str, Any]:
        """Return it with its data in one list."""
        return self._head | {"data": self.array.ravel().tolist()}

    def bytes(self) -> bytes:
        """Return its data as bytes, by the protocol's own words."""
        if self.datatype != "BYTES":
            return self.array.astype(self.array.dtype.newbyteorder("<")).tobytes()
        each = [value.encode() for value in self.array.ravel()]
        return b"".join(struct.pack("<I", len(value)) + value for value in each)

    def binary(self) -> dict[str, Any]:
        """Return it without data, which follows as bytes."""
        return self._head | {"parameters": {"binary_data_size": len(self.bytes())}}

    @property
    def _head(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.array.shape)}


class Asking:
    """A client that speaks the protocol, and counts the calls of the model."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.calls: list[int] = []  # rows of each call of the model
        self.given: list[Any] = []  # rows as they came to Service.infer
        client.service.serving.on_batch.append(lambda rows, waited: self.calls.append(rows))
        client.service.before_predict = self._note

    def _note(self, rows: Any, record: Any) -> Any:
        self.given.append(rows)
        return rows

    def send(self, call: Any, raw: bytes = b"", path: str = INFER, **headers: str) -> Any:
        """POST a call, with bytes behind its JSON if there are any, without a Content-Type."""
        head = call if isinstance(call, bytes) else json.dumps(call).encode()
        if raw:
            headers = {LENGTH: str(len(head))} | headers
        return self.client.http.post(path, data=head + raw, headers=self.client.headers | headers)

    def infer(self, call: Any, raw: bytes = b"", **headers: str) -> dict[str, Any]:
        """POST a call, expect 200, return its outputs as arrays by name."""
        answer = self.send(call, raw, **headers)
        assert answer.status_code == 200, answer.text
        return outputs_of(answer)


def outputs_of(answer: Any) -> dict[str, Any]:
    """Return the outputs of an answer as arrays by name."""
    body, at = answer.data, len(answer.data)
    if LENGTH in answer.headers:
        at = int(answer.headers[LENGTH])
        assert answer.content_type == "application/octet-stream"
    else:
        assert answer.content_type == "application/json"
    found = {}
    for output in json.loads(body[:at])["outputs"]:
        dtype = tensors.DTYPES.get(output["datatype"], "object")
        if "data" in output:
            values = [np.nan if value is None and dtype != "object" else value for value in output["data"]]
            array = np.array(values, dtype)
        elif dtype == "object":
            values, end = [], at + output["parameters"]["binary_data_size"]
            while at < end:
                (length,) = struct.unpack_from("<I", body, at)
                values.append(body[at + 4 : at + 4 + length].decode())
                at += 4 + length
            array = np.array(values, dtype)
        else:
            size = output["parameters"]["binary_data_size"]
            array = np.frombuffer(body[at : at + size], np.dtype(dtype).newbyteorder("<")).astype(dtype)
            at += size
        found[output["name"]] = array.reshape(output["shape"])
    assert at == len(body)
    return found


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Asking]:
    """Return a function that gives a client of one of the models."""
    clients: dict[str, Asking] = {}

    def find(name: str) -> Asking:
        if name not in clients:
            place = tmp_path_factory.mktemp("served")
            joblib.dump(MODELS[name], place / "model.joblib")
            if name == "frame":
                (place / "model.sample.json").write_text(json.dumps(FRAME_JSON))
            users = write_users(place / "users.json")
            extensions = ("+endpoints.open_inference",)
            settings = Settings(
                model_path=place / "model.joblib",
                users_file=users,
                journal_dir=place / "journal",
                extensions=extensions,
                max_body_bytes=LIMIT,
                max_rows=1000,
            )
            clients[name] = Asking(Client(settings))
        return clients[name]

    return find


def matrix(array: Any, datatype: str = "FP64") -> list[Tensor]:
    """Return an array as the one input of a call."""
    return [Tensor("input", datatype, np.asarray(array, tensors.DTYPES.get(datatype, object)))]


def columns(datatype_of: dict[str, str], rows: list[dict[str, Any]]) -> list[Tensor]:
    """Return rows as one input for each column."""
    return [
        Tensor(name, datatype, np.array([row[name] for row in rows], tensors.DTYPES.get(datatype, object)))
        for name, datatype in datatype_of.items()
    ]


FRAME_TYPES = {"age": "FP64", "city": "BYTES", "member": "BOOL", "day": "BYTES"}
NAMED_IRIS = load_iris(as_frame=True).data


def named(array: Any) -> pd.DataFrame:
    """Return rows as the model of iris was fitted on them."""
    return pd.DataFrame(array, columns=NAMED_IRIS.columns, dtype="float64")


# Model, tensors, the rows for the model itself.
RIGHT: dict[str, tuple[str, list[Tensor], Any]] = {
    "float64": ("iris", matrix(X), NAMED_IRIS),
    "float32": ("iris", matrix(X, "FP32"), named(X.astype("float32"))),
    "float16": ("iris", matrix(X, "FP16"), named(X.astype("float16"))),
    **{
        datatype: ("iris", matrix(np.round(X), datatype), named(np.round(X)))
        for datatype in tensors.DTYPES
        if "INT" in datatype
    },
    "one input for each named column": (
        "iris",
        [Tensor(name, "FP64", NAMED_IRIS[name].to_numpy()) for name in reversed(NAMED_IRIS.columns)],
        NAMED_IRIS,
    ),
    "columns of one": (
        "iris",
        [Tensor(name, "FP32", NAMED_IRIS[[name]].to_numpy("float32")) for name in NAMED_IRIS],
        named(X.astype("float32")),
    ),
    "a frame": ("frame", columns(FRAME_TYPES, FRAME_JSON), FRAME),
    "a frame in another order": ("frame", columns(FRAME_TYPES, FRAME_JSON)[::-1], FRAME),
    "integers for a column of booleans": ("frame", columns(FRAME_TYPES | {"member": "INT8"}, FRAME_JSON), FRAME),
    "integers beyond 2**53": ("ids", matrix(IDS, "INT64"), IDS),
    "such integers as a column": ("ids", [Tensor("id", "INT64", IDS["id"].to_numpy())], IDS),
    "strings": ("text", matrix(TEXTS, "BYTES"), TEXTS),
    "strings, one for each row": ("text", matrix([[text] for text in TEXTS], "BYTES"), TEXTS),
    "columns without names": (
        "unnamed",
        [Tensor("1", "INT32", np.array([2, 1], "int32")), Tensor("0", "BYTES", np.array(["b", "a"], object))],
        np.array([["b", 2], ["a", 1]], dtype=object),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("form", ["nested", "flat", "binary", "mixed", "gzip", "deflate"])
def test_tensors_in_any_form_are_answered_as_the_model_does(asking: Any, name: str, form: str) -> None:
    model, given_tensors, rows = RIGHT[name]
    expected = MODELS[model].predict(rows)
    client, raw, headers = asking(model), b"", {}
    inputs = [tensor.flat() if form == "flat" else tensor.json() for tensor in given_tensors]
    if form in ("binary", "mixed"):
        sent = given_tensors if form == "binary" else given_tensors[:1]
        inputs[: len(sent)] = [tensor.binary() for tensor in sent]
        raw = b"".join(tensor.bytes() for tensor in sent)
    call: Any = {"inputs": inputs}
    if form in ("gzip", "deflate"):
        call = json.dumps(call).encode()
        call = gzip.compress(call) if form == "gzip" else zlib.compress(call)
        headers = {"Content-Encoding": form}
    found = client.infer(call, raw, **headers)
    assert list(found) == ["predict"]
    assert found["predict"].tolist() == expected.tolist()
    if name in ("float64", "float32"):  # the very bits, as from /predict for the same rows and type
        binary = client.infer({"inputs": inputs, "outputs": [{"name": "predict_proba"}]}, raw)["predict_proba"]
        assert np.array_equal(binary, MODELS[model].predict_proba(rows))


@pytest.mark.parametrize("datatype", ["FP64", "FP32", "FP16", "INT8", "UINT64"])
@pytest.mark.parametrize("binary", [False, True])
def test_numbers_reach_the_server_in_the_type_they_came_in(asking: Any, datatype: str, binary: bool) -> None:
    client = asking("iris")
    (tensor,) = matrix(X[:7], datatype)
    client.infer({"inputs": [tensor.binary() if binary else tensor.json()]}, tensor.bytes() if binary else b"")
    assert client.given[-1].dtype == tensors.DTYPES[datatype]
    assert np.array_equal(client.given[-1], tensor.array)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function"])
def test_answers_are_those_of_predict_to_the_bit(asking: Any, method: str) -> None:
    client = asking("iris")
    (tensor,) = matrix(X, "FP32")
    file = io.BytesIO()
    np.save(file, tensor.array)
    by_npy = client.client.post(file.getvalue(), f"/predict?method={method}", Content_Type="application/x-npy").json
    outputs: list[Any] = [{"name": method, "parameters": {"binary_data": True}}]
    by_json = client.infer({"inputs": [tensor.json()], "outputs": [{"name": method}]})[method]
    by_bytes = client.infer({"inputs": [tensor.binary()], "outputs": outputs}, tensor.bytes())[method]
    assert by_json.tolist() == by_npy["prediction"]
    assert by_bytes.tolist() == by_npy["prediction"]
    by_predict = client.client.predict(X.tolist(), method)["prediction"]
    assert client.infer({"inputs": [matrix(X)[0].json()], "outputs": [{"name": method}]})[method].tolist() == by_predict


@pytest.mark.parametrize("binary", [False, True])
def test_answer_beyond_what_a_float_holds_is_exact(asking: Any, binary: bool) -> None:
    call = {"inputs": [matrix(IDS, "INT64")[0].json()], "parameters": {"binary_data_output": binary}}
    found = asking("ids").infer(call)["predict"]
    assert found.dtype == np.int64
    assert found.tolist() == IDS["id"].tolist()


def test_nan_is_null_in_json_and_exact_in_bytes_both_ways(asking: Any) -> None:
    client = asking("log")
    call = {"inputs": [matrix([[1.0], [-1.0]])[0].json()]}
    assert client.send(call).json["outputs"][0] | {"data": None} == {
        **{"name": "predict", "datatype": "FP64", "shape": [2, 1], "data": None}
    }
    assert client.send(call).json["outputs"][0]["data"] == [0.0, None]
    found = client.infer(call | {"parameters": {"binary_data_output": True}})["predict"]
    assert np.array_equal(found, [[0.0], [np.nan]], equal_nan=True)
    client = asking("missing")
    expected = MODELS["missing"].predict(pd.DataFrame({"a": [np.nan, 3.0], "b": [1.0, 2.0]})).tolist()
    tensor = matrix([[np.nan, 1.0], [3.0, 2.0]])[0]
    assert client.infer({"inputs": [tensor.binary()]}, tensor.bytes())["predict"].tolist() == expected
    with_null = tensor.json() | {"data": [None, 1, 3, 2]}
    assert client.infer({"inputs": [with_null]})["predict"].tolist() == expected


def test_several_outputs_are_named_and_each_is_json_or_bytes_as_asked(asking: Any) -> None:
    client = asking("frame")
    outputs = [
        {"name": "predict_proba", "parameters": {"binary_data": True}},
        {"name": "predict", "parameters": {"binary_data": False}},
        {"name": "decision_function"},
    ]
    inputs = [tensor.json() for tensor in RIGHT["a frame"][1]]
    call = {"id": "seven", "inputs": inputs, "outputs": outputs, "parameters": {"binary_data_output": True}}
    answer = client.send(call)
    head = json.loads(answer.data[: int(answer.headers[LENGTH])])
    assert {key: head[key] for key in ("id", "model_name")} == {"id": "seven", "model_name": "model"}
    assert head["model_version"] == answer.headers["X-Model-Version"]
    assert ["data" in output for output in head["outputs"]] == [False, True, False]
    found = outputs_of(answer)
    model = MODELS["frame"]
    assert found["predict"].tolist() == model.predict(FRAME).tolist()
    assert np.array_equal(found["predict_proba"], model.predict_proba(FRAME))
    assert np.array_equal(found["decision_function"], model.decision_function(FRAME))
    assert records(client.client.journal_dir)[-1]["method"] == "predict_proba,predict,decision_function"


def test_strings_are_answered_as_bytes(asking: Any) -> None:
    call = {"inputs": [matrix(TEXTS, "BYTES")[0].json()], "parameters": {"binary_data_output": True}}
    assert asking("text").infer(call)["predict"].tolist() == ["+", "-", "+", "-"]


def test_model_of_several_outputs_has_numbered_tensors(asking: Any) -> None:
    call = {"inputs": [matrix(X[:3, :2])[0].json()], "outputs": [{"name": "predict"}, {"name": "predict_proba"}]}
    found = asking("two outputs").infer(call)
    model = MODELS["two outputs"]
    assert list(found) == ["predict", "predict_proba_0", "predict_proba_1"]
    assert np.array_equal(found["predict"], model.predict(X[:3, :2]))
    assert all(np.array_equal(found[f"predict_proba_{at}"], model.predict_proba(X[:3, :2])[at]) for at in (0, 1))


def test_classification_lists_the_best_classes(asking: Any) -> None:
    output = {"name": "predict_proba", "parameters": {"classification": 2}}
    call = {"inputs": [tensor.json() for tensor in RIGHT["a frame"][1]], "outputs": [output]}
    found = asking("frame").infer(call)["predict_proba"]
    assert found.shape == (4, 2)
    proba = MODELS["frame"].predict_proba(FRAME)
    for row, (best, other) in zip(proba, found, strict=True):
        value, at, label = best.split(":")
        assert (float(value), int(at)) == (row.max(), row.argmax())
        assert label == ["no", "yes"][row.argmax()]
        assert float(other.split(":")[0]) == row.min()
    output["parameters"]["classification"] = 50
    assert asking("frame").infer(call)["predict_proba"].shape == (4, 2)


def test_metadata_describes_what_is_taken_and_answered(asking: Any) -> None:
    found = asking("iris").client.get("/v2/models/model").json
    version = found["versions"][0]
    assert found["inputs"] == [{"name": "input", "datatype": "FP64", "shape": [-1, 4]}]
    assert found["outputs"][:2] == [
        {"name": "predict", "datatype": "INT64", "shape": [-1]},
        {"name": "predict_proba", "datatype": "FP64", "shape": [-1, 3]},
    ]
    assert asking("iris").client.get(f"/v2/models/model/versions/{version}").json == found
    frame = asking("frame").client.get("/v2/models/model").json
    assert {each["name"]: each["datatype"] for each in frame["inputs"]} == FRAME_TYPES
    assert frame["outputs"][0]["datatype"] == "BYTES"
    assert asking("text").client.get("/v2/models/model").json["inputs"] == [
        {"name": "input", "datatype": "BYTES", "shape": [-1]}
    ]
    ids = asking("ids").client.get("/v2/models/model").json
    assert ids["inputs"] == [{"name": "input", "datatype": "INT64", "shape": [-1, 1]}]
    names = [each["name"] for each in asking("unnamed").client.get("/v2/models/model").json["inputs"]]
    assert names == ["0", "1"]


def test_server_and_its_health(asking: Any) -> None:
    http = asking("iris").client.http
    server = asking("iris").client.get("/v2").json
    assert server == asking("iris").client.get("/v2/").json
    assert server["version"] == re.search(r'version = "(.*)"', (ROOT / "pyproject.toml").read_text())[1]  # type: ignore[index]
    assert "binary_tensor_data" in server["extensions"]
    assert http.get("/v2/health/live").json == {"live": True}
    assert http.get("/v2/health/ready").json == {"live": True, "ready": True}
    assert http.get("/v2/models/model/ready").json == {"name": "model", "ready": True}
    for path in ("/v2", "/v2/models/model", INFER):
        answer = http.open(path, method="POST" if path == INFER else "GET")
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Basic")
        assert "error" in answer.json
        assert answer.headers["Content-Type"] == "application/json"


def test_requests_are_recorded_with_their_protocol(asking: Any) -> None:
    client = asking("iris")
    client.infer({"inputs": [matrix(X[:5])[0].json()]})
    client.send(b"{")
    good, bad = records(client.client.journal_dir)[-2:]
    assert (good["protocol"], good["path"], good["rows"], good["status"], good["method"]) == (
        *("v2", INFER, 5, 200),
        "predict",
    )
    assert (bad["protocol"], bad["status"], bad["error"], bad["error_type"]) == ("v2", 400, "Bad Request", "client")
    client.client.predict(X[:1].tolist())
    assert records(client.client.journal_dir)[-1]["protocol"] == "predict"


# --- wrong requests


def wrong(**changes: Any) -> dict[str, Any]:
    """Return a right call of one iris with changes of its only input; None takes a key away."""
    tensor = {"name": "input", "shape": [1, 4], "datatype": "FP64", "data": [5.1, 3.5, 1.4, 0.2]} | changes
    return {"inputs": [{key: value for key, value in tensor.items() if value is not None}]}


RAW = np.array([5.1, 3.5, 1.4, 0.2]).tobytes()


def binary(size: Any = 32, **changes: Any) -> dict[str, Any]:
    """Return such a call whose data follow as bytes."""
    return wrong(data=None, parameters={"binary_data_size": size}, **changes)


def asked(**output: Any) -> dict[str, Any]:
    """Return a right call that asks for an output."""
    return wrong() | {"outputs": [{"name": "predict_proba"} | output]}


COLUMN = {"shape": [1], "datatype": "FP64", "data": [1.0]}
NAMES = list(NAMED_IRIS.columns)
WRONG_CALLS: dict[str, tuple[Any, str]] = {
    "nothing": (b"", "not an object"),
    "no JSON": (b"{", "not JSON"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8"),
    "a list": ([], "not an object"),
    "NaN": (b'{"inputs": [{"data": [NaN]}]}', "NaN, Infinity"),
    "Infinity": (b'{"inputs": [{"data": [-Infinity]}]}', "NaN, Infinity"),
    "a number beyond a float": (b'{"inputs": [{"data": [1e999]}]}', "64-bit float"),
    "nesting without end": (b'{"inputs": ' + b"[" * 5000, "nested too deeply"),
    "no inputs": ({}, "inputs is not a list"),
    "empty inputs": ({"inputs": []}, "inputs is empty"),
    "inputs that are no objects": ({"inputs": [1]}, "inputs is not a list of objects"),
    "id": (wrong() | {"id": 7}, "id is not a string"),
    "null as id": (wrong() | {"id": None}, "id is not a string"),
    "null as outputs": (wrong() | {"outputs": None}, "outputs is not a list"),
    "null as parameters": (wrong() | {"parameters": None}, "parameters is not an object"),
    "parameters": (wrong() | {"parameters": []}, "parameters is not an object"),
    "a parameter": (wrong() | {"parameters": {"priority": [1]}}, "parameters is not an object"),
    "binary_data_output": (wrong() | {"parameters": {"binary_data_output": 1}}, "binary_data_output is not true"),
    "no name": (wrong(name=None), "each have a name"),
    "unknown input": (wrong(name="inputs"), "wrong inputs 'inputs'; this model takes one that is named 'input'"),
    "a column that is missing": ({"inputs": [COLUMN | {"name": name} for name in NAMES[1:]]}, "missing"),
    "a column too many": ({"inputs": [COLUMN | {"name": name} for name in [*NAMES, "x"]]}, "not a column"),
    "a column twice": ({"inputs": [COLUMN | {"name": name} for name in [*NAMES, NAMES[0]]]}, "a name twice"),
    "all columns and input": ({"inputs": [*wrong()["inputs"], COLUMN | {"name": NAMES[0]}]}, "column is [n]"),
    "columns that differ in rows": (
        {"inputs": [COLUMN | {"name": name} for name in NAMES[1:]] + [COLUMN | {"name": NAMES[0], "shape": [2]}]},
        "has the sizes",
    ),
    "more rows in one": (
        {
            "inputs": [COLUMN | {"name": name} for name in NAMES[1:]]
            + [COLUMN | {"name": NAMES[0], "shape": [2], "data": [1, 2]}]
        },
        "differ in their number of rows",
    ),
    "no shape": (wrong(shape=None), "shape is not a list"),
    "empty shape": (wrong(shape=[]), "shape is not a list"),
    "negative shape": (wrong(shape=[-1, 4]), "below 1"),
    "no rows": (wrong(shape=[0, 4], data=[]), "below 1"),
    "huge shape": (wrong(shape=[1, 2**40, 2**40]), "not the shape"),
    "too many rows": (wrong(shape=[1001, 4]), "takes 1000"),
    "fraction in shape": (wrong(shape=[1.0, 4]), "shape is not a list"),
    "true in shape": (wrong(shape=[True, 4]), "shape is not a list"),
    "string in shape": (wrong(shape=["1", 4]), "shape is not a list"),
    "33 dimensions": (wrong(shape=[1] * 33), "shape is not a list"),
    "another shape": (wrong(shape=[4, 1]), "expected (rows, 4)"),
    "one dimension": (wrong(shape=[4]), "expected (rows, 4)"),
    "less data": (wrong(data=[1, 2, 3]), "not the shape"),
    "more data": (wrong(data=[1, 2, 3, 4, 5]), "not the shape"),
    "nested in another way": (wrong(data=[[1, 2], [3, 4]]), "not the shape"),
    "ragged": (wrong(data=[[1, 2, 3], 4]), "differ in length or depth"),
    "ragged lists": (wrong(data=[[1, 2, 3], [4]]), "differ in length or depth"),
    "no data": (wrong(data=None), "either data or"),
    "data of no list": (wrong(data=7), "data is not a list"),
    "unknown datatype": (wrong(datatype="FP8"), "unknown datatype"),
    "BF16": (wrong(datatype="BF16"), "unknown datatype"),
    "no datatype": (wrong(datatype=None), "datatype is not a string"),
    "strings": (wrong(datatype="BYTES", data=["1", "2", "3", "4"]), "a string; expected a number"),
    "strings as numbers": (wrong(data=["1", "2", "3", "4"]), "holds a string; FP64"),
    "true as a number": (wrong(data=[True, 2, 3, 4]), "holds true or false; FP64"),
    "true as an integer": (wrong(datatype="INT8", data=[True, 2, 3, 4]), "holds true or false; INT8"),
    "booleans": (wrong(datatype="BOOL", data=[True] * 4), "true or false; expected a number"),
    "numbers as booleans": (wrong(datatype="BOOL", data=[1, 0, 1, 0]), "BOOL has true and false"),
    "a fraction as an integer": (wrong(datatype="INT64", data=[1, 2, 3, 4.0]), "holds a fraction; INT64"),
    "null as an integer": (wrong(datatype="INT64", data=[1, 2, 3, None]), "holds null"),
    "null where none is taken": (wrong(data=[1, 2, 3, None]), "missing value"),
    "256 in UINT8": (wrong(datatype="UINT8", data=[1, 2, 3, 256]), "does not fit UINT8"),
    "-1 in UINT64": (wrong(datatype="UINT64", data=[1, 2, 3, -1]), "does not fit UINT64"),
    "2**64": (wrong(datatype="UINT64", data=[1, 2, 3, 2**64]), "holds a fraction"),
    "70000 in FP16": (wrong(datatype="FP16", data=[1, 2, 3, 70000]), "too large for FP16"),
    "1e39 in FP32": (wrong(datatype="FP32", data=[1, 2, 3, 1e39]), "too large for FP32"),
    "an object as a number": (wrong(data=[{}, 2, 3, 4]), "holds an object"),
    "outputs": (wrong() | {"outputs": {}}, "outputs is not a list"),
    "unknown output": (asked(name="classes"), "no method 'classes'"),
    "unknown output beside one": (wrong() | {"outputs": [{"name": "predict"}, {"name": "fit"}]}, "no method 'fit'"),
    "an output twice": (wrong() | {"outputs": [{"name": "predict"}] * 2}, "outputs has a name twice"),
    "no classes": (asked(parameters={"classification": 0}), "not a number of classes"),
    "true classes": (asked(parameters={"classification": True}), "not a number of classes"),
    "classes of labels": (asked(name="predict", parameters={"classification": 2}), "classes already"),
    "binary_data": (asked(parameters={"binary_data": "yes"}), "binary_data is not true or false"),
    "binary without its header": (binary(), "needs the header"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_call_is_400_and_reaches_no_model(asking: Any, name: str) -> None:
    check_wrong(asking("iris"), *WRONG_CALLS[name])


def check_wrong(client: Asking, call: Any, words: str, raw: bytes = b"", status: int = 400, **headers: str) -> None:
    """Check that a call is answered in the protocol's form, and that the model was not called."""
    calls = len(client.calls)
    answer = client.send(call, raw, **headers)
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert list(answer.json) == ["error"]
    assert words in answer.json["error"]
    assert len(client.calls) == calls
    assert records(client.client.journal_dir)[-1]["status"] == status


HEAD = len(json.dumps(binary()))
WRONG_BYTES: dict[str, tuple[Any, bytes, dict[str, str], str]] = {
    "a length of letters": (binary(), RAW, {LENGTH: "abc"}, "is not a number of bytes"),
    "a negative length": (binary(), RAW, {LENGTH: "-1"}, "is not a number of bytes"),
    "a length with a sign": (binary(), RAW, {LENGTH: f"+{HEAD}"}, "is not a number of bytes"),
    "a length with blanks": (binary(), RAW, {LENGTH: f"{HEAD} 1"}, "is not a number of bytes"),
    "an empty length": (binary(), RAW, {LENGTH: ""}, "is not a number of bytes"),
    "a length of other digits": (binary(), RAW, {LENGTH: "²"}, "is not a number of bytes"),
    "a length of 5,000 digits": (binary(), RAW, {LENGTH: "9" * 5000}, "is not a number of bytes"),
    "a length beyond the body": (binary(), RAW, {LENGTH: str(HEAD + 33)}, "is not a number of bytes"),
    "a length of 0": (binary(), RAW, {LENGTH: "0"}, "not an object"),
    "a length of the whole body": (binary(), RAW, {LENGTH: str(HEAD + 32)}, "not"),
    "a length that is too small": (binary(), RAW, {LENGTH: str(HEAD - 1)}, "not JSON"),
    "less bytes": (binary(), RAW[:-1], {}, "is not a number of bytes"),
    "more bytes": (binary(), RAW + b"\0", {}, "add up to 32"),
    "a size that is not the shape's": (binary(24), RAW, {}, "has 32"),
    "a negative size": (binary(-1), RAW, {}, "is not a number of bytes"),
    "a huge size": (binary(2**70), RAW, {}, "is not a number of bytes"),
    "true as a size": (binary(True), RAW, {}, "is not a number of bytes"),
    "a fraction as a size": (binary(32.0), RAW, {}, "is not a number of bytes"),
    "a string as a size": (binary("32"), RAW, {}, "is not a number of bytes"),
    "data and a size": (wrong(parameters={"binary_data_size": 32}), RAW, {}, "either data or"),
    "bytes that no input has": (wrong(), RAW, {}, "add up to 0"),
    "NaN": (binary(), np.full(4, np.nan).tobytes(), {}, "missing value"),
    "infinity": (binary(), np.full(4, np.inf).tobytes(), {}, "infinity"),
    "a byte of 2 as a boolean": (binary(4, datatype="BOOL"), b"\0\1\2\0", {}, "neither 0 nor 1"),
    "booleans": (binary(4, datatype="BOOL"), b"\0\1\1\0", {}, "true or false; expected a number"),
    "no gzip": (wrong(), b"", {"Content-Encoding": "gzip"}, "not gzip"),
    "no deflate": (wrong(), b"", {"Content-Encoding": "deflate"}, "not deflate"),
    "gzip that is cut": (gzip.compress(b"{}")[:-4], b"", {"Content-Encoding": "gzip"}, "breaks off"),
    "gzip of nothing": (b"", b"", {"Content-Encoding": "gzip"}, "breaks off"),
    "gzip with more behind": (gzip.compress(b"{}") + b"x", b"", {"Content-Encoding": "gzip"}, "breaks off"),
}


@pytest.mark.parametrize("name", WRONG_BYTES)
def test_wrong_bytes_are_400_and_reach_no_model(asking: Any, name: str) -> None:
    call, raw, headers, words = WRONG_BYTES[name]
    check_wrong(asking("iris"), call, words, raw, **headers)


WRONG_STRINGS = {
    "not UTF-8": (b"\1\0\0\0\xff", "string 0 is not UTF-8"),
    "cut inside a length": (b"\1\0\0\0a\1\0", "end inside a string"),
    "cut inside a string": (b"\5\0\0\0a", "end inside a string"),
    "a length without end": (b"\xff\xff\xff\xffa", "end inside a string"),
    "two": (b"\1\0\0\0a\1\0\0\0b", "hold 2 strings; the shape has 1"),
    "half a surrogate pair": (b"\3\0\0\0\xed\xa0\x80", "string 0 is not UTF-8"),
}


@pytest.mark.parametrize("name", WRONG_STRINGS)
def test_wrong_strings_are_400_and_reach_no_model(asking: Any, name: str) -> None:
    raw, words = WRONG_STRINGS[name]
    check_wrong(asking("text"), binary(len(raw), shape=[1], datatype="BYTES"), words, raw)


def test_column_of_another_type_is_400(asking: Any) -> None:
    inputs = {tensor.name: tensor.json() for tensor in columns(FRAME_TYPES, FRAME_JSON[:1])}
    changes: list[tuple[str, dict[str, Any]]] = [
        ("age", {"datatype": "BOOL", "data": [True]}),
        ("age", {"datatype": "BYTES", "data": ["22"]}),
        ("city", {"datatype": "FP64", "data": [1.0]}),
        ("city", {"datatype": "BOOL", "data": [True]}),
        ("member", {"datatype": "INT64", "data": [2]}),
        ("member", {"datatype": "BYTES", "data": ["true"]}),
        ("day", {"datatype": "BYTES", "data": ["31/1/2026"]}),
        ("day", {"datatype": "INT64", "data": [1769817600]}),
        ("age", {"shape": [1, 1, 1]}),
        ("age", {"shape": [1, 2], "data": [1, 2]}),
    ]
    for name, change in changes:
        call = {"inputs": list((inputs | {name: inputs[name] | change}).values())}
        check_wrong(asking("frame"), call, "")
    infinite = columns(FRAME_TYPES, FRAME_JSON[:1])
    infinite[0] = Tensor("age", "FP64", np.array([np.inf]))
    call = {"inputs": [infinite[0].binary(), *(tensor.json() for tensor in infinite[1:])]}
    check_wrong(asking("frame"), call, "input 'age': an infinity", infinite[0].bytes())


def test_limit_holds_for_the_body_and_for_what_it_unpacks_to(asking: Any) -> None:
    client = asking("iris")
    whole = json.dumps(wrong()).encode()
    call = whole + b" " * (LIMIT - len(whole))
    zipped = gzip.compress(call)
    assert client.infer(call)
    assert client.infer(zipped, **{"Content-Encoding": "gzip"})
    words = f"than {LIMIT} bytes"
    check_wrong(client, call + b" ", words, status=413)
    check_wrong(client, gzip.compress(call + b" "), words, status=413, **{"Content-Encoding": "gzip"})
    bomb = gzip.compress(bytes(20 * 2**20))
    check_wrong(client, bomb, words, status=413, **{"Content-Encoding": "gzip"})
    check_wrong(client, zlib.compress(bytes(20 * 2**20)), words, status=413, **{"Content-Encoding": "deflate"})
    check_wrong(client, call, "gzip or deflate", status=415, **{"Content-Encoding": "br"})


@pytest.mark.parametrize("path", ["/v2/models/other/infer", "/v2/models/model/versions/9/infer"])
def test_unknown_model_or_version_is_404(asking: Any, path: str) -> None:
    client = asking("iris")
    calls = len(client.calls)
    answer = client.send(wrong(), path=path)
    assert (answer.status_code, list(answer.json)) == (404, ["error"])
    assert len(client.calls) == calls
    for other in (path.removesuffix("/infer"), path.replace("infer", "ready")):
        answer = client.client.get(other)
        assert (answer.status_code, list(answer.json)) == (404, ["error"])


@pytest.mark.parametrize(
    "path", ["/v2/nothing", "/v2/models/model/infer/", "/v2/models", "/v2/repository/index", "/v2//"]
)
def test_path_without_a_view_is_404_in_the_form_of_the_protocol(asking: Any, path: str) -> None:
    for method in ("GET", "POST"):
        answer = asking("iris").client.http.open(path, method=method)
        assert (answer.status_code, list(answer.json)) == (404, ["error"])
        assert answer.headers["Content-Type"] == "application/json"


def test_other_method_is_405_in_the_form_of_the_protocol(asking: Any) -> None:
    http = asking("iris").client.http
    answer = http.get(INFER)
    assert (answer.status_code, list(answer.json)) == (405, ["error"])
    assert "POST" in answer.headers["Allow"]
    assert http.delete("/v2").status_code == 405


def test_errors_elsewhere_keep_their_form(asking: Any) -> None:
    http = asking("iris").client.http
    for path in ("/v3", "/v2x", "/predict/v2/"):
        answer = http.get(path)
        assert (answer.status_code, answer.content_type) == (404, "application/problem+json")
    answer = http.get("/predict")
    assert (answer.status_code, answer.content_type) == (405, "application/problem+json")
    assert answer.headers["Allow"]


def test_version_in_the_path_is_answered_if_it_is_the_only_one(asking: Any) -> None:
    client = asking("iris")
    (version,) = client.client.get("/v2/models/model").json["versions"]
    answer = client.send(wrong(), path=f"/v2/models/model/versions/{version}/infer")
    assert (answer.status_code, answer.json["model_version"]) == (200, version)
    answer = client.send(wrong(), **{"X-Model-Version": version})
    assert (answer.status_code, list(answer.json)) == (403, ["error"])


@pytest.fixture
def with_canary(tmp_path: Path) -> Asking:
    """A client of two versions that share the requests; each answers its own number."""
    from model.versions.store import Store

    store = Store(tmp_path / "store")
    for version in ("1", "2"):
        joblib.dump(DummyClassifier(strategy="constant", constant=int(version)).fit(X, Y), tmp_path / "model.joblib")
        with store.new_version(tmp_path / "model.joblib", version) as manifest:
            manifest.about.update(sample=X[:2].tolist(), predictions=[int(version)] * 2)
    store.promote("1")
    store.canary("2", 50)
    users = tmp_path / "users.json"
    both = {"password": CHEAP, "roles": ["predict", "admin"]}
    users.write_text(json.dumps({"predict": {"password": CHEAP, "roles": ["predict"]}, "both": both}))
    users.chmod(0o600)
    return Asking(
        Client(
            Settings(
                model_dir=store.directory,
                users_file=users,
                journal_dir=tmp_path / "journal",
                extensions=("+endpoints.open_inference", "+endpoints.sagemaker"),
            )
        )
    )


def test_outputs_of_one_answer_come_from_one_version(with_canary: Asking) -> None:
    call = wrong() | {"outputs": [{"name": "predict"}, {"name": "predict_proba"}]}
    seen = set()
    for _ in range(40):
        answer = with_canary.send(call)
        found, version = outputs_of(answer), answer.json["model_version"]
        assert found["predict"].tolist() == [int(version)]
        assert found["predict_proba"].argmax() == int(version)
        assert answer.headers["X-Model-Version"] == version
        seen.add(version)
    assert seen == {"1", "2"}
    same = {with_canary.send(call, **{"X-Routing-Key": "me"}).json["model_version"] for _ in range(10)}
    assert len(same) == 1


def test_routing_key_has_the_same_version_on_every_path(with_canary: Asking) -> None:
    found = set()
    for key in map(str, range(20)):
        answers = [
            with_canary.client.post(X[:1].tolist(), path, X_Routing_Key=key) for path in ("/predict", "/invocations")
        ]
        answers.append(with_canary.send(wrong(), X_Routing_Key=key))
        (version,) = {answer.headers["X-Model-Version"] for answer in answers}
        found.add(version)
    assert found == {"1", "2"}


def test_version_in_the_path_beside_a_canary_is_for_admins(with_canary: Asking) -> None:
    assert with_canary.client.get("/v2/models/model").json["versions"] == ["1", "2"]
    calls = len(with_canary.calls)
    for version in ("1", "2"):
        answer = with_canary.send(wrong(), path=f"/v2/models/model/versions/{version}/infer")
        assert (answer.status_code, list(answer.json)) == (403, ["error"])
    assert len(with_canary.calls) == calls
    with_canary.client.headers = {"Authorization": basic("both")}
    for version in ("1", "2"):
        for _ in range(5):
            answer = with_canary.send(wrong(), path=f"/v2/models/model/versions/{version}/infer")
            assert (answer.status_code, answer.json["model_version"]) == (200, version)
        assert with_canary.client.get(f"/v2/models/model/versions/{version}").status_code == 200
    assert with_canary.send(wrong(), path="/v2/models/model/versions/3/infer").status_code == 404


def test_model_that_is_not_ready_is_503(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.joblib").write_bytes(b"nothing")
    client = serve(tmp_path / "broken.joblib", extensions=("+endpoints.open_inference",))
    asking = Asking(client)
    for path in ("/v2/health/ready", "/v2/models/model", "/v2/models/model/ready"):
        answer = client.get(path)
        assert (answer.status_code, list(answer.json)) == (503, ["error"])
        assert answer.headers["Retry-After"]
    assert client.get("/v2/health/live").status_code == 200
    check_wrong(asking, wrong(), "not ready", status=503)


def test_model_that_fails_is_500_with_nothing_of_its_own_words(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    client = serve(IRIS, extensions=("+endpoints.open_inference",))

    def fail(rows: Any, record: Any) -> Any:
        raise KeyError("secret")

    client.service.before_predict = fail
    answer = client.post(wrong(), INFER)
    assert (answer.status_code, list(answer.json)) == (500, ["error"])
    assert "secret" not in answer.text
    assert "secret" in caplog.text


def test_name_of_the_model_is_a_setting(serve: Any) -> None:
    client = serve(IRIS, extensions=("+endpoints.open_inference",), model_name="iris-1.0")
    assert client.post(wrong(), "/v2/models/iris-1.0/infer").json["model_name"] == "iris-1.0"
    assert client.post(wrong(), INFER).status_code == 404
    for name in ("a/b", "a b", "æ", "-a", "a" * 101):
        with pytest.raises(SettingsError, match="MODEL_NAME"):
            Settings.from_environ({"MODEL_NAME": name})


def test_example_in_the_documentation_is_answered_as_shown(asking: Any) -> None:
    page = (ROOT / "docs/protocols.md").read_text("utf-8")
    curl, shown = re.search(r"```sh\n(curl .*/v2/.*)\n```\n\n```json\n(.*)\n```", page).groups()  # type: ignore[union-attr]
    arguments = shlex.split(curl)
    answer = asking("iris").send(arguments[arguments.index("-d") + 1].encode())
    assert arguments[-1].endswith(INFER)
    assert answer.json | {"model_version": "1"} == json.loads(shown)


def test_protocol_is_off_unless_it_is_asked_for(serve: Any) -> None:
    client = serve(IRIS)
    for path in ("/v2", "/v2/health/live", INFER):
        answer = client.get(path)
        assert (answer.status_code, answer.content_type) == (404, "application/problem+json")


# --- models of other libraries


def identity(dtype: str, sizes: list[Any], place: Path) -> Path:
    """Write an ONNX file whose model answers what it is given."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -r requirements/onnx.txt")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -r requirements/onnx.txt")
    helper = onnx.helper
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    values = [helper.make_tensor_value_info(name, kind, ["n", *sizes]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = place / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


EXTREMES = {
    "int64": [-(2**63), 2**63 - 1, HUGE, -HUGE],
    "uint64": [2**64 - 1, HUGE, 0, 1],
    "int8": [-128, 127, 0, 1],
    "float32": [0.1, 1e-40, 3.4e38, -0.0],
    "float64": [0.1, 5e-324, 1.7e308, -0.0],
    "float16": [0.1, 6e-8, 65504.0, -0.0],
    "bool": [True, False, True, True],
}


@pytest.mark.parametrize("dtype", EXTREMES)
def test_every_datatype_comes_back_as_it_went_through_the_model(serve: Any, tmp_path: Path, dtype: str) -> None:
    client = Asking(serve(identity(dtype, [4], tmp_path), extensions=("+endpoints.open_inference",)))
    datatype = tensors.DATATYPES[dtype]
    tensor = Tensor("input", datatype, np.array([EXTREMES[dtype]], dtype))
    metadata = client.client.get("/v2/models/model").json
    assert metadata["inputs"] == [{"name": "input", "datatype": datatype, "shape": [-1, 4]}]
    assert metadata["outputs"] == [{"name": "predict", "datatype": datatype, "shape": [-1, 4]}]
    for call, raw in (({"inputs": [tensor.json()]}, b""), ({"inputs": [tensor.binary()]}, tensor.bytes())):
        for binary_output in (False, True):
            found = client.infer(call | {"parameters": {"binary_data_output": binary_output}}, raw)["predict"]
            assert found.dtype == tensor.array.dtype
            assert found.tobytes() == tensor.array.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_tensors_of_more_dimensions_keep_their_shape(serve: Any, tmp_path: Path, dtype: str) -> None:
    client = Asking(serve(identity(dtype, [2, "open"], tmp_path), extensions=("+endpoints.open_inference",)))
    tensor = Tensor("input", tensors.DATATYPES[dtype], (np.arange(24).reshape(4, 2, 3) % 5).astype(dtype))
    assert client.client.get("/v2/models/model").json["inputs"][0]["shape"] == [-1, 2, -1]
    for call, raw in (({"inputs": [tensor.flat()]}, b""), ({"inputs": [tensor.binary()]}, tensor.bytes())):
        assert np.array_equal(client.infer(call, raw)["predict"], tensor.array)
    check_wrong(client, {"inputs": [tensor.json() | {"shape": [4, 3, 2]}]}, "not the shape")
    check_wrong(client, {"inputs": [tensor.flat() | {"shape": [4, 3, 2]}]}, "expected")


# --- anything at all

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(allow_nan=False, allow_infinity=False), st.text()
)
ANY = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner), max_leaves=8
)
NAME = st.sampled_from(["input", *NAMES, "predict", "x"])
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("input") | NAME | SCALARS,
        "shape": st.just([1, 4]) | st.lists(st.integers(-1, 5) | SCALARS, max_size=4) | ANY,
        "datatype": st.sampled_from([*tensors.DTYPES, "BYTES"]) | SCALARS,
        "data": st.just([5.1, 3.5, 1.4, 0.2]) | st.lists(SCALARS, min_size=4, max_size=4) | ANY,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 40) | ANY}) | ANY,
    },
)
PARAMETERS = {"binary_data_output": SCALARS, "binary_data": SCALARS, "classification": SCALARS}
CALL = st.fixed_dictionaries(
    {},
    optional={
        "id": SCALARS,
        "inputs": st.lists(TENSOR, min_size=1, max_size=3) | ANY,
        "outputs": st.lists(st.fixed_dictionaries({"name": NAME}, optional={"parameters": ANY}), max_size=2) | ANY,
        "parameters": st.fixed_dictionaries({}, optional=PARAMETERS) | ANY,
    },
)


@given(call=CALL | ANY, raw=st.binary(max_size=40), length=st.none() | st.text("0123456789-+ ", max_size=4))
@hypothesis_settings(max_examples=120, deadline=None)
def test_any_call_is_answered_or_400(asking: Any, call: Any, raw: bytes, length: str | None) -> None:
    client = asking("iris")
    calls = len(client.calls)
    answer = client.send(call, raw, **({} if length is None else {LENGTH: length}))
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert list(answer.json) == ["error"]
        assert len(client.calls) == calls


@given(body=st.binary(max_size=200), encoding=st.sampled_from(["", "gzip", "deflate"]), packed=st.booleans())
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_bytes_are_400(asking: Any, body: bytes, encoding: str, packed: bool) -> None:
    if packed and encoding:
        body = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
    answer = asking("iris").send(body, **({"Content-Encoding": encoding} if encoding else {}))
    assert answer.status_code == 400
    assert list(answer.json) == ["error"]


@given(data=st.data())
@hypothesis_settings(max_examples=200, deadline=None)
def test_changed_bytes_are_answered_or_400(asking: Any, data: st.DataObject) -> None:
    client = asking("frame")
    inputs = columns(FRAME_TYPES, FRAME_JSON)
    head = json.dumps({"inputs": [tensor.binary() for tensor in inputs]}).encode()
    body = bytearray(head + b"".join(tensor.bytes() for tensor in inputs))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    length = len(head) + data.draw(st.sampled_from([0, 0, 0, -1, 1, 4]))
    calls = len(client.calls)
    answer = client.send(bytes(body), **{LENGTH: str(length)})
    assert answer.status_code in (200, 400), answer.text
    refused_by_model = answer.status_code == 400 and "the model does not take the values" in answer.text
    assert len(client.calls) == calls or answer.status_code == 200 or refused_by_model


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(rows=st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=1, max_size=5))
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_floats_arrive_as_they_were_sent(asking: Any, rows: list[list[float]]) -> None:
    client = asking("iris")
    for datatype in ("FP32", "FP64"):
        (tensor,) = matrix(rows, datatype)
        for call, raw in (({"inputs": [tensor.json()]}, b""), ({"inputs": [tensor.binary()]}, tensor.bytes())):
            client.infer(call, raw)
            assert client.given[-1].tobytes() == tensor.array.tobytes()


def test_real_server_answers_it(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, extensions="+endpoints.open_inference") as server:
        (tensor,) = matrix(X[:3])
        head = json.dumps({"inputs": [tensor.binary()]}).encode()
        headers = {"Authorization": basic("predict"), LENGTH: str(len(head)), "Content_Type": "application/json"}
        status, _, answer = server.ask("POST", INFER, head + tensor.bytes(), **headers)
        assert (status, json.loads(answer)["outputs"][0]["data"]) == (200, IRIS.predict(NAMED_IRIS[:3]).tolist())
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        assert json.loads(server.ask("GET", "/v2/other")[2]).keys() == {"error"}

        start = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nAuthorization: {basic('predict')}\r\nConnection: close\r\n"
        call = json.dumps(wrong()).encode()
        chunked = f"{start}Transfer-Encoding: chunked\r\n\r\n{len(call):x}\r\n".encode() + call
        limit = Settings().max_body_bytes
        for sent, status in (
            (chunked + b"\r\n0\r\n\r\n", 200),
            (chunked + b"xx", 400),
            (f"{start}Content-Length: {limit + 1}\r\n\r\n".encode(), 413),
            (f"{start}Content-Length: {len(call)}\r\nContent-Encoding: br\r\n\r\n".encode() + call, 415),
        ):
            head, _, body = server.raw(sent).partition(b"\r\n\r\n")
            assert head.startswith(f"HTTP/1.1 {status} ".encode()), head
            assert b"Content-Type: application/json\r\n" in head + b"\r\n"
            assert json.loads(body).keys() == (
                {"error"} if status != 200 else {"model_name", "model_version", "outputs"}
            )
