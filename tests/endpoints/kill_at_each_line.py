"""Kills a writer of the ledger at each line that it executes, and checks that the next one counts everything once.

python tests/endpoints/kill_at_each_line.py DIRECTORY EVERY     every line, or each second, third, … one
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from ledger_tools import entry, open_ledger

from endpoints.ledger import ACCEPTED, DUPLICATE, Entry
from monitor import read_lines, segments

FILES = ("endpoints/ledger.py", "endpoints/id_tables.py", "processes.py", "shared_files.py", "monitor.py")


def accept(place: Path, entries: list[Entry], last: int) -> None:
    """Accept entries, in a process that dies at the line with this number."""
    lines = 0

    def note(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return note if frame.f_code.co_filename.endswith(FILES) else None

    ledger = open_ledger(place)
    sys.settrace(note)
    ledger.accept(entries)


def main(directory: Path, every: int) -> None:
    """Kill one writer after the other, each a line later, until one gets to the end."""
    for last in range(1, 10_000, every):
        place = directory / str(last)
        place.mkdir()
        open_ledger(place).accept([entry(1)])
        batch = [entry(2, wrong=1), entry(3, hour=7), entry(2), entry(1)]
        child = os.fork()
        if not child:
            accept(place, batch, last)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        repaired = open_ledger(place)
        if last % 2:  # the next writer completes the batch, or a worker that has nothing to write
            repaired.tidy(10**10)
        results = repaired.accept(batch)
        assert results[2:] == [DUPLICATE, DUPLICATE], (last, results)
        assert results[:2] in ([ACCEPTED, ACCEPTED], [DUPLICATE, DUPLICATE]), (last, results)
        assert repaired.accept(batch) == [DUPLICATE] * 4, last
        (figures,) = repaired.figures().values()
        assert (figures.rows, figures.wrong, figures.entries) == (3, 1, 3), (last, figures)
        lines = (record for path in segments(place) for _, record in read_lines(path) if record)
        written = sorted(record["receipt_id"] for record in lines)
        assert written == [f"{number:016x}" for number in (1, 2, 3)], (last, written)
        open_ledger(place).tidy(10**10)
        names = {path.name for path in repaired.directory.iterdir()}
        assert names == {"figures.json", "ids-5-0", "ids-7-0", "lock"}, (last, names)
        if status == 0:
            print(f"{last} lines")
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
