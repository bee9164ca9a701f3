"""Which receipts were accepted, and the figures of each version: the one source of both, for all workers of a host.

ledger = Ledger(Path("var/journal"), journal.append)
ledger.accept([Entry(…)])        # [ACCEPTED], and from then on [DUPLICATE]
ledger.figures()["v7", "stable"].describe()
"""

import fcntl
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from endpoints.error_rate import Figures
from endpoints.id_tables import MAX_BYTES, IdTables
from endpoints.receipts import Receipt
from endpoints.row_counts import read_rows
from endpoints.truths import Outcome
from monitor import read_lines, segments
from processes import LogLimit
from shared_files import replace_file

log = logging.getLogger(__name__)

ACCEPTED, DUPLICATE = "accepted", "duplicate"
TOO_OLD = "this receipt is older than those whose truth can still be counted here (FEEDBACK_MAX_AGE, or a full table)"
OTHER_KIND = (
    "this receipt is of a regression and the figures of its version are of a classification, or the reverse: two "
    "models had the same version name, and their truths cannot be counted together; publish one under another name"
)
LOCK_SECONDS = 5.0  # that others may hold the lock; they need milliseconds
BATCH = 100  # entries that are written under the lock at a time: some 3 ms
MAX_FIGURES = 200  # versions and variants; beyond that those go whose feedback is longest ago
HOUR = 3600


