"""Tries the way to SLS with one record.

    python -m sls check          sends a record, and looks for it
    python -m sls test-alert     sends the record that fires the alert "Test alert"

Neither record counts as a request: it has no `status`.
"""

import secrets
import time
from collections.abc import Callable

from settings import Settings
from sls.client import Client, sender
from sls.shipper import ADVICE, SLSError

Say = Callable[[str], None]  # takes a line for the operator
HELP = ADVICE | {
    "LogRequestError": "check SLS_ENDPOINT, and this machine's DNS, network and proxy",
    "Unauthorized": "check the access key, and that its RAM user has the right that SLS names",
    "ProjectNotExist": "check SLS_PROJECT and SLS_ENDPOINT, or make it: python -m sls setup --make-project",
    "LogStoreNotExist": "check SLS_LOGSTORE, or make it: python -m sls setup",
    "IndexConfigNotExist": "make it: python -m sls setup",
}


def check(client: Client, settings: Settings, say: Say = print, wait: float = 90.0) -> int:
    """Send one record, which counts as no request, and look for it for `wait` seconds; return the exit status."""
    name, began = secrets.token_hex(16), time.time()
    if not _send(client, settings, say, check="1", record_id=name):
        return 1
    span = int(began) - 60, int(began) + 3600  # seconds since 1970
    trouble = "a new index begins to work after a minute or two; run it again then"
    while time.time() - began < wait:
        try:
            found = client.get_log(
                settings.sls_project, settings.sls_logstore, *span, query=f'record_id: "{name}"', size=1
            )
            if found.get_count():
                say(f"found it {time.time() - began:.0f} s later: records arrive, and can be searched for")
                return 0
        except SLSError as error:
            if error.code == "Unauthorized":
                say(f"it was not looked for, as the key may write and not read; to ship, that is enough ({error})")
                return 0
            trouble = explain(error)
            if not error.is_passing:
                break
        time.sleep(min(2.0, wait))
    say(f"it could not be found in {time.time() - began:.0f} s: {trouble}")
    return 1


def fire_test_alert(client: Client, settings: Settings, say: Say = print) -> int:
    """Send the record that fires the test alert; return the exit status."""
    if not _send(client, settings, say, test_alert="1", record_id=secrets.token_hex(16)):
        return 1
    say('the "Test alert" should reach you within some three minutes; if not, docs/operations.md says where to look')
    return 0


def _send(client: Client, settings: Settings, say: Say, **record: str) -> bool:
    where = f"{settings.sls_project}/{settings.sls_logstore}"
    try:
        sender(settings, client)([{"time": time.time(), **record}])
    except SLSError as error:
        say(f"SLS does not take a record for {where}: {explain(error)}")
        return False
    say(f"SLS took a record for {where}")
    return True


def explain(error: SLSError) -> str:
    """Return what SLS said, and what to do about it."""
    return f"{error}: {HELP[error.code]}" if error.code in HELP else str(error)
