"""gunicorn's workers, which at a stop answer all who have connected by then, and do not wait for idle connections.

An extension (EXTENSIONS in settings.py). gunicorn's own wait until idle connections have been so for `keepalive`
seconds or the drain is over: with a load balancer in front each stop would take the whole drain. And they close the
listener without taking what waits in its queue, which the kernel then resets. While they run, idle connections can take
all places, and a caller that does not read its answer keeps its place for ever.

gunicorn: overrides `handle_exit`, `handle_request`, `init_process`, `notify`, `server_class` and `timeout_ctx` of its
gevent worker, `murder_pending` and `set_accept_enabled` of its gthread worker.
"""

import errno
import socket
import time
from contextlib import suppress
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gevent
from gevent.server import StreamServer
from gunicorn.workers.ggevent import GeventWorker as BaseGeventWorker
from gunicorn.workers.gthread import ThreadWorker as BaseThreadWorker

from web.body import shutdown_socket

if TYPE_CHECKING:
    from flask import Flask

    from server import Service

WORKER_CLASSES = {"gevent": "operations.workers.GeventWorker", "gthread": "operations.workers.ThreadWorker"}
UNREAD = 10_000  # milliseconds after which the kernel ends a connection of whose answer nothing is taken
NEW = 0.5  # seconds for which a connection waits that a stop spares: its request may be on the way


def init_app(app: "Flask", service: "Service") -> None:
    """Do nothing: gunicorn makes the workers."""


def master_ready(server: Any) -> None:
    """Let the kernel end connections whose answer is not read, where it can (Linux)."""
    for listener in server.LISTENERS:  # from which connections have their options
        if isinstance(listener.getsockname(), tuple) and hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD)


class GeventWorker(BaseGeventWorker):  # type: ignore[misc]  # gunicorn has no types
    """Serves each connection in a greenlet.

    `idle` has the connections that wait for the head of a request, the longest first, and since when they do.
    """

    def init_process(self) -> None:
        """Begin without connections."""
        self.idle: dict[Any, float] = {}
        self._client_of: dict[Any, Any] = {}  # by greenlet
        self.server_class = self._server
        self.worker_connections //= len(self.sockets)  # gunicorn lets each listener have as many
        super().init_process()

    def _server(self, listener: Any, spawn: Any, **others: Any) -> Any:
        """Make what accepts connections, as gunicorn does itself."""
        tls = {"ssl_context": others["ssl_context"], "do_handshake_on_connect": False} if self.cfg.is_ssl else {}
        name = listener.getsockname()
        still_named = SimpleNamespace(getsockname=lambda: name)  # when it is closed, and connections are still served
        server = _Server(listener, partial(self._serve, still_named), spawn=spawn, **tls)
        if self.cfg.workers > 1:
            server.max_accept = 1
        return server

    def _serve(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve a connection."""
        greenlet = gevent.getcurrent()
        self._client_of[greenlet] = client
        self._make_room()
        try:
            if self.cfg.is_ssl:  # gunicorn would wait for ever; a handshake that fails here fails in `handle` as well
                with suppress(OSError), self.timeout_ctx():
                    client.do_handshake()
            self.handle(listener, client, addr)
        finally:
            del self._client_of[greenlet]

    def timeout_ctx(self) -> "_Idle":
        """Wait for the head of this greenlet's next request; `notify` ends that after `keepalive` seconds."""
        return _Idle(self.idle, self._client_of[gevent.getcurrent()])

    def handle_request(self, *arguments: Any) -> Any:
        """Answer a request."""
        try:
            return super().handle_request(*arguments)
        except TimeoutError as error:  # nothing of the answer was taken for UNREAD: not our fault
            raise ConnectionResetError(errno.ECONNRESET, "the answer was not taken") from error

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to stop, at SIGTERM."""
        super().handle_exit(sig, frame)
        gevent.spawn(self._close_idle, NEW)  # not in the signal's handler, which may interrupt anything

    def notify(self) -> None:
        """Report to the master that this worker lives, once a second, and close what has been idle for too long."""
        super().notify()
        self._close_idle((self.cfg.keepalive or 20.0) if self.alive else NEW)
        self._make_room()

    def _close_idle(self, seconds: float) -> None:
        """End longer waits for further requests; one that has arrived is still read, and answered."""
        now = time.monotonic()
        for client in [client for client, since in self.idle.items() if now - since >= seconds]:
            shutdown_socket(client, socket.SHUT_RD)

    def _make_room(self) -> None:
        """If hardly a place is left, close the longest idle connections; not those of a second, which may begin."""
        surplus = len(self._client_of) - int(0.9 * self.worker_connections)
        for client, since in list(islice(self.idle.items(), max(surplus, 0))):
            if time.monotonic() - since > 1.0:
                del self.idle[client]
                shutdown_socket(client, socket.SHUT_RD)


class _Idle:
    """Notes that a connection is idle; a generator would take a microsecond more, of each request."""

    def __init__(self, idle: dict[Any, float], client: Any) -> None:
        self._idle, self._client = idle, client

    def __enter__(self) -> None:
        self._idle[self._client] = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._idle.pop(self._client, None)


class _Server(StreamServer):  # type: ignore[misc]  # gevent has no types
    """Accepts connections."""

    def close(self) -> None:
        """Take the connections that wait in the listener's queue, and close it."""
        self.stop_accepting()
        while not self.full() and (accepted := self.do_read()):
            self.do_handle(*accepted)
        super().close()


class ThreadWorker(BaseThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """Serves requests in threads. A stop closes connections that never sent anything; gunicorn itself, the others."""

    def set_accept_enabled(self, enabled: bool) -> None:
        """Accept connections, or not; when a stop begins, take those that wait in the queue, and close the listener."""
        super().set_accept_enabled(enabled)
        for listener in self.sockets if not enabled and not self.alive else ():
            before = -1
            while before < self.nr_conns < self.worker_connections:
                before = self.nr_conns
                self.accept(listener)
            listener.close()

    def murder_pending(self) -> None:
        """Close the connections without a request that are past their time; while it stops, all."""
        for connection in self.pending_conns if not self.alive else ():
            connection.timeout = 0.0
        super().murder_pending()
