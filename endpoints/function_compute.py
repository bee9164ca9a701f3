"""Alibaba Cloud's Function Compute: what its HTTP trigger does not send to /predict.

    POST /invoke                    an event, whatever its Content-Type: the body of /predict    role predict
    POST /initialize                answers once the model is ready                              open
    GET  /pre-stop                  answers once the requests under way are answered             open

The hooks are open, since the platform has no password of ours; they reject nothing and change nothing.

Source: https://www.alibabacloud.com/help/en/functioncompute/fc/lifecycle-hooks-for-function-instances-in-a-custom-runtime
"""

import mmap
import threading
import time
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Flask, Response, request

from endpoints.routes import add_prediction, add_route, runner
from model.serving import ModelNotReady
from web.decoding import check_length, decode_json, read_body
from web.errors import json_response
from worker_slot import slot_of

if TYPE_CHECKING:
    from endpoints.openapi import Api
    from server import Service
    from settings import Settings

START_SECONDS = 120.0  # as long as the initializer of deploy/aliyun/s.yaml may take
DRAIN_SECONDS = 5.0
MAX_WORKERS = 1024  # that count together


class InFlight:
    """The requests under way in all workers: a number for each, in memory that they share.

    A worker writes its own number only, by its slot. That of a worker that was killed stands until another takes the
    slot, so waiting for zero needs a bound.
    """

    def __init__(self) -> None:
        """Make the memory; to be called before the fork."""
        self._counts = memoryview(mmap.mmap(-1, 8 * MAX_WORKERS)).cast("q")
        self._lock = threading.Lock()

    def add(self, slot: int, count: int) -> None:
        """Add to the number of this worker, which has a slot."""
        with self._lock:
            self._counts[slot] += count

    def clear(self, slot: int) -> None:
        """Begin a worker."""
        self._lock = threading.Lock()  # a thread of the parent may have held it at the fork
        self._counts[slot] = 0

    def total(self) -> int:
        """Return the number in all workers."""
        return sum(self._counts)


_shared: InFlight | None = None  # by gunicorn's workers


def before_fork(settings: "Settings") -> None:
    """Make what the workers share."""
    global _shared
    _shared = InFlight()


def wait_until_ready(service: "Service") -> Response:
    """Return what GET /readyz answers once all workers have a model. Raises: ModelNotReady, it takes too long."""
    until = time.monotonic() + START_SECONDS
    service.serving.finished.wait(START_SECONDS)
    while True:
        try:
            return service.readyz()
        except ModelNotReady:
            if service.serving.errors or time.monotonic() > until:
                raise
            time.sleep(0.1)


def init_app(app: Flask, service: "Service") -> None:
    """Add the routes, and count the requests under way."""
    blueprint = Blueprint("function_compute", __name__)
    slot = slot_of(app, service)
    in_flight = _shared or InFlight()  # a new one with PRELOAD=1, before the fork as well; or outside gunicorn

    def number() -> int:
        return slot.number % MAX_WORKERS  # the last for one without

    def invoke() -> Response:
        body = read_body(request.environ, service.bodies)
        run = runner(service, body)
        rows, method = run(decode_json, body, service.decoder.limits())
        check_length(rows, service.settings.max_rows)
        return service.respond(rows, method)

    def initialize() -> Response:
        return wait_until_ready(service)

    def pre_stop() -> Response:
        until = time.monotonic() + DRAIN_SECONDS
        while in_flight.total() > 0 and time.monotonic() < until:
            time.sleep(0.02)
        return json_response({"status": "ok"})

    def begin() -> None:
        if request.endpoint in service.recorded:
            request.environ["in_flight"] = number()
            in_flight.add(number(), 1)

    def end(response: Response) -> Response:
        counted: Any = request.environ.get("in_flight")
        if counted is not None:
            response.call_on_close(lambda: in_flight.add(counted, -1))
        return response

    service.on_start.append(lambda: in_flight.clear(number()))
    app.before_request(begin)
    app.after_request(end)
    add_prediction(app, blueprint, "/invoke", invoke)
    add_route(app, blueprint, "/initialize", initialize, "POST")
    add_route(app, blueprint, "/pre-stop", pre_stop, "GET")
    app.register_blueprint(blueprint)
    app.extensions.setdefault("on_openapi", []).append(describe)


def describe(api: "Api") -> None:
    """Describe the routes."""
    api.add_prediction("/invoke", "Predict, for an event of Function Compute", body=api.body())
    api.add("POST", "/initialize", "Answers once the model is ready", statuses=[503])
    api.add("GET", "/pre-stop", "Answers once the requests under way are answered")
