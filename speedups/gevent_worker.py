"""gunicorn's gevent worker, with a fast path for simple requests and native threads for slow calls.

    worker_class = "speedups.gevent_worker.Worker"          # in gunicorn.conf.py

fast_path.py and threadpool.py say what they earn. gunicorn: overrides `handle`, `handle_request`, `init_process` and
`load_wsgi` of its worker.
"""

import time
from typing import Any

import gevent
from gunicorn.util import close

from workers import GeventWorker

from . import switch_on


class Worker(GeventWorker):
    """Serves a connection's requests as long as they are simple; from the first that is not, GeventWorker does."""

    def init_process(self) -> None:
        """Decide, once, whether simple requests may take the fast path."""
        self._has_fast_path = switch_on("fast_path", "is_possible", self.cfg, self.log)
        self._checked, self._iteration = 0.0, None
        super().init_process()

    def load_wsgi(self) -> None:
        """Load the application, and let its service run what takes long on native threads."""
        super().load_wsgi()
        if service := getattr(self.wsgi, "extensions", {}).get("service"):
            switch_on("threadpool", "install", service)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve a connection."""
        if not self._has_fast_path:
            super().handle(listener, client, addr)
            return
        from .fast_path import serve

        unread = b""
        try:
            client.setblocking(1)  # whatever socket.setdefaulttimeout says
            unread = serve(self, listener.getsockname(), client, addr)
        except (BrokenPipeError, ConnectionResetError) as error:
            self.log.debug("connection lost: %s", error)
        except (Exception, SystemExit):  # SystemExit: gunicorn aborts a worker that hangs
            self.log.exception("error on a connection")
        finally:
            if not unread:
                close(client)
        if unread:
            super().handle(listener, _Unread(client, unread), addr)

    def handle_request(self, *arguments: Any) -> Any:
        """Answer a request that gunicorn has read."""
        self.yield_to_hub()
        return super().handle_request(*arguments)

    def yield_to_hub(self) -> None:
        """Let other connections have their turn if none has had one for 10 ms.

        gevent stays with one connection as long as there is something to read. A caller that sends request after
        request without waiting for answers would keep the worker to itself, until gunicorn considered it hung.
        """
        now = time.monotonic()
        if now - self._checked > 0.01:
            self._checked = now
            loop = gevent.get_hub().loop
            if getattr(loop, "iteration", None) == self._iteration:  # libuv's loop does not count them
                gevent.sleep(0.0001)  # not 0: then gevent would run other ready callbacks before it looks at sockets
            self._iteration = getattr(loop, "iteration", None)


class _Unread:
    """A socket of which some was read already: that comes first."""

    def __init__(self, sock: Any, data: bytes) -> None:
        self._sock, self._data = sock, data

    def recv(self, *arguments: Any) -> bytes:
        """Return what was read before; then what the socket has."""
        data, self._data = self._data, b""
        return data or self._sock.recv(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)
