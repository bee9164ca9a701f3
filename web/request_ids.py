"""The id of a request: the caller's if it is sane, else a random one."""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

SANE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # safe in logs and headers


class RequestIds:
    """Takes the id of a request from the first of these headers that has a sane one.

    Of a header whose name ends in a slash, the value counts up to its first slash.
    """

    def __init__(self, headers: Sequence[str]) -> None:
        names = [(name.removesuffix("/").upper().replace("-", "_"), name.endswith("/")) for name in headers]
        self._variables = [(f"HTTP_{name}", is_cut) for name, is_cut in names]

    def of(self, environ: Mapping[str, Any]) -> str:
        """Return the id of a request with this WSGI environ."""
        for name, is_cut in self._variables:
            if given := environ.get(name):
                given = given.partition("/")[0] if is_cut else given
                if SANE.fullmatch(given):
                    return str(given)
        return f"{random.getrandbits(128):032x}"  # no secret
