"""The API for people and programs, made from the model that is served.

    GET /openapi.json               what every endpoint takes and answers, as OpenAPI 3.1     role predict
    GET /docs                       the same as a page, with a form that sends the example    role predict
    GET /                           leads to /docs                                            open

While no model is loaded the first two are 503. The page needs nothing from another host; its Content-Security-Policy
allows its own style and script only, and without the script it still shows each curl. Endpoints describe themselves:
openapi.py.
"""

import secrets
import shlex
import weakref
from typing import TYPE_CHECKING, Any

import orjson
from flask import Blueprint, Flask, Response, g, make_response, redirect, render_template, request

from auth import require
from endpoints.openapi import OF_PREDICTIONS, Api, categories
from endpoints.routes import endpoint_of
from model.loaded import LoadedModel
from processes import run_hooks
from web.errors import json_response

if TYPE_CHECKING:
    from server import Service

POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)  # the nonce is another one each time, so that nothing that got into the page runs
HEADERS = {
    "Cache-Control": "no-store",  # another version may be served in a moment, and another user may look
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
MAX_COLUMNS = 100  # shown on the page
MAX_SHOWN = 1000  # characters of a body in a curl


def init_app(app: Flask, service: "Service") -> None:
    """Add the routes, except those that a platform has taken for its own."""
    docs, gate = Docs(app, service), require("predict")
    views: dict[str, Any] = {"/openapi.json": gate(docs.openapi), "/docs": gate(docs.page), "/": docs.root}
    blueprint = Blueprint("docs", __name__, template_folder="templates")
    for path, view in views.items():
        if endpoint_of(app, path, "GET") is None:
            blueprint.add_url_rule(path, view_func=view)
    app.register_blueprint(blueprint)


class Docs:
    """The views, and the description of the version that was looked at last."""

    def __init__(self, app: Flask, service: "Service") -> None:
        """Nothing is described before somebody looks."""
        self._app, self._service = app, service
        self._described: tuple[Any, dict[str, Any]] = lambda: None, {}

    def openapi(self) -> Response:
        """GET /openapi.json: the API as OpenAPI 3.1."""
        return _secured(json_response(self._describe(self._model())))

    def page(self) -> Response:
        """GET /docs: the API as a page."""
        model, nonce = self._model(), secrets.token_urlsafe(16)
        document, base = self._describe(model), request.url_root.rstrip("/")
        user, columns = g.user.name if "user" in g else "", model.signature.columns or ()
        html = render_template(
            "docs.html",
            **{"about": model.about, "columns": columns[:MAX_COLUMNS], "hidden": len(columns) - MAX_COLUMNS},
            **{"routes": _routes(document, base, user), "base": base, "user": user, "nonce": nonce},
            categories=categories,
        )
        return _secured(make_response(html), nonce)

    def root(self) -> Any:
        """GET /: leads to the page."""
        return redirect("docs")

    def _model(self) -> LoadedModel:
        """Return the stable version. Raises: ModelNotReady."""
        self._service.serving.choose()  # which raises while there is none
        routes: Any = self._service.serving.routes
        stable: LoadedModel = routes.stable
        return stable

    def _describe(self, model: LoadedModel) -> dict[str, Any]:
        """Return the document for a model, which is made once: it may take a call of the model for each column."""
        described, document = self._described
        if described() is not model:
            api = Api(self._service, model)
            _describe_core(api)
            run_hooks(self._app.extensions.get("on_openapi", []), api)
            document = api.document()
            self._described = weakref.ref(model), document  # an old model is freed with its last request
        return document


def _describe_core(api: Api) -> None:
    """Describe the endpoints of server.py and this module, without the pages for people."""
    others = ", ".join(f'"{method}"' for method in api.model.methods if method != "predict")
    about = f'Beside "data" the body may have "method": {others}.' if others else ""
    api.add_prediction(
        "/predict", "Predict: one prediction for each row, in order.", about, body=api.body() | api.arrays
    )
    api.add(
        "GET",
        "/model",
        "What is served: version, columns, methods, an example",
        role="predict or admin",
        answer=api.json_object,
    )
    api.add("GET", "/healthz", "The process answers", answer=api.json_object)
    api.add("GET", "/readyz", "The model is loaded and has answered its sample", answer=api.json_object, statuses=[503])
    api.add(
        "GET",
        "/openapi.json",
        "This API, as OpenAPI 3.1",
        role="predict",
        answer=api.json_object,
        statuses=OF_PREDICTIONS,
    )


def _routes(document: dict[str, Any], base: str, user: str) -> list[dict[str, Any]]:
    """Return what the page shows of each operation: its curl, and of one that takes JSON the example."""
    routes = []
    for written, operations in document["paths"].items():
        for method, operation in operations.items():
            path, body = written, ""
            for variable in operation.get("parameters", ()):
                path = path.replace(f"{{{variable['name']}}}", variable["example"])
            words = ["curl", *(["-u", user] if user and operation["security"] else [])]
            if content := operation.get("requestBody", {}).get("content", {}).get("application/json"):
                examples = [each["value"] for each in content.get("examples", {}).values()] or [content["example"]]
                body = _written(examples[0])
                compact = orjson.dumps(examples[0]).decode()
                words += [
                    "-H",
                    "Content-Type: application/json",
                    "-d",
                    compact if len(compact) <= MAX_SHOWN else "@body.json",
                ]
            elif method != "get":
                words += ["-X", method.upper()]
            curl = shlex.join([*words, base + path])
            routes.append({"method": method.upper(), "path": path, "curl": curl, "body": body, "operation": operation})
    return routes


def _written(value: Any) -> str:
    """Write JSON for people: objects a member a line, long lists of numbers not."""
    has_objects = b"[{" in orjson.dumps(value)
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 if has_objects else 0).decode()


def _secured(response: Response, nonce: str = "") -> Response:
    """Add the headers that keep a browser from doing anything else with an answer."""
    response.headers.update(HEADERS | {"Content-Security-Policy": POLICY.format(nonce)})
    return response
