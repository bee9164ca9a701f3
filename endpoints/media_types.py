"""Rows in and predictions out by media type: JSON, JSON lines, CSV and numpy's arrays, for SageMaker and Vertex AI."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from flask import Response, current_app, request
from werkzeug.datastructures import MIMEAccept
from werkzeug.exceptions import NotAcceptable, UnprocessableEntity, UnsupportedMediaType
from werkzeug.http import parse_options_header

from endpoints.lines import csv_rows, encode_csv, encode_json_lines, parse_csv, parse_json_lines
from endpoints.routes import runner
from model.answers import ModelFailed
from model.limits import Limits
from model.loaded import Answer
from model.signature import Signature
from web.decoding import LARGE_BODY, NPY, check_length, decode_call, decode_npy, parse_json, read_body

if TYPE_CHECKING:
    from server import Service

JSON, JSON_LINES, CSV = "application/json", "application/jsonlines", "text/csv"
TYPES = JSON, JSON_LINES, CSV, NPY
# For endpoints.docs: the bodies besides JSON and arrays, and the answers.
LINES: dict[str, Any] = {kind: {"schema": {"type": "string"}} for kind in (JSON_LINES, CSV)}
ANSWERS: dict[str, Any] = {kind: {} for kind in TYPES}


@dataclass(frozen=True)
class Call:
    """What a request asks for."""

    rows: Any
    method: str = "predict"
    key: str = ""  # of the predictions in an answer in JSON; "": a list without any
    adapt: Callable[[Any, Signature], Any] | None = None  # makes of the rows those for a signature


def predict(service: "Service", read_json: Callable[[Any], Call], body: bytes | None = None) -> Response:
    """Answer the request under way in the media type that its Accept asks for; without any, in its own.

    Args:
        service: that predicts.
        read_json: returns the call of a decoded JSON value. Raises: HTTPException.
        body: of the request, if it was read already.
    """
    given = given_type()
    asked = asked_type(given)
    body = read_body(request.environ, service.bodies) if body is None else body
    run = runner(service, body)
    call = run(_decode, body, given, read_json, service.decoder.limits())
    rows = partial(run, call.adapt, call.rows) if call.adapt else call.rows
    answer = service.infer(rows, call.method)
    return current_app.response_class(run(encode, answer, asked, call.key), content_type=asked)


def given_type() -> str:
    """Return the media type of the request under way; without any it is JSON. Raises: UnsupportedMediaType."""
    given = JSON if request.is_json else request.mimetype or JSON
    if given not in TYPES:
        raise UnsupportedMediaType(f"send one of these, and say so by Content-Type: {', '.join(TYPES)}")
    if given in (CSV, JSON_LINES):
        if request.mimetype_params.get("charset", "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
            raise UnsupportedMediaType("send UTF-8")
        if request.mimetype_params.get("header", "").lower() == "present":
            raise UnsupportedMediaType("send CSV without a header")
    return given


def asked_type(given: str) -> str:
    """Return the media type that the Accept of the request under way prefers; of equal ones, the given type.

    Raises: NotAcceptable, it takes none of `TYPES`.
    """
    if not request.accept_mimetypes:
        return given
    # Without parameters, such as charset, which a media type would have to match.
    accept = MIMEAccept([(parse_options_header(item)[0], q) for item, q in request.accept_mimetypes])
    asked = max([given, *TYPES], key=accept.quality)
    if not accept.quality(asked):
        raise NotAcceptable(f"answers come as one of these: {', '.join(TYPES)}")
    return asked


def _decode(body: bytes, given: str, read_json: Callable[[Any], Call], limits: Limits) -> Call:
    if given == CSV:
        records, lines = parse_csv(body)
        call = Call(records, adapt=partial(csv_rows, lines))
    elif given == JSON:
        call = read_json(parse_json(body, limits))
    else:
        if given == JSON_LINES and len(body) > LARGE_BODY:
            limits.check(body)
        call = Call(decode_npy(body) if given == NPY else parse_json_lines(body))
    check_length(call.rows, limits.rows)
    return call


def read_instances(call: Any) -> Call:
    """Return the call of `{"instances": rows, "parameters": {"method": "predict"}}`; the parameters are optional.

    Raises: UnprocessableEntity.
    """
    form = 'send {"instances": [[…], …]}'
    if type(call) is not dict or "instances" not in call:
        raise UnprocessableEntity(f"instances is missing; {form}")
    if unknown := call.keys() - {"instances", "parameters"}:
        raise UnprocessableEntity(f"unknown key {min(unknown)[:80]!r}; the body has instances and may have parameters")
    parameters = {} if call.get("parameters") is None else call["parameters"]
    if type(parameters) is not dict or parameters.keys() - {"method"}:
        raise UnprocessableEntity('parameters is not an object with no other key than "method"')
    method = parameters.get("method", "predict")
    if type(method) is not str:
        raise UnprocessableEntity('method is not a string, such as "predict_proba"')
    if type(call["instances"]) is not list or not call["instances"]:
        raise UnprocessableEntity(f"instances is not a list of rows; {form}")
    return Call(call["instances"], method, "predictions")


def read_call(call: Any) -> Call:
    """Return the call of `{"data": rows}`, as POST /predict takes it, of `{"instances": rows}`, or of a list of rows.

    Raises: UnprocessableEntity.
    """
    if type(call) is dict and "instances" in call:
        return read_instances(call)
    rows, method = decode_call(call)
    return Call(rows, method, "prediction" if type(call) is dict else "")


def per_row(prediction: Any) -> list[Any]:
    """Return an answer's prediction as JSON values, one for each row; of several outputs, lists of theirs.

    Raises: ModelFailed, it has no form in JSON.
    """
    try:
        values: Any = orjson.loads(orjson.dumps(prediction, option=orjson.OPT_SERIALIZE_NUMPY))
    except TypeError as error:  # a complex number, a set, half a surrogate pair
        raise ModelFailed("the prediction cannot be encoded as JSON") from error
    return list(map(list, zip(*values, strict=True))) if type(prediction) is tuple else values


def encode(answer: Answer, media_type: str, key: str) -> bytes:
    """Encode an answer. Raises: ModelFailed, as `per_row`; NotAcceptable, there is no such form of it."""
    if media_type == NPY:
        return _encode_npy(answer.prediction)
    values = per_row(answer.prediction)
    if media_type == CSV:
        return encode_csv(values)
    if media_type == JSON_LINES:
        return encode_json_lines(values)
    if key != "prediction":
        return orjson.dumps({key: values} if key else values, option=orjson.OPT_APPEND_NEWLINE)
    content = {key: answer.prediction} | ({} if answer.classes is None else {"classes": answer.classes})
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def _encode_npy(prediction: Any) -> bytes:
    """Write an array in numpy's format: of numbers or booleans as the model returned them, or of strings."""
    array = prediction
    if not isinstance(array, np.ndarray):
        values = per_row(prediction)
        try:
            array = np.array(values)
            if array.dtype.kind not in "biufU" or array.tolist() != values:
                raise ValueError(array.dtype)
        except ValueError:
            raise NotAcceptable("the prediction is no array of numbers or of strings; ask for JSON") from None
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
