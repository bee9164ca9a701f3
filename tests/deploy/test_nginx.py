"""nginx with the files of deploy/nginx, in front of real gunicorn processes on one host."""

import contextlib
import gzip
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import pytest
import runbook
from conftest import PASSWORD, ROOT, Gunicorn, Load, basic, gunicorn, read_all, records
from nginx_tools import NGINX, OPERATIONS, SHIPPED, Nginx, certificate, needs_nginx, nginx, one_host, substitute
from test_bad_requests import (
    BELOW,
    BODY,
    BROKEN_CHUNKS,
    FAST_BODIES,
    LEAKS,
    LIMIT,
    NEVER,
    NOT_JSON,
    SLOW_BODIES,
    SMALL,
    WRONG_FORM,
    WRONG_HTTP,
    WRONG_ROWS,
    WRONG_VALUES,
    Bad,
    Slow,
    chunked,
    fitted,
    sized,
    talk,
)

from settings import Settings

pytestmark = needs_nginx

LOGROTATE = shutil.which("logrotate", path=f"{os.environ['PATH']}:/usr/sbin")
needs_logrotate = pytest.mark.skipif(
    not (LOGROTATE and Path("/etc/logrotate.d/nginx").exists() and os.geteuid() == 0),
    reason="needs root and logrotate: sudo apt install logrotate",
)
IRIS = [[5.1, 3.5, 1.4, 0.2]]
SETOSA = (200, {"prediction": [0]})
CALL = {"Content_Type": "application/json", "Authorization": basic("predict")}


class Behind:
    """A gunicorn on a unix socket, with nginx in front of it."""

    def __init__(self, app: Gunicorn, front: Nginx) -> None:
        self.app, self.front = app, front

    def call(self, **headers: str) -> tuple[int, Any, Any]:
        """POST a good row through nginx; return status, headers and body."""
        return self.front.ask("POST", "/predict", BODY, **(CALL | headers))

    def logged(self, request_id: str) -> dict[str, Any]:
        """Return the line of nginx's access log for a request; it is written after the answer."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            lines = [json.loads(line) for line in self.front.access_log.read_text().splitlines()]
            found.extend(line for line in lines if line["request_id"] == request_id)
            return bool(found)

        self.front.wait_until(look, 30)
        return found[0]


@contextmanager
def served(place: Path, *arguments: str, changes: dict[str, str] | None = None, **settings: Any) -> Iterator[Behind]:
    """Serve through nginx; `changes` are those of its files, the rest is gunicorn's."""
    bind = ["--bind", f"unix:{place}/gunicorn.sock"]
    with (
        gunicorn(place, *bind, *arguments, trusted_proxies=1, **settings) as app,
        in_front_of(app, place / "nginx", changes) as running,
    ):
        yield running


@contextmanager
def in_front_of(app: Gunicorn, place: Path, changes: dict[str, str] | None = None) -> Iterator[Behind]:
    """Put an nginx in front of a gunicorn that runs, which may have others."""
    with nginx(place, one_host(app.place / "gunicorn.sock"), changes) as front:
        yield Behind(app, front)


@pytest.fixture(scope="module")
def behind(iris_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    """One such pair, with the files as they are shipped."""
    with served(tmp_path_factory.mktemp("behind"), model_path=iris_file, web_concurrency=2) as running:
        yield running


@pytest.fixture(scope="module")
def strict(iris_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    """A pair with the limits of the tests of bad bodies, which nginx and the app share."""
    changes = {
        "client_max_body_size 16m;": f"client_max_body_size {LIMIT};",
        "client_body_timeout 30s;": "client_body_timeout 2s;",
    }
    place = tmp_path_factory.mktemp("strict")
    with served(place, changes=changes, model_path=iris_file, max_body_bytes=LIMIT, body_timeout=2) as running:
        yield running


def check_problem(status: int, headers: Any, text: str) -> Any:
    """Check that an answer is a problem, of nginx's or the app's; return it decoded."""
    assert headers.get_all("Content-Type") == ["application/problem+json"]
    assert headers.get_all("Strict-Transport-Security") == ["max-age=63072000"]
    problem = json.loads(text)
    assert problem.keys() - {"errors"} == {"status", "title", "detail", "request_id"}
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert headers.get_all("X-Request-ID") == [problem["request_id"]]
    for leak in LEAKS:
        assert leak not in text + str(headers)
    return problem


# --- the same answers as the app's own


@pytest.fixture(scope="module")
def front_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Nginx]]:
    """Return a function that serves a model of the table of bad requests through nginx, each made once."""
    with ExitStack() as running:
        made: dict[str, Nginx] = {}

        def give(name: str) -> Nginx:
            if name not in made:
                place = tmp_path_factory.mktemp(name)
                joblib.dump(fitted(name), place / "model.joblib")
                limit = {"max_body_bytes": SMALL} if name == "small" else {}
                changes = {"client_max_body_size 16m": f"client_max_body_size {SMALL}"} if limit else {}
                with_model = served(place, changes=changes, model_path=place / "model.joblib", **limit)
                made[name] = running.enter_context(with_model).front
            return made[name]

        yield give


