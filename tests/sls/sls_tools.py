"""What the tests of shipping share: a server that ships, its shipper's processes, and what is stored."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, Gunicorn, gunicorn
from loopback_sls import LoopbackSLS


@contextmanager
def shipping(place: Path, model: Path, sls: LoopbackSLS, *arguments: str, **settings: Any) -> Iterator[Gunicorn]:
    """Run a gunicorn of two workers that ships to the loopback SLS; its shipper is ended with the block."""
    given = {"model_path": model, "web_concurrency": 2, "graceful_timeout": 10} | sls.environ() | settings
    try:
        with gunicorn(place, *arguments, **given) as server:
            yield server
    finally:
        for pid in shippers(place / "journal"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def shipper(place: Path, sls: LoopbackSLS, *arguments: str, **settings: str) -> Iterator[Any]:
    """Run `python -m sls ship` directly; its log goes to `ship.log`."""
    environ = {"JOURNAL_DIR": str(place / "journal"), "GRACEFUL_TIMEOUT": "10"} | sls.environ()
    environ |= {name.upper() if name.islower() else name: value for name, value in settings.items()}
    with (place / "ship.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "sls", "ship", *arguments], cwd=ROOT, env=environ, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def shippers(journal: Path) -> list[int]:
    """Return the pids of the processes that hold the journal's shipper lock open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"\0sls\0ship" in (process / "cmdline").read_bytes() and any(
                os.readlink(fd) == str(journal / "ship.lock") for fd in (process / "fd").iterdir()
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def stored(sls: LoopbackSLS) -> Counter[str]:
    """Count how often each request is stored."""
    return Counter(entry["request_id"] for entry in list(sls.logs) if entry.get("request_id"))


def assert_all_arrive(sls: LoopbackSLS, answered: list[str], seconds: float = 120.0, twice: bool = False) -> None:
    """Wait until each answered request is stored: once, or `twice` where an acknowledgement may have been lost.

    However often a request is stored, it is under one record id.
    """
    assert len(answered) > 10
    sls.wait_until(lambda: set(answered) <= set(stored(sls)), seconds)
    assert twice or max(stored(sls).values()) == 1
    pairs = {(entry["request_id"], entry["record_id"]) for entry in list(sls.logs) if entry.get("request_id")}
    assert len(pairs) == len({name for name, _ in pairs})


def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that puts the clock forward, in this process: the client's and both loopback services'."""
    shift = [0.0]
    shifted = SimpleNamespace(
        time=lambda: time.time() + shift[0], monotonic=lambda: time.monotonic() + shift[0], sleep=time.sleep
    )
    for module in ("sls.client", "ecs_metadata", "loopback_sls"):
        monkeypatch.setattr(f"{module}.time", shifted)

    def forward(seconds: float) -> None:
        shift[0] += seconds

    return forward


def state(place: Path) -> dict[str, Any]:
    """Read the shipper's progress file."""
    path = place / "journal/ship.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
