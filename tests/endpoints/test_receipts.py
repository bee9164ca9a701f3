"""Receipts: what one holds, who can make one, and the file with the keys."""

import base64
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoints.error_rate import CLASSIFICATION, REGRESSION
from endpoints.receipts import MAX_PREDICTIONS, BadReceipt, Issuer, KeyFile, new_key, verify

KEY, OTHER = new_key(b"k" * 32), new_key(b"o" * 32)
ISSUER = Issuer("v7", "canary", CLASSIFICATION)
A, B = "a" * 64, "0123456789ABCDEF" * 4


def test_receipt_holds_what_was_answered() -> None:
    began = time.time()
    text = Issuer("1849801354f9", "stable", CLASSIFICATION).issue(KEY, np.array([2]))
    assert len(text) <= 60
    receipt = verify(text, (KEY,))
    assert (receipt.version, receipt.variant, receipt.kind) == ("1849801354f9", "stable", CLASSIFICATION)
    assert began - 0.001 <= receipt.made <= time.time()
    assert receipt.resolve(None) == [2]
    other = verify(Issuer("v" * 64, "canary", REGRESSION).issue(KEY, [0.5, None]), (KEY,))
    assert (other.version, other.variant, other.kind) == ("v" * 64, "canary", REGRESSION)
    assert other.resolve(None) == [0.5, None]


def test_equal_answers_have_different_receipts() -> None:
    assert len({verify(ISSUER.issue(KEY, [0]), (KEY,)).id for _ in range(10_000)}) == 10_000


def test_every_spelling_of_a_receipt_is_one_id() -> None:
    for _ in range(50):
        text = ISSUER.issue(KEY, [["a", 1.5], None])
        padded = text + "=" * (-len(text) % 4)
        standard = padded.replace("-", "+").replace("_", "/")
        spare = {2: "AQgw", 3: "AEIM"}.get(len(text) % 4, "")  # last letters that differ in bits that nobody reads
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        mask = {2: 0b110000, 3: 0b111100}.get(len(text) % 4, 0b111111)
        last = letters.index(text[-1])
        others = [text[:-1] + letter for i, letter in enumerate(letters) if spare and i & mask == last & mask]
        ids = {verify(each, (KEY,)).id for each in (text, padded, standard, f" {text}\n", *others)}
        assert len(ids) == 1


@given(
    st.one_of(st.text(max_size=200), st.binary(max_size=200).map(lambda raw: base64.urlsafe_b64encode(raw).decode()))
)
def test_what_is_no_receipt_is_rejected(text: str) -> None:
    with pytest.raises(BadReceipt, match="no receipt of this server"):
        verify(text, (KEY,))


@given(st.data())
def test_receipt_that_was_changed_anywhere_is_rejected(data: Any) -> None:
    content = bytearray(base64.urlsafe_b64decode(_PADDED))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BadReceipt, match="no receipt of this server"):
        verify(base64.urlsafe_b64encode(content).decode(), (KEY,))
    with pytest.raises(BadReceipt, match="no receipt of this server"):
        verify(_PADDED[: data.draw(st.integers(0, len(_PADDED) - 5))], (KEY,))


_PADDED = ISSUER.issue(KEY, ["x"] * 7)
_PADDED += "=" * (-len(_PADDED) % 4)


@pytest.mark.parametrize("value", [None, 3, True, ["a"], {"a": 1}, 1.5])
def test_receipt_must_be_a_string(value: Any) -> None:
    with pytest.raises(BadReceipt, match="receipt is not a string"):
        verify(value, (KEY,))


def test_either_key_is_accepted_and_another_is_not() -> None:
    text = ISSUER.issue(KEY, [0])
    assert verify(text, (KEY,)).id == verify(text, (OTHER, KEY)).id == verify(text, (KEY, OTHER)).id
    for keys in (OTHER,), ():
        with pytest.raises(BadReceipt):
            verify(text, keys)


def long(row: Any) -> list[Any]:
    """Return predictions that do not fit a receipt."""
    return [row] * MAX_PREDICTIONS


