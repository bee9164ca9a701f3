"""What the further endpoints share: their routes, and where a large body is decoded."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Flask, Response, current_app, g

from auth import require
from model.batching import call_directly
from web.decoding import LARGE_BODY

if TYPE_CHECKING:
    from server import Service

View = Callable[..., Any]


def add_prediction(app: Flask, blueprint: Blueprint, path: str, view: View) -> None:
    """Answer POST at a path by a view that predicts: for the role predict, recorded under the blueprint's name."""

    @wraps(view)
    def named(**arguments: Any) -> Any:
        g.record["protocol"] = blueprint.name
        return gated(**arguments)

    gated = require("predict")(view)
    service: Service = app.extensions["service"]
    service.recorded.add(add_route(app, blueprint, path, named, "POST"))


def add_health(app: Flask, blueprint: Blueprint, path: str) -> None:
    """Answer GET at a path as /readyz does, but without a body."""
    service: Service = app.extensions["service"]

    def health(**_: str) -> Response:
        service.readyz()
        return current_app.response_class(content_type="text/plain")

    add_route(app, blueprint, path, health, "GET")


def add_route(app: Flask, blueprint: Blueprint, path: str, view: View, method: str) -> str:
    """Answer a method at a path by a view, also if the application answers it by another; return the endpoint.

    A platform lets its users choose paths, and they may choose the server's own.
    """
    if endpoint := endpoint_of(app, path, method):
        app.view_functions[endpoint] = view
        return endpoint
    blueprint.add_url_rule(path, view_func=view, methods=[method])
    return f"{blueprint.name}.{view.__name__}"


def endpoint_of(app: Flask, path: str, method: str) -> str | None:
    """Return the endpoint that answers a method at a path as it is written in a route, None if there is none yet."""
    rules = (rule for rule in app.url_map.iter_rules() if rule.rule == path and method in (rule.methods or ()))
    return next((str(rule.endpoint) for rule in rules), None)


def runner(service: "Service", body: bytes) -> Callable[..., Any]:
    """Return what decodes this body, and encodes its answer: for a large one a native thread, beside the event loop."""
    return service.decoder.decode_large if len(body) > LARGE_BODY else call_directly
