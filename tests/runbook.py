"""The commands of the operators' pages, as the tests type them.

Above each block of commands stands a comment, which the page does not show: the test that types the block, or why none
does. Commands of a block that cannot be typed are named by their first words:

    <!-- typed in tests/deploy/test_production.py -->
    <!-- typed in tests/deploy/test_production.py, without `sudo apt-get`: it would change this machine -->
    <!-- not typed: there is no cluster here -->

A test gets its blocks from here, so a new command in one of them is typed as well; tests/test_runbook.py looks for a
block without a comment, a command that is gone, and a test that does not ask for its blocks.
"""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = ("operations.md", "upgrades.md", "alerts.md", "records.md", "sls.md", "containers.md", "clouds.md")
WORDS = r"`[^`]+`(?:, `[^`]+`)*"
MARKED = re.compile(
    rf"^<!-- (?:not typed: [^>]+|typed in (?P<test>[\w./-]+)(?:, without (?P<left_out>{WORDS}): [^>]+)?) -->$"
)


class Block(NamedTuple):
    """A block of commands; `test` is the file that types it, or None; `left_out` begins what that leaves out."""

    page: str
    heading: str
    commands: str
    mark: str
    test: str | None
    left_out: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the commands; one that goes on in further lines is one of them. Comments and empty lines are none."""
        joined = re.sub(r"\\\n +", "", self.commands)
        return [line for line in joined.splitlines() if line and not line.startswith("#")]

    def typed(self) -> str:
        """Return what the test types, as it stands in the page."""
        kept = re.split(r"(?<!\\)\n", self.commands)
        return "\n".join(line for line in kept if not line.startswith(self.left_out))


def blocks(page: str) -> list[Block]:
    """Return the blocks of commands of a page, in order."""
    found, heading, above = [], "", ""
    text = (ROOT / "docs" / page).read_text("utf-8")
    for part in re.finditer(r"^#+ (?P<heading>[^\n]+)$|^```(?P<language>\w*)\n(?P<code>.*?)^```$", text, re.M | re.S):
        heading = part["heading"] or heading
        if part["language"] == "sh":
            above = text[: part.start()].rstrip("\n").rpartition("\n")[2]
            mark = MARKED.match(above)
            left_out = re.findall(r"`([^`]+)`", mark["left_out"] or "") if mark else []
            found.append(Block(page, heading, part["code"], above, mark and mark["test"], tuple(left_out)))
    return found


def commands(test: str, page: str, heading: str) -> list[str]:
    """Return the blocks of a section that a test types.

    Args:
        test: its `__file__`.
        heading: of the section, without its number signs.
    """
    name = Path(test).relative_to(ROOT).as_posix()
    found = [each.typed() for each in blocks(page) if (each.test, each.heading) == (name, heading)]
    assert found, f"docs/{page}, {heading}: no block is marked as typed in {name}"
    return found
