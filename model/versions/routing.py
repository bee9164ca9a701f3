"""Which versions are served: the file `routing.json` of a version store."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from ..formats import ModelLoadError

ROUTING = "routing.json"
LOCAL_ROLLBACK = "guard.json"  # of the guard on one host, in its JOURNAL_DIR, if it cannot write the store
VERSION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Routing:
    """Which versions are served: `routing.json`.

    Format: a JSON object with `stable` (a version); `previous`, the stable versions before it, the latest first:
    rollback goes back to them, and a server falls back on them if the stable version does not load; `canary`, null or
    `{"version", "weight", "guard"}`, the weight in percent of the requests; `generation`, which grows with each
    change; `changed` (UTC), `by`, and `why`, the change in words.
    """

    stable: str = ""
    previous: tuple[str, ...] = ()
    canary: str = ""
    weight: float = 0.0
    guard: bool = False
    generation: int = 0
    changed: str = ""
    by: str = ""
    why: str = ""

    @classmethod
    def read(cls, directory: Path) -> "Routing":
        """Read the routing of a store; without a file it is the empty one. Raises: ModelLoadError, it is not valid."""
        path = directory / ROUTING
        try:
            if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
                raise ValueError("it is not a file")
            given = orjson.loads(path.read_bytes())
            previous = given.get("previous", [])
            canary = given.get("canary") or {"version": "", "weight": 0, "guard": False}
            weight, generation = float(canary["weight"]), int(given.get("generation", 0))
            names = [given["stable"], *previous, *filter(None, [canary["version"]])]
            if not isinstance(previous, list) or not all(map(VERSION_NAME.fullmatch, names)):
                raise ValueError("it contains an invalid version name")
            if not 0 <= weight <= 100:
                raise ValueError("the canary's weight is not from 0 to 100")
            if not 0 <= generation < 2**53:  # GET /model shows it, and JSON has no larger ones
                raise ValueError("the generation is not a number that grows with each change")
            return cls(
                given["stable"],
                tuple(previous),
                canary["version"],
                weight,
                canary["guard"] is True,
                generation,
                *(str(given.get(name, "")) for name in ("changed", "by", "why")),
            )
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{path} cannot be used: {type(error).__name__}: {error}"
            raise ModelLoadError(f"{why}. Correct it, or remove it and promote a version") from error

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `read` reads."""
        canary = {"version": self.canary, "weight": self.weight, "guard": self.guard} if self.canary else None
        return {
            "generation": self.generation,
            "stable": self.stable,
            "previous": list(self.previous),
            "canary": canary,
            "changed": self.changed,
            "by": self.by,
            "why": self.why,
        }

    @property
    def etag(self) -> str:
        """Identify this routing. The generation alone does not: a routing written by hand may repeat it."""
        return f"{self.generation} of {self.changed}: {self.canary} {self.weight:g}"

    def local_rollback(self, journal_dir: Path) -> str:
        """Return why this routing's canary was rolled back on this host only, or ""."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = orjson.loads((journal_dir / LOCAL_ROLLBACK).read_bytes())
            if found["routing"] == self.etag:
                return str(found["reason"])
        return ""

    def __str__(self) -> str:
        canary = f", canary {self.canary} for {self.weight:g} % of the requests" if self.canary else ""
        return f"generation {self.generation}: stable {self.stable}{canary}"
