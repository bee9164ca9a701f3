"""The command line for model versions: `python -m model --help`."""

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
import orjson

import cli
from history import HEAD, History, cells_of
from settings import Settings, SettingsError

from .formats import ModelLoadError
from .versions import worker_statuses
from .versions.publishing import preflight, publish, validate
from .versions.store import Routing, Store, StoreError, read_manifest, read_rows

PATH = click.Path(path_type=Path)


@click.group()
@click.option("--dir", type=PATH, help="The version store (default: MODEL_DIR, or var/models).")
@click.pass_context
def commands(context: click.Context, dir: Path | None) -> None:
    """Publish, route and roll back model versions."""
    context.obj = dir


def command(function: Callable[..., int | None]) -> click.Command:
    """Make a command of a function that takes the store and the settings first."""

    @wraps(function)
    @click.pass_obj
    def run(directory: Path | None, /, **given: Any) -> int | None:
        settings = Settings.load()
        return function(Store(directory or settings.model_dir, History(settings).note), settings, **given)

    return commands.command(function.__name__.removesuffix("_command"))(run)


def _json(given: str) -> Any:
    try:
        return orjson.loads(given)
    except ValueError as error:
        raise StoreError(f"--metrics: expected JSON, such as '{{\"accuracy\": 0.97}}': {error}") from error


_version = click.argument("version")
_sample = click.option("--sample", type=read_rows, metavar="ROWS.JSON", help='Rows, as in "data".')
_force = click.option("--force", is_flag=True, help="Serve it even if it does not fit this machine.")
_wait_help = "Wait until all workers of this host serve it (default: 60 seconds)."
_bound_help = "Error rate (or mean absolute error) that alerts (default: that of the metrics)."
_wait = click.option("--wait", type=float, is_flag=False, flag_value=60.0, metavar="[SECONDS]", help=_wait_help)


@command
@click.argument("file", type=PATH)
@click.option("--version", default="", help="Its name (default: the next whole number).")
@_sample
@click.option("--metrics", type=_json, metavar="JSON", help="Figures to remember, such as '{\"accuracy\": 0.97}'.")
@click.option("--note", default="", help="Words to remember.")
@click.option("--error-bound", type=float, help=_bound_help)
def publish_command(store: Store, settings: Settings, file: Path, **given: Any) -> None:
    """Make a version of a model FILE, once two fresh processes agree on what it predicts for a sample."""
    version = publish(store, file, **given)
    click.echo(f"published version {version}; serve it with: python -m model promote {version}")
    if equal := store.same_file(version):
        click.echo(f"model: its file is equal to that of version {', '.join(equal)}", err=True)
    about = read_manifest(store.directory, version).about
    for warning in about["warnings"]:
        click.echo(f"warning: {warning}")
    if about["merges_requests"] != "yes":
        click.echo(f"callers share no calls: {about['merges_requests'].removeprefix('no: ')}")
    if not given["sample"]:
        click.echo("validated with a synthetic row only: give your own rows with --sample next time")


@command
@_version
@_force
@_wait
def promote(store: Store, settings: Settings, version: str, force: bool, wait: float | None) -> int:
    """Make a version the stable one, which answers every request that a canary does not."""
    _check_fit(store, version, settings, force)
    return _report(store, store.promote(version), settings, wait)


@command
@_version
@click.option("--weight", type=float, required=True, metavar="PERCENT", help="Its share of the requests.")
@click.option("--guard", is_flag=True, help="Roll it back automatically if it is worse than the stable version.")
@_force
@_wait
def canary(
    store: Store, settings: Settings, version: str, weight: float, guard: bool, force: bool, wait: float | None
) -> int:
    """Serve a version to a share of the requests, beside the stable one."""
    _check_fit(store, version, settings, force)
    return _report(store, store.canary(version, weight, guard), settings, wait)


@command
@_wait
def rollback(store: Store, settings: Settings, wait: float | None) -> int:
    """Withdraw the canary, or return to the previous stable version if there is none."""
    return _report(store, store.rollback(), settings, wait)


