"""How much JSON the rows of one request can be: counted before it is decoded, since a list takes 56 bytes in memory."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .signature import BadRows, Signature

PIECE_SIZE = 2**16  # bytes of JSON in which strings are found at a time
OPEN = 2**62  # a size that has no limit


@dataclass(frozen=True)
class Limits:
    """What the JSON of a request may hold."""

    rows: int
    lists: int = OPEN  # and objects, in all
    values: int = OPEN  # in each of them, on average

    @classmethod
    def of(cls, max_rows: int, signatures: Iterable[Signature]) -> "Limits":
        """Return what `max_rows` rows may hold, of the signature that takes most; without any, it is not known."""
        lists, values = [], []
        for signature in signatures:
            if signature.ignores_extra:  # and what is ignored may be anything
                return cls(max_rows)
            sizes = [OPEN if size is None else size for size in signature.row_shape]
            lists.append(max_rows * sum(math.prod(sizes[:depth]) for depth in range(len(sizes))))
            values.append(math.prod(sizes) if sizes else max_rows)
        # Eight lists more, and for each row a value and a list, as pandas writes an index of several levels.
        return cls(max_rows, max(lists, default=OPEN) + max_rows + 8, max(values, default=OPEN) + 1)

    def check(self, body: bytes) -> None:
        """Reject JSON that holds more, before anything is made of it. Raises: BadRows."""
        if self._exceeded([body]) and (problem := self._exceeded(_without_strings(body))):
            raise BadRows(problem)

    def _exceeded(self, pieces: Iterable[bytes]) -> str:
        lists = commas = 0
        for piece in pieces:
            lists += piece.count(b"[") + piece.count(b"{")
            commas += piece.count(b",")
            if lists > self.lists:
                return f"the body has more lists and objects than {self.rows} rows, the most that one request may have"
        if commas > lists * self.values:
            return "the body has more values than its rows can have; GET /model shows what a row is"
        return ""


def _without_strings(body: bytes) -> Iterator[bytes]:
    """Yield JSON piece by piece with its strings cut out: no copy of it all is made, and other threads run between."""
    in_string, rest = 0, b""
    for at in range(0, len(body), PIECE_SIZE):
        piece = (rest + body[at : at + PIECE_SIZE]).replace(rb"\\", b"").replace(rb"\"", b"")
        rest = b"\\" * piece.endswith(b"\\")  # it belongs to the next byte
        parts = piece.split(b'"')
        yield b"".join(parts[in_string::2])
        in_string ^= (len(parts) - 1) % 2
