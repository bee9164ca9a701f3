"""Who sent a request, and whether they still wait for the answer: for the model's queue."""

import select
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from werkzeug.exceptions import BadRequest

poll = select.poll  # not gevent's, which may switch to another greenlet: workers.py sets it
_HANG_UP = getattr(select, "POLLRDHUP", 0)  # without it, as on macOS, only connections that are wholly closed count


def caller_of(environ: dict[str, Any], user: str) -> tuple[Hashable, Callable[[], None]]:
    """Return who sent a request, and a function that raises BadRequest if nobody waits for its answer any more."""
    return (user, environ.get("REMOTE_ADDR")), partial(_check, environ)


def _check(environ: dict[str, Any]) -> None:
    if (connection := environ.get("gunicorn.socket")) is None:
        return
    try:
        polled = poll()
        polled.register(connection.fileno(), _HANG_UP)
        gone = bool(polled.poll(0))
    except (OSError, ValueError):  # it is closed on this side as well
        gone = True
    if gone:
        raise BadRequest("the connection was closed, or its sending side, before the answer was there")
