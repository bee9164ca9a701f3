"""What the tests of pages share: Chromium, pages that note what no reader should meet, and axe.

A package (`__init__.py`), since the tests here also use what is in tests/conftest.py, which is another `conftest`.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import PASSWORD, Server
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing leaves the machine, whatever a page asks for
)
# Width and height in CSS pixels, and the colour scheme that the reader prefers.
SCREENS = [(1280, 800, "light"), (1280, 800, "dark"), (360, 740, "light"), (360, 740, "dark")]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A running Chromium; each page gets an empty profile in it."""
    expect.set_options(timeout=60_000)  # milliseconds; machines are busy
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS])
        yield running
        running.close()


class Visit:
    """A reader of a server's pages: `page` is Playwright's, `faults` what went wrong in it, a line each.

    That is: messages of the console that are warnings or errors, among them each violation of the Content-Security-
    Policy and each answer with a status from 400 on; exceptions of scripts; and requests to another host.
    """

    def __init__(self, page: Page, origin: str) -> None:
        self.page, self.faults = page, []
        page.on("console", lambda said: said.type in ("warning", "error") and self.faults.append(said.text))
        page.on("pageerror", lambda error: self.faults.append(f"exception: {error}"))
        page.on("request", lambda asked: asked.url.startswith((f"{origin}/", "data:")) or self.faults.append(asked.url))

    def serious_faults(self) -> list[str]:
        """Return what axe finds that keeps people from using the page as it is now."""
        found = Axe().run(self.page).response["violations"]
        return [f"{each['id']}: {each['nodes']}" for each in found if each["impact"] in ("serious", "critical")]

    def overflows(self) -> bool:
        """Return whether the page is wider than the screen, so that it has to be moved sideways to be read."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page, as PNG."""
        self.page.screenshot(path=path, full_page=True)


@contextmanager
def visit(
    browser: Browser, server: Server, user: str = "predict", screen: tuple[int, int, str] = SCREENS[0]
) -> Iterator[Visit]:
    """Let a user visit a server. At the end no fault must be left; a test removes those that it wants."""
    width, height, scheme = screen
    origin = f"http://127.0.0.1:{server.port}"
    options: dict[str, Any] = {"color_scheme": scheme, "viewport": {"width": width, "height": height}}
    if user:
        options["http_credentials"] = {"username": user, "password": PASSWORD, "origin": origin}
    context = browser.new_context(base_url=origin, **options)
    try:
        visiting = Visit(context.new_page(), origin)
        yield visiting
        assert visiting.faults == []
    finally:
        context.close()