@pytest.mark.parametrize(
    ("answered", "sent"),
    [
        (np.array(long(3)), long(3.0)),
        (np.array(long(0.1), dtype=np.float32), long(0.1)),
        (np.array(long(-0.0)), long(0)),
        (np.array(long(1e16)), long(10**16)),
        (np.array([np.nan, np.inf, 1.0] * 300), [None, None, 1] * 300),
        (long("Zürich"), long("Zürich")),
        (long(2**60 + 1), long(2**60 + 1)),
        (long([1, 0.5]), long([1.0, 0.5])),
        (long({"b": 1, "a": None}), long({"a": None, "b": 1.0})),
    ],
)
def test_long_predictions_are_sent_again_and_compared_as_numbers(answered: Any, sent: Any) -> None:
    text = ISSUER.issue(KEY, answered)
    assert len(text) < 80
    receipt = verify(text, (KEY,))
    assert receipt.resolve(sent) == sent
    with pytest.raises(BadReceipt, match="send prediction"):
        receipt.resolve(None)
    for wrong in (sent[:-1], [*sent[:-1], "other"], [*sent, None], {}, "x", deep(1000)):
        with pytest.raises(BadReceipt, match="not what was answered"):
            receipt.resolve(wrong)


def deep(levels: int) -> list[Any]:
    """Return lists in lists, as deep as the JSON parser takes them."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


def test_prediction_that_fits_may_be_sent_and_must_be_right() -> None:
    receipt = verify(ISSUER.issue(KEY, [3, 4]), (KEY,))
    assert receipt.resolve([3.0, 4]) == [3, 4]
    for wrong in ([3], [4, 3], ["3", 4], [True, 4], 3, deep(1000)):
        with pytest.raises(BadReceipt, match="not what was answered"):
            receipt.resolve(wrong)
    with pytest.raises(BadReceipt, match="not what was answered"):
        verify(ISSUER.issue(KEY, [1]), (KEY,)).resolve([True])


def test_receipt_that_just_fits_holds_its_predictions() -> None:
    for row in range(MAX_PREDICTIONS - 20, MAX_PREDICTIONS):
        receipt = verify(Issuer("v" * 64, "stable", CLASSIFICATION).issue(KEY, ["x" * row]), (KEY,))
        assert receipt.is_digest == (row + 4 > MAX_PREDICTIONS)


# --- the file with the keys


def test_key_file_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "feedback.key"
    first, second = KeyFile(path), KeyFile(path)
    first.open()
    second.open()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert verify(ISSUER.issue(first.keys[0], [0]), second.keys).resolve(None) == [0]


@pytest.mark.parametrize("content", [A, f"{A}\n", f"{A}\n{B}", f"{A}\n{B}\n", f"{A}\r\n{B}\r\n\n", f"{B}\n{A} \n"])
def test_one_or_two_keys_are_read(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(content.encode())
    file = KeyFile(path)
    file.open()
    expected = [bytes.fromhex(line) for line in content.split()]
    assert len(file.keys) == len(expected)
    for key, secret in zip(file.keys, expected, strict=True):
        assert verify(ISSUER.issue(key, [0]), (new_key(secret),))


BAD_KEYS = [b"", b"\n", A[:-1].encode(), f"{A}a".encode(), f"{A}\n{A}\n{A}".encode(), b"\xff" * 64, f"#\n{A}".encode()]


@pytest.mark.parametrize("content", [*BAD_KEYS, b"g" * 64, f"{A} {A}".encode(), b"0" * 5000])
def test_malformed_key_file_gives_no_keys_and_one_line_without_its_content(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    file = KeyFile(path)
    file.open()
    for _ in range(3):
        os.utime(path)
        file.refresh()
    assert file.keys == ()
    assert path.read_bytes() == content
    (record,) = caplog.records
    assert "one or two lines of 64 hex digits" in record.getMessage()
    assert len(record.getMessage()) < 300
    assert content.decode("latin-1") not in record.getMessage() or len(content) < 2


def test_keys_follow_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "key"
    path.write_text(A)
    file = KeyFile(path)
    file.open()
    old = ISSUER.issue(file.keys[0], [0])
    path.write_text(f"{A}\n{B}\n")
    file.refresh()
    assert len(file.keys) == 2
    path.write_text(f"{B}\n{A}\n")
    file.refresh()
    assert verify(old, file.keys)
    assert verify(ISSUER.issue(file.keys[0], [0]), (new_key(bytes.fromhex(B)),))
    path.write_text(f"{B}\n")
    file.refresh()
    with pytest.raises(BadReceipt):
        verify(old, file.keys)
    path.unlink()
    file.refresh()
    assert file.keys == ()
    path.write_text(A)
    file.refresh()
    assert len(file.keys) == 1
    assert "cannot be read: No such file" in caplog.text
    path.write_text("half a line")
    for _ in range(3):
        file.refresh()
    assert [each.getMessage() for each in caplog.records if "one or two lines" in each.getMessage()] != []
    assert len(caplog.records) == 2  # one for each time that there were no keys


def test_key_file_in_what_is_no_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    file = KeyFile(tmp_path / "file" / "key")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            file.open()
            file.refresh()
    assert (file.keys, len(caplog.records)) == ((), 1)
