"""Log lines, on standard error: text in gunicorn's form, or with LOG_FORMAT=json an object each, for log collectors."""

import json
import logging
import re
from collections import Counter
from datetime import UTC, datetime

from processes import LogLimit


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

    gunicorn = logging.getLogger("gunicorn.error")
    callers, left_out = LogLimit(gunicorn, 1.0, burst=10), Counter[str]()  # callers without a password can cause lines

    def is_too_much(record: logging.LogRecord) -> bool:
        kind = str(record.msg)[:24]
        if not callers.is_due(kind):
            left_out[kind] += 1
            return True
        if count := left_out.pop(kind, 0):
            record.msg = f"{record.msg} ({count} more like this were left out)"
        return False

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

    gunicorn.addFilter(pass_on)

    # Python's own count, which shows a warning once, starts again each time that a library changes the filters.
    limit = LogLimit(logging.getLogger("py.warnings"))
    logging.getLogger("py.warnings").addFilter(lambda record: limit.is_due(record.getMessage().partition(": ")[0]))
    logging.captureWarnings(True)
