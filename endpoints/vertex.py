"""Vertex AI's contract for containers: predict and rawPredict.

    POST $AIP_PREDICT_ROUTE         {"instances": […]} → {"predictions": […]}                 role predict
    GET  $AIP_HEALTH_ROUTE          the model is loaded and has answered its sample           open

rawPredict brings any body to the same route: JSON lines, CSV, arrays and the Open Inference Protocol are taken as well.
Where a route is not set, it is the one that Vertex AI documents as its default.

Source: https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Flask, Request, request
from werkzeug import Response

from endpoints import media_types
from endpoints.inference_messages import JSON_LENGTH
from endpoints.lines import as_integer
from endpoints.open_inference import answer_request, limits_of
from endpoints.routes import add_health, add_prediction, runner
from model.limits import Limits
from model.signature import Signature
from web.decoding import parse_json, read_body

if TYPE_CHECKING:
    from endpoints.openapi import Api
    from server import Service

HEALTH_ROUTE = "/v1/endpoints/<endpoint>/deployedModels/<model>"
PREDICT_ROUTE = f"{HEALTH_ROUTE}:predict"


def init_app(app: Flask, service: "Service") -> None:
    """Add the routes."""
    blueprint = Blueprint("vertex", __name__)

    def predict(**_: str) -> Response:
        current: Request = request._get_current_object()  # type: ignore[attr-defined]  # for other threads
        if JSON_LENGTH in current.headers:
            return answer_request(service, current)
        body = read_body(current.environ, service.bodies)
        run = runner(service, body)
        if (current.is_json or not current.mimetype) and run(_is_inference, body, limits_of(service)):
            return answer_request(service, current, body=body)
        return media_types.predict(service, read_json, body)

    predict_route = service.settings.aip_predict_route or PREDICT_ROUTE
    health_route = service.settings.aip_health_route or HEALTH_ROUTE
    add_prediction(app, blueprint, predict_route, predict)
    add_health(app, blueprint, health_route)
    app.register_blueprint(blueprint)

    def describe(api: "Api") -> None:
        about = "rawPredict also brings JSON lines, CSV, arrays and the Open Inference Protocol. Answered by Accept."
        body, answer = api.body("instances") | media_types.LINES | api.arrays, media_types.ANSWERS
        summary = "Predict, for Vertex AI"
        api.add_prediction(predict_route, summary, about, body=body, answer=answer, statuses=[406])
        api.add("GET", health_route, "The model is loaded and has answered its sample", statuses=[503])

    app.extensions.setdefault("on_openapi", []).append(describe)


def _is_inference(body: bytes, limits: Limits) -> bool:
    """Return whether a body is JSON of the Open Inference Protocol: an object with inputs, and no instances."""
    call = parse_json(body, limits) if b'"inputs"' in body else None
    return type(call) is dict and "inputs" in call and "instances" not in call


def read_json(value: Any) -> media_types.Call:
    """Return the call of a decoded JSON value. Raises: UnprocessableEntity."""
    return replace(media_types.read_instances(value), adapt=whole_numbers)


def whole_numbers(rows: list[Any], signature: Signature) -> list[Any]:
    """Return rows with whole numbers where the model takes no others: Vertex AI's predict makes floats of them."""
    if signature.describe().get("type") == "integer":
        return [as_integer(row) for row in rows]
    integers = {at: c.name for at, c in enumerate(signature.columns or ()) if c.kind == "integer"}
    return [_with_integers(row, integers) for row in rows] if integers else rows


def _with_integers(row: Any, integers: dict[int, str | None]) -> Any:
    if type(row) is dict:
        names = set(integers.values())
        return {name: as_integer(value) if name in names else value for name, value in row.items()}
    if type(row) is list:
        return [as_integer(value) if at in integers else value for at, value in enumerate(row)]
    return row
