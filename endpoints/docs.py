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
from endpoints.openapi import Api, categories
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
MAX_FORM = 200  # characters of the rows that show how one is written


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
        """Nothing is described before the first request."""
        self._app, self._service = app, service
        self._described: tuple[Any, dict[str, Any]] = lambda: None, {}

    def openapi(self) -> Response:
        """GET /openapi.json: the API as OpenAPI 3.1."""
        return _secured(json_response(self._describe(self._model())))

    def page(self) -> Response:
        """GET /docs: the API as a page."""
        model, nonce = self._model(), secrets.token_urlsafe(16)
        user, base, document = g.user.name if "user" in g else "", request.url_root.rstrip("/"), self._describe(model)
        routes, named = _routes(document, base, user), [c for c in model.signature.columns or () if c.name]
        shown = {"model": model, "routes": routes, "columns": named[:MAX_COLUMNS], "hidden": len(named) - MAX_COLUMNS}
        shown |= {"form": _form(document) or model.signature.example(), "schemas": _schemas_by_name(document)}
        html = render_template("docs.html", **shown, base=base, user=user, nonce=nonce, categories=categories)
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
    api.add_prediction("/predict", "One prediction for each row, in order", about, body=api.body() | api.arrays)
    for path, role, statuses, summary in (
        ("/model", "predict or admin", (), "What is served: version, columns, methods, an example"),
        ("/healthz", "", (), "The process answers"),
        ("/readyz", "", (503,), "The model is loaded and has answered its sample"),
        ("/openapi.json", "predict", (503,), "This API, as OpenAPI 3.1"),
    ):
        api.add("GET", path, summary, role=role, answer=api.json_object, statuses=statuses)


def _routes(document: dict[str, Any], base: str, user: str) -> list[dict[str, Any]]:
    """Return what the page shows of each operation: its curl, and of one that takes JSON the first example."""
    routes = []
    for written, operations in document["paths"].items():
        for method, operation in operations.items():
            path, body = written, ""
            for variable in operation.get("parameters", ()):
                path = path.replace(f"{{{variable['name']}}}", variable["example"])
            words = ["curl", *(["-u", user] if user and operation["security"] else [])]
            if content := operation.get("requestBody", {}).get("content", {}).get("application/json"):
                examples = [each["value"] for each in content.get("examples", {}).values()] or [content["example"]]
                data = orjson.dumps(examples[0]).decode()
                words += [
                    "-H",
                    "Content-Type: application/json",
                    "-d",
                    data if len(data) <= MAX_SHOWN else "@body.json",
                ]
                # Objects a member a line; lists of numbers not, which may be long.
                body = orjson.dumps(examples[0], option=orjson.OPT_INDENT_2).decode() if "[{" in data else data
            elif method != "get":
                words += ["-X", method.upper()]
            curl = shlex.join([*words, base + path])
            routes.append({"method": method.upper(), "path": path, "curl": curl, "body": body, "operation": operation})
    return routes


def _form(document: dict[str, Any]) -> str:
    """Return rows that the model answers, as lists; "" if they are long."""
    body = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
    form = orjson.dumps(list(body["examples"].values())[-1]["value"]["data"]).decode()
    return form if len(form) <= MAX_FORM else ""


def _schemas_by_name(document: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of each column, if a row may be an object by their names."""
    rows = document["components"]["schemas"]["Rows"]
    schemas: dict[str, Any] = rows["anyOf"][1]["items"]["properties"] if "anyOf" in rows else {}
    return schemas


def _secured(response: Response, nonce: str = "") -> Response:
    """Add the headers that keep a browser from doing anything else with an answer."""
    response.headers.update(HEADERS | {"Content-Security-Policy": POLICY.format(nonce)})
    return response
