"""The prediction server: a Flask application that gunicorn runs. Read this file first.

    make run                        or: gunicorn server:app, with the settings in the environment (settings.py)

    POST /predict                   {"data": [[5.1, 3.5, 1.4, 0.2]]} → {"prediction": [0]}       role predict
                                    or an array as numpy.save writes it, application/x-npy
    GET  /model                     what is served: version, signature, checksum                 role predict or admin
    GET  /metrics                   all workers' metrics, for Prometheus                         role metrics
    GET  /healthz                   the process answers                                          open
    GET  /readyz                    the model is loaded and has answered its sample              open

A request's way: auth → body → version (model.serving) → rows (model.signature) → predict → one line in the journal
(monitor) and one in the metrics (metrics) → answer. Every error is answered as problem+json (problems).
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from flask import Flask, Request, Response, g, request
from flask.sessions import NullSession, SessionInterface
from flask_httpauth import HTTPBasicAuth
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, HTTPException, ServiceUnavailable, Unauthorized, UnsupportedMediaType
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import MapAdapter

from auth import Users
from housekeeping import Housekeeping
from model.batching import Overloaded
from model.loaded import METHODS, LoadedModel, ModelFailed, RowsRefused
from model.serving import ModelNotReady, Serving, UnknownVersion
from model.signature import BadRows
from model.versions.guard import veto
from model.versions.worker_status import Roster
from monitor import Journal, log_monitor
from settings import Settings
from speedups.threadpool import native_call
from telemetry import shared_counters as slots
from telemetry.metrics import Metrics
from web.body import BodyReader
from web.decoding import Unprocessable, parse_array, parse_call
from web.errors import ModelFault, NotReady, fault, json_response, problem

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # what we take over from a caller: safe in logs and headers
LARGE_BODY = 2**18  # bytes; from here on decoding takes milliseconds and goes to a native thread


def create_app(settings: Settings) -> Flask:
    """Make the application. Nothing is loaded and no thread runs before its first request or `service.start()`."""
    service = Service(settings)
    app = Application("server", static_folder=None)
    app.extensions["service"] = service
    app.url_map.merge_slashes = False  # no path is answered with a redirect
    app.ensure_sync = _as_it_is  # type: ignore[assignment,method-assign]  # Flask's own advice
    app.before_request(service.begin)
    predict = service.metrics.in_flight(service.predict)
    app.add_url_rule("/predict", view_func=service.allow("predict")(predict), methods=["POST"])
    app.add_url_rule("/model", view_func=service.allow("predict", "admin")(service.model))
    app.add_url_rule("/metrics", view_func=service.allow("metrics")(service.expose))
    app.add_url_rule("/healthz", view_func=service.healthz)
    app.add_url_rule("/readyz", view_func=service.readyz)
    app.register_error_handler(HTTPException, problem)
    app.register_error_handler(Exception, fault)
    app.after_request(service.finish)
    if settings.trusted_proxies:
        hops = settings.trusted_proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops)  # type: ignore[method-assign]  # Flask's own advice
    return app


def __getattr__(name: str) -> Any:
    """Make `server.app` on first access (PEP 562), so that importing this module reads nothing."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["app"] = create_app(Settings.from_environ(os.environ))
    return globals()["app"]


