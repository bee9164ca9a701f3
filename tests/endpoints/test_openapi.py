"""The API's description is true: its schema takes the rows that the server takes, and its examples are answered."""

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cloud_models import FRAME, frame_model, text_model
from conftest import ROOT, Client
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from endpoints.openapi import ERRORS, rows_schema
from model.columns import BadRows
from model.formats.tensor_signature import TensorSignature, TypedSignature
from model.frames.columns import FrameColumn as Column
from model.frames.signature import FrameSignature
from model.signature import Signature

PROTOCOLS = ("open_inference", "sagemaker", "vertex", "function_compute", "eas")
NAMED = (
    Column("height"),
    Column("count", "number", nullable=True, dtype="float32"),
    Column("open", "boolean", nullable=True),
    Column("city", "category", learned=("Oslo", "Ås")),
    Column("day", "date", nullable=True),
    Column("note", "any"),
    Column("word", "text"),
)
SIGNATURES = {
    "array": Signature("array", (Column(None), Column(None, nullable=True))),
    "float32": Signature("array", (Column("a"), Column("b")), precision="float32"),
    "open": Signature("array", None),
    "frame": FrameSignature("frame", NAMED),
    "optional": FrameSignature("frame", (Column("a", nullable=True, optional=True), Column("b", "text"))),
    "extra": Signature("array", (Column("height"),), ignores_extra=True),
    "texts": Signature("texts", ()),
    "numbers": Signature("numbers", ()),
    "numbers, float32": Signature("numbers", (), precision="float32"),
    "open, float32": Signature("array", None, precision="float32"),
    "integers": TypedSignature("array", (Column(None, "integer"),) * 2, precision="int64"),
    "image": TensorSignature("tensor", (), precision="float32", shape=(2, 1)),
    "flags": TensorSignature("tensor", (), precision="bool", shape=(2, 1)),
    "numbered categories": FrameSignature("frame", (Column("size", "category", learned=(1, 2)), Column("b"))),
}
# 1.0 is left out: JSON Schema takes it for whole. So are days that are none, of which a schema knows nothing.
VALUES = st.sampled_from([None, True, False, 0, 1, 3, 2.5, 1e39, 2**63, "", "Oslo", "2026-01-31", "31.01.2026", [], {}])


def rows_for(signature: Signature) -> st.SearchStrategy[Any]:
    """Return rows that a model may take, each with a value or two replaced, and whatever else is no row."""
    columns = signature.columns or (Column(None), Column(None))
    fitting = {"number": 2.5, "integer": 3, "text": "a", "boolean": True, "date": "2026-01-31", "any": "x"}
    good = [column.example if column.learned else fitting[column.kind] for column in columns]
    names = [str(column.place(at)) for at, column in enumerate(columns)]
    values = st.tuples(*(st.one_of(st.just(value), st.just(value), VALUES) for value in good)).map(list)
    lists = st.one_of(values, values, values, st.lists(VALUES, max_size=len(good) + 1))
    objects = values.map(lambda row: dict(zip(names, row, strict=True)))
    changed = st.tuples(objects, st.dictionaries(st.sampled_from([*names, "extra"]), VALUES)).map(lambda p: p[0] | p[1])
    missing = st.tuples(objects, st.sampled_from(names)).map(lambda p: {k: v for k, v in p[0].items() if k != p[1]})
    tensors = st.lists(st.lists(VALUES, min_size=1, max_size=1), min_size=2, max_size=2)
    forms = (lists, objects, changed, missing, tensors, VALUES, st.one_of(lists, objects))
    return st.one_of(VALUES, *(st.lists(form, max_size=2) for form in forms))


@pytest.mark.parametrize("name", SIGNATURES)
def test_schema_takes_the_rows_that_the_server_takes_and_no_others(name: str) -> None:
    signature = SIGNATURES[name]
    validator = Draft202012Validator(rows_schema(signature))
    seen = set()

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(rows_for(signature))
    def compare(rows: Any) -> None:
        if signature.columns is None and isinstance(rows, list) and len({len(r) for r in rows if type(r) is list}) > 1:
            return  # rows of different lengths, which no schema forbids
        try:
            signature.parse(rows)
        except BadRows as error:
            assert not validator.is_valid(rows), error
            seen.add(False)
        else:
            assert validator.is_valid(rows), list(validator.iter_errors(rows))
            seen.add(True)

    compare()
    assert seen == {True, False}


def models() -> dict[str, Any]:
    """Return a model of each kind."""
    numbers = pd.DataFrame({"age": [1.0, 2, np.nan, 4] * 10, "fare": [3.0, 1, 2, 8] * 10})
    strict = make_column_transformer((OneHotEncoder(), ["colour"]), remainder="passthrough")
    frame = FRAME.drop(columns="open").rename(columns={"height": "<b>&'\"height"})
    return {
        "nullable": HistGradientBoostingClassifier(max_iter=3).fit(numbers, ["a", "b", "b", "a"] * 10),
        "unnamed": LogisticRegression().fit([[0.0, 1], [1, 0], [2, 2]], [0, 1, 1]),
        "frame": frame_model(),
        "strict": make_pipeline(strict, LogisticRegression()).fit(frame, [0, 1, 0, 1, 0, 1]),
        "text": text_model(),
    }


