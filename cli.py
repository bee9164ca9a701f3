"""What the command lines share: usage, exit statuses, errors on one line, and progress on a terminal."""

import re
import sys
import time
from typing import Any

import click

HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


def run(module: str, command: click.Command, arguments: list[str] | None, *errors: type[Exception], status: int) -> int:
    """Run a command that prints with `click.echo`; return what it returned, or 0 for None.

    Args:
        module: its dotted name, such as "auth": the usage begins with `python -m auth`.
        command: a command or a group of commands. If nobody reads its output any more, click ends the process quietly.
        arguments: the command line; None for that of the process.
        errors: exceptions that are reported as one line on standard error, such as `auth: …`.
        status: the exit status after such an error.
    """
    try:
        return command.main(arguments, f"python -m {module}", standalone_mode=False, **HELP) or 0
    except click.ClickException as error:  # wrong usage
        error.show()
        return error.exit_code
    except click.Abort:
        return 130  # as shells report Ctrl-C
    except errors as error:
        click.echo(" ".join([f"{module.rpartition('.')[2]}:", *str(error).splitlines()]), err=True)
        return status


def duration(text: str) -> float:
    """Parse `90s`, `15m`, `1h` or `7d` to seconds, as the type of an option. Raises: click.BadParameter."""
    if not (found := re.fullmatch(r"([0-9]{1,6})([smhd])", text)):
        raise click.BadParameter(f"{text!r}: expected a number with s, m, h or d, such as 15m")
    return int(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[found[2]]


def utc(seconds: float) -> str:
    """Return a time (seconds since 1970) as words."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(seconds, 253_402_300_799)))  # the year 9999


def echo_table(lines: list[tuple[str, ...]]) -> None:
    """Print lines in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def progressbar(length: int, label: str) -> Any:
    """Return a bar on standard error if that is a terminal: `with progressbar(…) as bar: bar.update(steps)`."""
    return click.progressbar(length=length, label=label, file=sys.stderr, hidden=not sys.stderr.isatty())
