"""What the tests of pages rely on: a fault of a page is noted, and a page without one is not blamed."""

from pathlib import Path

from conftest import gunicorn
from playwright.sync_api import Browser

from browser.conftest import visit

PAGES = """
def init_app(app, service):
    policy = {"Content-Security-Policy": "default-src 'none'; img-src *"}
    start = '<!doctype html><html lang="en"><title>t</title><link rel="icon" href="data:,"><main><h1>t</h1>'
    app.add_url_rule("/good", "good", lambda: start)
    app.add_url_rule("/script", "script", lambda: (start + "<script>1</script>", policy))
    app.add_url_rule("/other", "other", lambda: start + "<img alt='' src='http://example.com/x.png'>")
    app.add_url_rule("/raises", "raises", lambda: start + "<script>undefined()</script>")
    app.add_url_rule("/missing", "missing", lambda: start + "<img alt='' src='/nowhere'>")
    app.add_url_rule("/pale", "pale", lambda: start + "<p style='color: #eee'>pale")
    app.add_url_rule("/wide", "wide", lambda: start + "<p style='width: 2000px'>wide")
"""


def test_faults_of_a_page_are_noted(browser: Browser, tmp_path: Path, iris_file: Path) -> None:
    (tmp_path / "pages.py").write_text(PAGES)
    with gunicorn(tmp_path, model_path=iris_file, extensions="+pages") as server, visit(browser, server) as reader:
        reader.page.goto("/good")
        assert (reader.faults, reader.serious_faults(), reader.overflows()) == ([], [], False)
        for path, fault in (
            ("/script", "Content Security Policy"),
            ("/other", "http://example.com/x.png"),
            ("/raises", "exception: "),
            ("/missing", "404"),
        ):
            reader.page.goto(path)
            assert fault in " ".join(reader.faults), path
            reader.faults.clear()
        reader.page.goto("/pale")
        assert "color-contrast" in " ".join(reader.serious_faults())
        reader.page.goto("/wide")
        assert reader.overflows()
