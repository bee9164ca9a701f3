"""Log lines, on standard error: text in gunicorn's form, or with LOG_FORMAT=json an object each, for log collectors."""

import json
import logging
import re
import time
from datetime import UTC, datetime

from processes import LogLimit

PERIOD, MAX_LINES = 10.0, 10  # seconds in which gunicorn logs so many warnings and errors of one kind


class _JsonFormatter(logging.Formatter):  # by the names of cloud.google.com/logging/docs/structured-logging
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat()
        content = {"severity": record.levelname, "message": super().format(record), "time": time}
        return json.dumps(content | {"logger": record.name, "process": record.process})


class _TextFormatter(logging.Formatter):
    """Keeps what a library or a caller wrote from looking like a line of its own, or from steering a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return _escape(super().format(record))


def _escape(text: str) -> str:
    printable = (each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)
    return re.sub(r"\n(?=[^ \n])", "\n  ", "".join(printable))  # only a record's first line begins at the margin


def set_up(form: str) -> None:
    """Set up the logs of this process, and of those that it forks; those of gunicorn as well."""
    text = "[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s"
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter(text, "%Y-%m-%d %H:%M:%S %z"))
    logging.basicConfig(level="INFO", handlers=[handler])

    logged: dict[str, tuple[float, int]] = {}  # kind of line → when its period began, and how many there were

    def is_too_much(record: logging.LogRecord) -> bool:  # callers without a password can cause lines
        now, kind = time.monotonic(), str(record.msg)[:24]
        began, count = logged.get(kind, (now, 0))
        if now - began >= PERIOD:
            if count > MAX_LINES:
                record.msg = f"{record.msg} ({count - MAX_LINES} more like this were left out)"
            began, count = now, 0
        logged[kind] = began, count + 1
        return count >= MAX_LINES

    def pass_on(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("Invalid request from ip="):  # without what is wrong, which may hold a password
            record.msg = ": ".join(str(record.msg).split(": ")[:2])
        if record.levelno >= logging.WARNING and is_too_much(record):
            return False
        if form == "json":
            handler.handle(record)
        elif record.exc_info:  # gunicorn's handler would format it as it is
            record.exc_text = _escape(logging.Formatter().formatException(record.exc_info))
        return form != "json"  # whether gunicorn's own handler gets it, which only knows text

    logging.getLogger("gunicorn.error").addFilter(pass_on)

    # Python's own count, which shows a warning once, starts again each time that a library changes the filters.
    limit = LogLimit(logging.getLogger("py.warnings"))
    logging.getLogger("py.warnings").addFilter(lambda record: limit.is_due(record.getMessage().partition(": ")[0]))
    logging.captureWarnings(True)
