"""The prediction server: a Flask application that gunicorn runs. Read this file first.

    make run                        or: gunicorn server:app, with the settings in the environment (settings.py)

    POST /predict                   {"data": [[5.1, 3.5, 1.4, 0.2]]} → {"prediction": [0]}       role predict
                                    or an array as numpy.save writes it, application/x-npy
    GET  /model                     what is served: version, signature, checksum                 role predict or admin
    GET  /healthz                   the process answers                                          open
    GET  /readyz                    the model is loaded and has answered its sample              open

Extensions add more, such as GET /metrics (telemetry/); settings.EXTENSIONS lists them. A request's way:

    Service.begin → auth.require                       start its record; check password and role
    → web.decoding.Decoder.read_rows                   read the body, and decode it
    → Service.infer → Serving.choose                   pick a version
      → Signature.validate                             reject bad rows
      → LoadedModel.predict → Batcher.submit           call the model, together with concurrent requests
    → json_response → Service.finish → Journal.append  encode the answer; record it; then gunicorn sends it

What is raised on the way becomes problem+json in Service.explain.
"""

if __name__ == "__main__":  # before the imports, which may fail: this may not be the Python that has the requirements
    import sys
    from importlib import import_module

    if sys.argv[1:]:
        sys.exit(import_module("operations.check").main())
    sys.exit("gunicorn runs this server: `make run`, or `gunicorn`, in the directory of server.py")

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.exceptions import Forbidden, HTTPException, InternalServerError, ServiceUnavailable, UnprocessableEntity
from werkzeug.middleware.proxy_fix import ProxyFix

from auth import NoUsers, Users, has_role, require
from model.answers import ModelFailed
from model.batching import Overloaded, call_directly
from model.loaded import Answer, LoadedModel, RowsRefused
from model.serving import ModelNotReady, Serving, SingleFile
from model.signature import BadRows
from monitor import BLANK, Journal, RequestLog
from processes import LogLimit, run_hooks
from settings import Settings
from web.body import BodyReader
from web.callers import RequestIds, caller_of
from web.decoding import Decoder
from web.errors import json_response, problem

log = logging.getLogger(__name__)

ERROR_TYPES: dict[Any, str] = {ModelFailed: "model", ModelNotReady: "model", NoUsers: "internal"}
ERROR_TYPES |= {401: "auth", 403: "auth", 429: "auth", 503: "overload"}  # else client or internal


def create_app(settings: Settings) -> Flask:
    """Make the application. Nothing is loaded and no thread runs before its first request or `service.start()`."""
    service = Service(settings)
    app = Flask("server", static_folder=None)
    app.extensions["service"] = service
    app.url_map.merge_slashes = False  # no path is answered with a redirect
    app.before_request(service.begin)
    app.add_url_rule("/predict", view_func=require("predict")(service.predict), methods=["POST"])
    app.add_url_rule("/model", view_func=require("predict", "admin")(service.model))
    app.add_url_rule("/healthz", view_func=service.healthz)
    app.add_url_rule("/readyz", view_func=service.readyz)
    app.register_error_handler(Exception, lambda error: problem(service.explain(error), getattr(error, "errors", ())))
    app.after_request(service.finish)
    for extension in settings.load_extensions():
        extension.init_app(app, service)
    if hops := settings.trusted_proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops)  # type: ignore[method-assign]  # Flask's own advice
    return app


@cache
def __getattr__(name: str) -> Any:
    """Make `server.app` on first access (PEP 562), so that importing this module reads nothing."""
    if name == "app":
        return create_app(Settings.load_for_app())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _unchanged(rows: Any, record: dict[str, Any]) -> Any:
    return rows


