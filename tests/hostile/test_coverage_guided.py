"""A few seconds of coverage-guided fuzzing of each reader; `coverage_guided.py` says how to run it for longer."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("coverage_guided.py")
TARGETS = re.findall(r'^    "([a-z]+)": \(', PROGRAM.read_text(), re.MULTILINE)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_but_its_own_errors_comes_of_made_up_bytes(tmp_path: Path, target: str) -> None:
    pytest.importorskip("atheris")
    done = subprocess.run(
        [sys.executable, PROGRAM, target, tmp_path / "corpus", "-max_total_time=2"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (runs,) = re.findall(r"Done (\d+) runs", done.stderr)
    assert int(runs) > 100