class Application(Flask):
    """Flask without what costs time at each request and no route here needs: hosts, sessions, uploaded files."""

    class request_class(Request):  # noqa: N801  # its name in Flask
        """A request that has no files to close."""

        def close(self) -> None:
            pass

    class NoSessions(SessionInterface):
        """There are none to open or save."""

        none = NullSession()

        def open_session(self, app: Flask, request: Request) -> NullSession:
            return self.none

    session_interface = NoSessions()

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Match a request's path and method to the routes, whatever its Host."""
        if request is None:
            return None
        return MapAdapter(self.url_map, "", "/", None, "http", request.path, request.method)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a view as it is: Flask would ask at each request whether it is a coroutine."""
    return function


class Service:
    """What one worker process holds, and the views."""

    def __init__(self, settings: Settings) -> None:
        self.native = native = native_call()
        self.max_rows = settings.max_rows
        self.bodies = BodyReader(settings.max_body_bytes, settings.body_timeout)
        workers = partial(Roster.read, settings.journal_dir)
        self.metrics = Metrics(settings.journal_dir, settings.ships, workers, slots.directory)
        self.journal = Journal(
            settings.journal_dir, settings.journal_max_bytes, settings.web_concurrency, self.metrics.dropped
        )
        self.serving = Serving(
            settings.model_path,
            settings.model_dir,
            settings.allow_version_mismatch,
            native,
            Roster(settings.journal_dir),
            settings.max_waiting_rows,
            self.metrics.batched,
            self.metrics.load_failed,
        )
        self.users = None if settings.auth == "off" else Users(settings.users_file, native)
        self.house = Housekeeping(settings, native, self.users, self.bodies, self.serving, self.metrics, self.journal)
        self._started_in: int | None = None
        self._journal_dir = settings.journal_dir
        if self.users is None:
            log.warning("AUTH=off: ANYONE who reaches this port gets predictions; only for platforms that authenticate")

    def start(self) -> None:
        """Load the model and begin to keep house, once in each process: threads do not survive a fork."""
        if self._started_in != os.getpid():
            self._started_in = os.getpid()
            self.metrics.join()
            self.serving.veto(*veto(self._journal_dir))  # before the first load: a canary that is vetoed stays away
            self.serving.start()
            self.house.start()

    # --- views

    def predict(self) -> Response:
        """POST /predict: answer rows with the model's predictions."""
        environ, record = request.environ, g.record
        content_type = environ.get("CONTENT_TYPE", "")
        is_array = content_type == "application/x-npy"
        if not is_array and content_type != "application/json" and not request.is_json:
            raise UnsupportedMediaType("send JSON and say so: curl -H 'Content-Type: application/json' …")
        if "HTTP_CONTENT_ENCODING" in environ:
            raise UnsupportedMediaType("send the body as it is, without Content-Encoding")
        model, record["variant"] = self._choose(environ)
        record["model_version"] = model.version
        body = self.bodies.read(environ)
        if is_array:
            data, method = parse_array(body, self.max_rows), request.args.get("method", "predict")
        elif len(body) > LARGE_BODY:
            data, method = self.native(parse_call, body, self.max_rows, model.signature.width_in_floats)
        else:
            data, method = parse_call(body, self.max_rows)
        if method not in model.methods:
            raise Unprocessable(
                f"this model has no method {method!r}"
                if method in METHODS
                else f"method is none of {', '.join(model.methods)}"
            )
        record["method"] = method
        answer = {"prediction": self._ask(model, data, method, record)}
        classes = model.classes_for(method)
        if classes is not None:
            answer["classes"] = classes
        try:
            return json_response(answer)
        except TypeError as error:  # orjson's: a complex number, a set, half a surrogate pair
            raise self._model_fault(error) from None

    def model(self) -> Response:
        """GET /model: what is served."""
        found = self.serving.describe()
        if found["error"] and not self._has_role("admin"):
            # The words themselves hold paths, and a library's text.
            what = "not all is well with the versions" if found["ready"] else "the model did not load"
            found["error"] = f"{what}; the server's log says why"
        return json_response(found)

    def expose(self) -> Response:
        """GET /metrics: all workers' metrics."""
        accept = request.headers.get("Accept", "")
        body, content_type = self.native(self.metrics.expose, accept, self.serving.describe())
        return Response(body, content_type=content_type)

    def healthz(self) -> Response:
        """GET /healthz: the process answers."""
        return json_response({"status": "ok"})

    def readyz(self) -> Response:
        """GET /readyz: the model is loaded and has answered its sample."""
        try:
            self.serving.choose()
        except ModelNotReady as reason:
            raise NotReady(f"not ready: {reason}", retry_after=5) from None
        return json_response({"status": "ready"})

    # --- what every request goes through

    def begin(self) -> None:
        """Note when a request came and what it is called."""
        environ = request.environ
        given = environ.get("HTTP_X_REQUEST_ID", "")
        g.record = {
            "error": "",
            "error_type": "",
            "path": environ["PATH_INFO"],
            "rows": 0,
            "model_version": "",
            "variant": "",
            "user": None,
            "method": "",
            "request_id": given if REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}",  # no secret
        }
        g.began = time.perf_counter()
        if not environ.get("HTTP_AUTHORIZATION", "").isascii():
            del environ["HTTP_AUTHORIZATION"]  # base64 is ASCII; werkzeug would raise
        self.start()

    def allow(self, *roles: str) -> Callable[[Callable[[], Response]], Callable[[], Response]]:
        """Return a decorator that lets a view answer only users with one of the roles."""
        users = self.users

        def decorate(view: Callable[[], Response]) -> Callable[[], Response]:
            in_full: Any = _authentication(users, roles).login_required(role=list(roles))(view) if users else view

            @wraps(view)  # Flask names the endpoint after it
            def answer() -> Response:
                # A header that was proved before needs no decoding: a tenth of what Flask-HTTPAuth takes.
                name = users.remembered(request.environ.get("HTTP_AUTHORIZATION", "")) if users else ""
                if users and (name is None or not set(roles).intersection(users.roles(name))):
                    return in_full()  # type: ignore[no-any-return]  # Flask-HTTPAuth has no types
                g.record["user"] = name
                return view()

            return answer

        return decorate

    def finish(self, response: Response) -> Response:
        """Record a prediction request and complete its answer."""
        self.bodies.finish(request.environ, response)
        record, status = g.record, response.status_code
        response.headers.add("X-Request-ID", record["request_id"])
        if record["model_version"]:
            response.headers.add("X-Model-Version", record["model_version"])
        if record["error_type"] == "auth":
            self.metrics.refused(status)
        if request.endpoint == "predict":
            seconds = time.perf_counter() - g.began
            self.metrics.answered(seconds, record)
            if record["user"] is not None:
                log_monitor(seconds, status < 400, journal=self.journal, status=status, **record)
            elif status >= 400:
                self.house.count_stranger()
        return response

    # --- helpers

    def _choose(self, environ: dict[str, Any]) -> tuple[LoadedModel, str]:
        try:
            asked = environ.get("HTTP_X_MODEL_VERSION", "")
            if asked and not self._has_role("admin"):
                raise Forbidden("asking for a version outright needs the role admin, which your user does not have")
            return self.serving.choose(environ.get("HTTP_X_ROUTING_KEY", ""), asked)
        except ModelNotReady as reason:
            raise NotReady(f"not ready: {reason}", retry_after=5) from None
        except UnknownVersion as reason:
            raise Unprocessable(f"X-Model-Version: {reason}") from None

    def _has_role(self, role: str) -> bool:
        return self.users is not None and role in self.users.roles(g.record["user"])

    def _ask(self, model: LoadedModel, data: Any, method: str, record: dict[str, Any]) -> Any:
        try:
            rows = model.signature.check(data)
            record["rows"] = len(rows)
            return model.ask(rows, method)
        except BadRows as bad:
            raise Unprocessable(bad.detail, bad.errors) from None
        except RowsRefused as refusal:
            # The model's own words may hold the caller's values: they stay in this log.
            log.warning("request %s: the model refused its rows: %r", record["request_id"], refusal.__cause__)
            raise Unprocessable(f"the model does not take the values of these rows (it raised {refusal})") from None
        except ModelFailed as failure:
            raise self._model_fault(failure) from None
        except Overloaded as reason:
            raise ServiceUnavailable(f"overloaded: {reason}; try again", retry_after=1) from None

    def _model_fault(self, error: Exception) -> "ModelFault":
        log.error("request %s: the model failed", g.record["request_id"], exc_info=error)
        return ModelFault("the model failed on this request; the server's log says why")


