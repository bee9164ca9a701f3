"""A minute of what soak.py does for an hour."""

from pathlib import Path

import pytest
from soak import soak


@pytest.mark.long
def test_nothing_grows_and_no_record_is_lost(tmp_path: Path) -> None:
    soak(tmp_path, 60)
