"""MODEL_PATH as a source of `Serving`, where several workers serve it: each loads what the others have loaded."""

import logging
from pathlib import Path
from typing import Any

from ..formats import ModelLoadError
from ..loaded import LoadedModel
from ..serving import SingleFile
from . import kept_file

log = logging.getLogger(__name__)


class KeptFile(SingleFile):
    """MODEL_PATH, until a reload as it was at the start (see `kept_file.py`)."""

    def load(self, path: Path, **options: Any) -> LoadedModel:
        """Load what was kept, from the file itself if that is unchanged. Raises: ModelLoadError."""
        if (kept := kept_file.kept) is None:
            return super().load(path, **options)
        options["sha256"] = kept.checksums[0]
        if _holds(path, self.sample, kept):
            return super().load(path, **options)
        way_out = "To serve what it holds now, reload the server: systemctl reload, or SIGHUP to gunicorn's master"
        if kept.copy is None or not _holds(kept.copy, None, kept):
            raise ModelLoadError(f"{path}, or its sample, is not what the other workers serve. {way_out}")
        log.warning("%s, or its sample, was replaced: this worker serves what the others do. %s", path, way_out)
        return SingleFile(kept.copy).load(kept.copy, **options)


def _holds(path: Path, sample: Path | None, kept: kept_file.Kept) -> bool:
    try:
        return kept_file.checksums(path, kept_file.sample_of(path, sample)) == kept.checksums
    except OSError:
        return False
