"""Checks in a fresh process whether the server would start and answer.

    python -m server check                  in the new release, as the service's user, with its settings
    python -m server check --reload PID     whether gunicorn's master PID has the code that is here

The first does what gunicorn and a worker do: it reads gunicorn.conf.py and the settings, imports everything, reads the
users, loads the model, or the versions that are routed to, and lets each answer its sample. A server that runs is not
disturbed: no port is opened, no lock taken, and what a worker writes goes into a directory that is removed.
"""

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import click

import auth
import cli
from operations.upgrades import NOTE, changes, import_all
from settings import ROOT, Settings, SettingsError


class CheckFailed(Exception):
    """The server would not start, or not answer. The message is for the operator."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    return cli.run("server", commands, arguments, CheckFailed, SettingsError, status=1)


@click.group()
def commands() -> None:
    """Check the server, which gunicorn runs."""


@commands.command()
@click.option(
    "--reload", "pid", type=int, metavar="PID", help="Whether gunicorn's master PID has the code that is here."
)
def check(pid: int | None) -> int:
    """Check whether the server would start here and answer, beside one that may run."""
    logging.root.handlers[:] = [_Notes(logging.WARNING)]
    settings = Settings.load()
    if pid is not None:
        _check_code(settings, pid)
        return 0
    checks: tuple[Callable[[Settings], Iterable[str]], ...] = (
        _packages,
        _configuration,
        _users,
        _directory,
        _certificate,
        _model,
    )
    failures = int(not _passes(_extensions, settings))
    if failures:  # the others would fail for the same reason
        checks = (_users, _directory, _certificate)
    failures += sum(not _passes(each, settings) for each in checks)
    click.echo(
        f"{failures} of these would keep the server from answering or recording"
        if failures
        else "the server would start"
    )
    return 1 if failures else 0


def _passes(check: Callable[[Settings], Iterable[str]], settings: Settings) -> bool:
    """Print what a check finds; return whether it found no fault."""
    try:
        for line in check(settings):
            click.echo(f"ok    {line}")
    except Exception as error:
        kind = "" if isinstance(error, EXPLAINED) else f"{type(error).__name__}: "
        lines = str(error).splitlines()[: None if isinstance(error, EXPLAINED) else 1]  # others may be tracebacks
        click.echo("\n      ".join([f"FAIL  {kind}{lines[0] if lines else ''}", *lines[1:]]))
        return False
    return True


EXPLAINED = (CheckFailed, SettingsError, auth.UsersFileError)


class _Notes(logging.Handler):
    """Shows warnings of what is checked; errors are reported as failures."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            click.echo(f"note  {record.getMessage().partition(chr(10))[0]}")  # Python's warnings quote a line of code


def _check_code(settings: Settings, pid: int) -> None:
    """Check that the code is what the master `pid` was started with. Raises: CheckFailed."""
    changed = changes(settings.journal_dir, pid)
    if changed is None:
        click.echo(f"unknown: {settings.journal_dir / NOTE} is not of process {pid}")
    elif changed:
        others = f" and {len(changed) - 3} others" if len(changed) > 3 else ""
        raise CheckFailed(
            f"the code is not what process {pid} was started with ({', '.join(changed[:3])}{others}), and a reload "
            "would not bring it. Restart instead: systemctl restart prediction-server"
        )


def _extensions(settings: Settings) -> Iterable[str]:
    """Import the extensions, as gunicorn.conf.py does it."""
    if settings.worker_class == "gevent":
        from gevent import monkey

        monkey.patch_all()
    settings.load_extensions()
    return ()


def _packages(settings: Settings) -> Iterator[str]:
    """Import everything, and compare what is installed with requirements.txt."""
    for name, error in import_all(settings).items():
        raise CheckFailed(f"the module {name} does not import: {type(error).__name__}: {error}")
    expected: dict[str, set[str]] = {}  # of several, each for some versions of Python
    with contextlib.suppress(OSError):
        for name, wanted in re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.txt").read_text(), re.M):
            expected.setdefault(name, set()).add(wanted)
    for name, versions in expected.items():
        with contextlib.suppress(metadata.PackageNotFoundError):  # for another system, perhaps
            if (found := metadata.version(name)) not in versions:
                click.echo(f"note  {name} {found} is installed; requirements.txt has {' or '.join(versions)}")
    yield f"everything imports, with Python {sys.version.split()[0]} of {sys.prefix}"


def _configuration(settings: Settings) -> Iterator[str]:
    """Read gunicorn.conf.py and GUNICORN_CMD_ARGS as gunicorn does, and import the worker's class."""
    from gunicorn.app.wsgiapp import WSGIApplication

    sys.argv[:] = ["gunicorn"]
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            config = WSGIApplication().cfg
            workers = config.workers
            name = config.worker_class.__name__
        except SystemExit as error:
            lines = [line for line in printed.getvalue().splitlines() if line and line[0] != " "] or [str(error)]
            if not Path("gunicorn.conf.py").exists():  # so gunicorn lacks what it says, too
                raise CheckFailed(f"gunicorn reads no gunicorn.conf.py here: cd {ROOT}") from None
            why = f"gunicorn: {lines[-1].removeprefix('gunicorn: ')}"
            raise CheckFailed(error.code if isinstance(error.code, str) else why) from None
    if "__config__" not in sys.modules:
        raise CheckFailed(f"gunicorn reads no gunicorn.conf.py here: cd {ROOT}")
    for path in filter(None, (config.certfile, config.keyfile)):
        Path(path).open("rb").close()
    yield f"configuration: {workers} workers, {name}, of {ROOT}"


def _users(settings: Settings) -> Iterator[str]:
    """Check that the files are there, and read the users."""
    settings.check_files()
    if settings.auth == "basic":
        users = auth.read_users(settings.users_file)
        if not users:
            raise CheckFailed(
                f"USERS_FILE={str(settings.users_file)!r} has no users, so the server would not be ready. Make one "
                "with: python -m auth add NAME --role predict"
            )
        yield f"users: {len(users)} in {settings.users_file}"


def _directory(settings: Settings) -> Iterator[str]:
    """Check that the journal can be written; where nothing is there yet, that it could be made."""
    there = directory = settings.journal_dir
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")  # on a full disk an empty file can be made
    except OSError as error:
        raise CheckFailed(f"JOURNAL_DIR={str(directory)!r} cannot be written: {error}") from None
    owner = there.stat().st_uid
    if os.geteuid() != owner:
        click.echo(
            f"note  this runs as user {os.geteuid()}, and {there} belongs to user {owner}: is that the service's?"
        )
    yield f"journal: {directory} can be written"


def _certificate(settings: Settings) -> Iterable[str]:
    """Warn if nothing would show when the certificate expires; the server itself does not use it."""
    if settings.certificate_file:
        with contextlib.suppress(ImportError):  # telemetry may be removed
            from telemetry import certificate

            try:
                certificate.expiry(settings.certificate_file)
            except certificate.NoCertificate as error:
                click.echo(f"note  CERTIFICATE_FILE: {error}, so no alert would come before it expires")
    return ()


def _model(settings: Settings) -> Iterator[str]:
    """Make the application and load what it would serve."""
    from server import create_app

    with tempfile.TemporaryDirectory() as scratch:
        app = create_app(replace(settings, journal_dir=Path(scratch), feedback_key_file=Path(scratch, "key")))
        serving = app.extensions["service"].serving
        serving.start()
        serving.finished.wait()
        if serving.errors:
            raise CheckFailed("; ".join(serving.errors))
        for model in serving.loaded():
            yield f"model: version {model}"
