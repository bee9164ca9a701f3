"""Alibaba Cloud's PAI-EAS: what its clients send, JSON without a content type, or with another.

    POST / and /predict             {"data": rows}, answered as /predict does; a list of rows, by a list    role predict

The service's own URL is the path /; health is /readyz.

Source: https://www.alibabacloud.com/help/en/pai/user-guide/deploy-a-model-service-by-using-a-custom-image
"""

from typing import TYPE_CHECKING, Any

from flask import Blueprint, Flask, Response, request
from werkzeug.exceptions import BadRequest, UnsupportedMediaType

from endpoints.media_types import per_row
from endpoints.routes import add_prediction, runner
from model.limits import Limits
from web.decoding import NPY, check_length, decode_call, parse_json, read_body
from web.errors import json_response

if TYPE_CHECKING:
    from endpoints.openapi import Api
    from server import Service


def init_app(app: Flask, service: "Service") -> None:
    """Add the routes."""
    blueprint = Blueprint("eas", __name__)

    def predict() -> Response:
        if request.mimetype == NPY:
            return service.predict()
        body = read_body(request.environ, service.bodies)
        run = runner(service, body)
        call = run(_parse, body, service.decoder.limits())
        rows, method = decode_call(call)
        check_length(rows, service.settings.max_rows)
        if type(call) is not list:
            return service.respond(rows, method)
        return json_response(per_row(service.infer(rows, method).prediction))

    add_prediction(app, blueprint, "/", predict)
    add_prediction(app, blueprint, "/predict", predict)
    app.register_blueprint(blueprint)
    app.extensions.setdefault("on_openapi", []).append(describe)


def describe(api: "Api") -> None:
    """Describe the routes."""
    for path in ("/", "/predict"):
        about = "A list of rows alone is answered by a list alone. Any Content-Type is taken, or none."
        answer = {"application/json": {"schema": {"type": ["object", "array"]}}}
        api.add_prediction(path, "Predict, for PAI-EAS", about, body=api.body() | api.arrays, answer=answer)


def _parse(body: bytes, limits: Limits) -> Any:
    """Decode JSON. Raises: BadRequest; UnsupportedMediaType, it is a message of the client's TFRequest."""
    try:
        return parse_json(body, limits)
    except BadRequest:
        # PredictRequest of TensorFlow Serving begins with its field 1, 2 or 3, each of which has a length.
        if body[:1] in (b"\n", b"\x12", b"\x1a") and body.strip()[:1] not in (b"{", b"["):
            raise UnsupportedMediaType(
                "this looks like protobuf, as TFRequest sends it; send JSON instead: StringRequest('[[5.1, …], …]')"
            ) from None
        raise