@dataclass
class Entry:
    """One receipt with its truth, compared."""

    receipt: Receipt
    outcome: Outcome
    age: float  # seconds from the prediction to the truth
    user: str
    error_bound: float | None = None  # of the version, if it is served still and has one

    @property
    def hour(self) -> int:
        """Return the hour since 1970 in which the receipt was made."""
        return int(self.receipt.made // HOUR)

    def record(self) -> dict[str, Any]:
        """Return the record for the journal: neither the truth nor the prediction."""
        receipt = self.receipt
        known = {"event": "feedback", "receipt_id": f"{receipt.id:016x}", "age": round(self.age, 3), "user": self.user}
        known |= {"model_version": receipt.version, "variant": receipt.variant, "error_bound": self.error_bound}
        return known | asdict(self.outcome)


class Ledger:
    """The ledger of one host, in `feedback/` beside the journal's segments.

    Format: `figures.json` holds the figures by `"<variant> <version>"`, and `oldest`, the hour before which no receipt
    is taken since their ids are not kept; `ids-…` the ids of accepted receipts (id_tables.py); `rows-…` the predicted
    rows of each worker (row_counts.py). `intent.json` is a batch that is being written: the pid of the writer, the
    records for the journal, the ids, and the figures as they will be.

    A batch is written in this order: intent, records, ids, figures, end of the intent. A batch without an intent was
    not begun, and its caller has no answer, so it may be sent again. One with an intent is completed by the next who
    takes the lock: ids and figures are written again, which changes nothing if they were there, and of the records
    those that are not in the dead writer's segments. So each receipt counts once, whenever its writer is killed.

    Concurrency: writers take an exclusive `flock` on `lock`, for milliseconds; readers take none, since files are
    replaced. Not synced to disk: like the journal, it may lose the last seconds in a power failure.
    """

    def __init__(self, journal_dir: Path, append: Callable[[dict[str, Any]], None]) -> None:
        """Remember where the journal is, and the function that appends a record to it."""
        self._journal_dir, self._append = journal_dir, append
        self.directory = journal_dir / "feedback"
        self._intent, self._state = self.directory / "intent.json", self.directory / "figures.json"
        self._ids = IdTables(self.directory)
        self._log_limit = LogLimit(log)
        self._forgotten = 0  # the hour before which the ids were forgotten

    # --- reading

    def figures(self) -> dict[tuple[str, str], Figures]:
        """Return the figures by (version, variant), summed over the workers.

        Read anew each time: if each worker kept them for a while, a counter could go down from one answer to the next.
        """
        found = self._figures(_load(self._state))
        for key, count in read_rows(self.directory.glob("rows-*")).items():
            found.setdefault(key, Figures(count.kind)).predicted_rows = count.rows
        return found

    @staticmethod
    def _figures(state: dict[str, Any]) -> dict[tuple[str, str], Figures]:
        found = {}
        for name, values in state.get("figures", {}).items():
            variant, _, version = name.partition(" ")
            found[version, variant] = Figures.read(values)
        return found

    # --- writing

    def accept(self, entries: list[Entry]) -> list[str]:
        """Count the entries that were not counted before.

        Returns: for each ACCEPTED, DUPLICATE, or why it is rejected. Raises: OSError, the ledger cannot be written;
        what was counted before that happened is a duplicate at the next attempt.
        """
        results: list[str] = []
        for at in range(0, len(entries), BATCH):
            with self._locked(LOCK_SECONDS):
                results += self._accept(entries[at : at + BATCH])
            time.sleep(0.0001)  # other requests, and other workers, get their turn
        return results

    @contextmanager
    def _locked(self, seconds: float) -> Iterator[None]:
        """Hold the lock, with no batch of a dead writer left. Raises: OSError.

        It is polled, since a `flock` that waits would stop all requests of a worker under gevent.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        fd, deadline = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o640), time.monotonic() + seconds
        try:
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() >= deadline:
                    raise TimeoutError("another worker holds the ledger's lock")
                time.sleep(0.002)
            self._repair()
            yield
        finally:
            os.close(fd)

    def _accept(self, entries: list[Entry]) -> list[str]:
        state = _load(self._state)
        self._make_room(state, entries)
        results = self._classify(entries, state)
        new = [entry for entry, result in zip(entries, results, strict=True) if result == ACCEPTED]
        if new:
            for entry in new:
                _count(state["figures"], entry)
            _limit(state["figures"])
            records, ids = [entry.record() for entry in new], [(entry.hour, entry.receipt.id) for entry in new]
            intent = {"pid": os.getpid(), "began": time.time(), "records": records, "ids": ids, "state": state}
            replace_file(self._intent, orjson.dumps(intent), durable=False)
            self._complete(intent, written=set())
        return results

    def _classify(self, entries: list[Entry], state: dict[str, Any]) -> list[str]:
        results, known = [], self._ids.find((entry.hour, entry.receipt.id) for entry in entries)
        kinds = {name: figures["kind"] for name, figures in state["figures"].items()}
        for entry in entries:
            if entry.receipt.id in known:
                results.append(DUPLICATE)
            elif entry.hour < state["oldest"]:
                results.append(TOO_OLD)
            elif kinds.setdefault(_name(entry), entry.receipt.kind) != entry.receipt.kind:
                results.append(OTHER_KIND)
            else:
                known.add(entry.receipt.id)
                results.append(ACCEPTED)
        return results

    def _make_room(self, state: dict[str, Any], entries: list[Entry]) -> None:
        """Make room for the ids of entries, if need be by forgetting the oldest, whose receipts are refused then."""
        counts = Counter(entry.hour for entry in entries if entry.hour >= state["oldest"])
        if needed := sum(sum(self._ids.lacking(hour, count).values()) for hour, count in counts.items()):
            self._forget(state, needed=needed)
        for hour, count in counts.items():
            if hour >= state["oldest"]:
                self._ids.prepare(hour, count)

    def _forget(self, state: dict[str, Any], *, before: int = 0, needed: int = 0) -> None:
        """Forget the ids of the hours before one, and more until so many bytes are free."""
        sizes = self._ids.sizes()
        free = MAX_BYTES - sum(sizes.values())
        for hour, size in sizes.items():
            if hour >= before and free >= needed:
                break
            state["oldest"] = max(state["oldest"], hour + 1)
            replace_file(self._state, orjson.dumps(state), durable=False)  # first: else its receipts would count twice
            self._ids.drop(hour)
            free += size

    def _complete(self, intent: dict[str, Any], written: set[str]) -> None:
        """Write a batch, but for the records that are written already."""
        for record in intent["records"]:
            if record["receipt_id"] not in written:
                self._append(dict(record))
        self._ids.add(intent["ids"])
        replace_file(self._state, orjson.dumps(intent["state"]), durable=False)
        self._intent.unlink()

    # --- beside the requests

    def tidy(self, max_age: float) -> None:
        """Complete the batch of a dead writer, and forget receipts older than `max_age` seconds. Once a second."""
        before = int((time.time() - max_age) // HOUR)
        due = before != self._forgotten
        if not due and not self._intent.exists():
            return
        try:
            with self._locked(seconds=0.0):
                self._forget(_load(self._state), before=before)
                self._remove_temporary_files()
                self._forgotten = before
        except TimeoutError:
            pass  # another worker is at it
        except OSError as error:
            self._log_limit.error("", "the feedback in %s cannot be written: %s", self.directory, error)

    def _repair(self) -> None:
        """Complete the batch of a writer that died, or whose disk was full. Raises: OSError."""
        try:
            intent = orjson.loads(self._intent.read_bytes())
        except FileNotFoundError:
            return
        except ValueError:  # a power failure
            self._intent.unlink()
            return
        written: set[str] = set()
        for path in segments(self._journal_dir):
            with suppress(OSError):  # shipped meanwhile
                if path.stem.endswith(f"-{intent['pid']}") and path.stat().st_mtime >= intent["began"] - 1:
                    written |= {str(record.get("receipt_id")) for _, record in read_lines(path) if record}
        self._complete(intent, written)

    def _remove_temporary_files(self) -> None:
        """Remove what killed writers left; not the files that are written without the lock, of which some may live."""
        for pattern in (".intent*", ".figures*", ".ids*"):
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, Any]:
    """Return the state in a file. One that a power failure damaged is kept under another name, for people."""
    state: dict[str, Any] = {"oldest": 0, "figures": {}}
    try:
        state = state | orjson.loads(path.read_bytes())
    except FileNotFoundError:
        pass
    except (ValueError, TypeError):  # not JSON, or no object
        log.error("%s is damaged, perhaps by a power failure: the figures begin at zero", path)
        with suppress(OSError):
            path.rename(path.with_suffix(".damaged"))
    return state


def _name(entry: Entry) -> str:
    return f"{entry.receipt.variant} {entry.receipt.version}"


def _count(figures: dict[str, dict[str, Any]], entry: Entry) -> None:
    """Add an entry to the figures of its version, which go to the end: the dict is in the order of feedback."""
    name = _name(entry)
    found = Figures.read(figures.pop(name, {"kind": entry.receipt.kind}))
    found.add(asdict(entry.outcome), entry.age)
    figures[name] = asdict(found)


def _limit(figures: dict[str, dict[str, Any]]) -> None:
    while len(figures) > MAX_FIGURES:
        del figures[next(iter(figures))]
