"""Any JSON becomes rows for models whose columns differ, or a short error."""

import doctest
from typing import Any

import pytest
from hypothesis import given, settings
from test_signature import HOSTILE, NEARLY, VALUES, assert_rows_or_reasons

from model.frames.columns import FrameColumn
from model.frames.signature import FrameSignature

SIGNATURES = {
    "table": FrameSignature(
        "frame",
        (
            FrameColumn("a", "text"),
            FrameColumn("b", "boolean", nullable=True),
            FrameColumn("c", "any"),
            FrameColumn("d"),
        ),
    ),
    "objects": FrameSignature("array", (FrameColumn(None, "text"), FrameColumn(None))),
    "whole numbers": FrameSignature(
        "frame", (FrameColumn("a", dtype="int64"), FrameColumn("b", dtype="int64", nullable=True))
    ),
    "whole numbers without names": FrameSignature(
        "array", (FrameColumn(None, dtype="int64"), FrameColumn(None, dtype="object"))
    ),
}


def test_example_in_the_docstring_runs() -> None:
    scope = {"FrameSignature": FrameSignature, "FrameColumn": FrameColumn}
    (example,) = doctest.DocTestFinder(recurse=False).find(FrameSignature, globs=scope)
    assert doctest.DocTestRunner(verbose=False).run(example) == (0, len(example.examples))


@pytest.mark.parametrize("name", SIGNATURES)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=VALUES | NEARLY)
def test_any_json_gives_rows_or_reasons(name: str, data: Any) -> None:
    assert_rows_or_reasons(SIGNATURES[name], data)


@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize("case", HOSTILE)
def test_error_stays_small_for_any_data(name: str, case: str) -> None:
    assert_rows_or_reasons(SIGNATURES[name], HOSTILE[case])
