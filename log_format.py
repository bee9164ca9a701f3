"""Log lines, on standard error: text in gunicorn's form, or with LOG_FORMAT=json an object each, for log collectors.

systemd's journal gets each line with its priority, so that `journalctl -p err` finds the errors. Without this module
gunicorn and Python's logging write their lines as they are, which may quote what a caller sent.
"""

import io
import json
import logging
import os
import re
import sys
import traceback
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from processes import LogLimit

# sd-daemon(3): "<3>" at the beginning of a line makes it an error, and so on. A line is an entry of its own there.
PRIORITIES = {logging.CRITICAL: "<2>", logging.ERROR: "<3>", logging.WARNING: "<4>", logging.INFO: "<6>", 0: "<7>"}

MAX_STRAY = 8192  # characters without an end of line: a progress bar never ends its own


class _JsonFormatter(logging.Formatter):  # by the names of cloud.google.com/logging/docs/structured-logging
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat()
        content: dict[str, Any] = {"time": time, "severity": record.levelname, "logger": record.name}
        content |= {"pid": record.process} | _ids_of_request(record)
        content["message"] = record.getMessage()
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content)


class _TextFormatter(logging.Formatter):
    """Keeps what a library or a caller wrote from looking like a line of its own, or from steering a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return _escape(text.rstrip() if record.name == "py.warnings" else text)  # these end with an empty line

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        trace = _ids_of_request(record).get("trace_id")
        return super().formatMessage(record) + (f" (trace {trace})" if trace else "")


def _escape(text: str) -> str:
    printable = (each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)
    return re.sub(r"\n(?=[^ \n])", "\n  ", "".join(printable))  # only a record's first line begins at the margin


class _Handler(logging.StreamHandler[Any]):
    """Writes to a stream, and to systemd's journal with priorities."""

    def __init__(self, stream: Any, formatter: logging.Formatter) -> None:
        super().__init__(stream)
        self.setFormatter(formatter)
        self.addFilter(_note_request)
        self.is_journal = _is_journal(stream)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self.is_journal:
            return text
        priority = next(mark for level, mark in PRIORITIES.items() if record.levelno >= level)
        return "\n".join(priority + line for line in text.split("\n"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        with suppress(OSError, ValueError):  # not on sys.stderr, which may come here again
            traceback.print_exc(file=self.stream)


def _is_journal(stream: Any) -> bool:
    """Return whether a stream is the one of JOURNAL_STREAM, "<device>:<inode>": see systemd.exec(5).

    A child has the variable too, wherever its output goes.
    """
    with suppress(OSError, ValueError):
        found = os.fstat(stream.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
    return False


def _note_request(record: logging.LogRecord) -> bool:
    """Note in a log record which request is under way, if the line is logged in its context."""
    if flask := sys.modules.get("flask"):  # the shipper has none
        found = flask.g.get("record", {}) if flask.g else {}
        vars(record).update((name, found[name]) for name in ("request_id", "trace_id") if found.get(name))
    return True


def _ids_of_request(record: logging.LogRecord) -> dict[str, str]:
    return {name: vars(record)[name] for name in ("request_id", "trace_id") if name in vars(record)}


class _StrayLines(io.TextIOBase):
    """Takes the place of sys.stderr: what is printed there, such as why a start failed, becomes records of errors."""

    encoding = "utf-8"

    def __init__(self, stream: Any) -> None:
        self._stream, self._rest, self._log = stream, "", logging.getLogger("stderr")

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        if len(self._rest) > MAX_STRAY:
            lines, self._rest = [*lines, self._rest], ""
        for line in filter(None, lines):
            self._log.error("%s", line)
        return len(text)

    def fileno(self) -> int:
        number: int = self._stream.fileno()
        return number


def set_up(form: str) -> None:
    """Set up the logs of this process, and of those that it forks; those of gunicorn as well."""
    text = "[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s"
    formatter = _JsonFormatter() if form == "json" else _TextFormatter(text, "%Y-%m-%d %H:%M:%S %z")
    handler = _Handler(sys.stderr, formatter)
    logging.basicConfig(level="INFO", handlers=[handler])
    if form == "json" or handler.is_journal:
        sys.stderr = _StrayLines(sys.stderr)

    gunicorn = logging.getLogger("gunicorn.error")
    callers, left_out = LogLimit(gunicorn, 1.0, burst=10), Counter[str]()  # callers without a password can cause lines

    def is_too_much(record: logging.LogRecord) -> bool:
        kind = re.sub(r"\d+", "", str(record.msg))[:24]  # without process ids, or there would be ever more kinds
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
        if form == "json" or (handler.is_journal and not has_file()):
            handler.handle(record)
            return False  # gunicorn's own handler would write it too, as plain text
        if record.exc_info:  # gunicorn's handler would format it as it is
            record.exc_text = _escape(logging.Formatter().formatException(record.exc_info))
        return True

    def has_file() -> bool:  # --error-logfile
        return any(isinstance(each, logging.FileHandler) for each in gunicorn.handlers)

    gunicorn.addFilter(pass_on)

    # Python's own count, which shows a warning once, starts again each time that a library changes the filters.
    limit = LogLimit(logging.getLogger("py.warnings"))
    logging.getLogger("py.warnings").addFilter(lambda record: limit.is_due(record.getMessage().partition(": ")[0]))
    logging.captureWarnings(True)