def resolved(document: Any, value: Any) -> Any:
    """Return a value with the document's components in place of the references to them."""
    if isinstance(value, list):
        return [resolved(document, each) for each in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        _, _, kind, name = value["$ref"].split("/")
        return resolved(document, document["components"][kind][name])
    return {key: resolved(document, each) for key, each in value.items()}


@pytest.mark.parametrize("name", models())
def test_every_example_of_every_endpoint_fits_its_schema_and_is_answered_as_described(serve: Any, name: str) -> None:
    extensions = tuple(f"+endpoints.{protocol}" for protocol in PROTOCOLS)
    client: Client = serve(models()[name], auth="off", extensions=extensions)
    document = client.get("/openapi.json").json
    answered = set()
    for path, operations in document["paths"].items():
        for method, operation in resolved(document, operations).items():
            filled = path
            for variable in operation.get("parameters", ()):
                filled = filled.replace(f"{{{variable['name']}}}", variable["example"])
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            bodies = [each["value"] for each in content.get("examples", {}).values()]
            bodies += [content["example"]] if "example" in content else []
            assert bool(bodies) == bool(content), path
            for body in bodies:
                Draft202012Validator(content["schema"]).validate(body)
            answers = [client.post(body, filled) for body in bodies]
            for answer in answers or [client.http.open(filled, method=method.upper(), headers=client.headers)]:
                answer.close()
                assert answer.status_code == 200, (path, answer.text)
                answered.add(path)
                if described := operation["responses"]["200"].get("content"):
                    assert answer.mimetype in described
                    if answer.mimetype == "application/json":
                        Draft202012Validator(described["application/json"].get("schema", {})).validate(answer.json)
    rules = {rule.rule for rule in client.app.url_map.iter_rules()} - {"/docs"}
    assert {re.sub(r"<(\w+)>", r"{\1}", rule) for rule in rules} - {"/v2/"} == answered


def test_categories_are_closed_where_the_model_rejects_others(serve: Any) -> None:
    def colours(model: Any) -> Any:
        document = serve(model).get("/openapi.json").json
        return document["components"]["schemas"]["Rows"]["anyOf"][1]["items"]["properties"]["colour"]

    known = ['a "blue"', "green, dark", "red"]
    assert colours(models()["strict"]) == {"type": "string", "enum": known}
    assert colours(models()["frame"]) == {"type": ["string", "null"], "examples": known}


def test_document_is_of_the_version_that_is_served_now(serve: Any, tmp_path: Any) -> None:
    client: Client = serve(models()["unnamed"])
    first = client.get("/openapi.json").json
    other = serve(models()["nullable"]).service.serving
    client.service.serving.routes = other.routes
    second = client.get("/openapi.json").json
    assert first["info"]["version"] != second["info"]["version"] == other.routes.stable.version
    objects = second["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["examples"]["objects"]
    assert list(objects["value"]["data"][0]) == ["age", "fare"]


def test_errors_are_those_of_the_table() -> None:
    table = (ROOT / "docs/api.md").read_text("utf-8").partition("## Errors")[2].partition("\n## ")[0]
    listed = {int(status) for row in re.findall(r"^\| ([0-9, ]+) \|", table, re.MULTILINE) for status in row.split(",")}
    assert listed | {406} == set(ERRORS)  # 406: docs/protocols.md


def test_passwords_and_their_errors_are_described_where_there_are_users(serve: Any, iris_file: Any) -> None:
    document = serve(iris_file).get("/openapi.json").json
    assert document["components"]["securitySchemes"] == {"basic": {"type": "http", "scheme": "basic"}}
    assert {"401", "403", "429"} <= document["paths"]["/predict"]["post"]["responses"].keys()
    assert document["paths"]["/readyz"]["get"]["security"] == []
    document = serve(iris_file, auth="off").get("/openapi.json").json
    assert "basic" not in str(document)
    assert "401" not in document["paths"]["/predict"]["post"]["responses"]


def test_extension_of_ones_own_describes_its_route_and_one_that_fails_harms_nobody(serve: Any, iris_file: Any) -> None:
    client: Client = serve(iris_file)

    def fail(api: Any) -> None:
        raise RuntimeError

    hooks = client.app.extensions["on_openapi"]
    hooks[:0] = [fail, lambda api: api.add("GET", "/mine/<name>", "Mine", name="x")]
    described = client.get("/openapi.json").json["paths"]
    assert described["/mine/{name}"]["get"]["parameters"][0]["example"] == "x"
    assert "/feedback" in described
