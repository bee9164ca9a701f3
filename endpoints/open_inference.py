"""The Open Inference Protocol, version 2, which KServe, Triton and MLServer speak: EXTENSIONS=+endpoints.open_inference

    GET  /v2, /v2/                                 name, version and extensions of the server      role predict
    GET  /v2/health/live, /v2/health/ready         as /healthz and /readyz                         open
    GET  /v2/models/NAME[/versions/V]              inputs and outputs of the model                 role predict
    GET  /v2/models/NAME[/versions/V]/ready        the model, or this version, is served           open
    POST /v2/models/NAME[/versions/V]/infer        predictions                                     role predict

NAME is the setting MODEL_NAME. Every error below /v2 is `{"error": "…"}`, with 400 for anything that is wrong with the
content of a request.
"""

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson
from flask import Blueprint, Flask, Request, g, request
from werkzeug import Response
from werkzeug.exceptions import BadRequest, MethodNotAllowed, NotFound, ServiceUnavailable

from auth import require
from endpoints import tensors
from endpoints.inference_messages import (
    JSON_LENGTH,
    Call,
    Output,
    describe_inputs,
    example_request,
    name_tensors,
    read_call,
    unpack,
    write_answer,
)
from model.answers import ModelFailed
from model.limits import OPEN, Limits
from model.loaded import LoadedModel, RowsRefused
from model.signature import BadRows
from web.decoding import LARGE_BODY
from web.errors import json_response, problem

if TYPE_CHECKING:
    from endpoints.openapi import Api

INPUT = {"type": "object", "required": ["name", "shape", "datatype"]}
REQUEST = {"type": "object", "required": ["inputs"], "properties": {"inputs": {"type": "array", "items": INPUT}}}
VERSION = "0.1.0"  # of the server, as in pyproject.toml
EXTENSIONS = ["binary_tensor_data", "classification", "parameters"]  # of the protocol
ATTEMPTS = 3  # to get several outputs from one and the same version


def init_app(app: Flask, service: Any) -> None:
    """Add the endpoints."""
    views = OpenInference(service)
    blueprint = Blueprint("open_inference", __name__, url_prefix="/v2")
    model, version = "/models/<name>", "/models/<name>/versions/<version>"
    gate = require("predict")
    server, metadata, infer = gate(views.server), gate(views.model), gate(views.infer)
    for rule in ("", "/"):
        blueprint.add_url_rule(rule, "server", server)
    blueprint.add_url_rule("/health/live", "live", views.live)
    blueprint.add_url_rule("/health/ready", "ready", views.ready)
    for rule in (model, version):
        blueprint.add_url_rule(rule, "model", metadata)
        blueprint.add_url_rule(f"{rule}/ready", "model_ready", views.model_ready)
        blueprint.add_url_rule(f"{rule}/infer", "infer", infer, methods=["POST"])
    app.extensions.setdefault("on_openapi", []).append(views.describe_api)
    blueprint.before_request(lambda: g.record.update(protocol="v2"))
    blueprint.register_error_handler(Exception, views.error)
    app.register_blueprint(blueprint)
    for code in (404, 405):  # of paths that have no view, which are no blueprint's
        app.register_error_handler(code, views.error_of_path)
    service.recorded.add("open_inference.infer")


class OpenInference:
    """The views, which decode and encode: everything that predicts is `Service.infer`."""

    def __init__(self, service: Any) -> None:
        self.service = service
        self.name = service.settings.model_name

    def server(self) -> Response:
        """GET /v2: what this server is."""
        return json_response({"name": "prediction-server", "version": VERSION, "extensions": EXTENSIONS})

    def live(self) -> Response:
        """GET /v2/health/live: the process answers."""
        return json_response({"live": True})

    def ready(self) -> Response:
        """GET /v2/health/ready: the model is loaded and has answered its sample."""
        self.service.readyz()
        return json_response({"live": True, "ready": True})

    def model(self, name: str, version: str = "") -> Response:
        """GET /v2/models/NAME: what the model, or one of its versions, takes and returns."""
        models = self._find(name, version)
        content = {"name": self.name, "versions": [each.version for each in _served(self.service)]}
        content["platform"] = "prediction-server_" + models[0].path.suffix.removeprefix(".")
        content["inputs"] = describe_inputs(models[0].signature)
        content["outputs"] = _describe_outputs(models[0])
        return json_response(content)

    def model_ready(self, name: str, version: str = "") -> Response:
        """GET /v2/models/NAME/ready: the model, or one of its versions, is served."""
        self._find(name, version)
        return json_response({"name": self.name, "ready": True})

    def infer(self, name: str, version: str = "") -> Response:
        """POST /v2/models/NAME/infer: answer tensors with the model's predictions, as tensors."""
        self._check_name(name)
        return answer_request(self.service, request._get_current_object(), version)  # type: ignore[attr-defined]

    def error(self, error: Exception) -> Response:
        """Answer an error in the protocol's form; what the content of a request has wrong is 400."""
        http = self.service.explain(error)
        response: Response = http.get_response()
        detail = http.description
        if response.status_code == 422:
            response.status_code = 400
            g.record["error"] = BadRequest().name
        if isinstance(error, MethodNotAllowed):
            detail = f"this path does not take {request.method}; use {response.headers['Allow']}"
        elif error is request.routing_exception:
            detail = f"there is nothing at this path; predictions are at POST /v2/models/{self.name}/infer"
        response.data = orjson.dumps({"error": detail}, option=orjson.OPT_APPEND_NEWLINE)
        response.content_type = "application/json"
        return response

    def error_of_path(self, error: Exception) -> Response:
        """Answer an error that was found before there was a view: in the protocol's form if it is below /v2."""
        if request.path == "/v2" or request.path.startswith("/v2/"):
            return self.error(error)
        return problem(self.service.explain(error))

    def describe_api(self, api: "Api") -> None:
        """Describe the routes, with the example as tensors."""
        error = {"application/json": {"schema": {"type": "object", "required": ["error"]}}}
        about: dict[str, Any] = {"problem": error, "answer": api.json_object}
        api.add("GET", "/v2", "Name, version and extensions of the server", role="predict", **about)
        api.add("GET", "/v2/health/live", "The process answers", **about)
        api.add("GET", "/v2/health/ready", "The model is loaded", statuses=[503], **about)
        example = example_request(api.model.signature, api.model.about["example"]["data"])
        body = {"application/json": {"schema": REQUEST, "example": example}}
        for end, version in {"": {}, "/versions/<version>": {"version": api.model.version}}.items():
            path, about = f"/v2/models/<name>{end}", about | {"name": self.name} | version
            api.add("GET", path, "Inputs and outputs of the model", role="predict", statuses=[404, 503], **about)
            api.add("GET", f"{path}/ready", "The model is served", statuses=[404, 503], **about)
            api.add_prediction(f"{path}/infer", "Predictions, as tensors", body=body, statuses=[404], **about)

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise NotFound(f"there is no model {name[:100]!r}; the one here is {self.name!r}")

    def _find(self, name: str, version: str) -> list[LoadedModel]:
        """Return the served versions of a model, or the one that is named. Raises: NotFound, ModelNotReady."""
        self._check_name(name)
        return _served(self.service, version)


