"""The Chinese pages say what the English ones say: their shape, commands, names and numbers; and how they are set."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import ROOT
from test_docs import README

import auth_commands
import model.__main__
import sls.__main__
from settings import Settings

CHINESE_README = (ROOT / "README.zh-CN.md").read_text("utf-8")
CHINESE = [ROOT / "README.zh-CN.md", *sorted(ROOT.glob("docs/zh/*.md"))]
PAGES = {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {*CHINESE}
ENGLISH = "".join(path.read_text("utf-8") for path in sorted(PAGES))
COMMANDS = {"auth": auth_commands.commands, "model": model.__main__.commands, "sls": sls.__main__.commands}
QUESTIONS = (ROOT / "docs/zh/questions.md").read_text("utf-8")
each_page = pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HAN = "[\u4e00-\u9fff]"


def prose(text: str) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", text)


def code(text: str) -> list[tuple[str, str]]:
    """Return the language and the lines of each code block, without comments and the blanks before them."""
    return [(language, re.sub(r"(?m)(^|\s+)# .*$", "", block)) for language, block in FENCE.findall(text)]


def spans(text: str) -> set[str]:
    """Return what a page shows as code within its sentences and tables."""
    return set(re.findall(r"`([^`\n]+)`", prose(text)))


def tables(text: str) -> list[list[str]]:
    """Return the rows of each table."""
    return [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", prose(text), re.MULTILINE)]


def test_readmes_link_to_each_other_at_their_beginning() -> None:
    assert "](README.zh-CN.md)" in "".join(README.splitlines()[:3])
    assert "](README.md)" in "".join(CHINESE_README.splitlines()[:3])


def test_readmes_have_the_same_headings_tables_commands_and_names() -> None:
    levels, chinese_levels = (re.findall(r"^#+", prose(text), re.MULTILINE) for text in (README, CHINESE_README))
    assert chinese_levels == levels
    assert [len(table) for table in tables(CHINESE_README)] == [len(table) for table in tables(README)]
    for rows, chinese_rows in zip(tables(README), tables(CHINESE_README), strict=True):
        for row, chinese_row in zip(rows, chinese_rows, strict=True):
            assert re.findall(r"\d+", chinese_row) == re.findall(r"\d+", row)
    assert code(CHINESE_README) == code(README)
    assert spans(CHINESE_README) == spans(README)


def test_every_chinese_page_is_linked_from_the_chinese_readme() -> None:
    for page in CHINESE[1:]:
        assert f"](docs/zh/{page.name}" in CHINESE_README, page.name


@each_page
def test_code_is_that_of_the_english_pages(page: Path) -> None:
    lines = {line.strip() for _, block in code(ENGLISH) for line in block.splitlines()}
    for _, block in code(page.read_text("utf-8")):
        assert {line.strip() for line in block.splitlines()} <= lines


@each_page
def test_names_are_those_of_the_english_pages(page: Path) -> None:
    known = spans(ENGLISH)
    known |= {word for span in known for word in span.split()}
    blocks = "".join(block for _, block in code(ENGLISH))
    for name in spans(page.read_text("utf-8")) - known:
        is_test = re.fullmatch(r"test_\w+(\.py)?", name)  # of these see below
        assert is_test or name in blocks or (ROOT / name).exists(), name


@each_page
def test_settings_and_commands_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    shown = [*spans(text), *(line for language, block in code(text) if language == "sh" for line in block.splitlines())]
    for variable in re.findall(r"(?<![/\w])([A-Z][A-Z_]+)=", "\n".join(shown)):
        assert hasattr(Settings, variable.lower()), variable
    for module, rest in re.findall(r"python -m ([\w.]+)(.*)", "\n".join(shown)):
        if module in COMMANDS:
            assert_command_is_there(COMMANDS[module], shlex.split(rest.partition("<")[0]))
        else:
            assert importlib.util.find_spec(module), module


def assert_command_is_there(group: click.Group, words: list[str]) -> None:
    """Assert that a group has the command that these words name, if any, and the command the options among them."""
    names = [word for word in words if not word.startswith("-")]
    command = next((group.commands[name] for name in names if name in group.commands), None)
    assert command or not names, names
    known = {option for each in (group, command) if each for parameter in each.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_every_alert_of_the_english_guide_is_in_the_chinese_one() -> None:
    english = re.findall(r"^### Alert: (.+)$", (ROOT / "docs/alerts.md").read_text("utf-8"), re.MULTILINE)
    chinese = (ROOT / "docs/zh/operations.md").read_text("utf-8")
    assert re.findall(r"^### 告警：.+（(.+)）$", chinese, re.MULTILINE) == english


# --- the fifteen questions


def questions() -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each section with a number."""
    for number, section in re.findall(r"^## (\d+)\. (.*?)(?=^## |\Z)", QUESTIONS, re.MULTILINE | re.DOTALL):
        yield int(number), section


def test_there_are_fifteen_questions() -> None:
    assert [number for number, _ in questions()] == list(range(1, 16))


@pytest.mark.parametrize("section", [section for _, section in questions()], ids=[str(n) for n, _ in questions()])
def test_answer_names_its_code_and_tests_that_are_there(section: str) -> None:
    assert re.search(r"^\*\*.+\*\*", section, re.MULTILINE)  # the answer in a sentence
    assert re.search(r"^- 代码：\[", section, re.MULTILINE)
    tests = re.findall(r"^- 测试：\[`([^`]+)`\]\(\.\./\.\./(tests/\S+)\)：(.+)$", section, re.MULTILINE)
    assert tests
    assert len(tests) == section.count("- 测试：")
    for name, path, listed in tests:
        assert Path(path).name == name
        source = (ROOT / path).read_text("utf-8")
        functions = re.findall(r"`(test_\w+)`", listed)
        assert functions
        for function in functions:
            assert f"\ndef {function}(" in source, function


# --- typography


@each_page
def test_chinese_is_set_as_usual(page: Path) -> None:
    text = re.sub(r"\]\([^)]*\)", "]", prose(page.read_text("utf-8")))  # without the targets of links
    text = re.sub(r"`[^`\n]+`", "`x`", re.sub(r"[*\[\]]", "", text))
    assert not re.findall(rf"{HAN}[A-Za-z0-9`].{{0,9}}|.{{0,9}}[A-Za-z0-9%`]{HAN}", text)  # a blank between the scripts
    assert not re.findall(rf".{{0,9}}(?:{HAN}[,.;:?!()]|[,;:?!()] ?{HAN}).{{0,9}}", text)  # punctuation of full width
    assert not re.findall(r".{0,9}(?: [，。；：、（）！？]|[，。；：、（！？] ).{0,9}", text)  # no blank beside it
