"""Answers as JSON, and errors as problem+json (RFC 9457, https://www.rfc-editor.org/rfc/rfc9457)."""

import logging
from collections.abc import Sequence
from typing import Any

import orjson
from flask import Response, current_app, g, request
from werkzeug.exceptions import (
    HTTPException,
    InternalServerError,
    MethodNotAllowed,
    NotFound,
    ServiceUnavailable,
    UnprocessableEntity,
)

log = logging.getLogger(__name__)

# Whose fault an error is, in the journal and the metrics; alerts watch model, overload and internal.
_ERROR_TYPES = {401: "auth", 403: "auth", 429: "auth", 503: "overload"}


class Unprocessable(UnprocessableEntity):
    """422: JSON, but not rows that fit the model; `errors` says where, as in `model.signature.BadRows`."""

    def __init__(self, detail: str, errors: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(detail)
        self.errors = errors


class NotReady(ServiceUnavailable):
    """503: no model is loaded yet, or it did not load."""

    error_type = "model"


class ModelFault(InternalServerError):
    """500: the model raised, or returned something other than one prediction per row."""

    error_type = "model"

    def __init__(self, error: Exception) -> None:
        """Log the cause, under the request's id; the caller only learns where to look."""
        super().__init__("the model failed on this request; the server's log says why")
        log.error("request %s: the model failed", g.record["request_id"], exc_info=error)


def json_response(value: Any, status: int = 200, content_type: str = "application/json") -> Response:
    """Encode a value, with numpy arrays in it, as strict JSON: NaN and infinities become null.

    Raises:
        ModelFault: it holds something without a JSON form (a complex number, a set), which only a model returns.
    """
    try:
        body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:
        raise ModelFault(error) from None
    return current_app.response_class(body, status, content_type=content_type)


def problem(error: HTTPException) -> Response:
    """Answer an HTTP error as problem+json, with the headers that it brings (Allow, Retry-After, WWW-Authenticate)."""
    plain = error.get_response()
    status = plain.status_code
    error_type = _ERROR_TYPES.get(status, "client" if status < 500 else "internal")
    g.record.update(error=error.name, error_type=getattr(error, "error_type", error_type))
    detail = error.description
    if isinstance(error, NotFound):
        detail = "there is nothing at this path; predictions are at POST /predict"
    elif isinstance(error, MethodNotAllowed):
        detail = f"this path does not take {request.method}; use {plain.headers['Allow']}"
    content = {"status": status, "title": error.name, "detail": detail, "request_id": g.record["request_id"]}
    if getattr(error, "errors", ()):
        content["errors"] = error.errors  # type: ignore[attr-defined]  # Unprocessable's
    response = json_response(content, status, "application/problem+json")
    for name, value in plain.headers:
        if name not in ("Content-Type", "Content-Length"):
            response.headers.add(name, value)
    return response


def fault(error: Exception) -> Response:
    """Answer an error of our own: the traceback goes to the log, never out."""
    log.error("request %s: %s", g.record["request_id"], type(error).__name__, exc_info=error)
    return problem(InternalServerError("the server failed on this request; its log says why, under this request_id"))
