"""The commands that manage the users file: `python -m auth`.

    python -m auth add alice --role predict         asks for the password; see python -m auth --help

The name is checked before the password is asked for, and again under the lock.
"""

import json
import math
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from werkzeug.security import generate_password_hash

import cli
from auth import ROLES, UsersFileError, read_entries, read_users
from history import History
from shared_files import FileLock, replace_file

MIN_PASSWORD = 8  # characters of a new one


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    return cli.run("auth", commands, arguments, UsersFileError, OSError, status=1)


@click.group()
@click.option(
    "--file", envvar="USERS_FILE", default="var/users.json", show_envvar=True, show_default=True, help="The users file."
)
@click.pass_context
def commands(context: click.Context, file: str) -> None:
    """Manage the users of the prediction server."""
    context.obj = Path(file).expanduser()


_roles = click.option(
    "--role", "roles", type=click.Choice(ROLES), multiple=True, required=True, help="May be repeated."
)


@commands.command()
@click.argument("name")
@_roles
@click.pass_obj
def add(path: Path, name: str, roles: tuple[str, ...]) -> None:
    """Add a user. Asks for the password, or reads it from standard input."""
    # A colon ends the name in basic auth; the rest would make logs and listings hard to read.
    if not name or len(name) > 64 or ":" in name or not name.isprintable():
        raise UsersFileError(f"{name!r} is not a user name: expected 1 to 64 printable characters without a colon")
    _read_for_change(path, name, exists=False)
    password = _ask_password()
    with _changing(path, name, exists=False) as entries:
        entries[name] = {"password": password, "roles": sorted(set(roles))}


@commands.command()
@click.argument("name")
@click.option(
    "--keep-old", type=cli.duration, metavar="TIME", help="How long the old password stays valid: 90s, 15m, 1h or 7d."
)
@click.pass_obj
def passwd(path: Path, name: str, keep_old: float | None) -> None:
    """Change a user's password. Asks for it, or reads it from standard input.

    The old one is invalid within a second, or with --keep-old after that time, so that callers can change in between.
    """
    _read_for_change(path, name, exists=True)
    password = _ask_password()
    with _changing(path, name, exists=True) as entries:
        entry = dict(entries[name]) if isinstance(entries[name], dict) else {"roles": []}
        entry.pop("old", None)  # two passwords are valid at most
        if keep_old is not None:
            old = read_users(path)[name].password
            entry["old"] = {"password": old, "until": math.ceil(time.time() + keep_old)}
        entries[name] = entry | {"password": password}


@commands.command()
@click.argument("name")
@_roles
@click.pass_obj
def role(path: Path, name: str, roles: tuple[str, ...]) -> None:
    """Give a user these roles, in place of those that they have."""
    with _changing(path, name, exists=True) as entries:
        entry = entries[name] if isinstance(entries[name], dict) else {}
        entries[name] = entry | {"roles": sorted(set(roles))}


def _ask_password() -> str:
    """Ask for a new password twice, or read a line of standard input if that is not a terminal; return the hash."""
    try:
        if sys.stdin.isatty():
            password = click.prompt("Password", hide_input=True, confirmation_prompt="Again", err=True)
        else:
            password = sys.stdin.readline().rstrip("\r\n")
        password.encode()  # in some locales, bytes that are not UTF-8 come as surrogates
    except UnicodeError:
        raise UsersFileError("the password is not UTF-8; nothing was changed") from None
    if not password:
        raise UsersFileError("an empty password; nothing was changed")
    if len(password) < MIN_PASSWORD:
        raise UsersFileError(f"a password needs at least {MIN_PASSWORD} characters; nothing was changed")
    return generate_password_hash(password)


@commands.command()
@click.argument("name")
@click.pass_obj
def remove(path: Path, name: str) -> None:
    """Remove a user."""
    with _changing(path, name, exists=True) as entries:
        del entries[name]


@commands.command("list")
@click.pass_obj
def list_users(path: Path) -> None:
    """List the users, their roles, and until when an old password is valid."""
    for name, user in sorted(read_users(path).items()):
        old = f"\told password until {cli.utc(user.until)}" if len(user.hashes()) > 1 else ""
        click.echo(f"{name}\t{','.join(sorted(user.roles))}{old}")


@commands.command()
@click.pass_obj
def demo(path: Path) -> None:
    """Add a user with a random password. Only if there is no users file yet; curl takes it from demo.netrc."""
    if path.exists():
        return
    password = secrets.token_urlsafe(16)
    netrc = path.with_name("demo.netrc")
    lines = [f"machine {host} login demo password {password}\n" for host in ("127.0.0.1", "localhost")]
    with _changing(path, "demo", exists=False) as entries:
        entries["demo"] = {"password": generate_password_hash(password), "roles": ["predict", "monitor"]}
        netrc.unlink(missing_ok=True)  # or its mode would be kept
        replace_file(netrc, "".join(lines).encode(), mode=0o600)
    click.echo(f"made the user demo; its password is in {netrc}")


# --- changes


def _read_for_change(path: Path, name: str, *, exists: bool) -> dict[str, Any]:
    """Return the entries of the users file, in which a user must exist, or must not."""
    entries = read_entries(path) if path.exists() else {}
    if exists and name not in entries:
        raise UsersFileError(f"there is no user {name!r} in {path}")
    if not exists and name in entries:
        raise UsersFileError(f"there is a user {name!r} already; for another password: python -m auth passwd")
    return entries


@contextmanager
def _changing(path: Path, name: str, *, exists: bool) -> Iterator[dict[str, Any]]:
    """Yield the entries of the users file to be changed, then write them, and note and print what has changed.

    Only one command at a time does so.
    """
    path = path.resolve()  # the file that a link leads to is replaced, not the link
    with FileLock(path.with_name(f".{path.name}.lock")):
        entries = _read_for_change(path, name, exists=exists)
        before = entries.get(name)
        yield entries
        try:
            replace_file(path, json.dumps(entries, indent=2).encode() + b"\n", mode=0o600)
        except OSError as error:
            raise UsersFileError(f"{path} cannot be written, nothing was changed: {error.strerror}") from error
    context = click.get_current_context()
    is_given = context.find_root().get_parameter_source("file") is ParameterSource.COMMANDLINE
    command = ["auth", *(["--file", str(path)] if is_given else []), str(context.info_name), name]
    words = _words(before), _words(entries.get(name), before)
    History().note(" ".join(command), *words)
    if context.info_name != "demo":
        click.echo(f"{name}: {' → '.join(each or 'no user' for each in words)}")


def _words(entry: Any, before: Any = None) -> str:
    """Describe a user's entry, and what is new of its passwords since another state of it; "" if there is none."""
    if not isinstance(entry, dict):
        return ""
    roles = entry.get("roles")
    words = ",".join(sorted(map(str, roles))) if isinstance(roles, list) else ""
    if isinstance(before, dict) and before.get("password") != entry.get("password"):
        words += "; new password"
        if "old" in entry:
            words += f", the old one is valid until {cli.utc(entry['old']['until'])}"
    return words or "no roles"
