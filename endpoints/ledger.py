"""Which receipts were accepted, and the figures of each version: the one source of both, for all workers of a host."""

from pathlib import Path

from endpoints.error_rate import Figures


class Ledger:
    """The ledger in a directory."""

    def __init__(self, directory: Path) -> None:
        """Remember where it is."""
        self._directory = directory

    def figures(self) -> dict[tuple[str, str], Figures]:
        """Return the figures by (version, variant), summed over the workers."""
        return {}
