"""The messages of the Open Inference Protocol, version 2: a request's bytes → tensors → rows; predictions → an answer.

    call = read_call(body, request.headers.get(JSON_LENGTH), max_rows)
    answer = service.infer(call.rows, call.outputs[0].method)
    response = write_answer(call, [answer], "model")    # an answer for each of call.outputs

Sources: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md, and the
extensions binary_tensor_data, classification and parameters,
https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

import re
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from flask import Response
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge, UnsupportedMediaType

from endpoints import tensors
from model.answers import ModelFailed
from model.columns import json_form, rows_as_lists
from model.limits import Limits
from model.signature import BadRows, Column, Signature
from web.decoding import parse_json
from web.errors import json_response

JSON_LENGTH = "Inference-Header-Content-Length"  # bytes of the JSON before the tensors that are sent as bytes
WHOLE = "input"  # the name of the one tensor that holds all columns, or rows without columns


@dataclass(frozen=True)
class Output:
    """An output that a request asks for."""

    method: str  # of the model, which is also the output's name
    binary: bool = False  # as bytes, behind the JSON
    classes: int = 0  # that are listed, the best first; 0: the values themselves


@dataclass(frozen=True)
class Call:
    """A decoded request."""

    id: str | None
    inputs: dict[str, Any]  # name → array, `(n_rows, …)`
    outputs: list[Output]

    def rows(self, signature: Signature) -> Any:
        """Return the rows for a model, as `Service.infer` takes them. Raises: BadRows, the model does not take them."""
        if list(self.inputs) == [WHOLE] and _columns_of(signature) != [WHOLE]:
            return _rows_of_one(self.inputs[WHOLE], signature)
        return _rows_of_columns(self.inputs, signature)


def _columns_of(signature: Signature) -> list[str]:
    """Return the names of the inputs that are one column each; a column without a name is called by its number."""
    return [str(column.place(at)) for at, column in enumerate(signature.columns or ())]


def _rows_of_one(array: Any, signature: Signature) -> Any:
    if signature.layout in ("texts", "numbers") and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if signature.is_one_array and array.dtype.kind in "iuf":
        return array
    return _to_rows(WHOLE, array)


def _rows_of_columns(inputs: dict[str, Any], signature: Signature) -> Any:
    names = _columns_of(signature)
    named = any(column.name is not None for column in signature.columns or ())
    fits = set(inputs) == set(names)
    if named:  # what is missing or unknown among columns is said when the rows are compared with the model
        fits = len(inputs) > 1 or fits or getattr(signature, "blanks_replaced", False)
    if not names or not fits:
        others = f", or one input for each column: {', '.join(names)[:1000]}" if names else ""
        raise BadRows(
            f"wrong inputs {str([*inputs])[1:-1][:200]}; this model takes one that is named {WHOLE!r}{others}"
        )
    columns = {}
    for name, array in inputs.items():
        if array.ndim > 2 or array.shape[1:] not in ((), (1,)):
            raise BadRows(f"input {name[:80]!r}: the shape of a column is [n] or [n, 1]")
        columns[name] = _to_rows(name, array.reshape(-1))
    if named:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [list(row) for row in zip(*(columns[name] for name in names), strict=True)]


def _to_rows(name: str, array: Any) -> Any:
    try:
        return tensors.to_rows(array)
    except BadRows as error:
        raise BadRows(f"input {name[:80]!r}: {error.detail}") from None


# --- a request


def unpack(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Undo a body's Content-Encoding: gzip, deflate, or none.

    Raises: UnsupportedMediaType, another one; BadRequest, the body is not of that form; RequestEntityTooLarge, it
    unpacks to more than `max_bytes`, and no more than these are unpacked.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise UnsupportedMediaType("the Content-Encoding may be gzip or deflate")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS + (16 if encoding == "gzip" else 0))
    try:
        unpacked = unpacker.decompress(body, max_bytes + 1)
    except zlib.error:
        raise BadRequest(f"the body is not {encoding}, as its Content-Encoding says") from None
    if len(unpacked) > max_bytes:
        raise RequestEntityTooLarge(f"the body unpacks to more than {max_bytes} bytes")
    if not unpacker.eof or unpacker.unused_data:
        raise BadRequest(f"the {encoding} body breaks off, or goes on behind its end")
    return unpacked


def read_call(body: bytes, json_length: str | None, limits: Limits) -> Call:
    """Decode a request; with `json_length`, the value of that header, tensors follow as bytes behind its JSON.

    Raises: BadRequest, it is not JSON; BadRows, it is not a request, or its tensors are not of the form they name.
    """
    length = len(body)
    if json_length is not None:
        if not re.fullmatch(r"[0-9]{1,18}", json_length) or int(json_length) > length:
            raise BadRequest(f"{JSON_LENGTH} is not a number of bytes up to the body's length, {length}")
        length = int(json_length)
    call = parse_json(body[:length], limits) if length else None
    if type(call) is not dict:
        raise BadRequest('the body is not an object such as {"inputs": [{"name", "shape", "datatype", "data"}]}')
    parameters = _parameters(call, "the request")
    identifier = call.get("id")
    if "id" in call and type(identifier) is not str:
        raise BadRows("id is not a string")
    binary = _flag(parameters, "binary_data_output", "the request")
    outputs = _read_outputs(call.get("outputs", []), binary)
    inputs = _read_inputs(call.get("inputs"), None if json_length is None else memoryview(body)[length:], limits.rows)
    return Call(identifier, inputs, outputs)


def _read_inputs(given: Any, raw: memoryview | None, max_rows: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    at = 0
    for where, each in _named(given, "inputs"):
        size = _parameters(each, where).get("binary_data_size")
        if ("data" in each) == (size is not None):
            raise BadRows(
                f"{where}: expected either data or, for bytes behind the JSON, the parameter binary_data_size"
            )
        try:
            shape, datatype = tensors.read_shape(each.get("shape")), each.get("datatype")
            if type(datatype) is not str:
                raise BadRows("datatype is not a string, such as FP64")
            if shape[0] > max_rows:
                raise BadRows(f"{shape[0]} rows; this server takes {max_rows} in one request")
            if size is None:
                array = tensors.from_json(datatype, shape, each["data"])
            else:
                array = tensors.from_bytes(datatype, shape, _slice(raw, at, size))
                at += size
        except BadRows as error:
            raise BadRows(f"{where}: {error.detail}") from None
        inputs[each["name"]] = array
    if raw is not None and at != len(raw):
        raise BadRows(f"{len(raw)} bytes follow the JSON; the inputs' binary_data_size add up to {at}")
    if not inputs:
        raise BadRows("inputs is empty")
    if len({len(array) for array in inputs.values()}) > 1:
        raise BadRows("the inputs differ in their number of rows, the first size of each shape")
    return inputs


def _slice(raw: memoryview | None, at: int, size: Any) -> memoryview:
    if raw is None:
        raise BadRows(f"binary_data_size needs the header {JSON_LENGTH}")
    if type(size) is not int or not 0 <= size <= len(raw) - at:
        raise BadRows(f"binary_data_size is not a number of bytes up to {len(raw) - at}, which follow")
    return raw[at : at + size]


def _read_outputs(given: Any, binary: bool) -> list[Output]:
    outputs = []
    for where, each in _named(given, "outputs"):
        parameters = _parameters(each, where)
        classes = parameters.get("classification", 0)
        if type(classes) is not int or ("classification" in parameters and classes < 1):
            raise BadRows(f"{where}: classification is not a number of classes")
        outputs.append(Output(each["name"], _flag(parameters, "binary_data", where, binary), classes))
    return outputs or [Output("predict", binary)]


def _named(given: Any, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a list, each with what errors call it. Raises: BadRows, they lack names of their own."""
    if type(given) is not list or not all(type(each) is dict and type(each.get("name")) is str for each in given):
        raise BadRows(f"{key} is not a list of objects that each have a name")
    names = [each["name"] for each in given]
    if len(set(names)) < len(names):
        raise BadRows(f"{key} has a name twice")
    return [(f"{key[:-1]} {name[:80]!r}", each) for name, each in zip(names, given, strict=True)]


