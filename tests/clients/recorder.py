"""A loopback server that records what an SDK sends, and answers what its platform would."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, str, Any], Any]


@contextmanager
def recording(answer: Answer) -> Iterator[tuple[int, list[tuple[str, str, Any]]]]:
    """Yield the port and the list of requests: method, path with its query, and body (JSON, or text).

    Args:
        answer: called with these three, returns the JSON to answer.
    """
    requests: list[tuple[str, str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            try:
                body = json.loads(text) if text else None
            except ValueError:
                body = text
            requests.append((self.command, self.path, body))
            content = json.dumps(answer(self.command, self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815  # http.server's names

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port, requests
    finally:
        server.shutdown()
        server.server_close()


def dry_run(script: Any, arguments: list[str]) -> list[dict[str, Any]]:
    """Return the calls that a deploy script prints with `--dry-run`."""
    import contextlib
    import io
    import sys

    printed = io.StringIO()
    sys.argv = ["deploy", *arguments, "--dry-run"]
    with contextlib.redirect_stdout(printed):
        script.main()
    decoder, rest, found = json.JSONDecoder(), printed.getvalue().strip(), []
    while rest:
        call, end = decoder.raw_decode(rest)
        found.append(call)
        rest = rest[end:].strip()
    return found
