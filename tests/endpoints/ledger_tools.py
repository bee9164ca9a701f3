"""What the tests of the ledger share; without what takes seconds to import."""

from pathlib import Path

from endpoints.error_rate import CLASSIFICATION
from endpoints.ledger import Entry, Ledger
from endpoints.receipts import Receipt
from endpoints.truths import Outcome
from monitor import Journal


def entry(number: int, *, wrong: int = 0, hour: int = 5, version: str = "v1", kind: str = CLASSIFICATION) -> Entry:
    """Return an entry with this id and one row."""
    receipt = Receipt(number, version, "stable", kind, hour * 3600.0, b"[0]", is_digest=False)
    return Entry(receipt, Outcome(1, wrong, 0), 60.5, "alice")


def open_ledger(place: Path) -> Ledger:
    """Open a journal with a ledger, as a worker does."""
    return Ledger(place, Journal(place, 2**24).append)
