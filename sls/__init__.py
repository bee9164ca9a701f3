"""Ships the journal to Alibaba Cloud's log service (SLS), and sets its console up.

    python -m sls ship              until no worker serves any more; the workers start it themselves
    python -m sls ship --forever    as a systemd unit or a sidecar
    python -m sls setup             creates logstore, index, dashboard, searches and alerts (deploy/sls/)
    python -m sls check             sends one record, searches for it, and reports what is wrong
    python -m sls test-alert        makes the alert "Test alert" fire

Shipping is on when SLS_ENDPOINT, SLS_PROJECT and SLS_LOGSTORE are set. In reading order: `shipper` (journal → batches,
retries, progress), `client` (the wire and the credentials), `console` (setup), `check`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from server import Service


def init_app(app: "Flask", service: "Service") -> None:
    """Let the workers keep a shipper running, if records are to be shipped."""
    if service.settings.ships:
        from sls.shipper import ShipperSupervisor

        service.every_second.append(ShipperSupervisor(service.settings.journal_dir).tick)
