"""What the log and the journal have of a request that failed. An extension (EXTENSIONS in settings.py).

The log has a line for each failure that is ours, with the request's id and the cause, and once a minute for each cause
the whole traceback: some fifty lines, in which nothing else is found when they come with each request. The journal has
`detail`: what the caller was told was wrong, without the names that the caller chose; of a failure, its cause.
"""

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import LogLimit

if TYPE_CHECKING:
    from flask import Flask
    from werkzeug.exceptions import HTTPException

    from server import Service

LINES, LINES_PER_SECOND = 50, 5  # of a worker: at first or after a calm, and for as long as it goes on
MAX_CAUSES = 100  # that have tracebacks of their own
MAX_DETAIL = 300  # characters

# A string as Python quotes it, and as JSON does; perhaps cut off. Not the apostrophe within a word.
QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.?)*(?:'|$)|"(?:[^"\\]|\\.?)*(?:"|$))""", re.DOTALL)
# Of those, what the server's own messages quote.
OURS = {
    *("data", "method", "columns", "inputs", "name", "shape", "datatype", "instances", "parameters", "feedback"),
    *("predict", "predict_proba", "predict_log_proba", "decision_function", "score_samples", "input"),
    "Content-Type: application/json",
}


def init_app(app: "Flask", service: "Service") -> None:
    """Log failures in this form, and note their details."""
    failures = FailureLog(logging.getLogger("server"))
    service.log_limit = failures
    service.every_second.append(failures.count_left_out)
    service.on_exit.append(failures.count_left_out)
    names = _Names(service)

    def note_detail(http: "HTTPException", error: Exception, record: dict[str, Any]) -> None:
        is_ours = (http.code or 500) == 500
        record["detail"] = cause_of(error) if is_ours else without_names(http.description or "", names)

    service.on_error.append(note_detail)


class FailureLog(LogLimit):
    """Logs each failure in one line, with its cause; the traceback once a minute for each cause.

    A flood has `LINES`, then `LINES_PER_SECOND`; how many were left out, and of which causes, is logged once a second.
    """

    def __init__(self, log: logging.Logger) -> None:
        super().__init__(log, 1.0, burst=10)
        self._lines = LogLimit(log, 1 / LINES_PER_SECOND, burst=LINES)
        self._tracebacks: dict[str, float] = {}  # cause → when its traceback was logged last (seconds, monotonic)
        self._since: Counter[str] = Counter()  # cause → failures since then
        self._left_out: Counter[str] = Counter()  # cause → failures that have no line
        self._counting = threading.Lock()

    def error(self, trouble: str, message: str, *arguments: Any, exc_info: Any = False) -> None:
        """Log a failure; `exc_info` is its exception."""
        cause, now = cause_of(exc_info), time.monotonic()
        with self._counting:
            if cause not in self._tracebacks and len(self._tracebacks) >= MAX_CAUSES:
                cause = "another cause"
            is_due = now - self._tracebacks.get(cause, -60.0) >= 60.0  # seconds
            since = self._since[cause]
            self._since[cause] = 0 if is_due else since + 1
            if is_due:
                self._tracebacks[cause] = now
            elif not (has_line := self._lines.is_due("")):
                self._left_out[cause] += 1
        if is_due:
            more = f", and {since} more since its last traceback" if since else ""
            self._log.error(f"{message}: %s%s", *arguments, cause, more, exc_info=exc_info)
        elif has_line:
            self._log.error(f"{message}: %s", *arguments, cause)

    def count_left_out(self) -> None:
        """Log how many failures have no line. To be called once a second."""
        with self._counting:
            left_out, self._left_out = self._left_out, Counter()
        if left_out:
            causes = "; ".join(f"{count} times {cause}" for cause, count in left_out.most_common(5))
            self._log.error("%d more requests failed, too many for a line each: %s", left_out.total(), causes)


def cause_of(error: BaseException) -> str:
    """Return the type of an exception, or of the one that caused it, and where it was raised; never its message."""
    for _ in range(10):  # a chain may be a circle
        error = error.__cause__ or error
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return type(error).__name__
    code = place.tb_frame.f_code
    return f"{type(error).__name__} at {Path(code.co_filename).name}:{place.tb_lineno} in {code.co_name}"[:MAX_DETAIL]


def without_names(detail: str, names: Container[str]) -> str:
    """Return a message of an error with '…' for each quoted string that is not one of the names.

    Messages quote what a caller chose: a key, a column that the model does not have, a method. They hold no value.

    >>> without_names("unknown key 'Jane Doe'; the body has data and may have method", ())
    "unknown key '…'; the body has data and may have method"
    """

    def replace(found: re.Match[str]) -> str:
        return found[0] if found[0] in names or found[0][1:-1] in OURS else f"{found[0][0]}…{found[0][0]}"

    return QUOTED.sub(replace, detail)[:MAX_DETAIL]


class _Names:
    """The names of the served models' columns, as messages quote them."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self._models: list[Any] = []
        self._names: frozenset[str] = frozenset()

    def __contains__(self, quoted: object) -> bool:
        models = self._service.serving.loaded()
        if len(models) != len(self._models) or any(a is not b for a, b in zip(models, self._models, strict=True)):
            columns = (column.name for model in models for column in model.signature.columns or ())
            self._names, self._models = frozenset(repr(name) for name in columns if name is not None), models
        return quoted in self._names
