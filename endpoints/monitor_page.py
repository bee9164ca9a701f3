"""GET /monitor: how this host's server is doing, on a page without a script. An extension (EXTENSIONS in settings.py).

    GET /monitor                    the last hour, as HTML                                        role monitor
    GET /monitor?range=24h          or 7d, 30d
    GET /monitor?format=json        the same as JSON: {"host", "range", "versions", "series", …}

What it shows comes from telemetry's roll-ups; without the extension telemetry there is no page.
"""

import logging
import secrets
import shlex
import socket
import threading
import time
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from flask import Response, request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import escape
from werkzeug.exceptions import UnprocessableEntity

from auth import require
from endpoints import monitor_figures as figures
from endpoints.monitor_figures import DAY, HOUR, Span, Traffic
from model.formats import ModelLoadError
from model.serving import short_turns

if TYPE_CHECKING:
    from flask import Flask

    from server import Service
    from settings import Settings

log = logging.getLogger(__name__)

RANGES = {"1h": HOUR, "24h": DAY, "7d": 7 * DAY, "30d": 30 * DAY}
FORMATS = {"html": "text/html; charset=utf-8", "json": "application/json"}
REFRESH = 30  # seconds
# A page is kept for so many times longer than it took to make, within these bounds (seconds): while one is made, each
# request in that worker waits some milliseconds for the interpreter, so this has to stay far below 1 % of the time.
TIMES, MIN_AGE, MAX_AGE = 200, 1.0, 30.0
MAX_EVENTS = 20
TEMPLATES = Path(__file__).with_name("templates")
STYLE = (TEMPLATES / "monitor.css").read_text("utf-8")
STYLE_HASH = b64encode(sha256(STYLE.encode()).digest()).decode()  # no nonce, so that the page can be kept
POLICY = f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; img-src data:; base-uri 'none'; form-action 'none'"

# A name that the template misspells is an error.
_templates = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {
    "ms": figures.as_milliseconds,
    "percent": figures.as_percent,
    "error": figures.error_text,
    "utc": figures.utc,
}
_workers = 0  # that gunicorn's master keeps


def before_fork(settings: "Settings") -> None:
    """Note how many workers there should be."""
    global _workers
    _workers = settings.web_concurrency


def init_app(app: "Flask", service: "Service") -> None:
    """Answer GET /monitor, if telemetry counts what it shows."""
    try:
        import telemetry.rollups  # noqa: F401
    except ModuleNotFoundError:
        log.info("without GET /monitor: telemetry, which counts what it shows, is not installed")
        return
    if "telemetry" not in service.settings.extension_names():
        log.info("without GET /monitor: EXTENSIONS leaves out telemetry, which counts what it shows")
        return
    app.add_url_rule("/monitor", view_func=require("monitor")(MonitorPage(service).monitor))
    app.extensions.setdefault("on_openapi", []).append(describe_api)  # without endpoints.docs, nobody calls it


def describe_api(api: Any) -> None:
    """Describe the route."""
    summary, answer = "How this host is doing: a page, or with ?format=json its figures", api.json_object
    api.add("GET", "/monitor", summary, role="monitor", answer={"text/html": {}} | answer, statuses=[422])


class MonitorPage:
    """Makes the page on a native thread, and keeps it for a moment: ten readers at once cost no more than one."""

    def __init__(self, service: "Service") -> None:
        self._service, self._started = service, time.time()
        self._kept: dict[tuple[str, str], tuple[str, float]] = {}  # (range, format) → the page, and until when
        self._lock = threading.Lock()  # readers wait here, not on the threads that predictions need
        self._url = secrets.token_hex()  # stands in a kept page for the server's address, which callers give

    def monitor(self) -> Response:
        """GET /monitor: the page, or its figures as JSON."""
        name, form = request.args.get("range", "1h"), request.args.get("format", "html")
        for argument, given, known in (("range", name, RANGES), ("format", form, FORMATS)):
            if given not in known:
                raise UnprocessableEntity(f"{argument} is {given[:80]!r}; expected {', '.join(known)}")
        url = str(escape(shlex.quote(f"{request.host_url}predict")))
        response = Response(self._page(name, form).replace(self._url, url), content_type=FORMATS[form])
        response.headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        if form == "html":
            policy = f"{POLICY}; frame-ancestors 'none'"
            response.headers |= {"Content-Security-Policy": policy, "Refresh": str(REFRESH)}
        return response

    def _page(self, name: str, form: str) -> str:
        with self._lock:
            page, until = self._kept.get((name, form), ("", 0.0))
            if time.monotonic() >= until:
                page, cost = self._service.run_in_thread(self._make, name, form, self._service.serving.describe())
                self._kept[name, form] = page, time.monotonic() + min(max(TIMES * cost, MIN_AGE), MAX_AGE)
            return page

    def _make(self, name: str, form: str, served: dict[str, Any]) -> tuple[str, float]:
        """Return a page, and the processor time that it took, in seconds."""
        settings, began, span = self._service.settings, time.thread_time(), Span.last(name, RANGES[name], time.time())
        with short_turns():
            if form == "json":
                page = as_json(settings.journal_dir, span)
            else:
                store = settings.model_dir if settings.model_path is None else None
                curl = "curl" if settings.auth == "off" else "curl -u NAME"
                known = (served, _workers, settings.ships, settings.certificate_file, self._started, curl, self._url)
                page = render(Host(settings.journal_dir, store, *known), span)
        return page, time.thread_time() - began


