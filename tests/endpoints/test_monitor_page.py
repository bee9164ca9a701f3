"""GET /monitor: what is counted is shown, exactly and as it was written, to those who may see it."""

import html
import json
import logging
import re
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import PASSWORD, Client, basic, gunicorn

from endpoints.charts import chart
from endpoints.error_rate import mean_interval, wilson
from endpoints.monitor_figures import STEPS, Span, Traffic, as_percent
from endpoints.monitor_page import RANGES, Host, render
from model.versions.store import Store
from telemetry.rollups import Sums, bucket_of, day_of
from worker_slot import WorkerSlot

ROW = [5.1, 3.5, 1.4, 0.2]
EVIL = "<script>alert('1')</script>&amp;\"<b>"


def write(journal_dir: Path, at: float, version: str, variant: str, span: int = 60, **sums: Any) -> None:
    """Write a line of a roll-up, as a worker does."""
    encoded = Sums(**{name: Counter(value) if type(value) is dict else value for name, value in sums.items()}).encode()
    start = int(at // span * span)
    line = {"time": start, "span": span, "version": version, "variant": variant} | encoded
    append(journal_dir, start, line)


def append(journal_dir: Path, at: float, line: dict[str, Any]) -> None:
    """Append a line to the file of a day."""
    (journal_dir / "rollup").mkdir(parents=True, exist_ok=True)
    with (journal_dir / "rollup" / f"{day_of(at)}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def traffic(journal_dir: Path, now: float) -> None:
    """Write some minutes of two workers, with a canary, errors, feedback, and callers without a password."""
    times = {bucket_of(0.010): 98, bucket_of(0.200): 2}
    feedback = {"rows": 100.0, "wrong": 5.0, "entries": 100.0}
    for minute in range(5):
        for _worker in range(2):
            at = now - 120 - 60 * minute
            errors = {"client 422 Unprocessable Entity": 3, "model 500 Internal Server Error": 1}
            stable = {"requests": 104, "success": 100, "errors": errors, "users": {"alice": 60, "bob": 44}}
            write(journal_dir, at, "7", "stable", **stable, times=times, feedback=feedback)
            write(
                journal_dir, at, "8", "canary", requests=10, success=10, users={"bob": 10}, times={bucket_of(0.5): 10}
            )
            write(journal_dir, at, "", "", requests=2, unauthenticated=2, errors={"auth 401 Unauthorized": 2})


def near(seconds: float) -> float:
    """Return what a response time is shown as: it is known within 1 %."""
    found = Sums(times=Counter({bucket_of(seconds): 1})).quantile(0.5)
    assert found == pytest.approx(seconds, rel=0.01)
    return found or 0.0


class Reader(HTMLParser):
    """Reads a page: its elements with their attributes, its text, and the cells of its tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.tables = "", []
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._inside.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._inside:
            self.text += data
        if {"td", "th"} & set(self._inside):
            self.tables[-1][-1][-1] += data

    def tags(self, *names: str) -> list[dict[str, str | None]]:
        """Return the attributes of the elements of these names."""
        return [attributes for tag, attributes in self.elements if tag in names]

    def table(self, first: str) -> list[list[str]]:
        """Return the rows of the table whose first heading this is."""
        return next(table for table in self.tables if table[0][0] == first)


@pytest.fixture
def monitor(serve: Any, iris_file: Path) -> Client:
    """A client of the iris model who may see the page; nothing has been counted yet."""
    client: Client = serve(iris_file)
    client.headers = {"Authorization": basic("monitor")}
    return client


def page(client: Client, query: str = "") -> Reader:
    """Get the page."""
    answer = client.get(f"/monitor{query}")
    assert answer.status_code == 200, answer.text
    return Reader(answer.text)


def shown(client: Client, query: str = "?format=json") -> Any:
    """Get the figures."""
    answer = client.get(f"/monitor{query}")
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    return answer.json


# --- who may see it, and how it is answered


@pytest.mark.parametrize("user", ["predict", "admin", "metrics", "feedback", "nobody"])
def test_only_the_role_monitor_may_see_it(user: str, monitor: Client) -> None:
    assert monitor.http.get("/monitor").status_code == 401
    answer = monitor.http.get("/monitor", headers={"Authorization": basic(user)})
    assert (answer.status_code, answer.content_type) == (403, "application/problem+json")
    assert monitor.http.head("/monitor", headers=monitor.headers).status_code == 200
    assert monitor.http.post("/monitor", headers=monitor.headers).status_code == 405


def hash_of_style(page: str) -> str:
    """Return the source by which a policy allows the only style of a page."""
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    return f"'sha256-{b64encode(sha256(style.encode()).digest()).decode()}'"


def test_page_may_load_and_run_nothing_and_is_not_kept(monitor: Client) -> None:
    answer = monitor.get("/monitor")
    policy = dict(each.split(" ", 1) for each in answer.headers["Content-Security-Policy"].split("; "))
    assert policy.pop("style-src") == hash_of_style(answer.text)
    none = ("default-src", "base-uri", "form-action", "frame-ancestors")
    assert policy == dict.fromkeys(none, "'none'") | {"img-src": "data:"}
    assert [answer.headers[name] for name in ("Cache-Control", "X-Content-Type-Options", "Refresh")] == [
        *("no-store", "nosniff", "30")
    ]
    read = Reader(answer.text)
    assert not read.tags("script", "iframe", "img", "form", "object", "base")
    names = {name for _, attributes in read.elements for name in attributes}
    assert not [name for name in names if name in ("style", "http-equiv") or name.startswith("on")]
    targets = [target for _, each in read.elements for name, target in each.items() if name in ("href", "src")]
    assert all(target and target.startswith(("?", "data:")) for target in targets)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("range=2h", "range is '2h'; expected 1h, 24h, 7d, 30d"),
        ("range=", "range is ''"),
        ("range=1H", "range is '1H'"),
        ("range=%3Cb%3E%00", "range is '<b>\\x00'"),
        (f"range={'9' * 5000}", f"range is '{'9' * 80}'; expected"),
        ("range=%FF", "range is "),
        ("format=xml", "format is 'xml'; expected html, json"),
        ("range=24h&format=", "format is ''"),
    ],
)
def test_unknown_range_or_format_is_a_problem(query: str, expected: str, monitor: Client) -> None:
    answer = monitor.get(f"/monitor?{query}")
    assert (answer.status_code, answer.content_type) == (422, "application/problem+json")
    assert expected in answer.json["detail"]


def test_ranges_are_links(monitor: Client) -> None:
    for name in RANGES:
        read = Reader(monitor.get(f"/monitor?range={name}").text)
        links = [each for each in read.tags("a") if "format" not in str(each["href"])]
        assert [each["href"] for each in links] == [f"?range={each}" for each in ("1h", "24h", "7d", "30d")]
        assert [each["href"] for each in links if each.get("aria-current") == "page"] == [f"?range={name}"]
    assert re.findall(r">(\w+)</a>", monitor.get("/monitor").text)[:4] == ["1h", "24h", "7d", "30d"]


# --- what is shown


def test_counts_are_exact_and_summed_over_workers(monitor: Client) -> None:
    traffic(monitor.journal_dir, time.time())
    found = shown(monitor)
    assert found["range"] == "1h"
    assert found["versions"] == [
        {"version": "7", "variant": "stable", "requests": 1040, "success": 1000, "errors": 40},
        {"version": "8", "variant": "canary", "requests": 100, "success": 100, "errors": 0},
        {"version": "", "variant": "", "requests": 20, "success": 0, "errors": 20},
    ]
    assert (found["requests"], found["success"], found["errors"]) == (1160, 1100, 60)
    outcomes = found["series"]["requests"]
    expected = {"success": 1100, "client": 30, "auth": 20, "model": 10, "overload": 0, "internal": 0, "other": 0}
    assert {name: sum(counts) for name, counts in outcomes.items()} == expected
    assert sum(found["series"]["canary"]["requests"]) == 100
    assert {len(each) for each in (found["series"]["time"], *outcomes.values())} == {60}


def test_page_shows_what_was_counted(monitor: Client) -> None:
    traffic(monitor.journal_dir, time.time())
    read, (low, high) = page(monitor), wilson(50, 1000)
    p50, p99, slow = (f"{1000 * seconds:.2f} ms" for seconds in map(near, (0.010, 0.200, 0.5)))
    error = f"5.00 % {100 * low:.2f} to {100 * high:.2f} %, n\xa0=\xa01,000"
    assert read.table("Version")[1:] == [
        ["stable 7", "1,040", "96.15 %", p50, p99, error, ""],
        ["canary 8", "100", "100.00 %", slow, slow, "–", ""],
        ["no version chosen", "20", "0.00 %", "–", "–", "–", ""],
    ]
    assert read.table("User")[1:] == [["alice", "600", "51.72 %"], ["bob", "540", "46.55 %"]]
    assert [row[:2] for row in read.table("Error")[1:]] == [
        ["client 422 Unprocessable Entity", "30"],
        ["auth 401 Unauthorized", "20"],
        ["model 500 Internal Server Error", "10"],
    ]
    assert "1,160 requests" in read.text
    assert "94.83 %" in read.text


def test_every_chart_is_a_table_too(monitor: Client) -> None:
    traffic(monitor.journal_dir, time.time())
    read = page(monitor)
    tables = [table for table in read.tables if table[0][0] == "UTC" and table[0][1] != "Event"]
    assert [table[0][1:] for table in tables] == [
        ["success", "client", "auth", "model"],
        ["p50", "p99"],
        ["client", "auth", "model"],
        ["stable", "canary"],
        ["stable", "canary"],
        ["stable", "canary"],
    ]
    assert len(read.tags("figure")) == len(tables)
    assert {len(table) for table in tables} == {61}
    columns = [[set(column) for column in zip(*each[1:], strict=True)] for each in tables]
    rates, times, errors, shares, slow, wrong = columns
    assert rates[1] - {"0.00"} == {"–", "3.67"}  # 220 requests a minute; before the first, nothing is known
    assert times[1:] == [{"–", f"{1000 * near(0.010):.1f}"}, {"–", f"{1000 * near(0.5):.0f}"}]
    assert slow[1:] == [{"–", f"{1000 * near(seconds):.0f}"} for seconds in (0.200, 0.5)]
    assert errors[1] == {"–", "2.59"}
    assert shares[1:] == [{"–", "3.85"}, {"–", "0.00"}]
    assert (wrong[1] - {"–"}, wrong[2]) == ({"5.00"}, {"–"})


def test_regression_is_shown_by_its_mean_absolute_error(monitor: Client) -> None:
    sums = {"rows": 100.0, "abs_error": 50.0, "sq_error": 40.0, "signed_error": 5.0, "regressions": 100.0}
    write(monitor.journal_dir, time.time() - 100, "7", "stable", requests=1, success=1, feedback=sums)
    read = page(monitor)
    low, high = mean_interval(50, 40, 100)
    assert read.table("Version")[1][5] == f"0.5 {low:.4g} to {high:.4g}, n\xa0=\xa0100"
    assert "Mean absolute error of the rows whose truth came, within 12 min" in " ".join(read.text.split())


def test_html_in_names_notes_and_errors_is_shown_and_not_run(tmp_path: Path, iris_file: Path) -> None:
    journal, store = tmp_path / "journal", tmp_path / "models"
    store.mkdir()
    with Store(store).new_version(iris_file, "7") as manifest:
        manifest.about.update({"sample": [ROW], "predictions": [0], "note": EVIL})
    names = {"users": {EVIL: 2}, "errors": {f"client 422 {EVIL}": 1, f"{EVIL}": 1}}
    write(journal, time.time() - 100, "7", "stable", requests=4, success=2, **names)
    write(journal, time.time() - 100, EVIL, "canary", requests=1, success=1)
    append(journal, time.time(), {"time": time.time(), "event": EVIL, "model_version": EVIL, "reason": EVIL, EVIL: 1})
    served = {"ready": True, "error": None, "routing": None, "stable": {"version": EVIL, "example": {"data": [EVIL]}}}
    for is_file in (False, True):
        read = Reader(
            render(Host(journal, store, served | {"canary": None}), Span.last("1h", 3600, time.time()), is_file)
        )
        assert not read.tags("script", "b")
        assert {cell for row in read.table("Version") for cell in row} >= {f"canary {EVIL}", EVIL}
        assert read.table("User")[1][0] == EVIL
        assert {row[0] for row in read.table("Error")[1:]} == {EVIL, f"client 422 {EVIL}"}
        assert read.tables[-1][1][1:] == [EVIL, EVIL, f"reason: {EVIL}; {EVIL}: 1"]
        assert f"Version {EVIL} is served." in read.text


def test_events_of_the_time_are_listed_the_newest_first(monitor: Client) -> None:
    now = time.time()
    for back in (10, 4000, 20):
        event = {"time": now - back, "event": "rollback", "model_version": "8", "reason": f"of {back}", "pid": 1}
        append(monitor.journal_dir, now - back, event)
    assert [row[1:] for row in page(monitor).tables[-1][1:]] == [
        ["rollback", "8", "reason: of 10"],
        ["rollback", "8", "reason: of 20"],
    ]
    assert len(page(monitor, "?range=24h").tables[-1]) == 4


# --- the state in words


def state(client: Client) -> list[tuple[str, str]]:
    """Return the sentences with their levels; of a service whose page was not asked for yet."""
    found = re.findall(r'<p class="(ok|warning|bad)">(.*)</p>', client.get("/monitor").text)
    return [(level, html.unescape(words)) for level, words in found]


def test_state_is_in_words(monitor: Client) -> None:
    version = monitor.service.serving.routes.stable.version
    *others, (level, last) = state(monitor)
    expected = [f"Version {version} is served.", "1 of 1 workers serve it.", "Shipping to SLS is off."]
    assert others == [("ok", words) for words in expected]
    assert level == "ok"
    assert re.fullmatch(r"The last start or reload was \d+ (s|min) ago\.", last)


def test_worker_that_serves_something_else_or_has_an_error_is_missed(monitor: Client) -> None:
    other = WorkerSlot(monitor.journal_dir / "workers")
    serves = {"stable": monitor.service.serving.routes.stable.version, "canary": None, "error": "/secret/path"}
    other.publish(serves)
    assert ("warning", "1 of 2 workers serve it.") in state(monitor)
    assert "/secret/path" not in monitor.get("/monitor").text


def test_model_that_does_not_load_is_bad_news(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.joblib").write_bytes(b"no model")
    client = serve(tmp_path / "broken.joblib")
    client.headers = {"Authorization": basic("monitor")}
    said = state(client)
    assert said[0] == ("bad", "No model is served; the server's log says why.")
    assert 'class="verdict bad"' in client.get("/monitor").text
    assert "joblib" not in client.get("/monitor").text


@pytest.mark.parametrize(
    ("offset", "age", "error", "expected"),
    [
        (1000, 5, None, ("ok", "No record waits for SLS.")),
        (0, 30, None, ("ok", "1.0 kB of records wait for SLS, the oldest for 30 s.")),
        (0, 7300, None, ("warning", "1.0 kB of records wait for SLS, the oldest for 2 h.")),
        (1000, 5, {"message": "denied & <b>"}, ("warning", "SLS's last error: denied & <b>")),
    ],
)
def test_records_that_wait_for_sls(offset: int, age: float, error: Any, expected: Any, monitor: Client) -> None:
    line = json.dumps({"time": time.time() - age, "fill": ""})
    segment = monitor.journal_dir / "0-1.jsonl"
    segment.write_text(line.replace('""', f'"{"x" * (999 - len(line))}"') + "\n")
    progress = {"offsets": {segment.name: offset}, "shipped": 1, "refused": 0, "dropped": 0, "error": error}
    (monitor.journal_dir / "ship.json").write_text(json.dumps(progress))
    assert expected in state(monitor)


def test_curl_of_an_empty_page_can_be_pasted(monitor: Client) -> None:
    answer = monitor.http.get("/monitor", headers=monitor.headers | {"Host": "'$(id)<b>.example:1"})
    assert answer.status_code in (200, 400)  # as werkzeug takes the host
    read = page(monitor)
    shown = read.text.partition("curl ")[2].partition("\n")[0]
    example = monitor.service.serving.describe()["stable"]["example"]
    assert (
        shown
        == f"-u NAME -H 'Content-Type: application/json' -d '{json.dumps(example, separators=(',', ':'))}' "
        + ("http://localhost/predict")
    )
    write(monitor.journal_dir, time.time(), "7", "stable", requests=1, success=1)
    assert "curl" not in page(monitor, "?range=24h").text


@pytest.mark.long
def test_requests_to_all_workers_are_shown_within_a_minute(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, web_concurrency=2) as server:
        _, _, body = server.ask("GET", "/monitor", Authorization=basic("monitor"))
        command = html.unescape(re.findall("<code>(.*)</code>", body.decode())[0])
        pasted = command.replace("-u NAME", f"-u 'predict:{PASSWORD}'")
        done = subprocess.run(["bash", "-c", f"{pasted} -sS"], capture_output=True, text=True)
        assert json.loads(done.stdout)["prediction"], done.stderr
        assert {server.predict([ROW])[0] for _ in range(30)} == {200}
        assert {server.predict([ROW[:3]])[0] for _ in range(5)} == {422}
        assert server.predict([ROW], "nobody")[0] == 403
        sent, found = time.monotonic(), {}
        while found.get("requests") != 37:
            assert time.monotonic() - sent < 60, found
            time.sleep(0.5)
            status, _, body = server.ask("GET", "/monitor?format=json", Authorization=basic("monitor"))
            assert status == 200
            found = json.loads(body)
        outcomes = {name: sum(counts) for name, counts in found["series"]["requests"].items()}
        assert outcomes | {"success": 31, "client": 5, "auth": 1} == outcomes
        assert sum(outcomes.values()) == sum(each["requests"] for each in found["versions"]) == 37


# --- where it runs, and what it costs


def test_ten_who_ask_at_once_cost_one_page(monitor: Client) -> None:
    made: list[Any] = []

    def run_in_thread(function: Any, *arguments: Any) -> Any:
        made.append(function)
        time.sleep(0.2)  # long enough for the others to ask
        return function(*arguments)

    monitor.get("/monitor?range=7d")  # the password is checked once
    monitor.service.thread_runner = run_in_thread
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(monitor.get("/monitor").status_code)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 10
    assert len(made) == 1


def test_new_requests_are_shown_a_moment_later(monitor: Client) -> None:
    assert shown(monitor)["requests"] == 0
    write(monitor.journal_dir, time.time() - 70, "7", "stable", requests=3, success=3)
    deadline = time.monotonic() + 60
    while shown(monitor)["requests"] != 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize("extensions", [("endpoints.monitor_page",), ("-telemetry",)])
def test_without_telemetry_there_is_no_page(
    extensions: tuple[str, ...], serve: Any, iris_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = serve(iris_file, extensions=extensions)
    assert client.http.get("/monitor", headers={"Authorization": basic("monitor")}).status_code == 404
    assert "without GET /monitor" in caplog.text
    assert client.predict([ROW]) == {"prediction": [0]}


def test_telemetry_that_is_not_installed_leaves_the_page_out(
    serve: Any, iris_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    for name in [name for name in sys.modules if name.partition(".")[0] == "telemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "telemetry", None)
    client = serve(iris_file)
    assert client.http.get("/monitor", headers={"Authorization": basic("monitor")}).status_code == 404
    assert "without GET /monitor: telemetry" in caplog.text


# --- the page as a file, and its parts


def test_page_can_be_kept_as_a_file(tmp_path: Path) -> None:
    now = time.time()
    traffic(tmp_path, now)
    text = render(Host(tmp_path), Span.last("15m", 900, now), is_file=True)
    read = Reader(text)
    policy = next(str(each["content"]) for each in read.tags("meta") if "http-equiv" in each)
    assert f"style-src {hash_of_style(text)};" in policy
    assert not read.tags("a")  # a file has no other ranges
    assert read.table("Version")[1][:2] == ["stable 7", "1,040"]
    assert "is served" not in read.text


@pytest.mark.parametrize(
    "seconds", [1, 90, 900, 3600, 7200, 10_000, 86_400, 7 * 86_400, 30 * 86_400, 1e9, float("inf")]
)
def test_any_time_has_a_few_hundred_steps_at_most(seconds: float, tmp_path: Path) -> None:
    span = Span.last("x", seconds, 1_764_403_199.5)
    assert 2 <= len(span.starts) <= 336
    assert all(start % span.step == 0 for start in span.starts)
    assert span.starts[-1] <= span.until < span.starts[-1] + span.step
    assert span.step in [step for _, step in STEPS]
    assert Traffic.read(tmp_path, span).charts()


def test_rate_of_a_young_server_is_the_same_in_every_range(tmp_path: Path) -> None:
    until = 1_764_403_199.5
    for back in (1020, 300):
        write(tmp_path, until - back, "7", "stable", requests=500, success=500)
    first = (until - 1020) // 60 * 60
    for name, seconds in RANGES.items():
        assert Traffic.read(tmp_path, Span.last(name, seconds, until)).rate == pytest.approx(1000 / (until - first))


def test_chart_has_gaps_dots_and_round_ends() -> None:
    values = [0.0, 3.0, None, 1.5, None, None, 2.9]
    found = chart("T", "u", list("abcdefg"), {"line": values}, ["a", "g"], {"line": "9"})
    assert found.y_labels == ["4.0", "2.0", "0.0"]
    assert found.lines[0].pieces == ["0.0,100.00 166.7,25.00"]
    assert found.lines[0].dots == ["500.0,62.50", "1000.0,27.50"]
    assert found.rows[0] == ("g", ["2.90"])
    assert found.rows[2] == ("e", ["–"])


@pytest.mark.parametrize(
    ("highest", "top"),
    [
        (0, "1.0"),
        (0.0007, "0.00080"),
        (0.95, "1.0"),
        (1, "1.0"),
        (1.01, "2.0"),
        (9, "10"),
        (61, "80"),
        (12_000, "20,000"),
    ],
)
def test_axis_ends_at_a_round_number(highest: float, top: str) -> None:
    assert chart("T", "u", ["a"], {"line": [highest]}, [], {}).y_labels[0] == top


def test_a_share_is_all_or_nothing_only_if_it_is() -> None:
    assert [as_percent(part, 10**6) for part in (0, 1, 999_999, 10**6)] == ["0.00 %", "0.01 %", "99.99 %", "100.00 %"]
    assert as_percent(0, 0) == "–"
