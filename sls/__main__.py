"""The command line: `python -m sls`."""

import argparse
import fcntl
import logging
import os
import signal
import sys
import threading
import time

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
    given = parser.parse_args(arguments)
    logging.basicConfig(level="INFO", format="[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s")
    try:
        settings = Settings.from_environ(os.environ)
    except SettingsError as error:
        print(f"sls: {error}", file=sys.stderr)
        return 2
    if not settings.ships:
        print("sls: set SLS_ENDPOINT, SLS_PROJECT and SLS_LOGSTORE", file=sys.stderr)
        return 2
    return ship(settings, given.forever)


if __name__ == "__main__":
    sys.exit(main())
