"""Workers run the code that the server was started with, whatever is on the disk by now.

An extension (EXTENSIONS in settings.py). gunicorn's master imports the product's modules before it forks, and with them
the libraries that they import, and scikit-learn for a model of that. So a worker that dies after a `git pull` or a `pip
install` is replaced by one with the same code, not by a mixture that may not even start. And the master notes which
code that is, so that the systemd unit can refuse a reload that would not bring new code (`python -m server check
--reload PID`).

What a model imports when it is loaded, the master does not know. A worker that starts after a package has changed
refuses to import from that package, rather than serve a mixture; and a worker that has no model for this reason does
not accept requests as long as another one serves.

Not with RELOAD=1, where workers are to see what has changed.
"""

import hashlib
import importlib
import json
import logging
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.formats import ModelLoadError
from settings import EXTENSIONS, ROOT
from shared_files import replace_file

if TYPE_CHECKING:
    from flask import Flask

    from server import Service
    from settings import Settings

log = logging.getLogger(__name__)

WAY_OUT = "A worker imports nothing that was installed later, since it might mix two versions. Restart the server"

NOTE = "code.json"  # in JOURNAL_DIR: the process id of the master, and what `code` returned in it
# Modules that only processes of their own import: commands, and the shipper. SLS's SDK takes 0.1 s and 12 MB.
OF_COMMANDS = (
    *("model.demo", "model.versions.onnx_export", "model.versions.synthetic_rows"),
    *("sls.check", "sls.client", "sls.console"),
)
# What workers would import to load a model, by the suffix of its file. For two workers and more that saves 80 MB and
# 0.9 s of processor time in each with scikit-learn, 200 MB and 1.2 s with torch. onnxruntime takes 27 MB and starts a
# thread, which a fork does not copy; so does what Keras may import.
LIBRARIES = {".pt": "torch", ".pt2": "torch"}
LIBRARIES |= dict.fromkeys((".joblib", ".pkl", ".pickle", ".skops"), "sklearn.pipeline")


_at_start: dict[str, str] = {}  # what `code` returned in the master
_refused: dict[str, str] = {}  # in a worker: a name that is imported → its package, which has changed since then


class ChangedPackage(ModelLoadError):
    """A package was changed after the server was started.

    Not an ImportError: many libraries catch that and do without the package, which may change an answer.
    """


def init_app(app: "Flask", service: "Service") -> None:
    """Leave the requests to other workers while this one may not import what its model needs."""
    serving = service.serving
    service.keeps_waiting = lambda: bool(_refused) and serving.routes is None and service.others_serve()


def before_fork(settings: "Settings") -> None:
    """Import what workers will need, and note which code that is."""
    global _at_start
    if settings.reload:
        return
    for name, error in import_all(settings).items():
        log.warning("%s does not import: %r", name, error)
    _at_start = code()
    note = {"pid": os.getpid(), "code": _at_start}
    try:
        settings.journal_dir.mkdir(parents=True, exist_ok=True)
        replace_file(settings.journal_dir / NOTE, json.dumps(note).encode(), durable=False)
    except OSError as error:
        log.warning("a reload will not be refused if the code has changed: %s", error)


def after_fork(settings: "Settings") -> None:
    """Let a worker import nothing from packages that have changed since the master was started."""
    if not _at_start:
        return
    found = packages()
    changed = [name for name, digest in digests(found).items() if _at_start.get(name) != digest]
    for name in changed:
        with suppress(OSError):  # removed just now
            for line in found[name].read_text("utf-8", "replace").splitlines():
                _refused[line.partition("/")[0].partition(".")[0]] = name
    if changed:
        log.error("installed after the server was started: %s. %s", ", ".join(changed), WAY_OUT)
        sys.meta_path.insert(0, _Refusal())


class _Refusal(MetaPathFinder):
    """Is asked before all others where a module is."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if package := _refused.get(name.partition(".")[0]):
            raise ChangedPackage(f"{package} was installed after the server was started. {WAY_OUT}")


# --- imports


def import_all(settings: "Settings") -> dict[str, Exception]:
    """Import the modules that workers need; return those that failed, by name."""
    failed: dict[str, Exception] = {}
    for library in {LIBRARIES[each] for each in suffixes(settings) & LIBRARIES.keys()}:
        with suppress(ImportError):  # the worker that loads the model reports it; and speedups may be removed
            if library.startswith("sklearn") and "speedups" in settings.extension_names():
                importlib.import_module("speedups").import_sklearn()
        with suppress(ImportError):
            importlib.import_module(library)
    for name in module_names(settings):
        try:
            importlib.import_module(name)
        except Exception as error:  # of its library, perhaps
            failed[name] = error
    return failed


def module_names(settings: "Settings") -> Iterator[str]:
    """Yield the names of the product's modules in the rooms that are used; not a user's, which may be scripts."""
    yield "server"
    rooms = {name.partition(".")[0] for name in set(EXTENSIONS).intersection(settings.extension_names())}
    left_out = OF_COMMANDS if "sklearn" in sys.modules else (*OF_COMMANDS, "speedups.sklearn_checks")  # it imports that
    for package in sorted({"model", "web", *rooms}):
        for each in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if not each.name.endswith(".__main__") and each.name not in left_out:
                yield each.name


def suffixes(settings: "Settings") -> set[str]:
    """Return the suffixes of the model files that are to be served; none if that cannot be found out."""
    if settings.model_path is not None:
        return {settings.model_path.suffix.lower()}
    try:
        routing = json.loads((settings.model_dir / "routing.json").read_bytes())
        versions = (routing["stable"], (routing["canary"] or {}).get("version"))
        files = [path for each in filter(None, versions) for path in (settings.model_dir / each).glob("model.*")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # the worker reports it
        return set()
    return {path.suffix.lower() for path in files}


# --- which code


def code() -> dict[str, str]:
    """Return what the code consists of: a digest for each of the product's files and each installed package, by name.

    A package's is that of its RECORD, which has a hash of each file that pip installed.
    """
    return digests({str(path.relative_to(ROOT)): path for path in product_files()} | packages())


def packages() -> dict[str, Path]:
    """Return the RECORD of each installed package, by its name and version."""
    directories = {Path(each) for each in sys.path if each.endswith("-packages")}
    records = [record for directory in directories for record in directory.glob("*.dist-info/RECORD")]
    return {record.parent.name.removesuffix(".dist-info").replace("-", " "): record for record in records}


def digests(paths: dict[str, Path]) -> dict[str, str]:
    """Return a digest of each file, by the same names."""
    found = {}
    for name, path in sorted(paths.items()):
        with suppress(OSError):  # removed just now
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def product_files() -> Iterator[Path]:
    """Yield the product's files: modules, and the templates in their packages."""
    yield from ROOT.glob("*.py")
    for package in ROOT.glob("*/__init__.py"):
        for pattern in ("*.py", "*.html"):
            yield from package.parent.rglob(pattern)


def changes(journal_dir: Path, pid: int) -> list[str] | None:
    """Return which files and packages are not as they were when the master `pid` was started; None if that is unknown.

    Raises: nothing; what cannot be read is unknown.
    """
    try:
        note = json.loads((journal_dir / NOTE).read_bytes())
        if note["pid"] != pid:
            return None
        before = dict(note["code"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    now = code()
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