def answer_request(service: Any, current: Request, version: str = "", body: bytes | None = None) -> Response:
    """Answer a request of this protocol, at whatever path it came: read (unless that is done), decode, predict, encode.

    A version that is not the only one may only be named by admins, as with X-Model-Version. Raises: what
    `Service.explain` explains.
    """
    environ, record = current.environ, g.record
    call = _read(service, current, body)
    key, wanted = environ.get("HTTP_X_ROUTING_KEY", ""), environ.get("HTTP_X_MODEL_VERSION", "")
    if version:
        wanted = version if len(_served(service, version)) < len(_served(service)) else ""
    methods = [output.method for output in call.outputs]
    if len(methods) > 1 or call.outputs[0].classes:
        key = key or record["request_id"]  # so that one version answers them all, and the one that is looked at here
        model, _ = service.serving.choose(key, wanted)
        _check_outputs(call.outputs, model)
    for _ in range(ATTEMPTS):
        answers = [service.infer(call.rows, method, wanted, key) for method in methods]
        if len({id(answer.model) for answer in answers}) == 1:
            break
    else:
        raise ServiceUnavailable("the model was replaced between two outputs; try again", retry_after=1)
    if version and answers[0].model.version != version:  # replaced since it was looked for
        raise NotFound(f"version {version[:100]!r} is not served any more")
    record["method"] = ",".join(methods)
    return write_answer(call, answers, service.settings.model_name)


def _check_outputs(outputs: list[Output], model: LoadedModel) -> None:
    """Refuse what can be known before any method is called. Raises: BadRows."""
    for output in outputs:
        if output.method not in model.methods:
            raise BadRows(f"this model has no method {output.method[:80]!r}; it has {', '.join(model.methods)}")
        if output.classes and output.method == "predict" and model.classes is not None:
            raise BadRows(
                "output 'predict': classification: its values are classes already; ask for an output that has a number "
                "for each, such as predict_proba"
            )


def _read(service: Any, current: Request, body: bytes | None) -> Call:
    environ, settings = current.environ, service.settings
    encoding = environ.get("HTTP_CONTENT_ENCODING", "")
    packed: bytes = service.bodies.read(environ) if body is None else body
    limits = limits_of(service)

    def decode() -> Call:
        unpacked = unpack(packed, encoding, settings.max_body_bytes)
        return read_call(unpacked, current.headers.get(JSON_LENGTH), limits)

    if not encoding and len(packed) <= LARGE_BODY:
        return decode()
    call: Call = service.decoder.decode_large(decode)
    return call


def limits_of(service: Any) -> Limits:
    """Return what a request may hold: each column may be a tensor, with a list for each row, or one for all values."""
    limits: Limits = service.decoder.limits()
    columns = max((len(model.signature.columns or ()) for model in service.serving.loaded()), default=0)
    return replace(limits, lists=limits.lists + columns * (limits.rows + 4), values=OPEN)


def _served(service: Any, version: str = "") -> list[LoadedModel]:
    """Return the models that are served, or the one of a version. Raises: ModelNotReady; NotFound, no such version."""
    service.serving.choose()
    models: list[LoadedModel] = service.serving.routes.models()
    found = [model for model in models if version in ("", model.version)]
    if not found:
        there = ", ".join(model.version for model in models)
        raise NotFound(f"version {version[:100]!r} is not served; there is: {there}")
    return found


def _describe_outputs(model: LoadedModel) -> list[dict[str, Any]]:
    """Describe what each method returns, by letting the model answer its example; -1 is the number of rows."""
    outputs = []
    for method in model.methods:
        with suppress(ModelFailed, RowsRefused, TypeError):  # one that fails even there
            prediction = model.predict(model.signature.validate(model.about["example"]["data"]), method)
            for name, array in name_tensors(method, prediction):
                shape = [-1, *array.shape[1:]]
                outputs.append({"name": name, "datatype": tensors.datatype_of(array), "shape": shape})
    return outputs
