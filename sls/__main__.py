"""The command line: `python -m sls --help`."""

import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from importlib import import_module

import click

import cli
from settings import Settings, SettingsError
from shared_files import FileLock
from sls.shipper import Shipper


@click.group()
def commands() -> None:
    """Ship the journal to Alibaba Cloud's log service (SLS), and set its console up."""
    with suppress(ModuleNotFoundError):  # it may be taken away
        import_module("log_format").set_up(os.environ.get("LOG_FORMAT", ""))
    logging.basicConfig(level="INFO")


@commands.command()
@click.option("--forever", is_flag=True, help="Ship until stopped: as a systemd unit or a sidecar.")
def ship(forever: bool) -> None:
    """Ship records until no worker serves any more."""
    settings = _settings()
    lock = FileLock(settings.journal_dir / "ship.lock")
    if not lock.acquire():
        return  # another shipper runs
    from sls.client import Client  # the SDK takes a fifth of a second, and a second shipper ends above

    shipper = Shipper(settings.journal_dir, Client(settings, os.environ).send, forever)
    threading.Thread(target=_end_in_time, args=(shipper, settings.graceful_timeout), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: shipper.stop())
    shipper.run()


def _end_in_time(shipper: Shipper, drain: float) -> None:
    """End this process once the shipper has been ending for `drain` seconds: what is left waits for the next start."""
    while not shipper.is_ending():
        time.sleep(0.5)
    time.sleep(drain)
    os._exit(0)  # at any moment, since the progress is saved and a send may take its time


@commands.command()
@click.option("--make-project", is_flag=True, help="Create the project too.")
@click.option(
    "--keep-days", type=click.IntRange(1, 3650), metavar="DAYS", help="How long SLS keeps records (a new logstore: 30)."
)
@click.option(
    "--language", type=click.Choice(["en", "zh"]), default="en", help="Of titles and descriptions: English or Chinese."
)
@click.option("--dry-run", is_flag=True, help="Print everything, send nothing.")
def setup(make_project: bool, keep_days: int | None, language: str, dry_run: bool) -> int:
    """Create or update everything that SLS needs.

    That is the logstore and its index, a dashboard, saved searches and alerts, as in deploy/sls/.
    """
    from sls import client, console

    return console.setup(
        partial(client.Client, environ=os.environ),
        _settings(),
        console.Recipients.from_environ(os.environ),
        make_project=make_project,
        keep_days=keep_days,
        language=language,
        dry_run=dry_run,
    )


@commands.command()
def check() -> int:
    """Send one record, search for it, and report what is wrong."""
    from sls import check, client

    return check.check(client.Client(_settings(), os.environ))


@commands.command()
def test_alert() -> int:
    """Make the alert "Test alert" fire."""
    from sls import check, client

    return check.fire_test_alert(client.Client(_settings(), os.environ))


def _settings() -> Settings:
    """Read the settings. Raises: SettingsError, also if they do not say where to ship to."""
    settings = Settings.load()
    if not settings.ships:
        raise SettingsError("set SLS_ENDPOINT, SLS_PROJECT and SLS_LOGSTORE")
    return settings


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    return cli.run("sls", commands, arguments, SettingsError, status=2)


if __name__ == "__main__":
    sys.exit(main())
