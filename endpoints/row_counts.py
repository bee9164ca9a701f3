"""How many rows each worker predicted with a receipt, by version and variant: counted without a lock that others share.

counts = RowCounts(directory / "rows-0")
count = counts.counter("v7", "stable", CLASSIFICATION)
count(3, time.time())
read_rows([directory / "rows-0"])[("v7", "stable")].rows
"""

import _thread  # a native lock under gevent, too: it is held for half a microsecond, and nothing yields meanwhile
import mmap
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from endpoints.error_rate import CLASSIFICATION, REGRESSION
from processes import replace_file

PLACE = struct.Struct("<Qd80s")  # rows, when last counted (seconds since 1970), kind, version and variant
NUMBERS = struct.Struct("<Qd")
PLACES = 200
KINDS = {"c": CLASSIFICATION, "r": REGRESSION}


@dataclass
class Count:
    """The rows of one version and variant."""

    rows: int
    last: float  # seconds since 1970
    kind: str


class RowCounts:
    """The file in which a worker counts on from where a dead worker with the same number stopped.

    Format: `PLACES` places of `PLACE`; the name in one is `<c or r> <variant> <version>`, padded with zero bytes; a
    place without a name is free. A version beyond them takes the place of the one that was counted longest ago.

    Concurrency: only the worker that holds the number (worker_slot.WorkerSlot) writes, and anyone may read. A kill
    loses nothing: what was written to a memory map is the kernel's.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. Raises: OSError."""
        self.path = path
        size = PLACES * PLACE.size
        if not path.exists() or path.stat().st_size != size:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, bytes(size), durable=False)  # no hole: on a full disk writing to one kills the process
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._lock = _thread.allocate_lock()
        self._names = [name for name, _ in _places(self._map[:])]

    def exists(self) -> bool:
        """Return whether nobody removed the file."""
        return self.path.exists()

    def counter(self, version: str, variant: str, kind: str) -> Callable[[int, float], None]:
        """Return a function that counts rows, with the time of their answer."""
        name, view = f"{kind[0]} {variant} {version}".encode(), self._map
        with self._lock:
            at = self._place(name) * PLACE.size
        lock, unpack, pack = self._lock, NUMBERS.unpack_from, NUMBERS.pack_into

        def count(rows: int, now: float) -> None:
            with lock:
                pack(view, at, unpack(view, at)[0] + rows, now)

        return count

    def _place(self, name: bytes) -> int:
        for wanted in name, b"":
            if wanted in self._names:
                place = self._names.index(wanted)
                break
        else:
            place = min(range(PLACES), key=lambda each: NUMBERS.unpack_from(self._map, each * PLACE.size)[1])
        if self._names[place] != name:
            self._names[place] = name
            PLACE.pack_into(self._map, place * PLACE.size, 0, 0.0, name)
        return place


def read_rows(paths: Iterable[Path]) -> dict[tuple[str, str], Count]:
    """Return the sums over files by version and variant."""
    found: dict[tuple[str, str], Count] = {}
    for path in paths:
        content = b""
        with suppress(OSError):  # removed just now
            content = path.read_bytes()
        for name, (rows, last) in _places(content):
            kind, _, rest = name.decode(errors="replace").partition(" ")
            variant, _, version = rest.partition(" ")
            if kind in KINDS:
                count = found.setdefault((version, variant), Count(0, 0.0, KINDS[kind]))
                count.rows += rows
                if last >= count.last:
                    count.last, count.kind = last, KINDS[kind]
    return found


def _places(content: bytes) -> Iterable[tuple[bytes, tuple[int, float]]]:
    for at in range(0, len(content) - PLACE.size + 1, PLACE.size):
        rows, last, name = PLACE.unpack_from(content, at)
        yield name.rstrip(b"\0"), (rows, last)
