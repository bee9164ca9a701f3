"""How many rows each worker predicted with a receipt, by version and variant: counted without a lock that others share.

counts = RowCounts(directory / "rows-0")
count = counts.counter("v7", "stable", CLASSIFICATION)
count(3)
read_rows([directory / "rows-0"])[("v7", "stable")].rows
"""

import _thread  # its RLock is native under gevent too, its allocate_lock is not; nothing yields while it is held
import mmap
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from endpoints.error_rate import CLASSIFICATION, REGRESSION
from shared_files import replace_file

PLACE = struct.Struct("@Qd80s")  # rows, when last counted (seconds since 1970, a second late), name
PLACES = 200
KEPT = 100  # when a worker starts; so there are as many free places
KINDS = {"c": CLASSIFICATION, "r": REGRESSION}


@dataclass
class Count:
    """The rows of one version and variant."""

    rows: int
    last: float  # when last counted, in seconds since 1970
    kind: str


class RowCounts:
    """The file in which a worker counts on from where a dead worker with the same number stopped.

    Format: `PLACES` places of `PLACE`, in the machine's byte order; the name in one is `<c or r> <variant> <version>`,
    padded with zero bytes; a place without a name is free. At a start the `KEPT` that were counted last are kept.

    Concurrency: only the worker that holds the number (worker_slot.WorkerSlot) writes, and anyone may read. A kill
    loses nothing: what was written to a memory map is the kernel's.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. Raises: OSError."""
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        places = sorted(_places(content), key=lambda place: place[1], reverse=True)
        if len(content) != PLACES * PLACE.size or len(places) > KEPT:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = b"".join(PLACE.pack(*place) for place in places[:KEPT]).ljust(PLACES * PLACE.size, b"\0")
            replace_file(path, content, durable=False)  # zeros, no hole: a write to one can kill on a full disk
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), len(content))
        self._lock = _thread.RLock()
        self._names = [name for _, _, name in _places(content)]
        self._noted = [rows for rows, _, _ in _places(content)]

    def note(self) -> None:
        """Note when rows were counted, once a second: each answer would pay for the time of its own count."""
        places, now = memoryview(self._map).cast("Q"), time.time()
        for at, before in enumerate(self._noted):
            if (rows := places[at * PLACE.size // 8]) != before:
                self._noted[at] = rows
                memoryview(self._map).cast("d")[at * PLACE.size // 8 + 1] = now

    def exists(self) -> bool:
        """Return whether nobody removed the file."""
        return self.path.exists()

    def counter(self, version: str, variant: str, kind: str) -> Callable[[int], None]:
        """Return a function that counts rows. Raises: OSError, there is no place left."""
        name, lock = f"{kind[0]} {variant} {version}".encode(), self._lock
        with lock:
            if name not in self._names:
                if len(self._names) == PLACES or len(name) > 80:
                    raise OSError("too many versions were served since this worker started")
                PLACE.pack_into(self._map, len(self._names) * PLACE.size, 0, time.time(), name)
                self._names.append(name)
                self._noted.append(0)
            at = self._names.index(name) * PLACE.size // 8
        rows = memoryview(self._map).cast("Q")

        def count(number: int) -> None:
            with lock:
                rows[at] += number

        return count


def read_rows(paths: Iterable[Path]) -> dict[tuple[str, str], Count]:
    """Return the sums over files by version and variant."""
    found: dict[tuple[str, str], Count] = {}
    for path in paths:
        content = b""
        with suppress(OSError):  # removed just now
            content = path.read_bytes()
        for rows, last, name in _places(content):
            kind, _, rest = name.decode(errors="replace").partition(" ")
            variant, _, version = rest.partition(" ")
            if kind in KINDS:
                count = found.setdefault((version, variant), Count(0, 0.0, KINDS[kind]))
                count.rows += rows
                if last >= count.last:
                    count.last, count.kind = last, KINDS[kind]
    return found


def _places(content: bytes) -> list[tuple[int, float, bytes]]:
    """Return the rows, the time and the name of each place that is taken."""
    whole = content[: len(content) // PLACE.size * PLACE.size]
    places = ((rows, last, name.rstrip(b"\0")) for rows, last, name in PLACE.iter_unpack(whole))
    return [place for place in places if place[2]]
