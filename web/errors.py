"""Answers as JSON, and errors as problem+json (RFC 9457, https://www.rfc-editor.org/rfc/rfc9457)."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import orjson
from flask import Response, g, request
from werkzeug.exceptions import (
    Forbidden,
    HTTPException,
    InternalServerError,
    MethodNotAllowed,
    NotFound,
    ServiceUnavailable,
    TooManyRequests,
    Unauthorized,
)

from web.decoding import Unprocessable

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)


class JSONResponse(Response):
    """An answer that is complete when it is made: the length of its one piece is known, and it is no redirect."""

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if self._on_close or environ["REQUEST_METHOD"] == "HEAD":
            return super().__call__(environ, start_response)
        start_response(self.status, self.headers.to_wsgi_list())
        return self.response  # type: ignore[return-value]  # a list of bytes


def json_response(value: Any, status: int = 200, content_type: str = "application/json") -> Response:
    """Encode a value, with numpy arrays in it, as strict JSON: NaN and infinities become null."""
    body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
    return JSONResponse(body, status, content_type=content_type)


class NotReady(ServiceUnavailable):
    """503: no model is loaded."""


class ModelFault(InternalServerError):
    """500: the model raised, or returned what is not one prediction a row."""


def problem(error: HTTPException) -> Response:
    """Answer an HTTP error as problem+json, with the headers that it brings (Allow, Retry-After, WWW-Authenticate)."""
    basis = error.get_response()
    g.record.update(error=error.name, error_type=error_type(error))
    detail = error.description
    if isinstance(error, NotFound):
        detail = "there is nothing at this path; predictions are at POST /predict"
    elif isinstance(error, MethodNotAllowed):
        detail = f"this path does not take {request.method}; use {basis.headers['Allow']}"
    content = {"status": basis.status_code, "title": error.name, "detail": detail, "request_id": g.record["request_id"]}
    if isinstance(error, Unprocessable) and error.errors:
        content["errors"] = error.errors
    response = json_response(content, basis.status_code, "application/problem+json")
    for name, value in basis.headers:
        if name not in ("Content-Type", "Content-Length"):
            response.headers.add(name, value)
    return response


def error_type(error: HTTPException) -> str:
    """Say whose fault an error is; alerts watch model, overload and internal."""
    if isinstance(error, (NotReady, ModelFault)):
        return "model"
    if isinstance(error, (Unauthorized, Forbidden, TooManyRequests)):
        return "auth"
    if isinstance(error, ServiceUnavailable):
        return "overload"
    return "client" if (error.code or 500) < 500 else "internal"


def fault(error: Exception) -> Response:
    """Answer an error of our own: the traceback goes to the log, never out."""
    log.error("request %s: %s", g.record["request_id"], type(error).__name__, exc_info=error)
    return problem(InternalServerError("the server failed on this request; its log says why, under this request_id"))
