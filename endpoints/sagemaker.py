"""Amazon SageMaker's contract for containers: real-time endpoints and batch transform.

    POST /invocations               JSON, JSON lines, CSV or an array; answered by Accept     role predict
    GET  /ping                      the model is loaded and has answered its sample           open
    GET  /execution-parameters      how batch transform should send                           open

Source: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html and
https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-batch-code.html
"""

import re
from typing import TYPE_CHECKING

from flask import Blueprint, Flask, Response, request
from werkzeug.exceptions import BadRequest

from endpoints import media_types
from endpoints.routes import add_health, add_prediction, add_route
from web.errors import json_response

if TYPE_CHECKING:
    from endpoints.openapi import Api
    from server import Service

CUSTOM_ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"
ATTRIBUTES = re.compile(r"[\t -~]{0,1024}")  # the platform's bound
MAX_TRANSFER = 100  # MB; the platform's bound of what a job has under way
ROW_BYTES = 10  # a short row; a body that is full of them should not have more than MAX_ROWS


def init_app(app: Flask, service: "Service") -> None:
    """Add the routes."""
    blueprint = Blueprint("sagemaker", __name__)

    def invocations() -> Response:
        attributes = request.headers.get(CUSTOM_ATTRIBUTES)
        if attributes is not None and not ATTRIBUTES.fullmatch(attributes):
            raise BadRequest(f"{CUSTOM_ATTRIBUTES} is not at most 1,024 characters of visible ASCII")
        response = media_types.predict(service, media_types.read_call)
        if attributes is not None:
            response.headers[CUSTOM_ATTRIBUTES] = attributes
        return response

    def execution_parameters() -> Response:
        settings = service.settings
        payload = min(settings.max_body_bytes, settings.max_rows * ROW_BYTES) // 2**20
        payload = min(max(payload, 1), MAX_TRANSFER)
        at_once = min(settings.web_concurrency, MAX_TRANSFER // payload)
        parameters = {"MaxConcurrentTransforms": at_once, "BatchStrategy": "MULTI_RECORD", "MaxPayloadInMB": payload}
        return json_response(parameters)

    add_prediction(app, blueprint, "/invocations", invocations)
    add_health(app, blueprint, "/ping")
    add_route(app, blueprint, "/execution-parameters", execution_parameters, "GET")
    app.register_blueprint(blueprint)
    app.extensions.setdefault("on_openapi", []).append(describe)


def describe(api: "Api") -> None:
    """Describe the routes."""
    about = 'JSON as for POST /predict, or {"instances": rows}; JSON lines, CSV and arrays. Answered by Accept.'
    body, answer = api.body() | media_types.LINES | api.arrays, media_types.ANSWERS
    api.add_prediction("/invocations", "Predict, for SageMaker", about, body=body, answer=answer, statuses=[406])
    api.add("GET", "/ping", "The model is loaded and has answered its sample", statuses=[503])
    api.add("GET", "/execution-parameters", "How batch transform should send", answer=api.json_object)
