"""The command line for model versions: `python -m model --help`."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import click
import orjson

import cli
from history import HEAD, History, cells_of
from settings import Settings, SettingsError

from .formats import ModelLoadError, has_frames
from .versions import living_workers, worker_statuses
from .versions.callers import differences
from .versions.guard import changed_at, watching
from .versions.publishing import preflight, publish, validate
from .versions.routing import Routing
from .versions.store import Store, StoreError, read_manifest, read_rows

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
_force_help = "Serve it even if callers of the stable version notice a difference."
_force = click.option("--force", is_flag=True, help=_force_help)
_machine_help = "Serve it even if it was not made for this machine: memory, processor, libraries."
_any_machine = click.option("--any-machine", is_flag=True, help=_machine_help)
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
@_any_machine
@_wait
def promote(store: Store, settings: Settings, version: str, force: bool, any_machine: bool, wait: float | None) -> int:
    """Make a version the stable one, which answers every request that a canary does not.

    It must predict its sample here, and answer each request that the present stable version answers.
    """
    before = Routing.read(store.directory)
    store.promoted(before, version)  # raises now, rather than after seconds of validation
    _check_fit(store, version, before, settings, force, any_machine)
    after = store.promote(version, before.stable, version == before.canary)
    return _report(store, before, after, settings, wait)


@command
@_version
@click.option("--weight", type=float, required=True, metavar="PERCENT", help="Its share of the requests.")
@click.option("--guard", is_flag=True, help="Roll it back automatically if it is worse than the stable version.")
@_force
@_any_machine
@_wait
def canary(store: Store, settings: Settings, version: str, weight: float, guard: bool, **given: Any) -> int:
    """Serve a version to a share of the requests, beside the stable one. The same must hold as for `promote`."""
    before = Routing.read(store.directory)
    store.with_canary(before, version, weight, guard)  # raises now, rather than after seconds of validation
    _check_fit(store, version, before, settings, given["force"], given["any_machine"])
    after = store.canary(version, weight, guard, before.stable)
    return _report(store, before, after, settings, given["wait"])


@command
@click.argument("version", default="")
@_wait
def rollback(store: Store, settings: Settings, version: str, wait: float | None) -> int:
    """Withdraw the canary; without one, return to the stable version before the last promotion.

    A second rollback in a row changes nothing, also after the guard's: to go further back, name the VERSION.
    """
    before, after = Routing.read(store.directory), store.rollback(version=version)
    if after.stable != before.stable:
        click.echo(f"back to version {after.stable}, from version {before.stable}")
        for each in _noticed(store, before, after):
            click.echo(f"callers notice: {each}")
    return _report(store, before, after, settings, wait)


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
    cli.echo_table(lines)
    if len(lines) == 1:
        click.echo(f"model: there is no version in {store.directory}", err=True)
    if routing.generation:
        click.echo(f"generation {routing.generation}, {routing.changed}, by {routing.by}: {routing.why}")
    if (ahead := changed_at(routing) - time.time()) > 60.0:
        clocks = "the clock here, or where it was changed, is wrong"
        click.echo(f"warning: the routing was changed {ahead:.0f} s from now: {clocks}", err=True)
    if reason := routing.local_rollback(settings.journal_dir):
        click.echo(f"the canary was rolled back on this host: guard, {reason}")
    elif verdict := watching(settings.journal_dir, routing):
        click.echo(f"guard: {verdict}")
    for each in worker_statuses(settings.journal_dir):
        canary = f", canary {each['canary']}" if each["canary"] else ""
        error = f", {each['error']}" if each["error"] else ""
        what = f"generation {each['generation']}, stable {each['stable']}{canary}{error}"
        click.echo(f"worker {each['pid']}: {_other_source(each, store) or what}")


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
    if not versions:
        raise StoreError(f"there is no version in {store.directory}")
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
@click.option("--keep", type=click.IntRange(min=0), default=5, show_default=True, help="How many, newest first.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
def prune(store: Store, settings: Settings, keep: int, dry_run: bool) -> int:
    """Remove old versions: all but those in use and the newest others.

    In use are the stable version, the one before it, the canary, and what the workers of this host serve.
    """
    served = [each[name] for each in worker_statuses(settings.journal_dir) for name in ("stable", "canary")]
    status, freed, removed = 0, 0, 0
    for version in store.prunable(keep, filter(None, served)):
        try:
            size = store.size(version)
            if not dry_run:
                store.remove(version)
        except (StoreError, OSError) as error:
            status = 1
            click.echo(f"model: kept version {version}: {error}", err=True)
            continue
        freed, removed = freed + size, removed + 1
        click.echo(f"{'would remove' if dry_run else 'removed'} version {version}, {size / 1e6:.1f} MB")
    click.echo(f"{removed} versions, {freed / 1e6:.1f} MB {'would be freed' if dry_run else 'freed'}")
    return status


@command
@click.argument("file", type=PATH)
@click.argument("out", type=PATH)
@_sample
@click.option("--force", is_flag=True, help="Write it even if the predictions differ.")
def export_command(store: Store, settings: Settings, file: Path, **given: Any) -> None:
    """Write a scikit-learn model FILE as OUT.onnx, and compare what the two predict for a sample."""
    if not has_frames():
        raise ModelLoadError("this server was installed without model/frames, which export needs")
    from .versions.onnx_export import export

    report, out = export(file, **given), given["out"]
    sample = " --sample ROWS.JSON" if report.rows else ""
    click.echo(f"{report}\nwrote {out}; make a version of it with: python -m model publish {out}{sample}")


def _check_fit(store: Store, version: str, before: Routing, settings: Settings, force: bool, any_machine: bool) -> None:
    """Print whether a version fits this machine, predicts its sample, and fits the callers of the stable version.

    Raises: StoreError, it does not. `any_machine` skips the first of these, `force` the last.
    """
    manifest = store.manifest(version)
    is_loaded = version in (before.stable, before.canary)
    found = preflight(manifest, 0 if is_loaded else settings.web_concurrency, settings.allow_version_mismatch)
    for fits, comparison in found:
        click.echo(f"{'fits' if fits else 'DOES NOT FIT'}  {comparison}")
    if not any_machine and not all(fits for fits, _ in found):
        raise StoreError(f"version {version} does not fit this machine; --any-machine serves it anyway")
    old, noticed = None, []
    if before.stable:
        try:
            old = read_manifest(store.directory, before.stable)
        except ModelLoadError as error:
            noticed = [f"nobody knows what they send: {error}"]
    noticed += validate(manifest, old).get("differences", [])
    click.echo("fits  it predicts its sample here as when it was published")
    for each in noticed:
        click.echo(f"DOES NOT FIT  callers of version {before.stable}: {each}")
    if noticed and not force:
        raise StoreError(
            f"version {version} does not fit the callers of version {before.stable}; --force serves it anyway"
        )
    if old and not noticed:
        click.echo(f"fits  it answers each request that version {before.stable} answers")


def _noticed(store: Store, before: Routing, after: Routing) -> list[str]:
    """Return what callers notice of a rollback. It is not tried: that would take seconds."""
    try:
        old, new = (read_manifest(store.directory, each.stable).about for each in (before, after))
    except ModelLoadError as error:  # which may be why it was rolled back
        return [f"nobody knows what: {error}"]
    return differences(old, new)


def _report(store: Store, before: Routing, routing: Routing, settings: Settings, wait: float | None) -> int:
    """Print the routing and what became of the canary; with `wait` (seconds), wait until this host serves it."""
    click.echo(routing)
    guarded = ", guarded" if before.guard else ""
    if not before.canary or routing.stable == before.canary:
        pass
    elif not routing.canary:
        click.echo(f"canary {before.canary} is withdrawn ({before.weight:g} % of the requests{guarded})")
    elif routing.canary != before.canary:
        was = f"canary {before.canary} ({before.weight:g} % of the requests{guarded})"
        click.echo(f"it replaces {was}, which gets no requests any more")
    elif before.guard and routing.etag != before.etag:
        click.echo("its guard counts anew" if routing.guard else "it is NOT guarded any more")
    return 0 if wait is None else _wait_for_workers(store, routing, settings, wait)


def _wait_for_workers(store: Store, routing: Routing, settings: Settings, wait: float) -> int:
    """Wait until all workers of this host serve a routing. Raises: StoreError, they never will."""
    began, expected = time.monotonic(), (routing.generation, routing.changed)
    while True:
        workers = living_workers(settings.journal_dir)
        if not workers:
            with suppress(FileNotFoundError):
                os.listdir(settings.journal_dir / "workers")  # raises if this user may not know
            raise StoreError(
                f"it is routed, but no server runs on this host with JOURNAL_DIR={settings.journal_dir}: one that "
                "starts will serve it. If one runs, give this command its settings"
            )
        if other := next(filter(None, (_other_source(each, store) for each in workers)), ""):
            raise StoreError(f"it is routed, but the server with JOURNAL_DIR={settings.journal_dir} {other}")
        late = [each for each in workers if (each.get("generation"), each.get("changed")) != expected]
        now = Routing.read(store.directory)
        if now.etag != routing.etag:
            raise StoreError(f"the routing was changed again meanwhile: generation {now.generation}, {now.why}")
        if not late or not time.monotonic() - began < wait:
            break
        time.sleep(0.1)
    broken = [each for each in workers if each.get("error")]
    for each in broken:
        click.echo(f"worker {each['pid']}: {each['error']}", err=True)
    serving = sum(each not in late and each not in broken for each in workers)
    if serving < len(workers):
        click.echo(f"{serving} of {len(workers)} workers serve it", err=True)
        return 1
    click.echo(f"all {len(workers)} workers serve it, after {time.monotonic() - began:.1f} s")
    return 0


def _other_source(worker: dict[str, Any], store: Store) -> str:
    """Return what a worker serves instead of this store, or "". One of an older release does not publish that."""
    if not worker or worker.get("store", "") is None:
        return "serves a file, not versions: unset MODEL_PATH and restart it" if worker else ""
    if worker.get("store", here := os.path.realpath(store.directory)) != here:
        return f"serves another store: MODEL_DIR={worker['store']}"
    return ""


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
