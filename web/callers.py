"""The caller of a request, the request's id, and whether the caller is still connected."""

import ipaddress
import random
import re
import select
import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

from werkzeug.exceptions import BadRequest

_gevent = sys.modules.get("gevent.monkey")  # whose `poll` may switch to another greenlet, and knows no POLLRDHUP
_poll = _gevent.get_original("select", "poll") if _gevent else select.poll
_HANG_UP = getattr(select, "POLLRDHUP", 0)  # without it, as on macOS, only connections that are wholly closed count
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # safe in logs and headers
PORT_AFTER_ADDRESS = re.compile(r"^(?:\[([^]]*)\]|([^:]*))(?::\d+)?$")  # an IPv6 address is in brackets then


class RequestIds:
    """The ids of requests: those of their callers, or random ones."""

    def __init__(self, headers: Sequence[str]) -> None:
        """`headers` are the names of those that may have one; with / behind the name it ends at its first slash."""
        self._variables = [("HTTP_" + n.rstrip("/").upper().replace("-", "_"), n.endswith("/")) for n in headers]

    def of(self, environ: dict[str, Any]) -> str:
        """Return the first sane id in those headers, else a random one."""
        for variable, is_cut in self._variables:
            if given := environ.get(variable):
                given = given.partition("/")[0] if is_cut else given
                if REQUEST_ID.fullmatch(given):
                    return str(given)
        return f"{random.getrandbits(128):032x}"  # no secret


@lru_cache(1024)
def network_of(address: str) -> str:
    """Return the part of an address that one customer of a provider has: all of IPv4, the first 64 bits of IPv6.

    Some proxies write a port after the address, such as Azure's gateway: it is another for each connection.
    """
    without_port = PORT_AFTER_ADDRESS.sub(r"\1\2", address)
    with suppress(ValueError):  # IPv4, a unix socket's "", or what a proxy made up
        found = ipaddress.IPv6Address(without_port)
        return str(found.ipv4_mapped or ipaddress.IPv6Network((int(found), 64), strict=False))
    return without_port


def caller_of(environ: dict[str, Any], user: str) -> tuple[Hashable, Callable[[], None]]:
    """Return who sent a request, and a function that raises BadRequest if nobody waits for its answer any more."""
    return (user, network_of(environ.get("REMOTE_ADDR", ""))), partial(_check, environ)


def _check(environ: dict[str, Any]) -> None:
    polled, gone = _poll(), True
    with suppress(OSError, ValueError):  # it is closed on this side as well
        if (connection := environ.get("gunicorn.socket")) is not None:
            polled.register(connection.fileno(), _HANG_UP)
        gone = bool(polled.poll(0))
    if gone:
        raise BadRequest("the connection was closed, or its sending side, before the answer was there")
