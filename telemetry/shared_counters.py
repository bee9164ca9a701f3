"""Numbers that several processes count together, in prometheus_client's files for that, which bound and outlive them.

    slots.clear(slots.directory)                 # in the master, before it forks
    slots.Slot(slots.directory).take_values()    # in each worker: its metrics are in its files from now on
    slots.collect(slots.directory)               # the sums

prometheus_client itself has files for each process id, which stay when it is dead: each restart of a worker would make
`/metrics` slower.
"""

import _thread  # gevent leaves its RLock as it is
import fcntl
import itertools
import json
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import Metric, values
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from monitor import is_finished

# Bytes of a process's file of each kind, all of them taken when it is made: some 45 versions.
FILES = {"counter": 2**16, "gauge_livesum": 2**12, "histogram": 2**18}

directory: Path | None = None  # of the processes that are summed, set before they fork; None: this one is alone


def clear(where: Path) -> None:
    """Begin from zero, unless some process still counts: then its successors, or another master's, go on."""
    with suppress(OSError):  # a directory that cannot be written is said when a process joins
        if all(map(is_finished, where.glob("slot-*"))):
            for path in (*where.glob("*.db"), *where.glob("slot-*")):
                path.unlink()


def collect(where: Path) -> list[Metric]:
    """Return the sums over all processes, dead ones too; of gauges over the living. Takes no lock."""
    living = {path.name.removeprefix("slot-") for path in where.glob("slot-*") if not is_finished(path)}
    files = [
        str(path)
        for path in sorted(where.glob("*.db"))
        if not path.name.startswith("gauge") or path.stem.rpartition("_")[2] in living
    ]
    return sorted(MultiProcessCollector.merge(files), key=lambda metric: metric.name)


class Slot:
    """A process's place among those that are summed: a number, and the files that go by it.

    Format: `slot-<n>` is empty; `counter_<n>.db` and the others are as prometheus_client's `mmap_dict` says.

    Concurrency: the process holds `slot-<n>` with `flock` for life. The next one takes the lowest number that is free
    and counts on where a dead one stopped. So there are never more files than processes that lived at once, no sum goes
    down, and whose requests in flight are to be counted is the kernel's knowledge, also after a `kill -9`.
    """

    def __init__(self, where: Path) -> None:
        """Take the lowest free one.

        Raises:
            OSError: the files cannot be written.
        """
        where.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            self._fd: int | None = os.open(where / f"slot-{number}", os.O_RDWR | os.O_CREAT, 0o640)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                os.close(self._fd)
        try:
            self.files = {kind: _file(where / f"{kind}_{number}.db", size) for kind, size in FILES.items()}
        except OSError:
            self._leave()
            raise
        os.register_at_fork(after_in_child=self._leave)  # a child that kept it would keep the lock

    def is_there(self) -> bool:
        """Tell whether it is held, and nobody removed it."""
        return self._fd is not None and os.fstat(self._fd).st_nlink > 0

    def take_values(self) -> None:
        """Let metrics that are made from now on in this process be in these files."""
        values.ValueClass = partial(_Value, self.files)  # as prometheus_client's documentation does for uWSGI

    def takes(self, version: str) -> bool:
        """Tell whether another version fits, so that an eighth stays free; or is there already."""
        return all(file._used < FILES[kind] * 7 // 8 for kind, file in self.files.items()) or any(
            f'"model_version": {json.dumps(version)}' in key for key in self.files["counter"]._positions
        )

    def _leave(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _file(path: Path, size: int) -> MmapedDict:
    """Open a slot's file; make it where there is none, and empty those of gauges: their process is dead."""
    if not path.exists():
        # Zeros take their room on the disk now. A hole would take it when the memory map is first written to; and where
        # the disk is full by then, the kernel kills the process.
        beside = path.with_suffix(".new")
        beside.write_bytes(bytes(size))
        beside.rename(path)
    elif path.name.startswith("gauge"):
        with path.open("r+b") as file:  # in place, since there may be room for nothing else
            file.write(bytes(size))
    return MmapedDict(str(path))


_lock = _thread.RLock()  # native: a lock of gevent's that a native thread shared would hang the loop


class _Value:
    """A number in a slot's file, where prometheus_client has its own class, for half of its processor time.

    See `prometheus_client.values` for what it is asked.
    """

    def __init__(
        self,
        files: dict[str, MmapedDict],
        kind: str,
        metric: str,
        name: str,
        label_names: Any,
        label_values: Any,
        help_text: str,
        multiprocess_mode: str = "",
        **_: Any,
    ) -> None:
        file = files[f"{kind}_{multiprocess_mode}" if multiprocess_mode else kind]
        key = mmap_key(metric, name, label_names, label_values, help_text)
        with _lock:
            file.read_value(key)  # makes it
            at = file._positions[key]
            self._cell = memoryview(file._m)[at : at + 8].cast("d")

    def inc(self, amount: float) -> None:
        with _lock:
            self._cell[0] += amount

    # The two below are asked for where an application shows its own metrics after another in its process has joined.

    def get(self) -> float:
        return float(self._cell[0])

    def get_exemplar(self) -> None:
        return None
