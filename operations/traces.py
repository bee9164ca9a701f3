"""The trace that a request is part of, by its header traceparent. An extension (EXTENSIONS in settings.py).

Its id is the `trace_id` of the record, of the log's lines and of errors, and the answer's X-Trace-ID.
"""

import re
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, after_this_request, g

if TYPE_CHECKING:
    from server import Service

# https://www.w3.org/TR/trace-context/#traceparent-header: version, trace, the caller's span, flags. There is no version
# ff; in others than 00 more may follow.
TRACEPARENT = re.compile(
    r"(?:00(?=.{53}$)|(?!00|ff)[0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?"
)


def init_app(app: Flask, service: "Service") -> None:
    """Note the trace of each request that has a valid header."""
    service.on_traceparent.append(note)


def note(traceparent: str, record: dict[str, Any]) -> None:
    """Note the trace in the record and in the answer, unless the header is not valid."""
    if found := TRACEPARENT.fullmatch(traceparent):
        record["trace_id"] = found[1]
        after_this_request(add_header)


def add_header(response: Response) -> Response:
    """Add the id of the trace to an answer."""
    response.headers.add("X-Trace-ID", g.record["trace_id"])
    return response
