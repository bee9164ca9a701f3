"""Tests shipping to SLS with one record, which does not count as a request: it has no `status`."""

import secrets
import time

import click

from cli import progressbar
from sls.client import Client
from sls.shipper import SLSError


def check(client: Client, wait: float = 90.0) -> int:
    """Send one record and search for it for `wait` seconds; return the exit status."""
    record_id = secrets.token_hex(16)
    if not _send(client, check="1", record_id=record_id):
        return 1
    status, outcome = _search(client, record_id, wait)
    click.echo(outcome)
    return status


def _search(client: Client, record_id: str, wait: float) -> tuple[int, str]:
    """Search for a record for `wait` seconds; return the exit status and the outcome in words."""
    began = time.time()
    span = int(began) - 60, int(began) + 3600  # seconds since 1970
    query, trouble = f'record_id: "{record_id}"', ""
    with progressbar(round(wait), "searching for it") as bar:
        while (seconds := time.time() - began) < wait:
            try:
                if client.get_log(client.project, client.logstore, *span, query=query, size=1).get_count():
                    return 0, f"found it {seconds:.0f} s later: records arrive and can be searched"
                trouble = "a new index takes a minute or two to work; run the check again then"
            except SLSError as error:
                if error.code == "Unauthorized":
                    may_write = "the key may only write, which is enough for shipping"
                    return 0, f"the record was not searched for: {may_write} ({error})"
                trouble = error.explain()
                if not error.is_transient:
                    break
            time.sleep(min(2.0, wait))
            bar.update(2)
    return 1, f"the record could not be found in {seconds:.0f} s: {trouble}"


def fire_test_alert(client: Client) -> int:
    """Send the record that fires the test alert; return the exit status."""
    if not _send(client, test_alert="1", record_id=secrets.token_hex(16)):
        return 1
    click.echo('the "Test alert" should reach you within three minutes or so; if not, see docs/alerts.md')
    return 0


def _send(client: Client, **record: str) -> bool:
    where = f"{client.project}/{client.logstore}"
    try:
        client.send([{"time": time.time(), **record}])
    except SLSError as error:
        click.echo(f"SLS does not take a record for {where}: {error.explain()}")
        return False
    click.echo(f"SLS took a record for {where}")
    return True
