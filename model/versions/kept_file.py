"""Keeps what MODEL_PATH holds at the start, for workers that come later: until a reload all serve the same model.

A worker that takes a dead one's place would load whatever the file holds by then, and two models would answer. So
gunicorn's master copies the file, and its sample, to `JOURNAL_DIR/model` before it forks, and again at a reload; a
worker that finds something else at MODEL_PATH loads the copy (`single_file.py`). Files above `MAX_COPIED` are not
copied: such a worker serves nothing then, and reports how to go on. One worker alone needs none of this, nor do
PRELOAD=1 (all are forked from what was loaded) and RELOAD=1 (all follow the file).
"""

import hashlib
import logging
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from settings import Settings

log = logging.getLogger(__name__)

MAX_COPIED = 2**29  # bytes; JOURNAL_DIR may be in memory, or small

Checksums = tuple[str, str]  # of the file and of its sample; "" without a sample


@dataclass(frozen=True)
class Kept:
    """What MODEL_PATH held."""

    checksums: Checksums
    copy: Path | None  # None if the file is too large, or could not be copied


kept: Kept | None = None  # of this process, and of those that it forks from now on


def keep(settings: Settings) -> None:
    """Keep what MODEL_PATH holds now. In gunicorn's master, which imports nothing else of the model's."""
    global kept
    kept = None
    path = settings.model_path
    if path is None or settings.web_concurrency < 2 or settings.preload or settings.reload:
        return
    copy, sample = None, sample_of(path, settings.model_sample)
    try:
        if path.stat().st_size <= MAX_COPIED:
            copy = _copy(path, sample, settings.journal_dir / "model")
    except OSError as error:
        log.warning("if MODEL_PATH is replaced, a worker that starts later will serve nothing: %s", error)
    with suppress(OSError):  # the workers report it
        kept = Kept(checksums(*((copy, sample_of(copy)) if copy else (path, sample))), copy)


def _copy(path: Path, sample: Path | None, directory: Path) -> Path:
    """Copy a model file and its sample; return the copy. Raises: OSError."""
    staging = directory.with_name(f".{directory.name}")
    shutil.rmtree(staging, ignore_errors=True)  # of a master that was killed
    staging.mkdir(mode=0o700, parents=True)
    copy = staging / path.name
    try:
        shutil.copyfile(path, copy)
        if sample:
            shutil.copyfile(sample, copy.with_suffix(".sample.json"))
        shutil.rmtree(directory, ignore_errors=True)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # half a copy on a full disk would leave the journal no room
    return directory / path.name


def sample_of(path: Path, sample: Path | None = None) -> Path | None:
    """Return the file of a model's sample: the one that was named, or the one beside it; None if there is none."""
    beside = path.with_suffix(".sample.json")
    return sample or (beside if beside.is_file() else None)


def checksums(path: Path, sample: Path | None) -> Checksums:
    """Return the checksums of what is loaded. Raises: OSError."""
    return _sha256(path), _sha256(sample) if sample else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