class Service:
    """What one worker process holds, its views, and the hooks of extensions.

    An extension is a module with `init_app(app, service)`. It may also have what gunicorn.conf.py asks for. Hooks are
    called in the order in which they were added; `finish` runs after every other function that is registered with
    `app.after_request`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.thread_runner: Callable[..., Any] = call_directly  # a worker class may replace it; see run_in_thread
        source = SingleFile(settings.model_path, settings.model_sample)
        self.serving = Serving(
            source,
            self.run_in_thread,
            settings.max_wait,
            allow_version_mismatch=settings.allow_version_mismatch,
            merge_requests=settings.merge_requests,
            extra_columns=settings.extra_columns,
        )
        self.users = Users(settings.users_file, self.run_in_thread) if settings.auth == "basic" else None
        self._request_ids = RequestIds(settings.request_id_headers)
        self.bodies = BodyReader(settings.max_body_bytes, settings.body_timeout)
        self.decoder = Decoder(self.bodies, settings.max_rows, self._limiting_models, self.run_in_thread)
        self.journal = Journal(settings.journal_dir, settings.journal_max_bytes, settings.web_concurrency)
        self.request_log = RequestLog(self.journal)
        self.recorded = {"predict"}  # Flask endpoints, named after their views, whose requests are recorded
        self.observers: list[Callable[[float, dict[str, Any]], None]] = [self.request_log.observe]
        self.on_answer: list[Callable[[Answer, Response, dict[str, Any]], None]] = []  # of successes, and the record
        self.on_error: list[Callable[[HTTPException, Exception, dict[str, Any]], None]] = []  # answer, cause, record
        self.on_traceparent: list[Callable[[str, dict[str, Any]], None]] = []  # the header and the record
        self.on_ready: list[Callable[[], None]] = []  # called by `readyz`; may raise ModelNotReady
        self.on_start: list[Callable[[], None]] = []  # in each process, after the fork
        self.on_exit: list[Callable[[], None]] = [self.request_log.summarise]  # in a worker that ends
        self.every_second: list[Callable[[], None]] = [
            lambda: self.serving.end_if_hung(settings.predict_timeout),
            self.bodies.expire_reads,
            self.journal.close_if_removed,
            self.request_log.tick,
        ]
        # A user's own extension may replace these two, to change the rows or the answer.
        self.before_predict: Callable[[Any, dict[str, Any]], Any] = _unchanged
        self.after_predict: Callable[[Answer, dict[str, Any]], Answer] = lambda answer, record: answer
        self.others_serve: Callable[[], bool] = bool  # whether another worker has a model; bool() is False
        self.keeps_waiting: Callable[[], bool] = bool  # whether this worker is to accept no connections yet
        self._started_in: int | None = None
        self.log_limit = LogLimit(log, 1.0, burst=10)  # for what each request may cause; an extension may replace it
        if self.users is None:
            log.warning("AUTH=off: ANYONE who reaches this port gets predictions; only for platforms that authenticate")
        else:
            self.every_second.append(self.users.refresh)
            self.on_ready.append(self.users.check)

    def _limiting_models(self) -> list[LoadedModel]:
        """Return the models whose signatures limit a body; none if an extension may make other rows of it."""
        return self.serving.loaded() if self.before_predict is _unchanged else []

    def run_in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function returns, called beside the event loop if the worker class has threads for it."""
        return self.thread_runner(function, *arguments)

    # --- views

    def predict(self) -> Response:
        """POST /predict: answer rows with the model's predictions."""
        return self.respond(*self.decoder.read_rows(request._get_current_object()))  # type: ignore[attr-defined]

    def respond(self, rows: Any, method: str) -> Response:
        """Answer rows as POST /predict does."""
        answer = self.infer(rows, method)
        content = {"prediction": answer.prediction}
        if answer.classes is not None:
            content["classes"] = answer.classes
        try:
            return json_response(content)
        except TypeError as error:  # orjson's: a complex number, a set, half a surrogate pair
            raise ModelFailed("the prediction cannot be encoded as JSON") from error

    def model(self) -> Response:
        """GET /model: what is served."""
        found = self.serving.describe()
        if found["error"] and not has_role("admin"):  # it may hold paths, and messages of libraries
            what = "something is wrong with the versions" if found["ready"] else "the model did not load"
            found["error"] = f"{what}; the server's log says why"
        return json_response(found)

    def healthz(self) -> Response:
        """GET /healthz: the process answers."""
        return json_response({"status": "ok"})

    def readyz(self) -> Response:
        """GET /readyz: the model is loaded and has answered its sample, and there are users."""
        self.serving.choose()
        for hook in self.on_ready:
            hook()
        return json_response({"status": "ready"})

    # --- inference

    def infer(
        self, rows: Any, method: str = "predict", version: str | None = None, routing_key: str | None = None
    ) -> Answer:
        """Answer rows, for the request under way; every endpoint that predicts calls this, and nothing else.

        Args:
            rows: a decoded JSON value, or an array `(n_rows, …)`; or a function that makes it for a signature.
            method: of the model.
            version, routing_key: as in `Serving.choose`; by default of the headers. Only admins may name a version.

        Raises: Forbidden, BadRows, RowsRefused, ModelFailed, ModelNotReady, Overloaded.
        """
        context, given = g._get_current_object(), request.environ.get
        record = context.record
        version = given("HTTP_X_MODEL_VERSION", "") if version is None else version
        routing_key = given("HTTP_X_ROUTING_KEY", "") if routing_key is None else routing_key
        if version and not has_role("admin"):
            raise Forbidden("choosing a version needs the role admin, which your user does not have")
        model, record["variant"] = self.serving.choose(key=routing_key, version=version)
        if version or routing_key:  # the caller chose, so the guard of a canary does not count this
            record["routed_by"] = "version" if version else "key"
        record["model_version"] = model.version
        if method not in model.methods:
            raise BadRows(f"this model has no method {method[:80]!r}; it has {', '.join(model.methods)}")
        record["method"] = method
        rows = rows(model.signature) if callable(rows) else rows
        rows = model.signature.validate(self.before_predict(rows, record))
        record["rows"] = len(rows)
        caller, check = caller_of(request.environ, record["user"])
        prediction = model.predict(rows, method, caller, check)
        answer = Answer(prediction, model.classes_for(method), model, method, rows)
        context.answers[method] = answer = self.after_predict(answer, record)
        return answer

    def explain(self, error: Exception) -> HTTPException:
        """Return the HTTP error for an exception, and note it in the record with whose fault it is.

        A blueprint with another form of errors calls this too. Alerts watch the types model, overload and internal. An
        exception's own words may hold a caller's values, or a library's: they go to the log, never out.
        """
        request_id, user = g.record["request_id"], g.record["user"]
        if isinstance(error, HTTPException):
            http = error
        elif isinstance(error, BadRows):
            http = UnprocessableEntity(error.detail)
        elif isinstance(error, RowsRefused):
            if self.log_limit.is_due(f"{user}: rows"):
                log.warning("request %s: the model refused its rows: %r", request_id, error.__cause__)
            http = UnprocessableEntity(f"the model does not take the values of these rows (it raised {error})")
        elif isinstance(error, Overloaded):
            http = ServiceUnavailable(f"overloaded: {error}; try again", retry_after=1)
        elif isinstance(error, (ModelNotReady, NoUsers)):
            http = ServiceUnavailable(f"not ready: {error}", retry_after=5)
            http.code = 502 if request.environ.get("HTTP_X_NOT_READY_STATUS") == "502" else 503  # nginx asks another
        else:
            who = "model" if isinstance(error, ModelFailed) else "server"
            self.log_limit.error(f"{user}: {who}", "request %s: the %s failed", request_id, who, exc_info=error)
            http = InternalServerError(f"the {who} failed on this request; the server's log says why")
        code = http.code or 500
        error_type = ERROR_TYPES.get(type(error)) or ERROR_TYPES.get(code, "client" if code < 500 else "internal")
        g.record |= {"error": http.name, "error_type": error_type}
        run_hooks(self.on_error, http, error, g.record)
        return http

    # --- around every request

    def begin(self) -> None:
        """Start the record of a request."""
        context = g._get_current_object()  # not by its proxy, each use of which costs 0.8 µs; below and in auth.py too
        context.began, context.answers, environ = time.perf_counter(), {}, request.environ  # answers by method
        context.record = {**BLANK, "path": environ["PATH_INFO"], "request_id": self._request_ids.of(environ)}
        if traceparent := environ.get("HTTP_TRACEPARENT"):
            run_hooks(self.on_traceparent, traceparent, context.record)
        self.start()

    def finish(self, response: Response) -> Response:
        """Complete the answer, and record it before it leaves."""
        context, current = g._get_current_object(), request._get_current_object()  # type: ignore[attr-defined]
        record = context.record
        self.bodies.finish(current.environ, response)
        response.headers.add("X-Request-ID", record["request_id"])
        if record["model_version"]:
            response.headers.add("X-Model-Version", record["model_version"])
        record["status"], record["success"] = response.status_code, response.status_code < 400
        if record["success"]:
            for answer in context.answers.values():
                run_hooks(self.on_answer, answer, response, record)
        if current.endpoint in self.recorded:
            run_hooks(self.observers, time.perf_counter() - context.began, record)
        return response

    # --- beside the requests

    def start(self) -> None:
        """Load the model and begin the background tasks, once in each process: threads do not survive a fork."""
        if self._started_in != os.getpid():
            self._started_in = os.getpid()
            run_hooks(self.on_start)
            self.serving.start()
            threading.Thread(target=self._run_background_tasks, name="background", daemon=True).start()

    def _run_background_tasks(self) -> None:
        while True:
            time.sleep(1.0)
            run_hooks(self.every_second)
