"""Ships the journal to Alibaba Cloud's log service (SLS), and prepares its console.

    python -m sls ship              until no worker serves any more; the workers start it by themselves
    python -m sls ship --forever    as a systemd unit or a sidecar
    python -m sls setup             makes logstore, index, dashboard, searches and alerts (deploy/sls/)
    python -m sls check             sends one record, looks for it, and says what is wrong
    python -m sls test-alert        makes the alert "Test alert" fire

On when SLS_ENDPOINT, SLS_PROJECT and SLS_LOGSTORE are set. In reading order: `shipper` (journal → batches, retries,
progress), `client` (the wire and the credentials), `console` (setup), `check`.
"""

from sls.shipper import Presence, Progress

__all__ = ["Presence", "Progress"]
