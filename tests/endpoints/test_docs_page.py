"""The page of the API: for whom it is, what it shows, and that a browser runs nothing else in it."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import WORKER_CLASSES, Client, basic, gunicorn
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from server import create_app
from settings import Settings

EVIL = "<script>alert(1)</script>\"'&"
VERTEX = ("+endpoints.vertex",)


def text_of(page: str) -> str:
    """Return what a page shows, its tags and its script left out."""
    return html.unescape(re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL))


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
def test_only_the_role_predict_may_look(serve: Any, iris_file: Path, path: str) -> None:
    client: Client = serve(iris_file)
    assert client.get(path).status_code == 200
    assert client.http.get(path, headers={"Authorization": basic("admin")}).status_code == 403
    answer = client.http.get(path)
    assert (answer.status_code, answer.headers["WWW-Authenticate"][:5]) == (401, "Basic")
    assert client.http.get("/").headers["Location"] == "docs"
    assert client.http.get("/", follow_redirects=True, headers=client.headers).request.path == "/docs"


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
def test_while_no_model_is_loaded_both_are_503(tmp_path: Path, path: str) -> None:
    client = create_app(Settings(auth="off", journal_dir=tmp_path, model_path=tmp_path / "none.joblib")).test_client()
    answer = client.get(path)
    assert (answer.status_code, answer.content_type) == (503, "application/problem+json")
    assert answer.headers["Retry-After"]


def test_page_shows_each_route_with_a_curl_for_whoever_looks_and_where(serve: Any, iris_file: Path) -> None:
    client: Client = serve(iris_file)
    page = client.http.get("/docs", headers=client.headers, base_url="https://models.example:8443").text
    shown = text_of(page)
    for path in client.get("/openapi.json").json["paths"]:
        assert re.search(rf"curl .*https://models\.example:8443{path}\s", shown), path
    assert 'curl -u predict -H \'Content-Type: application/json\' -d \'{"data":[{"sepal length (cm)":0.0,' in shown
    assert "curl https://models.example:8443/readyz " in shown
    assert page.count("<form ") == page.count("<textarea ") == page.count("<button>Send</button>") == 2
    assert "-u " not in text_of(serve(iris_file, auth="off").http.get("/docs").text)


def test_page_shows_which_categories_are_refused_and_rows_that_are_answered(serve: Any) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"closed": list("abcdef"), "open": list("uvwxyz")})
    encoders = (OneHotEncoder(), ["closed"]), (OneHotEncoder(handle_unknown="ignore"), ["open"])
    client: Client = serve(
        make_pipeline(make_column_transformer(*encoders), LogisticRegression()).fit(frame, [0, 1] * 3)
    )
    shown = " ".join(text_of(client.get("/docs").text).split())
    assert "closed a string, one of a , b , c , d , e , …" in shown
    assert "open a string, such as u , v , w , x , y , …" in shown
    (form,) = re.findall(r"Rows, as (.*?) or, by the names", shown)
    assert len(client.predict(json.loads(form))["prediction"]) == 1


def test_paths_that_a_browser_can_open_are_links(serve: Any, iris_file: Path) -> None:
    client: Client = serve(iris_file)
    links = re.findall(r'<code><a href="(.*?)">', client.get("/docs").text)
    assert {"model", "monitor", "openapi.json"} <= set(links)
    assert "predict" not in links


def test_markup_in_names_is_shown_and_not_run(serve: Any) -> None:
    pandas = pytest.importorskip("pandas")
    model = LogisticRegression().fit(pandas.DataFrame({EVIL: [0.0, 1.0], "b": [1.0, 0.0]}), [0, 1])
    client: Client = serve(model)
    page = client.http.get("/docs", headers=client.headers, base_url="http://a';id;'<b>:80").text
    assert "<script>alert" not in page
    assert text_of(page).count(EVIL) == 1  # in the table; in JSON the quote has a backslash
    assert text_of(page).count(EVIL.replace('"', '\\"')) == 1
    assert "<b>:80" not in page


def test_wide_model_has_a_page_that_can_be_read(serve: Any) -> None:
    pandas = pytest.importorskip("pandas")
    names = [f"column {number}" for number in range(400)]
    client: Client = serve(
        LogisticRegression().fit(pandas.DataFrame([[0.0] * 400, [1.0] * 400], columns=names), [0, 1])
    )
    shown = text_of(client.get("/docs").text)
    assert "-d @body.json http://localhost/predict" in shown
    assert "And 300 more" in shown
    assert shown.count("column 399") == 1  # in the body


def test_browser_runs_nothing_but_the_script_of_the_page(serve: Any, iris_file: Path) -> None:
    client: Client = serve(iris_file)
    answers = [client.get("/docs") for _ in range(2)]
    nonces = [re.findall(r'<(?:script|style) nonce="([^"]{16,})">', answer.text) for answer in answers]
    assert [len(set(found)) for found in nonces] == [1, 1]
    assert nonces[0][0] != nonces[1][0]
    assert len(re.findall("<(?:script|style)", answers[0].text)) == len(nonces[0]) == 2
    assert answers[0].headers["Content-Security-Policy"] == (
        f"default-src 'none'; script-src 'nonce-{nonces[0][0]}'; style-src 'nonce-{nonces[0][0]}'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert not re.search(r"\s(on\w+|style|src)=", answers[0].text)
    for answer in (answers[0], client.get("/openapi.json")):
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("extensions", [VERTEX, ("endpoints.docs", *VERTEX), (*VERTEX, "+endpoints.docs", "telemetry")])
def test_platform_that_wants_a_path_of_the_page_has_it(serve: Any, iris_file: Path, extensions: Any) -> None:
    settings = {"aip_health_route": "/", "aip_predict_route": "/docs", "extensions": extensions}
    client: Client = serve(iris_file, **settings)
    assert client.http.get("/").status_code == 200
    assert client.post({"instances": [[5.1, 3.5, 1.4, 0.2]]}, "/docs").json == {"predictions": [0]}
    assert client.get("/docs").status_code == 200
    described = client.get("/openapi.json").json["paths"]
    assert described["/"].keys() == {"get"}
    assert described["/docs"].keys() == {"post"}


def test_eas_answers_at_the_root_beside_the_way_to_the_page(serve: Any, iris_file: Path) -> None:
    client: Client = serve(iris_file, extensions=("+endpoints.eas",))
    assert client.post([[5.1, 3.5, 1.4, 0.2]], "/").json == [0]
    assert client.http.get("/").status_code == 302
    assert client.http.put("/").status_code == 405


def test_request_meets_nothing_of_it_while_nobody_looks(serve: Any, iris_file: Path) -> None:
    def hooks(client: Client) -> Any:
        service, app = client.service, client.app
        lists = (service.observers, service.on_answer, service.on_error, service.on_start, service.every_second)
        of_app = (app.before_request_funcs, app.after_request_funcs, app.teardown_request_funcs)
        return [len(each) for each in lists], [len(each.get(None, ())) for each in of_app], app.wsgi_app

    beside, without = serve(iris_file), serve(iris_file, extensions=("-endpoints.docs",))
    assert hooks(beside)[:2] == hooks(without)[:2]
    assert without.get("/docs").status_code == without.get("/").status_code == 404


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
@pytest.mark.parametrize("extensions", ["", pytest.param("-speedups", marks=pytest.mark.long)])
def test_page_is_served_by_a_real_server(tmp_path: Path, iris_file: Path, worker_class: str, extensions: str) -> None:
    settings = {"model_path": iris_file, "worker_class": worker_class, "extensions": extensions}
    with gunicorn(tmp_path, **settings) as server:
        status, headers, _ = server.ask("GET", "/")
        assert (status, headers["Location"]) == (302, "docs")
        status, headers, page = server.ask("GET", "/docs", Authorization=basic("predict"))
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert f"http://127.0.0.1:{server.port}/predict".encode() in page
        assert server.ask("HEAD", "/docs", Authorization=basic("predict"))[2] == b""
        assert server.ask("GET", "/openapi.json")[0] == 401
