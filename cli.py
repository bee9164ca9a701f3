"""What the command lines share: usage, exit statuses, errors on one line, and progress on a terminal."""

import sys
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


def progressbar(length: int, label: str) -> Any:
    """Return a bar on standard error if that is a terminal: `with progressbar(…) as bar: bar.update(steps)`."""
    return click.progressbar(length=length, label=label, file=sys.stderr, hidden=not sys.stderr.isatty())
