"""Answers as JSON, and errors as problem+json (RFC 9457, https://www.rfc-editor.org/rfc/rfc9457)."""

from collections.abc import Sequence
from typing import Any

import flask
import orjson
from flask import current_app, g, request
from werkzeug import Response
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound


def json_response(value: Any) -> flask.Response:
    """Encode a value, with numpy arrays in it, as strict JSON: NaN and infinities become null. Raises: TypeError."""
    body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
    return current_app.response_class(body, content_type="application/json")


def problem(error: HTTPException, errors: Sequence[dict[str, Any]] = ()) -> Response:
    """Answer an error as problem+json, with the headers that it brings (Allow, Retry-After, WWW-Authenticate).

    Its description is the `detail`; `errors` says where rows are wrong, as in `model.signature.BadRows`.
    """
    response, detail = error.get_response(), error.description
    if isinstance(error, NotFound):
        detail = "there is nothing at this path; predictions are at POST /predict"
    elif isinstance(error, MethodNotAllowed):
        detail = f"this path does not take {request.method}; use {response.headers['Allow']}"
    content: dict[str, Any] = {"status": response.status_code, "title": error.name, "detail": detail}
    content |= {name: g.record[name] for name in ("request_id", "trace_id") if name in g.record}
    if errors:
        content["errors"] = errors
    response.data = orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)
    response.content_type = "application/problem+json"
    return response
