"""What a platform does between its clients and a container: it maps the path, drops headers, and wraps errors."""

import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Changed = tuple[int, Mapping[str, str], bytes]  # status, headers and body


class Gateway:
    """A platform on loopback, at `url`."""

    def __init__(
        self,
        server: str,
        paths: Callable[[str], str | None],
        headers: set[str],
        change: Callable[[Changed], Changed] = lambda answer: answer,
    ) -> None:
        """Stand before a server.

        Args:
            server: its URL.
            paths: returns the server's path for a client's, or None if there is none.
            headers: those that are passed on, in lower case.
            change: what is made of an answer.
        """

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the name that http.server calls
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = paths(self.path)
                passed = {name: value for name, value in self.headers.items() if name.lower() in headers}
                answer: Changed = (404, {}, b"no such path")
                if path is not None:
                    request = Unnamed(server + path, body, passed, method="POST")
                    try:
                        with urllib.request.urlopen(request) as response:
                            answer = change((response.status, response.headers, response.read()))
                    except urllib.error.HTTPError as error:
                        answer = change((error.code, error.headers, error.read()))
                self.send_response(answer[0])
                for name, value in {**answer[1], "Content-Length": str(len(answer[2]))}.items():
                    if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer[2])

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


class Unnamed(urllib.request.Request):
    """A request whose body has no type unless one is passed on: urllib would call it a form."""

    def has_header(self, header_name: str) -> bool:
        """Pretend that there is a type."""
        return header_name == "Content-type" or super().has_header(header_name)