@dataclass(frozen=True)
class Host:
    """Where a server keeps its records, and what else is known of it."""

    journal_dir: Path
    model_dir: Path | None = None  # the version store, if it is served from one; it holds the versions' notes
    served: dict[str, Any] | None = None  # what `Serving.describe` returned; None if no server is asked
    workers: int = 0  # how many there should be; 0 if that is not known
    ships: bool = False  # whether records are to be shipped to SLS
    certificate: Path | None = None  # whose expiry to show
    started: float = 0.0  # when the worker that is asked began, in seconds since 1970; 0 if none is
    curl: str = "curl -u NAME"  # how to call it …
    url: str = "http://127.0.0.1:5000/predict"  # … and where

    def command(self) -> str:
        """Return a command that predicts."""
        model = self.served and self.served["stable"]
        example = orjson.dumps(model["example"], default=str).decode() if model else '{"data": […]}'
        return f"{self.curl} -H 'Content-Type: application/json' -d {shlex.quote(example)} {self.url}"


def render(host: Host, span: Span, is_file: bool = False) -> str:
    """Return the page as HTML. As a file it has no links to other ranges, and names its own policy."""
    from endpoints.verdict import LEVELS, OK, verdict
    from telemetry.rollups import read_events

    traffic = Traffic.read(host.journal_dir, span)
    sentences = verdict(host)
    return _templates.get_template("monitor.html").render(
        name=socket.gethostname(),
        host=host,
        span=span,
        ranges={} if is_file else RANGES,
        style=STYLE,
        policy=POLICY if is_file else "",
        sentences=sentences,
        level=max((level for level, _ in sentences), key=LEVELS.index, default=OK),
        traffic=traffic,
        served=[key for key in traffic.versions if _is_served(host, *key)],
        notes={version: _note(host, version) for version, _ in traffic.versions},
        charts=traffic.charts(),
        events=[_event(each) for each in read_events(host.journal_dir, span.starts[0], MAX_EVENTS)],
    )


def as_json(journal_dir: Path, span: Span) -> str:
    """Return the figures as a JSON object."""
    traffic = Traffic.read(journal_dir, span)
    content: dict[str, Any] = {"host": socket.gethostname(), "range": span.name, **_counts(traffic.total)}
    versions = traffic.versions.items()
    content["versions"] = [{"version": key[0], "variant": key[1], **_counts(sums)} for key, sums in versions]
    return orjson.dumps(content | {"series": traffic.series()}, option=orjson.OPT_APPEND_NEWLINE).decode()


def _counts(sums: Any) -> dict[str, int]:
    return {"requests": sums.requests, "success": sums.success, "errors": sums.requests - sums.success}


def _is_served(host: Host, version: str, variant: str) -> bool:
    served = host.served and host.served.get(variant)
    return bool(served and served["version"] == version)


def _event(event: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of an event: when, what, which version, and all else that is known of it."""
    known = ("time", "event", "model_version", "variant", "record_id", "pid")
    more = "; ".join(f"{name}: {value}" for name, value in event.items() if name not in known)
    return figures.utc(event["time"]), event["event"], event.get("model_version") or "", more


def _note(host: Host, version: str) -> str:
    """Return the note with which a version was published."""
    if not host.model_dir or not version:
        return ""
    try:
        from model.versions.store import read_manifest

        return str(read_manifest(host.model_dir, version).about.get("note") or "")
    except (ModuleNotFoundError, ModelLoadError):  # model/versions was removed, or the version
        return ""
