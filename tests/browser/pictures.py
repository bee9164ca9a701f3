"""Makes the README's pictures from the real pages: `make pictures` writes docs/docs.png and docs/monitor.png.

The server has two versions, and answers the example. The traffic, errors and feedback of its last hour are made up:
else the charts would show two minutes.
"""

import math
import random
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import orjson
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for what is shown, and what the tests share

from conftest import PASSWORD  # noqa: E402  # found by the line above

from browser.conftest import ARGUMENTS, CHROMIUM  # noqa: E402
from browser.scene import ROLES, busy_server  # noqa: E402
from telemetry.rollups import Sums, bucket_of, day_of  # noqa: E402

WIDTH, HEIGHT = 1200, 1230  # pixels
MAX_BYTES = 500_000
ERRORS = ("client 422 Unprocessable Entity", "model 500 Internal Server Error", "overload 503 Service Unavailable")


def make_up_an_hour(journal_dir: Path) -> None:
    """Write the roll-ups of the last hour, and of the minute that is under way."""
    dice, now = random.Random(3), int(time.time() // 60 * 60)
    (journal_dir / "rollup").mkdir(parents=True)
    for start in range(now - 3600, now + 60, 60):
        for version, variant, rate, median in ("7", "stable", 36, 0.0015), ("8", "canary", 9, 0.0012):
            found = sums(dice, round(60 * rate * dice.uniform(0.9, 1.1)), median)
            found.users.update(
                {user: found.requests * share // 10 for user, share in zip(ROLES, (6, 3, 1), strict=True)}
            )
            found.feedback = {"rows": 40, "wrong": round(dice.uniform(0.5, 2.5)) + (version == "8"), "entries": 40}
            line = {"time": start, "span": 60, "version": version, "variant": variant} | found.encode()
            with (journal_dir / "rollup" / f"{day_of(start)}.jsonl").open("ab") as file:
                file.write(orjson.dumps(line) + b"\n")


def sums(dice: random.Random, requests: int, median: float) -> Sums:
    """Return what so many requests add up to, with a log-normal response time."""
    errors = Counter({name: round(requests * dice.uniform(0, 0.002)) for name in ERRORS})
    found = Sums(requests, requests - errors.total(), requests, requests * median, errors=+errors)
    for _ in range(300):
        found.times[bucket_of(dice.lognormvariate(math.log(median), 0.5))] += max(1, requests // 300)
    found.protocols = Counter({"predict": requests})
    return found


def docs(page: Page) -> None:
    """Open the page of the API and send the example."""
    page.goto("/docs")
    page.get_by_role("button", name="Send").first.click()
    expect(page.locator("output b").first).not_to_be_empty()


def monitor(page: Page) -> None:
    """Open the page of the host when both workers serve."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        page.goto("/monitor")
        if page.get_by_text("2 of 2 workers serve both.").count():
            return
        time.sleep(1)
    raise TimeoutError("the page does not show that both workers serve")


def main() -> None:
    """Write the pictures."""
    with TemporaryDirectory(prefix="pictures-") as place, sync_playwright() as playwright:
        make_up_an_hour(Path(place) / "journal")
        with busy_server(Path(place)) as server:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS])
            credentials = {"username": "alice", "password": PASSWORD}
            page = browser.new_page(
                base_url=f"http://127.0.0.1:{server.port}",
                viewport={"width": WIDTH, "height": HEIGHT},
                http_credentials=credentials,
                color_scheme="light",
            )
            for prepare in docs, monitor:
                path = ROOT / "docs" / f"{prepare.__name__}.png"
                prepare(page)
                page.screenshot(path=path)
                if path.stat().st_size > MAX_BYTES:
                    raise ValueError(f"{path} has more than {MAX_BYTES} bytes")
                print(f"wrote {path}, {path.stat().st_size} bytes")
            browser.close()


if __name__ == "__main__":
    main()
