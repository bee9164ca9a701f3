"""Receipts: what an answer carries so that its truth can be counted later, though nothing of it is stored here.

keys = KeyFile(Path("var/feedback.key"))
keys.open()
text = Issuer("v7", "stable", CLASSIFICATION).issue(keys.keys[0], [0])     # for the header X-Feedback
receipt = verify(text, keys.keys)
"""

import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import struct
from binascii import a2b_base64, b2a_base64
from dataclasses import dataclass
from pathlib import Path
from random import getrandbits
from time import time_ns
from typing import Any

import orjson

from endpoints.error_rate import CLASSIFICATION, REGRESSION
from processes import LogLimit

log = logging.getLogger(__name__)

FORMAT = 1
MAX_PREDICTIONS = 512  # bytes of JSON that a receipt holds; of more it holds a digest
MAX_RECEIPT = 1024  # characters
MAC_BYTES, DIGEST_BYTES = 12, 16
IS_CANARY, IS_REGRESSION, IS_DIGEST = 1, 2, 4  # flags
HEAD = struct.Struct(">BBB")  # format, flags, length of the version
WHEN = struct.Struct(">QI")  # microseconds since 1970, random bits

Key = Any  # a keyed hash, to be copied: it is half of what making one costs

_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_SPELLING = re.compile(r"[A-Za-z0-9_-]+")
_KEYS = re.compile(rb"([0-9a-fA-F]{64})(?:\r?\n([0-9a-fA-F]{64}))?\s*")


class BadReceipt(Exception):
    """A string that is no receipt of this server. The message is for the caller."""


@dataclass(frozen=True)
class Receipt:
    """What an answer to `/predict` was.

    Format: unpadded base64url of

        format (1 byte, 1) · flags (1): canary, regression, digest · length of the version (1) · version (ASCII) ·
        microseconds since 1970 (8, big-endian) · random bits (4) · predictions · MAC (12)

    The predictions are the JSON of the answer's `prediction`, or with the flag `digest` a hash of them (`digest_of`).
    The MAC is keyed BLAKE2b (RFC 7693) of all before it. The random bits tell apart what was answered within the same
    microsecond.
    """

    id: int  # 64 bits, not 0, whatever the spelling: a hash of all but the MAC
    version: str
    variant: str
    kind: str  # CLASSIFICATION or REGRESSION
    made: float  # seconds since 1970
    predictions: bytes  # JSON; or a digest
    is_digest: bool

    def resolve(self, sent: Any) -> Any:
        """Return the predictions, one entry per row; `sent` is what the caller says they were, None for nothing.

        Raises: BadReceipt, they are needed, or are others.
        """
        if sent is None and self.is_digest:
            raise BadReceipt(
                "the predictions were too long for the receipt: send prediction, as it was, beside the truth"
            )
        if sent is None:
            return orjson.loads(self.predictions)
        if digest_of(sent) != (self.predictions if self.is_digest else digest_of(orjson.loads(self.predictions))):
            raise BadReceipt("prediction is not what was answered; send it as it was, with every row")
        return sent


