"""Which receipts were accepted: 64-bit ids in memory-mapped hash tables that all workers of a host share.

tables = IdTables(directory)
tables.add([(hour, 7)])
tables.find([(hour, 7), (hour, 8)])       # {7}
"""

import mmap
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared_files import replace_file

FIRST_SLOTS = 2**8  # of an hour's first table; each further one has twice as many
MAX_BYTES = 2**30  # of all tables
WORD = struct.Struct("<Q")


class IdTables:
    """The tables of a directory: the ids of receipts, by the hour in which these were made.

    Format: `ids-<hours since 1970>-<number>`, each a count of its ids and then its slots, 8 bytes each. An id is in the
    first slot from `id % slots` on that was free, which is 0, as no id is. A table is filled up to three quarters, then
    the hour gets another, twice as large: no id ever moves, and looking one up always takes about as long.

    Concurrency: every use is under the ledger's lock. A kill loses nothing; an id is written before the count.
    """

    def __init__(self, directory: Path) -> None:
        """Remember the directory."""
        self._directory = directory

    def hours(self) -> dict[int, list[Path]]:
        """Return the files of each hour, the oldest hour first, the smallest file first."""
        found: dict[int, dict[int, Path]] = defaultdict(dict)
        for path in self._directory.glob("ids-*"):
            with suppress(ValueError):  # not ours
                hour, number = path.name.removeprefix("ids-").split("-")
                found[int(hour)][int(number)] = path
        return {hour: [path for _, path in sorted(found[hour].items())] for hour in sorted(found)}

    def sizes(self) -> dict[int, int]:
        """Return the bytes of each hour's files, the oldest hour first."""
        return {hour: sum(path.stat().st_size for path in paths) for hour, paths in self.hours().items()}

    def lacking(self, hour: int, count: int) -> dict[Path, int]:
        """Return the files that are lacking for `count` more ids, with their sizes in bytes."""
        with self.open(hour) as table:
            room, number = table.room, table.count
        found = {}
        while room < count:
            slots = FIRST_SLOTS << number
            found[self._path(hour, number)] = WORD.size * (slots + 1)
            room, number = room + _filled(slots), number + 1
        return found

    def prepare(self, hour: int, count: int) -> None:
        """Make room for `count` more ids. Raises: OSError."""
        for path, size in self.lacking(hour, count).items():
            self._directory.mkdir(parents=True, exist_ok=True)
            # Zeros, no hole: if the disk is full when a map onto a hole is written, the kernel kills the process.
            replace_file(path, bytes(size), durable=False)

    def _path(self, hour: int, number: int) -> Path:
        return self._directory / f"ids-{hour}-{number}"

    @contextmanager
    def open(self, hour: int) -> Iterator["HourTable"]:
        """Open the tables of an hour."""
        maps: list[mmap.mmap] = []
        try:
            with suppress(FileNotFoundError):  # after the last
                while True:
                    with self._path(hour, len(maps)).open("r+b") as file:
                        maps.append(mmap.mmap(file.fileno(), 0))
            yield HourTable(maps)
        finally:
            for each in maps:
                each.close()

    def find(self, ids: Iterable[tuple[int, int]]) -> set[int]:
        """Return those of some ids that were added; each is given after its hour."""
        found: set[int] = set()
        for hour, group in _by_hour(ids).items():
            with self.open(hour) as table:
                found.update(each for each in group if each in table)
        return found

    def add(self, ids: Iterable[tuple[int, int]]) -> None:
        """Add ids, each given after its hour, unless they are there. Raises: OSError."""
        for hour, group in _by_hour(ids).items():
            with self.open(hour) as table:
                new = [each for each in group if each not in table]
            self.prepare(hour, len(new))
            with self.open(hour) as table:
                for each in new:
                    table.add(each)

    def drop(self, hour: int) -> None:
        """Forget the ids of an hour."""
        for path in reversed(self.hours().get(hour, [])):
            path.unlink()


class HourTable:
    """The open tables of one hour."""

    def __init__(self, maps: list[mmap.mmap]) -> None:
        """Use these maps, the smallest first."""
        self._maps = maps

    @property
    def count(self) -> int:
        """Return the number of tables."""
        return len(self._maps)

    @property
    def room(self) -> int:
        """Return how many ids can be added."""
        return sum(max(0, _filled(_slots(each)) - WORD.unpack_from(each)[0]) for each in self._maps)

    def __contains__(self, receipt_id: int) -> bool:
        """Return whether an id was added."""
        return any(_find(each, receipt_id)[1] for each in self._maps)

    def add(self, receipt_id: int) -> None:
        """Add an id, unless it is there. There must be room."""
        if receipt_id in self:
            return
        for each in self._maps:
            (used,) = WORD.unpack_from(each)
            if used < _filled(_slots(each)):
                WORD.pack_into(each, _find(each, receipt_id)[0], receipt_id)
                WORD.pack_into(each, 0, used + 1)
                return
        raise OSError("the tables of receipts have no room")


def _by_hour(ids: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for hour, receipt_id in ids:
        found[hour].append(receipt_id)
    return found


def _slots(table: mmap.mmap) -> int:
    return len(table) // WORD.size - 1


def _filled(slots: int) -> int:
    return slots * 3 // 4


def _find(table: mmap.mmap, receipt_id: int) -> tuple[int, bool]:
    """Return the offset of an id's slot, or of the free one where it belongs, and whether it is there."""
    slots = _slots(table)
    slot = receipt_id % slots
    while (found := WORD.unpack_from(table, WORD.size * (slot + 1))[0]) not in (0, receipt_id):
        slot = (slot + 1) % slots
    return WORD.size * (slot + 1), found == receipt_id
