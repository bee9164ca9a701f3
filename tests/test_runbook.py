"""Every command of the operators' pages is typed by a test, or its page says why it cannot be."""

import ast

import pytest
from runbook import MARKED, PAGES, ROOT, Block, blocks

BLOCKS = [block for page in PAGES for block in blocks(page)]


def asked_for() -> set[tuple[str, str, str]]:
    """Return the file, page and heading of each call of `runbook.commands` in the tests."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "runbook.commands":
                page, heading = (ast.literal_eval(each) for each in call.args[1:])
                found.add((path.relative_to(ROOT).as_posix(), page, heading))
    return found


@pytest.mark.parametrize("block", BLOCKS)
def test_block_of_commands_is_typed_or_says_why_not(block: Block) -> None:
    assert MARKED.match(block.mark), f"{block.page}, {block.heading}: no line above says who types {block.lines()[0]}"
    for words in block.left_out:
        assert any(line.startswith(words) for line in block.lines()), f"{words} is gone"
    assert block.test is None or block.typed().strip()


def test_tests_type_the_blocks_that_name_them_and_no_others() -> None:
    assert asked_for() == {(block.test, block.page, block.heading) for block in BLOCKS if block.test}


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_in_blocks_of_the_shell_alone(page: str) -> None:
    text = (ROOT / "docs" / page).read_text("utf-8")
    assert text.count("```sh\n") == len(blocks(page))
    assert not [each for each in ("```bash", "```shell", "```console") if each in text]