class Issuer:
    """Makes the receipts of one version and variant."""

    def __init__(self, version: str, variant: str, kind: str) -> None:
        """Prepare what they have in common."""
        flags, name = IS_CANARY * (variant == "canary") | IS_REGRESSION * (kind == REGRESSION), version.encode()
        self._head = HEAD.pack(FORMAT, flags, len(name)) + name
        self._head_of_digest = HEAD.pack(FORMAT, flags | IS_DIGEST, len(name)) + name

    def issue(self, key: Key, prediction: Any) -> str:
        """Return a receipt. Raises: TypeError, the prediction has no form in JSON."""
        head, content = self._head, orjson.dumps(prediction, option=orjson.OPT_SERIALIZE_NUMPY)
        if len(content) > MAX_PREDICTIONS:
            head, content = self._head_of_digest, digest_of(orjson.loads(content))
        signed = head + WHEN.pack(time_ns() // 1000, getrandbits(32)) + content
        mac = key.copy()  # as in `_mac`, whose call each answer would pay for
        mac.update(signed)
        return b2a_base64(signed + mac.digest()).translate(_URL_SAFE, b"=\n").decode("ascii")


def verify(text: Any, keys: tuple[Key, ...]) -> Receipt:
    """Return a receipt that was signed with one of the keys. Raises: BadReceipt."""
    if not isinstance(text, str):
        raise BadReceipt("receipt is not a string; send what the header X-Feedback of the answer held")
    spelled = text.strip().rstrip("=").replace("+", "-").replace("/", "_")
    wrong = (
        "this is no receipt of this server: it was cut off, changed, or signed with a key that is no longer accepted; "
        "send what the header X-Feedback of the answer held"
    )
    if len(spelled) > MAX_RECEIPT or not _SPELLING.fullmatch(spelled) or len(spelled) % 4 == 1:
        raise BadReceipt(wrong)
    content = a2b_base64(spelled.replace("-", "+").replace("_", "/") + "=" * (-len(spelled) % 4))
    signed, mac = content[:-MAC_BYTES], content[-MAC_BYTES:]
    matches = [hmac.compare_digest(_mac(key, signed), mac) for key in keys]  # all: it takes as long for either key
    if True not in matches:
        raise BadReceipt(wrong)
    if signed[0] != FORMAT:
        raise BadReceipt("this receipt is of another release of the server, whose format is not known here")
    _, flags, length = HEAD.unpack_from(signed)
    made, _ = WHEN.unpack_from(signed, HEAD.size + length)
    return Receipt(
        id=int.from_bytes(hashlib.blake2b(signed, digest_size=8).digest()) or 1,
        version=signed[HEAD.size : HEAD.size + length].decode(),
        variant="canary" if flags & IS_CANARY else "stable",
        kind=REGRESSION if flags & IS_REGRESSION else CLASSIFICATION,
        made=made / 1e6,
        predictions=signed[HEAD.size + length + WHEN.size :],
        is_digest=bool(flags & IS_DIGEST),
    )


def _mac(key: Key, signed: bytes) -> bytes:
    mac = key.copy()
    mac.update(signed)
    digest: bytes = mac.digest()
    return digest


def digest_of(predictions: Any) -> bytes:
    """Return a hash of decoded predictions in which equal numbers are equal, however they are written."""
    try:
        text = orjson.dumps(_with_floats(predictions), option=orjson.OPT_SORT_KEYS)
    except (TypeError, RecursionError):  # a caller's, nested deeper than any answer
        return b""
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


def _with_floats(value: Any) -> Any:
    if type(value) is list:
        return [_with_floats(each) for each in value]
    if type(value) is float:
        return value + 0.0  # -0.0 becomes 0.0
    if type(value) is int:
        return number if (number := float(value)) == value else value
    if type(value) is dict:
        return {name: _with_floats(each) for name, each in value.items()}
    return value


# --- keys


def new_key(secret: bytes) -> Key:
    """Return the keyed hash of 32 secret bytes."""
    return hashlib.blake2b(key=secret, digest_size=MAC_BYTES)


class KeyFile:
    """The keys in a file: one or two, each 64 hex digits on a line of its own. The first signs, both are accepted.

    Without a file that can be used there are no keys, and one line in the log says why. It never holds what was read.
    """

    def __init__(self, path: Path) -> None:
        """Remember the file. Nothing is read before `open`."""
        self._path = path
        self._etag: tuple[int, ...] = ()
        self._log_limit = LogLimit(log, math.inf)
        self.keys: tuple[Key, ...] = ()

    def open(self) -> None:
        """Read the file, and make it with a random key before if there is none."""
        try:
            if not self._path.exists():
                self._make()
        except OSError as error:
            self._fail(f"it cannot be made: {error.strerror}")
        else:
            self.refresh()

    def _make(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        staging = self._path.with_name(f".{self._path.name}-{secrets.token_hex(8)}")
        fd = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(secrets.token_hex(32).encode() + b"\n")
                file.flush()
                os.fsync(fd)
            os.link(staging, self._path)  # unlike a rename it leaves the key of a worker that was faster
        except FileExistsError:
            pass
        finally:
            staging.unlink()

    def refresh(self) -> None:
        """Read the file again if it has changed. To be called once a second."""
        try:
            found = self._path.stat()
            etag = (found.st_ctime_ns, found.st_mtime_ns, found.st_size, found.st_ino)
            if etag == self._etag:
                return
            with self._path.open("rb") as file:
                content = file.read(1000)
        except OSError as error:
            self._fail(f"it cannot be read: {error.strerror}")
            return
        self._etag = etag
        matched = _KEYS.fullmatch(content)
        if not matched:
            self._fail("expected one or two lines of 64 hex digits each")
            return
        self.keys = tuple(new_key(bytes.fromhex(digits.decode())) for digits in matched.groups() if digits)
        self._log_limit.reset()

    def _fail(self, why: str) -> None:
        self.keys, self._etag = (), ()
        message = "FEEDBACK_KEY_FILE=%s: %s; answers carry no receipt, and no feedback is taken, until that is fixed"
        self._log_limit.error("", message, self._path, why)