@command
def list_command(store: Store, settings: Settings) -> None:
    """List the versions, how they are served, and by which workers."""
    try:
        uses, routing = store.in_use(), Routing.read(store.directory)
    except ModelLoadError as broken:
        uses, routing = {}, Routing()
        click.echo(f"model: {broken}", err=True)
    lines: list[tuple[str, ...]] = [("VERSION", "FORMAT", "MB", "PUBLISHED", "BY", "SERVED AS", "NOTE")]
    lines += [_line(store, version, uses.get(version, "")) for version in store.versions()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    if routing.generation:
        click.echo(f"generation {routing.generation}, {routing.changed}, by {routing.by}: {routing.why}")
    if reason := routing.local_rollback(settings.journal_dir):
        click.echo(f"the canary was rolled back on this host: guard, {reason}")
    for each in worker_statuses(settings.journal_dir):
        canary = f", canary {each['canary']}" if each["canary"] else ""
        error = f", {each['error']}" if each["error"] else ""
        click.echo(f"worker {each['pid']}: generation {each['generation']}, stable {each['stable']}{canary}{error}")


@command
@_version
def show(store: Store, settings: Settings, version: str) -> None:
    """Print a version's manifest."""
    click.echo(json.dumps(store.manifest(version).about, indent=2, ensure_ascii=False))


@command
@click.argument("version", required=False)
def verify_command(store: Store, settings: Settings, version: str | None) -> int:
    """Validate a version, or all of them, in a fresh process: bytes, signature and predictions."""
    versions = [version] if version else store.versions()
    broken = 0
    for each in versions:
        found = "as it was published"
        try:
            validate(read_manifest(store.directory, each))
        except (StoreError, ModelLoadError) as error:
            found, broken = str(error), 1
        click.echo(f"{each}: {found}")
    return broken


@command
@_version
def remove(store: Store, settings: Settings, version: str) -> None:
    """Remove a version that is not in use."""
    store.remove(version)
    click.echo(f"removed version {version}")


@command
@click.option("--since", type=cli.duration, metavar="TIME", help="How far back: 90s, 15m, 1h or 7d (default: all).")
@click.option("--last", type=click.IntRange(1), metavar="N", help="The latest N only.")
def history(store: Store, settings: Settings, since: float | None, last: int | None) -> None:
    """Print who changed versions, routing, users and roles: when, where, by which command, from what to what."""
    first = 0.0 if since is None else time.time() - since
    changes = [each for each in History.read(settings.journal_dir) if each["time"] >= first]
    cli.echo_table([HEAD, *map(cells_of, changes[-(last or 0) :])])


@command
@click.argument("file", type=PATH)
@click.argument("out", type=PATH)
@_sample
@click.option("--force", is_flag=True, help="Write it even if the predictions differ.")
def export_command(store: Store, settings: Settings, file: Path, **given: Any) -> None:
    """Write a scikit-learn model FILE as OUT.onnx, and compare what the two predict for a sample."""
    from .versions.onnx_export import export

    report, out = export(file, **given), given["out"]
    sample = " --sample ROWS.JSON" if report.rows else ""
    click.echo(f"{report}\nwrote {out}; make a version of it with: python -m model publish {out}{sample}")


def _check_fit(store: Store, version: str, settings: Settings, force: bool) -> None:
    """Print whether a version fits this machine. Raises: StoreError, it does not."""
    manifest = store.manifest(version)
    is_loaded = store.in_use().get(version, "").startswith(("stable", "canary"))
    found = preflight(manifest, 0 if is_loaded else settings.web_concurrency)
    for fits, comparison in found:
        click.echo(f"{'fits' if fits else 'DOES NOT FIT'}  {comparison}")
    if not force:
        if not all(fits for fits, _ in found):
            raise StoreError(f"version {version} does not fit this machine; --force serves it anyway")
        validate(manifest)
        click.echo("fits  it predicts its sample here as when it was published")


def _report(store: Store, routing: Routing, settings: Settings, wait: float | None) -> int:
    """Print the routing; with `wait` (seconds), wait until all workers of this host serve it."""
    click.echo(routing)
    if wait is None:
        return 0
    began, expected = time.monotonic(), (routing.generation, routing.changed)
    workers: list[dict[str, Any]] = []
    while time.monotonic() - began < wait:
        workers = worker_statuses(settings.journal_dir)
        late = [each for each in workers if (each["generation"], each["changed"]) != expected]
        now = Routing.read(store.directory)
        if now.etag != routing.etag:
            raise StoreError(f"the routing was changed again meanwhile: generation {now.generation}, {now.why}")
        if workers and not late:
            break
        time.sleep(0.1)
    if not workers:
        raise StoreError(f"no worker has published in {settings.journal_dir} what it serves")
    broken = [each for each in workers if each["error"]]
    for each in broken:
        click.echo(f"worker {each['pid']}: {each['error']}", err=True)
    serving = sum(each not in late and each not in broken for each in workers)
    if serving < len(workers):
        click.echo(f"{serving} of {len(workers)} workers serve it", err=True)
        return 1
    click.echo(f"all {len(workers)} workers serve it, after {time.monotonic() - began:.1f} s")
    return 0


def _line(store: Store, version: str, use: str) -> tuple[str, ...]:
    """Return the cells of a version in the list."""
    try:
        about = read_manifest(store.directory, version).about
    except ModelLoadError:
        about = {"note": "ITS MANIFEST CANNOT BE USED"}
    size = f"{about['size'] / 1e6:.1f}" if isinstance(about.get("size"), int) else ""
    cells = (version, about.get("format"), size, about.get("published"), about.get("by"), use, about.get("note"))
    return tuple(" ".join(str(cell or "").split()) for cell in cells)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    errors = (StoreError, SettingsError, ModelLoadError, OSError, UnicodeError)
    return cli.run("model", commands, arguments, *errors, status=1)


if __name__ == "__main__":
    sys.exit(main())