def _parameters(owner: dict[str, Any], where: str) -> dict[str, Any]:
    """Return an object's parameters; of those that are not of use here, any may be given."""
    parameters = owner.get("parameters", {})
    if type(parameters) is not dict or not set(map(type, parameters.values())) <= {str, int, float, bool}:
        raise BadRows(f"{where}: parameters is not an object of strings, numbers and booleans")
    return parameters


def _flag(parameters: dict[str, Any], key: str, where: str, default: bool = False) -> bool:
    value = parameters.get(key, default)
    if type(value) is not bool:
        raise BadRows(f"{where}: {key} is not true or false")
    return value


# --- an answer


def write_answer(call: Call, answers: list[Any], model_name: str) -> Response:
    """Encode the answers to a call, one for each of its outputs. Raises: BadRows, ModelFailed."""
    found: dict[str, Any] = {"model_name": model_name, "model_version": answers[0].model.version}
    if call.id is not None:
        found["id"] = call.id
    found["outputs"] = []
    raw = []
    try:
        for output, answer in zip(call.outputs, answers, strict=True):
            for name, array in name_tensors(output.method, answer.prediction, answer.classes, output.classes):
                described: dict[str, Any] = {
                    "name": name,
                    "datatype": tensors.datatype_of(array),
                    "shape": list(array.shape),
                }
                encoded = tensors.to_bytes(array) if output.binary else None
                if encoded is None:
                    described["data"] = tensors.json_data(array)
                else:
                    described["parameters"] = {"binary_data_size": len(encoded)}
                    raw.append(encoded)
                found["outputs"].append(described)
        response = json_response(found)
    except (TypeError, UnicodeEncodeError) as error:
        raise ModelFailed("the prediction has no form in this protocol") from error
    if raw:
        head = response.get_data()
        response.headers[JSON_LENGTH] = str(len(head))
        response.content_type = "application/octet-stream"
        response.set_data(b"".join([head, *raw]))
    return response


