"""gunicorn's gevent worker, with a fast path for simple requests and native threads for slow calls.

fast_path.py and threadpool.py say what they earn. gunicorn: overrides `handle`, `handle_request` and `load_wsgi` of its
worker.
"""

import time
from types import SimpleNamespace
from typing import Any

import gevent
from gunicorn.util import close
from gunicorn.workers.ggevent import GeventWorker

from . import switch_on


class Worker(GeventWorker):  # type: ignore[misc]  # gunicorn has no types
    """Serves a connection's requests as long as they are simple; from the first that is not, GeventWorker does."""

    has_fast_path = False  # whether simple requests may take it
    _round, _round_ends, _paused = -1.0, 0.0, 0

    def load_wsgi(self) -> None:
        """Load the application, and switch on what speeds it up."""
        super().load_wsgi()
        service = getattr(self.wsgi, "extensions", {}).get("service")
        if service is None or service.settings.fast_path:
            self.has_fast_path = bool(switch_on("fast_path", "is_possible", self.cfg, self.log))
        if service is not None:
            switch_on("threadpool", "install", service)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve the requests of a connection."""
        if not self.has_fast_path:
            super().handle(listener, client, addr)
            return
        from .fast_path import serve

        name, unread = listener.getsockname(), b""
        still_named = SimpleNamespace(getsockname=lambda: name)  # a stop closes it, and connections are still served
        try:
            client.setblocking(1)  # whatever socket.setdefaulttimeout says
            unread = serve(self, name, client, addr)
        except (BrokenPipeError, ConnectionResetError, TimeoutError) as error:
            self.log.debug("connection lost: %s", error)
        except (Exception, SystemExit):  # SystemExit: gunicorn aborts a worker that hangs
            self.log.exception("error on a connection")
        finally:
            if not unread:
                close(client)
        if unread:
            super().handle(still_named, _Unread(client, unread), addr)

    def handle_request(self, *arguments: Any) -> Any:
        """Answer a request that gunicorn has read."""
        self.yield_to_hub()
        return super().handle_request(*arguments)

    def yield_to_hub(self) -> None:
        """Let others have their turn, if this connection has had one in this round of the loop, which lasts for 2 ms.

        gevent stays with one connection as long as there is something to read. A caller that sends request after
        request without waiting for answers would keep the worker to itself, until gunicorn considered it hung. Several
        such callers leave at least half of the time to others, however many they are.
        """
        loop, greenlet, now = gevent.get_hub().loop, gevent.getcurrent(), time.monotonic()
        number = getattr(loop, "iteration", now // 0.01)  # libuv's loop does not count its rounds
        if number == self._round and now > self._round_ends and getattr(greenlet, "served_in", None) == number:
            self._paused += 1
            try:  # not 0: then gevent would run other ready callbacks before it looks at sockets
                gevent.sleep(min(0.004 * (self._paused - 1), 1.0) or 0.0001)
            finally:
                self._paused -= 1
            number, now = getattr(loop, "iteration", now // 0.01 + 1), time.monotonic()
        if number != self._round:
            self._round, self._round_ends = number, now + 0.002
        greenlet.served_in = number


class _Unread:
    """A socket of which some was read already: that comes first."""

    def __init__(self, client: Any, data: bytes) -> None:
        self._client, self._data = client, data

    def recv(self, *arguments: Any) -> bytes:
        """Return what was read before; then what the socket has."""
        data, self._data = self._data, b""
        return data or self._client.recv(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)
