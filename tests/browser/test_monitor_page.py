"""The page /monitor in a browser, under load, with a canary and feedback."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Gunicorn, basic
from playwright.sync_api import Browser

from browser.conftest import SCREENS, visit
from browser.scene import NOTES, busy_server, call

REQUESTS = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """A server whose page shows all requests that were sent."""
    with busy_server(tmp_path_factory.mktemp("monitor")) as running:
        call(running, REQUESTS)
        sent, whole = time.monotonic(), 0
        while whole < 10:  # in a row: both workers show them
            whole = whole + 1 if figures(running)["requests"] == REQUESTS else 0
            assert time.monotonic() - sent < 60, figures(running)
            time.sleep(0.2)
        yield running


def figures(server: Gunicorn) -> Any:
    """Get the page as JSON."""
    status, _, body = server.ask("GET", "/monitor?format=json", Authorization=basic("alice"))
    assert status == 200
    return json.loads(body)


def test_counts_are_exact_and_summed_over_workers(server: Gunicorn) -> None:
    found = figures(server)
    versions = {each["version"]: each for each in found["versions"]}
    assert {each["variant"] for each in found["versions"]} == {"stable", "canary"}
    assert sum(each["requests"] for each in versions.values()) == REQUESTS
    assert (found["requests"], found["success"], found["errors"]) == (REQUESTS, REQUESTS * 9 // 10, REQUESTS // 10)


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: f"{screen[0]}-{screen[2]}")
def test_page_shows_both_versions_and_has_no_fault(
    screen: tuple[int, int, str], server: Gunicorn, browser: Browser, tmp_path: Path
) -> None:
    with visit(browser, server, "alice", screen) as reader:
        reader.page.goto("/monitor")
        versions = reader.page.get_by_role("region", name="Versions")
        for variant, version in ("stable", "7"), ("canary", "8"):
            row = versions.get_by_role("row", name=f"{variant} {version}")
            assert NOTES[version] in row.inner_text()
            assert "n\xa0=\xa0" in row.inner_text()
        assert "Version 7 is served; canary 8 gets 20 % of the requests." in reader.page.inner_text("main")
        assert "2 of 2 workers serve both." in reader.page.inner_text("main")
        reader.page.get_by_text("Requests as a table").click()
        assert reader.page.get_by_role("region", name="Requests, table").is_visible()
        for name in ("24h", "7d", "30d", "1h"):
            reader.page.get_by_role("link", name=name, exact=True).click()
            assert f"?range={name}" in reader.page.url
            assert not reader.overflows()
        assert reader.serious_faults() == []
        reader.screenshot(tmp_path / "monitor.png")


def test_lines_are_drawn_in_the_colours_of_the_style_sheet(server: Gunicorn, browser: Browser) -> None:
    with visit(browser, server, "alice") as reader:
        reader.page.goto("/monitor?range=24h")
        strokes = reader.page.eval_on_selector_all(
            ".plot .line", "lines => lines.map(line => [getComputedStyle(line).stroke, line.getTotalLength()])"
        )
        assert strokes
        assert all(stroke.startswith("rgb(") for stroke, _ in strokes)
