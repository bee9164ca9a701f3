"""The command line: `python -m sls`."""

import argparse
import fcntl
import logging
import os
import signal
import sys
import threading
import time
from functools import partial

from settings import Settings, SettingsError
from sls.shipper import Shipper, open_lock


def ship(settings: Settings, forever: bool) -> int:
    """Ship the journal until it is time to end; return the exit status."""
    settings.journal_dir.mkdir(parents=True, exist_ok=True)
    lock = open_lock(settings.journal_dir / "ship.lock")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0  # another ships
    from sls.client import connect, sender  # the SDK takes a fifth of a second, and a second shipper ends above

    send = sender(settings, connect(settings, os.environ))
    shipper = Shipper(settings.journal_dir, send, forever)
    threading.Thread(target=end_in_time, args=(shipper, settings.graceful_timeout), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: shipper.stop())
    shipper.run()
    return 0


def end_in_time(shipper: Shipper, drain: float) -> None:
    """End this process once the shipper has been ending for `drain` seconds: what is left waits for the next start."""
    since = None
    while True:
        if not shipper.is_ending():
            since = None
        elif since is None:
            since = time.monotonic()
        elif time.monotonic() - since >= drain:
            os._exit(0)  # at any moment, since progress lasts and a send may take its time
        time.sleep(0.5)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sls", description="Ship the journal to Alibaba Cloud's log service, and prepare its console."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shipping = commands.add_parser("ship", help="ship records until no worker serves any more")
    shipping.add_argument("--forever", action="store_true", help="until it is stopped: as a systemd unit or a sidecar")
    making = commands.add_parser("setup", help="make or update logstore, index, dashboard, searches and alerts")
    making.add_argument("--make-project", action="store_true", help="make the project too")
    making.add_argument("--keep-days", type=int, metavar="DAYS", help="how long SLS keeps records (a new logstore: 30)")
    making.add_argument("--dry-run", action="store_true", help="print everything, send nothing")
    commands.add_parser("check", help="send one record, look for it, and say what is wrong")
    commands.add_parser("test-alert", help='make the alert "Test alert" fire')
    given = parser.parse_args(arguments)
    if given.command == "setup" and given.keep_days is not None and not 1 <= given.keep_days <= 3650:
        parser.error("--keep-days: expected 1 to 3650")
    logging.basicConfig(level="INFO", format="[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s")
    try:
        settings = Settings.from_environ(os.environ)
        if not settings.ships:
            raise SettingsError("set SLS_ENDPOINT, SLS_PROJECT and SLS_LOGSTORE")
        return run(given, settings)
    except SettingsError as error:
        print(f"sls: {error}", file=sys.stderr)
        return 2


def run(given: argparse.Namespace, settings: Settings) -> int:
    """Do what the command line asks; return the exit status."""
    if given.command == "ship":
        return ship(settings, given.forever)
    from sls.check import check, fire_test_alert
    from sls.client import connect
    from sls.console import Recipients, setup

    if given.command == "setup":
        return setup(
            partial(connect, environ=os.environ),
            settings,
            Recipients.from_environ(os.environ),
            make_project=given.make_project,
            keep_days=given.keep_days,
            dry_run=given.dry_run,
        )
    client = connect(settings, os.environ)
    return check(client, settings) if given.command == "check" else fire_test_alert(client, settings)


if __name__ == "__main__":
    sys.exit(main())
