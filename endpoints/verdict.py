"""What a host's server is doing, in words: what it serves, by how many workers, what waits to be shipped.

A sentence comes with its level: OK, or WARNING or BAD if someone has to do something.
"""

import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

from endpoints.monitor_figures import duration
from telemetry import shipping_progress
from telemetry.certificate import NoCertificate, expiry
from worker_slot import WorkerSlot

if TYPE_CHECKING:
    from endpoints.monitor_page import Host

OK, WARNING, BAD = LEVELS = ("ok", "warning", "bad")
MIN_LEFT = 14 * 86_400.0  # seconds before a certificate's end; certbot renews it thirty days before
MAX_WAIT = 600.0  # seconds that records may wait for SLS, as in the alert of deploy/prometheus/rules.yml

Sentence = tuple[str, str]  # its level, and its words


def verdict(host: "Host") -> list[Sentence]:
    """Return the sentences."""
    found = [] if host.served is None else [_serving(host.served)]
    return found + _workers(host) + _shipping(host) + _certificate(host) + _last_changes(host)


def _serving(served: dict[str, Any]) -> Sentence:
    if not served["ready"]:
        return BAD, "No model is served; the server's log says why."
    words = f"Version {served['stable']['version']} is served"
    if served["canary"]:
        routing = served["routing"]["canary"]
        guarded = " and is guarded" if routing["guard"] else ""
        words += f"; canary {served['canary']['version']} gets {routing['weight']:g} % of the requests{guarded}"
    if served["error"]:  # its words hold paths, and messages of libraries
        return WARNING, f"{words}. Something is wrong with the versions; the server's log says what."
    return OK, f"{words}."


def _workers(host: "Host") -> list[Sentence]:
    """Compare what the living workers have published with what this one serves."""
    statuses, served = list(WorkerSlot.read(host.journal_dir / "workers").values()), host.served
    total = max(host.workers, len(statuses))
    if served is None or not served["ready"] or not any(statuses):
        level = OK if len(statuses) == total else WARNING
        return [(level, f"{len(statuses)} of {total} workers run.")] if total else []
    versions = {name: served[name] and served[name]["version"] for name in ("stable", "canary")}
    same = sum({**each, **versions} == each and not each["error"] for each in statuses)
    what = "both" if served["canary"] else "it"
    return [(OK if same == total else WARNING, f"{same} of {total} workers serve {what}.")]


def _shipping(host: "Host") -> list[Sentence]:
    progress = shipping_progress(host.journal_dir, expected=host.ships)
    if progress is None:
        return [(OK, "Shipping to SLS is off.")]
    size, oldest = progress.waiting(host.journal_dir)
    age = 0.0 if oldest is None else time.time() - oldest
    found = [(OK, "No record waits for SLS.")]
    if oldest is not None:
        words = f"{size / 1000:,.1f} kB of records wait for SLS, the oldest for {duration(age)}."
        found = [(WARNING if age > MAX_WAIT else OK, words)]
    if progress.error:
        found += [(WARNING, f"SLS's last error: {progress.error['message']}")]
    return found


def _certificate(host: "Host") -> list[Sentence]:
    if host.certificate is None:
        return []
    try:
        left = expiry(host.certificate) - time.time()
    except NoCertificate as error:
        return [(WARNING, f"When the certificate expires is not known: {error}.")]
    if left <= 0:
        return [(BAD, f"The certificate expired {duration(-left)} ago.")]
    return [(OK if left > MIN_LEFT else WARNING, f"The certificate expires in {duration(left)}.")]


def _last_changes(host: "Host") -> list[Sentence]:
    found, now = [], time.time()
    routing = host.served and host.served["routing"]
    if routing and routing["changed"]:
        ago = duration(now - datetime.fromisoformat(routing["changed"]).timestamp())
        found += [(OK, f"The versions were last changed {ago} ago: {routing['why']}, by {routing['by']}.")]
    if host.started:
        found += [(OK, f"The last start or reload was {duration(now - host.started)} ago.")]
    return found
