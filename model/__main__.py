"""The command line for model versions: `python -m model --help`."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import orjson

from settings import Settings, SettingsError

from .formats import ModelLoadError
from .versions.guard import veto
from .versions.publishing import preflight, publish, verify
from .versions.store import Manifest, Routing, Store, StoreError, check_weight, rows_from
from .versions.worker_status import Roster


def parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    top = argparse.ArgumentParser(prog="python -m model", description="Publish, route and roll back model versions.")
    top.add_argument("--dir", type=Path, help="the version store (default: MODEL_DIR, or var/models)")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, version: bool = False) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about)
        if version:
            made.add_argument("version", help="the version's name")
        return made

    new = command("publish", "make a version of a model file, once it has answered its sample in a fresh process")
    new.add_argument("file", type=Path, help="the model file; its suffix says the format")
    new.add_argument("--version", default="", help="its name (default: the next whole number)")
    new.add_argument("--sample", type=Path, metavar="ROWS.JSON", help='rows to prove it with, as in "data"')
    new.add_argument("--metrics", metavar="JSON", help="figures to remember, such as '{\"accuracy\": 0.97}'")
    new.add_argument("--note", default="", help="words to remember")
    for name, about in (
        ("promote", "serve a version to all but a canary's callers"),
        ("canary", "serve a version to a share of the requests, beside the stable one"),
    ):
        made = command(name, about, version=True)
        made.add_argument("--force", action="store_true", help="even where it does not fit this machine")
        _add_wait(made)
        if name == "canary":
            made.add_argument("--weight", type=float, required=True, help="requests of a hundred")
            made.add_argument(
                "--guard", action="store_true", help="take it back by itself when it is worse than stable"
            )
    _add_wait(command("rollback", "take the canary back, or go back to the stable version before this one"))
    command("list", "list the versions, how they are served, and by how many workers")
    command("show", "print a version's manifest", version=True)
    check = command("verify", "load versions again in a fresh process: their bytes, signature and answers")
    check.add_argument("version", nargs="?", help="the version's name (default: all)")
    command("remove", "remove a version that is not in use", version=True)
    out = command("export", "write a scikit-learn model as .onnx, and compare what the two answer")
    out.add_argument("file", type=Path, help="the model file")
    out.add_argument("out", type=Path, help="the .onnx file to write")
    out.add_argument("--sample", type=Path, metavar="ROWS.JSON", help='rows to compare on, as in "data"')
    out.add_argument("--force", action="store_true", help="write it even where answers differ")
    return top


def _add_wait(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--wait",
        type=float,
        nargs="?",
        const=60.0,
        metavar="SECONDS",
        help="until all workers of this host serve it (60)",
    )


def run(given: argparse.Namespace, settings: Settings) -> int:
    """Do what the command line asks; return the exit status. Raises: StoreError."""
    store = Store(given.dir or settings.model_dir)
    allow = settings.allow_version_mismatch
    if given.command == "publish":
        sample = rows_from(given.sample) if given.sample else None
        metrics = _json(given.metrics) if given.metrics else None
        made = publish(store, given.file, given.version, sample, metrics, given.note, allow)
        print(f"published version {made.version}; serve it with: python -m model promote {made.version}")
        if not sample:
            print("proved with a synthetic row only: give rows of yours with --sample next time")
    elif given.command in ("promote", "canary"):
        if given.command == "canary":
            check_weight(given.weight)  # before what takes seconds
        _fits(store, given.version, settings, given.force)
        if given.command == "promote":
            routing = store.promote(given.version)
        else:
            routing = store.canary(given.version, given.weight, given.guard)
        return _routed(store, routing, settings, given.wait)
    elif given.command == "rollback":
        return _routed(store, store.rollback(), settings, given.wait)
    elif given.command == "list":
        _list(store, settings)
    elif given.command == "show":
        print(json.dumps(_manifest(store, given.version).about, indent=2, ensure_ascii=False))
    elif given.command == "verify":
        return _verify(store, [given.version] if given.version else store.versions(), allow)
    elif given.command == "remove":
        store.remove(given.version)
        print(f"removed version {given.version}")
    elif given.command == "export":
        from .versions.onnx_export import export

        print(export(given.file, given.out, rows_from(given.sample) if given.sample else None, given.force))
    return 0


def _fits(store: Store, version: str, settings: Settings, force: bool) -> None:
    """Print whether a version fits this machine. Raises: StoreError, it does not."""
    manifest = _manifest(store, version)
    is_loaded = store.in_use().get(version, "").startswith(("stable", "canary"))
    found = preflight(manifest, 0 if is_loaded else settings.web_concurrency)
    for fits, said in found:
        print(f"{'fits' if fits else 'DOES NOT FIT'}  {said}")
    if not force:
        if not all(fits for fits, _ in found):
            raise StoreError(f"version {version} does not fit this machine; --force serves it anyway")
        verify(store, version, settings.allow_version_mismatch)
        print("fits  it answers its sample here as when it was published")


def _routed(store: Store, routing: Routing, settings: Settings, wait: float | None) -> int:
    """Print the routing; with `wait` (seconds), see until all workers of this host serve it."""
    beside = f", canary {routing.canary} for {routing.weight:g} of a hundred requests" if routing.canary else ""
    print(f"generation {routing.generation}: stable {routing.stable}{beside}")
    if wait is None:
        return 0
    began = time.monotonic()
    workers: list[dict[str, Any]] = []
    while time.monotonic() - began < wait:
        workers = Roster.read(settings.journal_dir)
        late = [
            each for each in workers if (each["generation"], each["changed"]) != (routing.generation, routing.changed)
        ]
        now = Routing.read(store.directory)
        if now.mark != routing.mark:
            raise StoreError(f"the routing was changed again meanwhile: generation {now.generation}, {now.why}")
        broken = [each for each in workers if each["error"]]
        if workers and not late:
            break
        time.sleep(0.1)
    if not workers:
        raise StoreError(f"no worker has said in {settings.journal_dir} that it serves")
    for each in broken:
        print(f"worker {each['pid']}: {each['error']}", file=sys.stderr)
    if late or broken:
        print(
            f"{len(workers) - len({id(e) for e in late + broken})} of {len(workers)} workers serve it", file=sys.stderr
        )
        return 1
    print(f"all {len(workers)} workers serve it, after {time.monotonic() - began:.1f} s")
    return 0


def _list(store: Store, settings: Settings) -> None:
    try:
        uses, routing = store.in_use(), Routing.read(store.directory)
    except (StoreError, ModelLoadError) as broken:
        uses, routing = {}, Routing()
        print(f"model: {broken}", file=sys.stderr)
    lines = [("VERSION", "FORMAT", "MB", "PUBLISHED", "BY", "SERVED AS", "NOTE")]
    for version in store.versions():
        try:
            about = Manifest.read(store.directory, version).about
        except ModelLoadError:
            about = {"note": "ITS MANIFEST CANNOT BE USED"}
        size = f"{about['size'] / 1e6:.1f}" if isinstance(about.get("size"), int) else ""
        texts = (" ".join(str(about.get(name) or "").split()) for name in ("format", "published", "by", "note"))
        kind, published, by, note = texts
        lines.append((version, kind, size, published, by, uses.get(version, ""), note))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip())
    if routing.generation:
        print(f"generation {routing.generation}, {routing.changed}, by {routing.by}: {routing.why}")
    mark, reason = veto(settings.journal_dir)
    if routing.canary and mark == routing.mark:
        print(f"the canary is taken back on this host: guard, {reason}")
    for each in Roster.read(settings.journal_dir):
        beside = f", canary {each['canary']}" if each["canary"] else ""
        error = f", {each['error']}" if each["error"] else ""
        print(f"worker {each['pid']}: generation {each['generation']}, stable {each['stable']}{beside}{error}")


def _verify(store: Store, names: list[str], allow: bool) -> int:
    failed = 0
    for version in names:
        try:
            verify(store, version, allow)
            print(f"{version}: as it was published")
        except StoreError as error:
            failed += 1
            print(f"{version}: {error}")
    return 1 if failed else 0


def _manifest(store: Store, version: str) -> Manifest:
    try:
        return Manifest.read(store.directory, version)
    except ModelLoadError as error:
        raise StoreError(f"{error}. There are: {', '.join(store.versions()) or 'none'}") from error


def _json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except ValueError as error:
        raise StoreError(f"--metrics: expected JSON, such as '{{\"accuracy\": 0.97}}': {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    given = parser().parse_args(arguments)
    try:
        return run(given, Settings.from_environ(os.environ))
    except (StoreError, SettingsError, ModelLoadError, OSError, UnicodeError) as error:
        print("model:", *str(error).splitlines(), file=sys.stderr)  # on one line
        return 1
    except KeyboardInterrupt:
        return 130  # as shells have it


if __name__ == "__main__":
    sys.exit(main())