def _authentication(users: Users, roles: tuple[str, ...]) -> HTTPBasicAuth:
    """Set up basic auth for views that need one of the roles."""
    auth = HTTPBasicAuth(realm="predictions")

    @auth.verify_password
    def verify(name: str, password: str) -> str | None:
        # Flask-HTTPAuth would take the credentials under any scheme.
        environ = request.environ
        is_basic = environ.get("HTTP_AUTHORIZATION", "")[:6].lower() == "basic "
        if not (is_basic and name and users.verify(name, password, environ.get("REMOTE_ADDR", ""))):
            return None
        g.record["user"] = name
        users.remember(environ["HTTP_AUTHORIZATION"], name)
        return name

    @auth.get_user_roles
    def roles_of(name: str) -> list[str]:
        return users.roles(name)

    @auth.error_handler
    def refuse(status: int) -> Response:
        if status == 403:
            raise Forbidden(f"this needs the role {' or '.join(roles)}, which your user does not have")
        raise Unauthorized(
            "a user name and a password are needed (HTTP basic auth), and these are not right"
            if request.authorization
            else "send a user name and a password (HTTP basic auth): curl -u NAME",
            www_authenticate=WWWAuthenticate("basic", {"realm": "predictions", "charset": "UTF-8"}),
        )

    return auth
