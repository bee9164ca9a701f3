"""Tests shipping to SLS with one record.

    python -m sls check          sends a record, and searches for it
    python -m sls test-alert     sends the record that fires the alert "Test alert"

Neither record counts as a request: it has no `status`.
"""

import secrets
import time
from collections.abc import Callable

import click

from cli import progressbar
from settings import Settings
from sls.client import Client, sender
from sls.shipper import ADVICE, SLSError

Echo = Callable[[str], None]  # prints a line for the operator
HELP = ADVICE | {
    "LogRequestError": "check SLS_ENDPOINT, and this machine's DNS, network and proxy",
    "Unauthorized": "check the access key, and that its RAM user has the permission that SLS names",
    "ProjectNotExist": "check SLS_PROJECT and SLS_ENDPOINT, or create it: python -m sls setup --make-project",
    "LogStoreNotExist": "check SLS_LOGSTORE, or create it: python -m sls setup",
    "IndexConfigNotExist": "create it: python -m sls setup",
}


def check(client: Client, settings: Settings, echo: Echo = click.echo, wait: float = 90.0) -> int:
    """Send one record and search for it for `wait` seconds; return the exit status."""
    record_id, began = secrets.token_hex(16), time.time()
    if not _send(client, settings, echo, check="1", record_id=record_id):
        return 1
    try:
        if _search(client, settings, record_id, wait):
            echo(f"found it {time.time() - began:.0f} s later: records arrive and can be searched")
            return 0
        trouble = "a new index takes a minute or two to work; run the check again then"
    except SLSError as error:
        if error.code == "Unauthorized":
            echo(f"the record was not searched for: the key may only write, which is enough for shipping ({error})")
            return 0
        trouble = explain(error)
    echo(f"the record could not be found in {time.time() - began:.0f} s: {trouble}")
    return 1


def _search(client: Client, settings: Settings, record_id: str, wait: float) -> bool:
    """Search for a record for `wait` seconds; return whether it was found. Raises: SLSError, of the last attempt."""
    began, error = time.time(), None
    span = int(began) - 60, int(began) + 3600  # seconds since 1970
    query = f'record_id: "{record_id}"'
    with progressbar(round(wait), "searching for it") as bar:
        while time.time() - began < wait:
            try:
                if client.get_log(settings.sls_project, settings.sls_logstore, *span, query=query, size=1).get_count():
                    return True
                error = None
            except SLSError as failure:
                if not failure.is_transient:
                    raise
                error = failure
            time.sleep(min(2.0, wait))
            bar.update(2)
    if error is not None:
        raise error
    return False


def fire_test_alert(client: Client, settings: Settings, echo: Echo = click.echo) -> int:
    """Send the record that fires the test alert; return the exit status."""
    if not _send(client, settings, echo, test_alert="1", record_id=secrets.token_hex(16)):
        return 1
    echo('the "Test alert" should reach you within three minutes or so; if not, see docs/operations.md')
    return 0


def _send(client: Client, settings: Settings, echo: Echo, **record: str) -> bool:
    where = f"{settings.sls_project}/{settings.sls_logstore}"
    try:
        sender(settings, client)([{"time": time.time(), **record}])
    except SLSError as error:
        echo(f"SLS does not take a record for {where}: {explain(error)}")
        return False
    echo(f"SLS took a record for {where}")
    return True


def explain(error: SLSError) -> str:
    """Return an error of SLS, and what to do about it."""
    return f"{error}: {HELP[error.code]}" if error.code in HELP else str(error)
