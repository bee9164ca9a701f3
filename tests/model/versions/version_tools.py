"""What the tests of versions share."""

import io
import subprocess
from typing import Any

from model.versions import publishing


def validate_in_this_process(monkeypatch: Any) -> None:
    """Let what proves a version run in this process, where a fresh one is not the point."""

    def run(command: list[str], input: bytes, **_: Any) -> "subprocess.CompletedProcess[bytes]":
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO(input.decode()))
            publishing.main(command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("model.versions.publishing.subprocess.run", run)
