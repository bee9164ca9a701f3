"""A Flask application that takes the shortcuts answers as it would without them."""

import io
import logging
from collections.abc import Iterator
from typing import Any

import flask
import pytest
from flask import Blueprint, Flask, Response, abort, redirect, request, send_file, session, url_for
from werkzeug.routing import MapAdapter
from werkzeug.test import EnvironBuilder, run_wsgi_app
from werkzeug.wrappers import Response as BaseResponse

import speedups
from speedups import slim_flask


class OwnResponse(Response):
    """A response with a way of its own to be sent."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        start_response("299 OWN", [("X-Own", "1")])
        return [b"own"]


def made(*arguments: Any, **named: Any) -> Response:
    return flask.current_app.response_class(*arguments, **named)


def with_close() -> Response:
    response, closed = made("closes"), flask.current_app.extensions["closed"]
    response.call_on_close(lambda: closed.append(True))
    return response


def pieces() -> Iterator[str]:
    yield "a"
    yield "b"


VIEWS = {
    "string": lambda: "ä",
    "bytes": lambda: b"a",
    "empty": lambda: "",
    "json": lambda: {"a": [1]},
    "list": lambda: made(["a", b"b"]),
    "list-of-one": lambda: made([b"b"]),
    "list-with-length": lambda: made(["ab"], headers={"Content-Length": "2"}),
    "generator": pieces,
    "file": lambda: send_file(io.BytesIO(b"abc" * 100), "text/plain", conditional=True, etag="e"),
    "redirect": lambda: redirect("/ä b"),
    "created": lambda: ("made", 201, {"location": "/ä"}),
    "content-location": lambda: ("a", {"Content-Location": "/ä"}),
    "no-content": lambda: ("ignored", 204),
    "not-modified": lambda: ("ignored", 304, {"Content-Type": "a/b"}),
    "own-length": lambda: made(b"abc", headers={"Content-Length": "2"}),
    "flask-class": lambda: Response("a"),
    "own-class": lambda: OwnResponse("ignored"),
    "werkzeug": lambda: BaseResponse("a", 202),
    "wsgi": lambda: lambda environ, start: start("298 WSGI", []) or [b"wsgi"],
    "closes": with_close,
    "cookie": lambda: session.setdefault("a", 1) and "cookie",
    "upload": lambda: request.files["a"].read() if request.files else "none",
    "urls": lambda: " ".join([url_for("string"), url_for("string", _external=True), request.host, request.url]),
    "gone": lambda: abort(410),
    "fails": lambda: 1 / 0,
}


async def coroutine() -> str:
    return "async"


def application(is_slim: bool, **config: Any) -> Flask:
    """Make an application with a view of each kind, and a hook and an error handler of each kind."""
    app = Flask("test", static_folder=None, host_matching=config.pop("host_matching", False))
    app.logger.setLevel(logging.CRITICAL)
    app.secret_key = "secret"
    app.config.update(config, PROPAGATE_EXCEPTIONS=False)
    app.extensions["closed"] = []
    if is_slim:
        slim_flask.slim(app)
        assert app.response_class is slim_flask.SlimResponse
    blueprint = Blueprint("blueprint", "test", url_prefix="/blueprint")
    blueprint.register_error_handler(410, lambda error: (f"blueprint's {error.code}", 410))
    for name, view in VIEWS.items():
        app.add_url_rule(
            f"/{name}", name, view, methods=["GET", "POST"], host="<host>" if app.url_map.host_matching else None
        )
        blueprint.add_url_rule(f"/{name}", name, view)
    app.add_url_rule("/coroutine", view_func=coroutine)
    app.add_url_rule("/slash/<int:number>/", "slash", lambda number: str(number))
    app.add_url_rule("/old", "old", redirect_to="string")
    app.register_blueprint(blueprint)
    app.before_request(lambda: setattr(flask.g, "hooks", ["before"]))

    @app.after_request
    def add_header(response: Response) -> Response:
        response.headers["X-Hooks"] = " ".join(flask.g.hooks)
        return response

    return app


def answers(app: Flask, *requests: dict[str, Any]) -> list[Any]:
    """Return status, headers and body of the answer to each request, and whether it closed what it should."""
    found = []
    for each in requests:
        body, status, headers = run_wsgi_app(app, EnvironBuilder(**each).get_environ(), buffered=True)
        headers.remove("Date")
        found.append((status, headers.to_wsgi_list(), b"".join(body), len(app.extensions["closed"])))
    return found


UPLOAD = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.txt"\r\n\r\nfile\r\n--x--\r\n'
REQUESTS: list[dict[str, Any]] = [
    *({"path": f"/{name}", "method": method} for name in VIEWS for method in ("GET", "POST", "HEAD", "OPTIONS")),
    *({"path": f"/blueprint/{name}"} for name in ("string", "gone", "fails")),
    *(
        {"path": path, "query_string": "b=%2F"}
        for path in ("/coroutine", "/slash/3", "/slash/3/", "/slash/a", "/old", "/none")
    ),
    {"path": "//string"},
    {"path": "/slash/3", "environ_overrides": {"QUERY_STRING": "ä=\xc3\xa4&b=\xff"}},
    {"path": "/string", "method": "DELETE"},
    {"path": "/file", "headers": {"Range": "bytes=1-2"}},
    {"path": "/file", "headers": {"If-None-Match": '"e"'}},
    {"path": "/upload", "method": "POST", "data": UPLOAD, "content_type": "multipart/form-data; boundary=x"},
]
HOSTS = ["localhost", "localhost:80", "LOCALHOST:5000", "a.b", "[::1]:80", ""]
PLACES: list[dict[str, Any]] = [
    *({"path": "/urls", "environ_overrides": {"HTTP_HOST": host}} for host in HOSTS),
    *({"path": "/urls", "base_url": f"https://{host}/under/ä"} for host in ("localhost", "localhost:443", "a.b")),
    {"path": "/old", "base_url": "https://a.b/under"},
]


@pytest.mark.parametrize("each", REQUESTS, ids=str)
def test_every_kind_of_response_is_as_without(each: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("itsdangerous.TimestampSigner.get_timestamp", lambda self: 1)  # of cookies
    assert answers(application(True), each, each) == answers(application(False), each, each)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"SERVER_NAME": "a.b"},
        {"TRUSTED_HOSTS": ["localhost"]},
        {"APPLICATION_ROOT": "/under"},
        {"host_matching": True},
    ],
    ids=str,
)
def test_every_host_is_as_without(config: dict[str, Any]) -> None:
    expected = answers(application(False, **config), *PLACES, *PLACES)
    assert answers(application(True, **config), *PLACES, *PLACES) == expected
    assert len({str(each) for each in expected}) > 1


@pytest.mark.parametrize("host", ["a b", "ä", "a..b", "x" * 70])
def test_no_route_depends_on_the_host(host: str) -> None:
    place = {"path": "/string", "environ_overrides": {"HTTP_HOST": host}}
    (answer,) = answers(application(True), place)
    assert "200 OK" in str(answer)


def test_session_without_a_secret_key_is_as_without() -> None:
    found = []
    for is_slim in (True, False):
        app = application(is_slim)
        app.secret_key = None
        app.add_url_rule("/read", view_func=lambda: str(session.get("a")))
        found.append(answers(app, {"path": "/read"}, {"path": "/cookie"}, {"path": "/read"}))
        app.secret_key = "set later"
        (answer,) = answers(app, {"path": "/cookie"})
        assert "Set-Cookie" in str(answer)
    assert found[0] == found[1]
    assert "500" in found[0][1][0]  # a session that cannot be signed cannot be written to


@pytest.mark.parametrize("content", [b"", b'{"a": 1}', b"\xff" * 1000])
def test_json_response_is_as_without(content: bytes) -> None:
    found = slim_flask.SlimResponse(content, content_type="application/json")
    expected = Response(content, content_type="application/json")
    assert vars(found) == vars(expected)
    found.headers.add("X-A", "1")
    assert "X-A" not in slim_flask.SlimResponse(content, content_type="application/json").headers


def test_what_another_extension_has_replaced_stays() -> None:
    app = Flask("test")
    app.response_class = OwnResponse

    def create_url_adapter(request: Any) -> Any:
        return Flask.create_url_adapter(app, request)

    app.create_url_adapter = create_url_adapter  # type: ignore[method-assign]
    slim_flask.slim(app)
    assert (app.response_class, app.create_url_adapter) == (OwnResponse, create_url_adapter)


def other_adapter(self: Any, *arguments: Any, **named: Any) -> None:
    self.of_a_later_werkzeug = True


def other_response(self: Any, *arguments: Any, **named: Any) -> None:
    self.response = []


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (MapAdapter, "__init__", other_adapter),
        (Response, "__init__", other_response),
        (Flask, "create_url_adapter", lambda self, context: None),
    ],
)
def test_flask_that_has_changed_is_left_alone(
    owner: Any, name: str, other: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = Flask("test")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, other)
        speedups.init_app(app, None)  # type: ignore[arg-type]  # the service, which it does not use
    assert app.response_class is Response
    assert app.create_url_adapter.__func__ is Flask.create_url_adapter
    assert "slim_flask is left off" in caplog.text
