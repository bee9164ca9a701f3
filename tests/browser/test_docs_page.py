"""The page of the API in a browser: it runs the example, shows what is wrong with a row, and is for everybody."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import pytest
from conftest import PASSWORD, Gunicorn, basic, gunicorn
from playwright.sync_api import Browser, Page, expect
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from browser.conftest import SCREENS, visit

EVIL = "<img src=x onerror=alert(1)>'\"&"
FRAME = pd.DataFrame({"age": [22.0, 38, 26, 54], "city": ["Oslo", "Bergen", "Ås", "Oslo"], EVIL: [1.0, 2, 3, 4]})


@pytest.fixture(scope="module")
def model() -> Any:
    """A classifier of a data frame, one of whose names is HTML."""
    columns = make_column_transformer((OneHotEncoder(), ["city"]), remainder="passthrough")
    return make_pipeline(columns, LogisticRegression()).fit(FRAME, ["yes", "no", "no", "yes"])


@pytest.fixture(scope="module")
def server(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """A server of that model, with every protocol."""
    place = tmp_path_factory.mktemp("docs")
    joblib.dump(model, place / "model.joblib")
    names = ("open_inference", "sagemaker", "vertex", "function_compute", "eas")
    extensions = ",".join(f"+endpoints.{name}" for name in names)
    with gunicorn(place, model_path=place / "model.joblib", extensions=extensions) as running:
        yield running


def send(page: Page, body: str = "") -> tuple[str, dict[str, str], str]:
    """Send the first form, with another body if one is given; return what is shown: status, headers and body."""
    section = page.locator("section", has=page.locator("form")).first
    if body:
        section.get_by_label("Body, as JSON").fill(body)
    section.get_by_role("button", name="Send").click()
    expect(section.locator("output b")).not_to_be_empty()  # that of the last answer is gone with the click
    headers = dict(line.split(": ") for line in section.locator("output small").inner_text().splitlines())
    shown = section.locator("output").inner_text()
    status, rest = shown.split("\n", 1)
    return status, headers, "\n".join(rest.split("\n")[len(headers) :])


@pytest.mark.parametrize("screen", SCREENS, ids=str)
def test_example_is_sent_and_a_wrong_value_is_explained(
    browser: Browser, server: Gunicorn, model: Any, screen: Any
) -> None:
    with visit(browser, server, screen=screen) as reader:
        reader.page.goto("/")
        assert reader.page.url.endswith("/docs")
        body = json.loads(reader.page.locator("textarea").first.input_value())
        status, headers, answer = send(reader.page)
        assert (status, headers.keys()) == ("200 OK", {"X-Model-Version", "X-Feedback"})
        assert json.loads(answer) == {"prediction": model.predict(pd.DataFrame(body["data"])).tolist()}
        assert (reader.faults, reader.serious_faults(), reader.overflows()) == ([], [], False)

        body["data"][0]["age"] = "old"
        status, _, answer = send(reader.page, json.dumps(body))
        assert status == "422 UNPROCESSABLE ENTITY"
        assert json.loads(answer)["errors"] == [{"row": 0, "column": "age", "detail": "a string; expected a number"}]
        assert (reader.serious_faults(), reader.overflows()) == ([], False)
        assert "422" in reader.faults.pop()  # Chromium's own line about the answer


def test_markup_in_a_name_is_shown(browser: Browser, server: Gunicorn) -> None:
    with visit(browser, server) as reader:
        reader.page.goto("/docs")
        expect(reader.page.get_by_role("rowheader", name=EVIL)).to_be_visible()
        assert EVIL in json.loads(reader.page.locator("textarea").first.input_value())["data"][0]
        assert reader.page.locator("img").count() == 0
        _, _, answer = send(reader.page, json.dumps({"data": [{"age": 1, "city": "Oslo", EVIL: EVIL}]}))
        assert json.loads(answer)["errors"][0]["column"] == EVIL
        assert reader.page.locator("img").count() == 0
        assert "422" in reader.faults.pop()


def test_each_curl_of_the_page_works(browser: Browser, server: Gunicorn) -> None:
    with visit(browser, server) as reader:
        reader.page.goto("/docs")
        curls = reader.page.locator("pre code").all_inner_texts()
    assert len(curls) > 20
    for curl in curls:
        command = curl.replace("-u predict", f"-u 'predict:{PASSWORD}'", 1) + " -sw ' %{http_code}'"
        status = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout.split()[-1]
        assert status == ("403" if curl.endswith(("/metrics", "/feedback", "/monitor")) else "200"), command


def test_numbers_are_shown_as_they_were_answered(browser: Browser, tmp_path: Path) -> None:
    rows, labels = [[1], [2]] * 20, [2**53 + 1, 2**53 + 3] * 20  # JavaScript has neither
    joblib.dump(LogisticRegression().fit(rows, labels), tmp_path / "model.joblib")
    with gunicorn(tmp_path, model_path=tmp_path / "model.joblib") as server, visit(browser, server) as reader:
        reader.page.goto("/docs")
        _, _, answer = send(reader.page, json.dumps({"data": rows}))
        assert json.loads(answer) == {"prediction": labels}
        assert answer.count("\n") == 2  # it is indented, with the list on a line


def test_receipt_that_is_shown_is_taken_back(browser: Browser, server: Gunicorn) -> None:
    with visit(browser, server) as reader:
        reader.page.goto("/docs")
        _, headers, answer = send(reader.page)
    entry = {"receipt": headers["X-Feedback"], "truth": json.loads(answer)["prediction"]}
    sent = {"Content_Type": "application/json", "Authorization": basic("feedback")}
    _, _, answer = server.ask("POST", "/feedback", json.dumps({"feedback": [entry]}).encode(), **sent)
    assert json.loads(answer) == {"accepted": 1, "duplicates": 0, "rejected": []}


def test_page_is_used_with_the_keyboard_alone(browser: Browser, server: Gunicorn) -> None:
    with visit(browser, server) as reader:
        reader.page.goto("/docs")
        reader.page.locator("textarea").first.focus()
        reader.page.keyboard.press("Tab")
        reader.page.keyboard.press("Enter")
        expect(reader.page.locator("output b").first).to_have_text("200 OK")


def test_without_a_script_the_curls_are_there_and_no_dead_form(browser: Browser, server: Gunicorn) -> None:
    credentials = {"username": "predict", "password": PASSWORD}
    context = browser.new_context(java_script_enabled=False, http_credentials=credentials)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/docs")
    expect(page.get_by_text("curl -u predict -H").first).to_be_visible()
    assert page.get_by_role("button").count() == 0
    context.close()


def test_without_users_nobody_is_asked_for_a_password(browser: Browser, tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file, auth="off") as server, visit(browser, server, user="") as reader:
        reader.page.goto("/docs")
        status, _, answer = send(reader.page)
        assert (status, answer) == ("200 OK", '{"prediction":[0]}\n')
        assert "-u " not in reader.page.locator("main").inner_text()
