"""Which addresses send wrong passwords. An extension (EXTENSIONS in settings.py).

The log has a line for the first one from an address, and then one a minute with their number, as long as more come;
the journal has the ids of the first requests, so that `python -m telemetry.report --request ID` finds them. Neither has
the name or the password that was sent. Each worker counts for itself, and of so many addresses that a flood from all
over the world writes 200 bytes of log and 300 bytes of journal a second.
"""

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flask import request

from processes import LogLimit
from web.callers import network_of

if TYPE_CHECKING:
    from flask import Flask
    from werkzeug.exceptions import HTTPException

    from server import Service

log = logging.getLogger(__name__)

EVENT = "wrong_password"  # of a record in the journal
SECONDS = 60.0  # between two lines of an address
MAX_ADDRESSES = 50  # that have lines of their own, in a minute; the others have one together
MAX_ADDRESS_LENGTH = 64  # characters: a proxy may pass on whatever it was sent
RECORDS = 5  # of one address in a minute
RECORDS_AT_ONCE = 100  # of all; then one a second


def init_app(app: "Flask", service: "Service") -> None:
    """Note wrong passwords."""
    found = WrongPasswords(service)
    service.on_error.append(found.note)
    service.every_second.append(found.tick)
    service.on_exit.append(lambda: found.tick(0.0))


@dataclass
class _Address:
    began: float = field(default_factory=time.monotonic)  # when its last line was, or it was first seen
    count: int = 0  # wrong passwords that no line counts yet
    records: int = 0
    request_id: str = ""  # the latest


class WrongPasswords:
    """Counts wrong passwords by address."""

    def __init__(self, service: "Service") -> None:
        """Count those of a service's requests."""
        self._journal = service.journal
        self._addresses: dict[str, _Address] = {}
        self._others = _Address()
        self._records = LogLimit(log, 1.0, burst=RECORDS_AT_ONCE)
        self._counting = threading.Lock()

    def note(self, http: "HTTPException", error: Exception, record: dict[str, Any]) -> None:
        """Count a request that failed, if its password was wrong, or was not even checked after many wrong ones."""
        if http.code not in (401, 429) or record["user"] is not None or "HTTP_AUTHORIZATION" not in request.environ:
            return
        name = network_of(request.environ.get("REMOTE_ADDR", ""))[:MAX_ADDRESS_LENGTH]
        request_id = record["request_id"]
        with self._counting:
            is_new = name not in self._addresses and len(self._addresses) < MAX_ADDRESSES
            if is_new:
                self._addresses[name] = _Address()
            address = self._addresses.get(name, self._others)
            address.count += not is_new
            address.request_id = request_id
            address.records += 1
            is_recorded = address is not self._others and address.records <= RECORDS and self._records.is_due("")
        if is_new:
            log.warning("wrong password from %s, request %s", name or "a unix socket", request_id)
        if is_recorded:
            reason = "wrong password" if http.code == 401 else "too many wrong passwords"
            self._journal.append({"event": EVENT, "request_id": request_id, "address": name, "reason": reason})

    def tick(self, seconds: float = SECONDS) -> None:
        """Log the numbers of those who have had no line for so many seconds. To be called once a second."""
        now = time.monotonic()
        with self._counting:
            due = {name: each for name, each in self._addresses.items() if now - each.began >= seconds}
            for name, each in due.items():
                if each.count:
                    self._addresses[name] = _Address()
                else:
                    del self._addresses[name]
            others = self._others
            if now - others.began >= seconds:
                self._others = _Address()
        for name, each in due.items():
            if each.count:
                message = "%d more wrong passwords from %s within a minute, the last in request %s"
                log.warning(message, each.count, name or "a unix socket", each.request_id)
        if others is not self._others and others.count:
            log.warning("%d wrong passwords from other addresses within a minute", others.count)