BAD = [  # one model is enough for a newcomer: nginx knows nothing of models
    pytest.param(*row.values, id=row.id, marks=() if row.values[0].on == "iris" else pytest.mark.long)
    for row in NOT_JSON + WRONG_FORM + WRONG_ROWS + WRONG_VALUES + WRONG_HTTP
]
ANSWERED_HERE = {"POST /healthz": 404, "POST /%00": 400}  # where nginx says something else before the app is asked


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_answered_through_nginx_as_by_the_app(case: Bad, front_of: Any) -> None:
    body = case.body if isinstance(case.body, bytes | None) else json.dumps(case.body).encode()
    given = {"Content-Type": "application/json", "Authorization": basic("predict")}
    given |= {name.replace("_", "-"): value for name, value in case.headers.items()}
    with contextlib.closing(front_of(case.on).connect()) as connection:
        headers = {name: value for name, value in given.items() if value is not None}
        connection.request(case.method, case.path, body, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
    status = ANSWERED_HERE.get(f"{case.method} {case.path}", case.status)
    assert answer.status == status, text
    check_problem(status, answer.headers, text)
    if status == 405:
        assert case.method not in answer.headers["Allow"]
    if status == 401:
        assert answer.headers["WWW-Authenticate"].lower().startswith("basic ")


# nginx reads a request itself before it asks the app. Where its answer differs: its statuses; none where its answer has
# no head (HTTP/0.9).
READ_OTHERWISE: dict[str, list[int]] = {
    "no version": [],
    "null bytes without end": [400],  # at the first
    "control character in the request id": [404],  # another id is put in its place; the path is closed
    "line feeds alone": [404],  # taken for line ends
    "101 headers": [404],
    "expecting something else": [200],  # Expect is not passed on
    "not chunked in the end": [501],
    "size of 20,000 digits": [200],
    "control character after the size": [200],  # what stands there is dropped
    "line feed alone after it": [200],
    "length among the trailers": [200],  # trailers are dropped
    "trailer without a colon": [200],
}
FROM_GUNICORN = ("two content types",)  # its HTML is passed on (nginx from 1.23 on answers itself)


@pytest.mark.parametrize(
    ("name", "sent", "status"), BELOW + [(name, chunked() + sent, 400) for name, sent in BROKEN_CHUNKS.items()]
)
def test_malformed_request_gets_the_status_that_gunicorn_gives(
    name: str, sent: bytes, status: int, strict: Behind
) -> None:
    came = talk(strict.front.plain_port, sent, quiet=0.3)  # nginx may leave it open
    assert came.statuses in (READ_OTHERWISE.get(name, [status]), [status])  # a newer nginx may be stricter
    if came.statuses not in ([], [200]) and name not in FROM_GUNICORN:
        head, _, text = came.received.partition(b"\r\n\r\n")
        headers = http.client.parse_headers(io.BytesIO(head.partition(b"\r\n")[2] + b"\r\n\r\n"))
        check_problem(came.statuses[0], headers, text.decode())
    assert strict.front.predict(IRIS) == SETOSA


HELD = "held"  # nginx goes on reading for as long as something comes at times
CLOSED = "closed"  # as nginx does where nothing comes: without an answer
CUT_SHORT: dict[str, str | int] = {  # what becomes of a body that does not end; else nginx answers as the app
    "half a body, then silence": CLOSED,
    "no body, then silence": CLOSED,
    "half a chunk, then silence": CLOSED,
    "chunks, then silence": CLOSED,
    "a stranger's, silent": CLOSED,  # nginx has the whole body before it asks the app
    "a byte now and then": HELD,
    "a chunk now and then": HELD,
    "a chunk size that does not end": HELD,
    "trailers that do not end": HELD,
    "a stranger's, dripping": HELD,
    "a stranger's dripping chunks": HELD,
    "of the wrong type, dripping": HELD,
    "with GET, dripping": HELD,
    "too long by its header, dripping": 400,  # it is no number for nginx
    "a stranger's of 64 MB": 413,
    "a stranger's endless chunks": 413,
    "of the wrong type, endless": 413,
    "to nowhere, endless": 413,
    "to the probe, silent": 404,
    "to the probe, dripping": 404,
    "to the probe, endless": 404,
}


def outcome(slow: Slow, port: int) -> str | int:
    """Send a body that does not come to an end, and say what became of it."""
    came = talk(port, slow.first, slow.pieces, slow.pause, seconds=4.0)
    if came.statuses:
        return came.statuses[0] if b"application/problem+json" in came.received else "no problem"
    return CLOSED if 1.9 < came.ended < 3.5 else HELD if came.ended == NEVER else f"ended after {came.ended:.1f} s"


def test_body_that_does_not_end_is_refused_or_costs_only_nginx(strict: Behind) -> None:
    bodies = SLOW_BODIES | FAST_BODIES
    for _ in range(3):  # again what came out otherwise: a pause of this machine makes a piece or an answer late
        with ThreadPoolExecutor(len(bodies)) as pool:
            running = {name: pool.submit(outcome, slow, strict.front.plain_port) for name, slow in bodies.items()}
            while not all(future.done() for future in running.values()):
                assert strict.front.predict(IRIS) == SETOSA
                time.sleep(0.2)
        came = {name: future.result() for name, future in running.items()}
        wanted = {name: CUT_SHORT.get(name, slow.status) for name, slow in bodies.items()}
        bodies = {name: slow for name, slow in bodies.items() if came[name] != wanted[name]}
        if not bodies:
            break
    assert came == wanted
    assert len(strict.app.workers()) == 1
    assert "Traceback" not in strict.app.log.read_text()


def test_body_of_just_the_limit_passes_and_a_byte_more_does_not(behind: Behind) -> None:
    limit = Settings().max_body_bytes
    for size, wanted in ((limit, 200), (limit + 1, 413)):
        status, headers, body = behind.front.ask("POST", "/predict", BODY.ljust(size), **CALL)
        assert status == wanted
    check_problem(413, headers, body.decode())


def test_limits_and_times_in_the_files_agree_with_the_apps(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(path.read_text() for path in SHIPPED.glob("*.conf"))

    def numbers(directive: str, unit: str) -> list[int]:
        return [int(value) for value in re.findall(rf"^ *{directive} (\d+){unit};", text, re.MULTILINE)]

    for name in ("WORKER_CLASS", "GRACEFUL_TIMEOUT", "PORT", "HOST", "PRELOAD", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    # In a process of its own, since it puts gevent in the place of threads.
    names = ("keepalive", "graceful_timeout", "timeout")
    script = f"import runpy; found = runpy.run_path('gunicorn.conf.py'); print([found[each] for each in {names}])"
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    configured = dict(zip(names, json.loads(shown), strict=True))
    assert numbers("client_max_body_size", "m") == [Settings().max_body_bytes / 2**20]
    assert numbers("client_body_timeout", "s") == [Settings().body_timeout]
    assert numbers("client_header_timeout", "s") == [configured["keepalive"]]
    (one, several) = sorted(numbers("keepalive_timeout", "s"))
    assert 0 < one <= several < configured["keepalive"] < configured["graceful_timeout"]
    (read,), (again,) = numbers("proxy_read_timeout", "s"), numbers("proxy_next_upstream_timeout", "s")
    assert configured["timeout"] + 5 < again < read


def test_error_of_the_app_is_passed_on_as_it_is(behind: Behind) -> None:
    status, headers, body = behind.front.ask("GET", "/predict", **CALL)
    assert (status, sorted(headers.get_all("Allow")[0].split(", "))) == (405, ["OPTIONS", "POST"])
    assert len(headers.get_all("Allow")) == 1
    assert "does not take GET" in check_problem(405, headers, body.decode())["detail"]


# --- what is closed, and what is passed on


@pytest.mark.parametrize(
    "path",
    [
        "/healthz",
        "/readyz",
        "/metrics",
        "/monitor",
        "/monitor?range=24h",
        "//healthz",
        "/./readyz",
        "/%68ealthz",
        "/x/../metrics",
        "/healthz?a=1",
    ],
)
def test_probes_metrics_and_monitor_are_not_exposed(path: str, behind: Behind) -> None:
    for method in ("GET", "POST"):
        status, headers, body = behind.front.ask(method, path, Authorization=basic("metrics"))
        assert status == 404
        problem = check_problem(404, headers, body.decode())
        assert "nothing at this path" in problem["detail"]
        assert behind.logged(problem["request_id"])["upstream"] == ""  # the app was not asked


@pytest.mark.parametrize("path", ["/HEALTHZ", "/healthz/", "/healthz;x", "/healthz%0a", "/%2e%2e/healthz%00"])
def test_other_spellings_of_a_closed_path_are_nothing_either(path: str, behind: Behind) -> None:
    status, headers, body = behind.front.ask("GET", path)
    assert status in (400, 404)
    check_problem(status, headers, body.decode())


def test_page_of_the_api_is_passed_on_and_names_https(behind: Behind) -> None:
    status, headers, _ = behind.front.ask("GET", "/")
    assert (status, headers.get_all("Location")) == (302, ["docs"])
    status, headers, page = behind.front.ask("GET", "/docs", Host="models.example", Authorization=basic("predict"))
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert len(headers.get_all("Content-Security-Policy")) == len(headers.get_all("Strict-Transport-Security")) == 1
    assert b" https://models.example/predict\n" in page.replace(b"<", b"\n")
    status, headers, document = behind.front.ask("GET", "/openapi.json", Authorization=basic("predict"))
    assert (status, json.loads(document)["openapi"]) == (200, "3.1.1")
    assert behind.front.ask("GET", "/docs")[0] == 401


def test_request_id_is_the_same_in_answer_journal_and_log(behind: Behind) -> None:
    sane = f"order:{uuid.uuid4().hex}"
    for given, kept in ((sane, True), ("", False), ('a"b', False), ("x" * 129, False), ("caf\xe9", False)):
        status, headers, _ = behind.call(X_Request_ID=given)
        (told,) = headers.get_all("X-Request-ID")
        assert status == 200
        assert told == given if kept else re.fullmatch("[0-9a-f]{32}", told)
        assert behind.logged(told)["status"] == 200
        assert [record["status"] for record in records(behind.app.journal_dir) if record["request_id"] == told] == [200]


def test_trace_is_the_same_in_answer_journal_and_log(behind: Behind) -> None:
    trace, span = uuid.uuid4().hex, "00f067aa0ba902b7"
    valid = f"00-{trace}-{span}-01", f"cc-{trace}-{span}-00-more"
    for given, kept in (
        *((each, True) for each in valid),
        (f"00-{trace}-{span}-01-more", False),
        (f"ff-{trace}-{span}-01", False),
    ):
        status, headers, _ = behind.call(traceparent=given)
        assert (status, headers.get_all("X-Trace-ID")) == (200, [trace] if kept else None)
        told = headers["X-Request-ID"]
        assert behind.logged(told)["trace_id"] == (trace if kept else "")
        (record,) = (each for each in records(behind.app.journal_dir) if each["request_id"] == told)
        assert record.get("trace_id") == (trace if kept else None)
        status, headers, body = behind.front.ask("GET", "/metrics", traceparent=given)  # which nginx answers itself
        assert (status, headers.get_all("X-Trace-ID")) == (404, [trace] if kept else None)
        assert json.loads(body).get("trace_id") == (trace if kept else None)


def test_log_of_nginx_holds_neither_password_nor_query_nor_body(behind: Behind) -> None:
    _, headers, _ = behind.front.ask("POST", "/predict?token=abc", BODY, **CALL)
    line = behind.logged(headers["X-Request-ID"])
    assert line.keys() == {
        *("time", "request_id", "trace_id", "address", "request", "status", "bytes", "seconds"),
        *("upstream", "upstream_status", "upstream_seconds"),
    }
    assert (line["address"], line["request"]) == ("127.0.0.1", "POST /predict")
    _, headers, _ = behind.front.ask("GET", "/healthz?token=abc")
    assert behind.logged(headers["X-Request-ID"])["request"] == "GET /healthz"  # also where nginx answers itself


def test_address_that_a_caller_claims_is_not_believed(behind: Behind) -> None:
    def wrong(source: str, number: int) -> int:
        with contextlib.closing(behind.front.connect(source=source)) as connection:
            claims = {"X-Forwarded-For": f"10.1.1.{number}", "Forwarded": "for=10.1.1.1", "X-Real-IP": "10.1.1.1"}
            given = {"Content-Type": "application/json", "Authorization": basic("predict", "wrong")}
            connection.request("POST", "/predict", BODY, given | claims)
            return connection.getresponse().status

    statuses = [wrong("127.0.0.2", number) for number in range(40)]  # two workers count ten wrong ones each
    assert statuses[:10] == [401] * 10
    assert 429 in statuses  # a new claim each time did not help
    assert wrong("127.0.0.3", 0) == 401  # another real address is not the one that is throttled
    assert behind.front.predict(IRIS) == SETOSA


@pytest.mark.parametrize("how", ["X-Forwarded-For", "proxy_protocol"])
def test_address_of_a_load_balancer_in_front_is_replaced_by_the_callers(
    how: str, behind: Behind, tmp_path: Path
) -> None:
    written = re.search(rf"^ *set_real_ip_from 10.0.0.0/16;\n *real_ip_header {how};$", OPERATIONS, re.MULTILINE)
    assert written
    lines = written[0].replace("10.0.0.0/16", "127.0.0.1")  # who calls here
    changes = {"    # --- the app\n": f"{lines}\n", "ssl http2;": "ssl http2 proxy_protocol;"}
    if how != "proxy_protocol":
        del changes["ssl http2;"]
    with in_front_of(behind.app, tmp_path, changes) as running:
        with socket.create_connection(("127.0.0.1", running.front.port), 10) as raw:
            if how == "proxy_protocol":
                raw.sendall(b"PROXY TCP4 192.0.2.7 192.0.2.1 5000 443\r\n")
            context = ssl.create_default_context(cafile=str(running.front.place / "prediction-server.pem"))
            with context.wrap_socket(raw, server_hostname="localhost") as connection:
                claim = "192.0.2.9, 192.0.2.7"  # the load balancer appends what it saw
                ours = f"X-Request-ID: {how}\r\nX-Forwarded-For: {claim}\r\nConnection: close\r\n"
                connection.sendall(sized(len(BODY))[:-2] + f"{ours}\r\n".encode() + BODY)
                assert read_all(connection).startswith(b"HTTP/1.1 200 ")
        assert running.logged(how)["address"] == "192.0.2.7"


def test_certificates_authority_finds_its_file_over_http(behind: Behind, tmp_path: Path) -> None:
    place = tmp_path / ".well-known/acme-challenge"
    place.mkdir(parents=True)
    (place / "token").write_text("as it should be")
    with in_front_of(behind.app, tmp_path / "nginx", {"/var/www/acme;": f"{tmp_path};"}) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.front.http_port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/.well-known/acme-challenge/token")
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, b"as it should be")


def sockets(app: Gunicorn) -> set[str]:
    """Return the sockets that an app's workers have open."""
    links = set()
    for worker in app.workers():
        for each in Path(f"/proc/{worker}/fd").iterdir():
            with contextlib.suppress(OSError):
                links.add(os.readlink(each))
    return {link for link in links if link.startswith("socket:")}


def test_connections_to_the_app_are_kept(behind: Behind) -> None:
    connected = partial(sockets, behind.app)
    for _ in range(3):  # nginx closes an idle one after two seconds, for which this machine may pause as well
        time.sleep(2.5)  # then those of the tests before are closed
        before = connected()
        assert behind.front.predict(IRIS) == SETOSA
        kept = connected() - before
        for _ in range(5):
            assert behind.front.predict(IRIS) == SETOSA
        later = connected()
        if kept and kept <= later:
            break
    assert len(kept) == 1
    assert kept <= later
    assert len(later - before) <= 2  # nginx runs two processes, each with connections of its own
    behind.front.wait_until(lambda: connected() <= before, 10)  # and idle ones are closed in time for a stop


KEPT = 4  # seconds, KEEPALIVE of the next test


@pytest.mark.long
@pytest.mark.parametrize("by_proxy", [2, 60])
def test_idle_connection_is_used_again_and_one_that_closes_fails_no_request(
    by_proxy: int, iris_file: Path, tmp_path: Path
) -> None:
    """A proxy that keeps connections for less than KEEPALIVE needs no retries for that; this one has them."""
    times = {"keepalive_timeout 2s": f"keepalive_timeout {by_proxy}s"}
    changes = {"proxy_next_upstream error": "proxy_next_upstream off; #"} if by_proxy < KEPT else {}
    bind = ["--bind", f"unix:{tmp_path}/gunicorn.sock"]
    with (
        gunicorn(tmp_path, *bind, trusted_proxies=1, model_path=iris_file, keepalive=KEPT) as app,
        nginx(tmp_path / "nginx", substitute(one_host(tmp_path / "gunicorn.sock"), times), changes) as front,
        contextlib.closing(front.connect()) as caller,  # one connection, so that one nginx process has it
    ):
        no_one, given = sockets(app), {name.replace("_", "-"): value for name, value in CALL.items()}

        def ask(meanwhile: Callable[[], None] = lambda: None) -> set[str]:
            caller.request("POST", "/predict", BODY, given)
            meanwhile()
            answer = caller.getresponse()
            assert (answer.status, answer.read()) == (200, b'{"prediction":[0]}\n')
            return sockets(app) - no_one

        def close_while_nginx_sleeps() -> None:
            front.wait_until(lambda: sockets(app) <= no_one, 20)
            os.killpg(front.process.pid, signal.SIGCONT)

        used = False
        for _ in range(5):  # this machine may pause for as long
            kept = ask()
            time.sleep(1.0)
            used = used or ask() == kept != set()
        assert used
        front.wait_until(lambda: sockets(app) <= no_one, 20)  # closed: by the proxy, or by the app
        assert ask()
        if by_proxy > KEPT:  # the request comes, the app closes, and then nginx sends it there
            os.killpg(front.process.pid, signal.SIGSTOP)
            ask(close_while_nginx_sleeps)
            front.wait_until(lambda: '"upstream_status":"502, 200"' in front.access_log.read_text())


def test_other_protocols_are_spoken_as_configured(behind: Behind) -> None:
    curl = shutil.which("curl")
    if not curl:
        pytest.skip("needs curl: sudo apt install curl")
    url = f"https://localhost:{behind.front.port}/predict"
    trust = ["--cacert", str(behind.front.place / "prediction-server.pem")]
    command = [curl, "-sS", *trust, "-u", f"predict:{PASSWORD}", "-H", "Content-Type: application/json", "-d", BODY]
    shown = ["-w", "%{http_version} %{http_code}", "-o", "/dev/null"]
    for version in ("1.0", "1.1", "2"):
        told = subprocess.run([*command, *shown, f"--http{version}", url], capture_output=True, text=True, check=True)
        assert told.stdout == f"{'1.1' if version == '1.0' else version} 200"


def test_http_is_sent_on_to_https_with_method_and_path(behind: Behind) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", behind.front.http_port, timeout=10)
    with contextlib.closing(connection):
        connection.request("POST", "/predict?a=b", BODY, {"Host": "predictions.example.com"})
        answer = connection.getresponse()
        assert answer.status == 308
        assert answer.headers["Location"] == "https://predictions.example.com/predict?a=b"


def test_http_on_the_port_for_https_is_a_problem(behind: Behind) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", behind.front.port, timeout=10)) as connection:
        connection.request("GET", "/model")
        answer = connection.getresponse()
        assert answer.status == 400
        check_problem(400, answer.headers, answer.read().decode())


# --- limits of one address


def test_address_that_asks_too_often_gets_429_and_others_do_not(behind: Behind, tmp_path: Path) -> None:
    changes = {"rate=500r/s": "rate=1r/m", "burst=1000 nodelay": "burst=5 nodelay"}
    with in_front_of(behind.app, tmp_path, changes) as running:
        answers = [running.call() for _ in range(10)]
        statuses = [status for status, _, _ in answers]
        assert statuses[:6] == [200] * 6
        assert statuses[-1] == 429
        _, headers, body = answers[-1]
        assert "too many requests" in check_problem(429, headers, body.decode())["detail"]
        assert headers["Retry-After"] == "1"
        with contextlib.closing(running.front.connect(source="127.0.0.2")) as connection:
            connection.request("POST", "/predict", BODY, {name.replace("_", "-"): text for name, text in CALL.items()})
            assert connection.getresponse().status == 200


def test_address_with_too_many_requests_at_once_gets_429(behind: Behind, tmp_path: Path) -> None:
    changes = {"limit_conn predictions_open 200;": "limit_conn predictions_open 5;"}
    with in_front_of(behind.app, tmp_path, changes) as running, ExitStack() as open_ones:
        for _ in range(10):  # five of them stay, whoever comes between
            half_sent = socket.create_connection(("127.0.0.1", running.front.plain_port))
            open_ones.enter_context(half_sent).sendall(sized(1000) + BODY)
        running.front.wait_until(lambda: running.call()[0] == 429, 20)
        status, headers, body = running.call()
        assert status == 429
        check_problem(429, headers, body.decode())
        open_ones.close()
        running.front.wait_until(lambda: running.call()[0] == 200, 20)


# --- failures


def test_app_that_is_not_there_is_a_502_to_try_again(tmp_path: Path) -> None:
    with nginx(tmp_path / "nginx", one_host(tmp_path / "nobody.sock")) as front:
        status, headers, body = front.ask("POST", "/predict", BODY, **CALL)
        assert status == 502
        check_problem(502, headers, body.decode())
        assert headers["Retry-After"] == "5"


def test_overloaded_app_is_not_asked_again(tmp_path: Path) -> None:
    asked: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "app.sock"))
        (tmp_path / "app.sock").chmod(0o666)
        listener.listen()

        def answer() -> None:
            with suppress(OSError):  # closed at the end
                while True:
                    with listener.accept()[0] as connection:
                        asked.append(connection.recv(65536))
                        connection.sendall(b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbusy")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with nginx(tmp_path / "nginx", one_host(tmp_path / "app.sock")) as front:
            status, _, body = front.ask("POST", "/predict", BODY, **CALL)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(30)
    assert (status, body) == (503, b"busy")
    assert len(asked) == 1


def test_answer_that_the_model_is_not_there_is_the_apps_own(tmp_path: Path) -> None:
    (tmp_path / "broken.joblib").write_bytes(b"not a model")
    with served(tmp_path, ready=False, model_path=tmp_path / "broken.joblib") as running:
        running.app.wait_until(lambda: "NOT READY" in running.app.log.read_text())
        status, headers, body = running.call()
        assert (status, headers["Retry-After"]) == (502, "5")
        assert "not ready" in check_problem(502, headers, body.decode())["detail"]
        assert running.logged(headers["X-Request-ID"])["upstream_status"] == "502, 502"  # another worker was asked


# A model that for one row makes a file and waits for another, and for a second row does not return; else it is quick,
# so that it runs in the worker's event loop.
HANGING_MODULE = """
import time
from pathlib import Path

class Hanging:
    n_features_in_ = 4

    def predict(self, rows):
        if rows[0][0] == 2:
            Path(__file__).with_name("asked").touch()
            while not Path(__file__).with_name("go").exists():
                time.sleep(0.05)
        while rows[0][0] == 666:
            pass
        return [0 for row in rows]
"""


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Such a model, in a file."""
    (tmp_path / "hanging_module.py").write_text(HANGING_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from hanging_module import Hanging  # type: ignore[import-not-found]  # just written

    joblib.dump(Hanging(), tmp_path / "model.joblib")
    yield tmp_path / "model.joblib"
    sys.modules.pop("hanging_module", None)


def test_request_under_way_in_a_worker_that_dies_is_answered_by_another(tmp_path: Path, hanging: Path) -> None:
    with served(tmp_path, model_path=hanging) as running, ThreadPoolExecutor(1) as pool:
        (worker,) = running.app.workers()
        call = pool.submit(running.front.ask, "POST", "/predict", b'{"data": [[2, 0, 0, 0]]}', **CALL)
        running.app.wait_until((tmp_path / "asked").exists)
        os.kill(worker, signal.SIGKILL)
        (tmp_path / "go").touch()
        status, headers, body = call.result()
        assert (status, body) == (200, b'{"prediction":[0]}\n')
        line = running.logged(headers["X-Request-ID"])
        assert line["upstream_status"] == "502, 200"


def check_all_answered(load: Load, at_least: int = 20) -> None:
    """Check that no caller saw a failure."""
    assert load.errors == []
    assert set(load.statuses) == {200}
    assert len(load.statuses) >= at_least


@pytest.mark.long
@pytest.mark.parametrize("how", ["killed", "reloaded", "counted"])
def test_worker_that_ends_under_load_fails_no_request(how: str, iris_file: Path, tmp_path: Path) -> None:
    by_count = ["--max-requests", "100", "--max-requests-jitter", "50"] if how == "counted" else []
    with served(tmp_path, *by_count, model_path=iris_file, web_concurrency=2) as running:
        app = running.app

        def count() -> int:
            return app.log.read_text().count("serving version")

        with Load(running.front, pause=0.03) as load:
            for _ in range(3):
                if how == "killed":  # nginx keeps the second name's connections for 2 s, perhaps to the next that dies
                    time.sleep(2.5)
                wanted = count() + (2 if how == "reloaded" else 1)
                if how == "killed":
                    os.kill(app.workers()[0], signal.SIGKILL)
                elif how == "reloaded":
                    app.process.send_signal(signal.SIGHUP)
                app.wait_until(lambda wanted=wanted: count() >= wanted)
            time.sleep(0.5)
        check_all_answered(load)


@pytest.mark.long
def test_worker_that_hangs_is_replaced_and_its_requests_are_answered_by_another(
    iris_file: Path, tmp_path: Path
) -> None:
    with served(tmp_path, "--timeout", "3", model_path=iris_file, web_concurrency=2) as running:
        hung = running.app.workers()[0]
        with Load(running.front, callers=6, pause=0.1) as load:
            os.kill(hung, signal.SIGSTOP)
            running.app.wait_until(lambda: hung not in running.app.workers(), 25)  # without --timeout it is 30
            running.app.wait_until(lambda: running.app.log.read_text().count("serving version") >= 3)
        check_all_answered(load)
        assert max(answer.seconds for answer in load.answers) < 25.0


@pytest.mark.long
def test_predict_that_does_not_return_is_ended_and_the_others_serve_on(tmp_path: Path, hanging: Path) -> None:
    with served(tmp_path, "--timeout", "3", model_path=hanging, web_concurrency=2) as running:
        with Load(running.front, callers=6, pause=0.1) as load:
            began = time.monotonic()
            status, headers, body = running.front.ask("POST", "/predict", b'{"data": [[666, 0, 0, 0]]}', **CALL)
            assert (status, time.monotonic() - began < 20.0) == (500, True)  # without --timeout it is 30
            check_problem(500, headers, body.decode())
            running.app.wait_until(lambda: running.app.log.read_text().count("serving version") >= 3)
        check_all_answered(load)
        line = running.logged(headers["X-Request-ID"])
        assert line["upstream_status"] == "500"  # it was not given to the other


def renewed(lineage: Path) -> str:
    """Renew a certificate as certbot does: a file more in the archive, to which a link leads now; return it."""
    made, key = certificate(lineage.parents[1] / "archive")
    lineage.mkdir(parents=True, exist_ok=True)
    for name, path in (("fullchain.pem", made), ("privkey.pem", key)):
        (lineage / "new").symlink_to(path)
        os.replace(lineage / "new", lineage / name)
    return made.read_text()


def run_hook(front: Nginx, lineage: Path) -> None:
    """Run deploy/nginx/certificate.sh as certbot does, on a machine whose files are in the place of this nginx."""
    place = front.place
    paths = {"/etc/ssl/certs/": f"{place}/", "/etc/ssl/private/": f"{place}/"}
    (place / "hook").write_text(substitute((SHIPPED / "certificate.sh").read_text(), paths))
    (place / "bin").mkdir(exist_ok=True)
    for name, script in (
        ("nginx", f'exec {NGINX} -p {place} -c {place}/nginx.conf "$@"'),
        ("systemctl", f'[ "$*" = "reload nginx" ] && kill -HUP {front.process.pid}'),
    ):
        (place / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (place / "bin" / name).chmod(0o755)
    given = {"RENEWED_LINEAGE": str(lineage), "PATH": f"{place}/bin:{os.environ['PATH']}"}
    subprocess.run(["sh", place / "hook"], env=given, check=True)
    assert (place / "prediction-server.key").stat().st_mode & 0o777 == 0o600
    assert (place / "prediction-server.pem").stat().st_mode & 0o777 == 0o644


def test_certificate_is_renewed_under_load_without_a_failed_request(behind: Behind, tmp_path: Path) -> None:
    lineage = tmp_path / "letsencrypt/live/predictions.example.com"

    def shown(front: Nginx) -> str:
        return ssl.get_server_certificate(("127.0.0.1", front.port))

    with in_front_of(behind.app, tmp_path / "nginx") as running:
        front = running.front
        trusting_both = front.place / "both.pem"
        made = renewed(lineage)
        trusting_both.write_text((front.place / "prediction-server.pem").read_text() + made)
        context = ssl.create_default_context(cafile=str(trusting_both))
        front.connect = lambda timeout=30.0: http.client.HTTPSConnection(  # type: ignore[method-assign]
            "127.0.0.1", front.port, timeout=timeout, context=context
        )
        with Load(front) as load:
            front.wait_until(lambda: len(load.statuses) > 10)
            run_hook(front, lineage)
            front.wait_until(lambda: shown(front) == made, 30)
            before = len(load.statuses)
            front.wait_until(lambda: len(load.statuses) > before + 20)
        check_all_answered(load)


@needs_logrotate
def test_logs_are_rotated_under_load_without_a_lost_line(behind: Behind, tmp_path: Path) -> None:
    with in_front_of(behind.app, tmp_path / "nginx") as running:
        front, place = running.front, running.front.place
        debians = substitute(
            Path("/etc/logrotate.d/nginx").read_text(),
            {"/var/log/nginx/": f"{place}/", "invoke-rc.d nginx rotate": f"kill -USR1 {front.process.pid}"},
        )
        (place / "rotate").write_text(debians)
        with Load(front) as load:
            for _ in range(2):
                front.wait_until(lambda: front.access_log.exists() and front.access_log.stat().st_size > 3000)
                command = [LOGROTATE, "--force", "--state", place / "rotated", place / "rotate"]
                subprocess.run(command, check=True, capture_output=True)
            front.wait_until(lambda: front.access_log.stat().st_size > 3000)
        check_all_answered(load)
        log = front.access_log

        def lines() -> list[str]:
            oldest = gzip.decompress(log.with_name(f"{log.name}.2.gz").read_bytes())
            texts = oldest + log.with_name(f"{log.name}.1").read_bytes() + log.read_bytes()
            return [json.loads(line)["request_id"] for line in texts.splitlines()]

        front.wait_until(lambda: sorted(lines()) == sorted(load.answered), 30)


@needs_logrotate
def test_logs_are_rotated_by_size_as_well_once_it_is_set_up(tmp_path: Path) -> None:
    """The page's commands on a copy of Debian's file; systemd takes the drop-in."""
    (block,) = runbook.commands(__file__, "operations.md", "Logs")
    log, units = tmp_path / "prediction-server.log", tmp_path / "system"
    paths = {"/var/log/nginx/": f"{tmp_path}/", "invoke-rc.d nginx rotate": "true"}
    (tmp_path / "rotate").write_text(substitute(Path("/etc/logrotate.d/nginx").read_text(), paths))
    typed = substitute(block, {"/etc/logrotate.d/nginx": f"{tmp_path}/rotate", "/etc/systemd/system": str(units)})
    stand_ins = 'sudo() { "$@"; }; systemctl() { [ "$1" = daemon-reload ]; }\n'
    subprocess.run(["bash", "-euc", stand_ins + typed], check=True)
    assert "\tdaily\n\tmaxsize 500M\n" in (tmp_path / "rotate").read_text()
    assert (units / "logrotate.timer.d/hourly.conf").read_text() == "[Timer]\nOnCalendar=hourly\n"
    shutil.copy("/lib/systemd/system/logrotate.timer", units)
    checked = ["systemd-analyze", "verify", units / "logrotate.timer"]
    told = subprocess.run(checked, capture_output=True, text=True, env=os.environ | {"SYSTEMD_UNIT_PATH": f"{units}:"})
    assert (told.returncode, told.stderr) == (0, "")
    for size, rotated in ((1000, False), (501 * 2**20, True)):  # it has been rotated today
        log.touch()
        os.truncate(log, size)
        (tmp_path / "state").write_text(f'logrotate state -- version 2\n"{log}" {time.strftime("%Y-%-m-%-d")}-0:0:0\n')
        command = [str(LOGROTATE), "--state", str(tmp_path / "state"), str(tmp_path / "rotate")]
        subprocess.run(command, check=True, capture_output=True)
        assert log.with_name(f"{log.name}.1").exists() is rotated


@pytest.mark.parametrize("upstream", ["upstream-one-host.conf", "upstream-several-hosts.conf"])
def test_files_as_they_are_shipped_are_right(upstream: str, tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    for name in ("prediction-server.conf", upstream):
        shutil.copy(SHIPPED / name, tmp_path / "conf.d")
    made, key = certificate(tmp_path)
    shipped = tmp_path / "conf.d/prediction-server.conf"
    # Only the paths of the certificate, its key and the log, which need not be there or are another's.
    text = substitute(
        shipped.read_text(),
        {
            "/etc/ssl/certs/prediction-server.pem": str(made),
            "/etc/ssl/private/prediction-server.key": str(key),
            "/var/log/nginx": str(tmp_path),
        },
    )
    shipped.write_text(text)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; events {{}} http {{ access_log off; include {tmp_path}/conf.d/*.conf; }}"
    )
    command = [str(NGINX), "-t", "-e", "stderr", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    # From 1.25.1 on, nginx would have HTTP/2 in a directive of its own.
    complaints = [line for line in told.stderr.splitlines() if "[" in line and '"listen ... http2"' not in line]
    assert complaints == []
