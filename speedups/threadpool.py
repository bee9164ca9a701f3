"""How to run a function on a native thread while the worker's loop goes on with other requests."""

import _thread  # gevent leaves its RLock as it is
import logging
import sys
from collections.abc import Callable
from typing import Any


def native_call() -> Callable[..., Any]:
    """Return how to run a function on a native thread and wait for its result while other requests go on.

    Under gevent that is its thread pool; elsewhere requests have native threads of their own.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return lambda function, *arguments: function(*arguments)
    from gevent import get_hub

    _use_native_locks_in_logging()

    def guarded(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
        try:
            return function(*arguments), None
        except BaseException as error:  # gevent would print it as well as raise it
            return None, error

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        value, error = get_hub().threadpool.apply(guarded, (function, arguments))
        if error is not None:
            raise error
        return value

    return call


def _use_native_locks_in_logging() -> None:
    """Take gevent's locks out of logging again.

    gunicorn asks for a logger at each request, and a library does so as it is imported, on a native thread. A lock of
    gevent's that a loop and a native thread share loses wake-ups: the whole worker would wait for ever.
    """
    logging._lock = _thread.RLock()  # type: ignore[attr-defined]
    for reference in logging._handlerList:  # type: ignore[attr-defined]
        handler = reference()
        if handler is not None and handler.lock is not None:
            handler.lock = _thread.RLock()

    def create_lock(handler: logging.Handler) -> None:
        handler.lock = _thread.RLock()
        logging._register_at_fork_reinit_lock(handler)  # type: ignore[attr-defined]

    logging.Handler.createLock = create_lock  # type: ignore[assignment,method-assign]