def name_tensors(method: str, prediction: Any, classes: Any = None, count: int = 0) -> list[tuple[str, Any]]:
    """Return an output's tensors; if the model has several outputs they are numbered: predict_proba_0, …

    With `count`, that many of the best classes in place of the values. Raises: TypeError, BadRows.
    """
    several = isinstance(prediction, tuple)
    parts = [tensors.from_prediction(each) for each in (prediction if several else [prediction])]
    labels = classes if several and classes is not None else [classes] * len(parts)
    if count:
        parts = [tensors.best_classes(part, count, each) for part, each in zip(parts, labels, strict=True)]
    return [(f"{method}_{at}" if several else method, part) for at, part in enumerate(parts)]


# --- what a model takes


def describe_inputs(signature: Signature) -> list[dict[str, Any]]:
    """Describe the inputs of a model: one for all columns if they have one datatype, else one for each; -1 is open."""
    columns = signature.columns or ()
    precision = signature.precision if signature.is_one_array else ""
    datatypes = [_datatype_of_column(column, precision or column.dtype) for column in columns]
    if len(set(datatypes)) > 1:
        named = zip(_columns_of(signature), datatypes, strict=True)
        return [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in named]
    datatype = "BYTES" if signature.layout == "texts" else tensors.DATATYPES[signature.precision]
    row = [-1 if size is None else size for size in signature.row_shape]
    return [{"name": WHOLE, "datatype": (datatypes or [datatype])[0], "shape": [-1, *row]}]


def example_request(signature: Signature, rows: list[Any]) -> dict[str, Any]:
    """Write rows as a request, with the inputs of `describe_inputs`."""
    inputs, lists = describe_inputs(signature), rows_as_lists(rows, signature.columns or ())
    values = [lists] if len(inputs) == 1 else [list(column) for column in zip(*lists, strict=True)]
    given = [(data, list(np.shape(np.array(data, dtype=object)))) for data in values]
    return {"inputs": [i | {"shape": shape, "data": data} for i, (data, shape) in zip(inputs, given, strict=True)]}


def _datatype_of_column(column: Column, dtype: str) -> str:
    if column.kind in ("text", "date"):
        return "BYTES"
    if column.kind == "boolean":
        return "BOOL"
    if column.kind == "category":
        types = {type(json_form(value)) for value in column.learned} or {str}
        datatypes = {str: "BYTES", bool: "BOOL", int: "INT64", float: "FP64"}
        return next(datatype for kind, datatype in datatypes.items() if kind in types)
    return tensors.DATATYPES[dtype] if dtype in tensors.DTYPES.values() else "FP64"
