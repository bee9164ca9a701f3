"""Numbers that workers count together, in prometheus_client's own files for that.

    counters = SharedCounters(directory, slot.number)   # the metrics that are made from now on are in its files
    collect(directory, WorkerSlot.read(…).keys())       # the sums over all workers, dead ones too

By itself prometheus_client names the files by process id and keeps those of dead processes, so that each restart of a
worker would make `/metrics` slower. Here they are named by the worker's number, which its successor takes over.
"""

import _thread
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from prometheus_client import Metric, metrics, registry, values
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from shared_files import replace_file

# Bytes of a worker's file of each kind, for some 45 versions.
FILES = {"counter": 2**16, "gauge_livesum": 2**12, "histogram": 2**18}

# prometheus_client takes its locks from `threading`; whether those are gevent's depends on the order of imports. A lock
# of gevent's that the loop shares with a native thread loses wake-ups, and the worker would wait forever. This lock is
# the native one in either case.
for _module in (metrics, registry, values):
    _module.Lock = _thread.RLock  # type: ignore[attr-defined]


def collect(directory: Path, living: Collection[int]) -> list[Metric]:
    """Return the sums over all workers, dead ones too, but of gauges only over the workers with these numbers."""
    files = [
        str(path)
        for path in sorted(directory.glob("*.db"))
        if not path.name.startswith("gauge") or int(path.stem.rpartition("_")[2]) in living
    ]
    return sorted(MultiProcessCollector.merge(files), key=lambda metric: metric.name)


class SharedCounters:
    """The files in which a worker counts on from where a dead worker with the same number stopped.

    Format: `counter_<number>.db`, `gauge_livesum_<number>.db` and `histogram_<number>.db`, as prometheus_client's
    `mmap_dict` describes them.

    Concurrency: only the worker that holds the number (worker_slot.WorkerSlot) writes to them, and anyone may read. So
    there are never more files than workers that lived at once, and no sum goes down. A kill loses nothing: what was
    written to a memory map is the kernel's.
    """

    def __init__(self, directory: Path, number: int) -> None:
        """Open the files, or make them. The metrics that this process makes from now on are in them.

        Raises:
            OSError: they cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.number = number
        self._paths = {kind: directory / f"{kind}_{number}.db" for kind in FILES}
        for kind, path in self._paths.items():
            _prepare(path, FILES[kind])
        files = map(str, self._paths.values())
        self._keys = {key for file in files for key, *_ in MmapedDict.read_all_values_from_file(file)}
        labels = [json.loads(key)[2] for key in self._keys]
        self._versions = {(each.get("model_version"), each.get("variant")) for each in labels}
        self._lock = _thread.RLock()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
        self._in_file = values.MultiProcessValue(lambda: number)
        values.ValueClass = self._value  # as prometheus_client's documentation does for uWSGI

    def exist(self) -> bool:
        """Return whether nobody removed the files."""
        return all(path.exists() for path in self._paths.values())

    def takes(self, version: str, variant: str) -> bool:
        """Return whether the files have these labels, or have room for them and an eighth more."""
        if all(self._free(kind) > size // 8 for kind, size in FILES.items()):
            self._versions.add((version, variant))
        return (version, variant) in self._versions

    def _value(self, kind: str, *names: Any, multiprocess_mode: str = "", **_: Any) -> Any:
        """Return a new number: in a file, or if there is no room, in memory, where it is not exposed.

        prometheus_client would enlarge a file by a hole. If the disk is full by the time that it writes to the hole,
        the kernel kills the process.
        """
        file = f"{kind}_{multiprocess_mode}" if multiprocess_mode else kind
        key = mmap_key(*names)
        with self._lock:
            fits = key in self._keys or len(key) + 32 <= self._free(file)  # its size, padding and two doubles
            return (self._in_file if fits else values.MutexValue)(kind, *names, multiprocess_mode=multiprocess_mode)

    def _free(self, kind: str) -> int:
        """Return how many bytes of a file are free, 0 if there is none."""
        try:
            with self._paths[kind].open("rb") as file:
                used = int.from_bytes(file.read(4), sys.byteorder)
                return os.fstat(file.fileno()).st_size - max(used, 8)
        except (KeyError, OSError):  # a kind that only someone else's metrics have; or removed just now
            return 0


def _prepare(path: Path, size: int) -> None:
    """Make a worker's file, or empty that of its gauges: their process is dead."""
    if not path.exists():
        replace_file(path, bytes(size), durable=False)  # zeros, since holes take no room on the disk
    elif path.name.startswith("gauge"):
        with path.open("r+b") as file:  # in place, since the disk may be full
            file.write(bytes(size))
