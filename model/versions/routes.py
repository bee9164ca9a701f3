"""Which version answers a request: a stable one, or a canary beside it that gets a share of the requests."""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from ..loaded import LoadedModel
from ..serving import Routes
from ..signature import BadRows
from .store import Routing


@dataclass(frozen=True)
class StoreRoutes(Routes):
    """A stable version, and perhaps a canary beside it."""

    canary: LoadedModel | None
    routing: Routing

    def choose(self, key: str, version: str) -> tuple[LoadedModel, str]:
        """Return the version for a request: the one that it asks for, or by its key, or at random."""
        if version:
            for model, variant in zip(self.models(), ("stable", "canary"), strict=False):
                if model.version == version:
                    return model, variant
            served = ", ".join(model.version for model in self.models())
            raise BadRows(f"X-Model-Version: no such version is served; there are: {served}")
        if self.canary is not None and share_of(key, self.canary.version) < self.routing.weight:
            return self.canary, "canary"
        return self.stable, "stable"

    def models(self) -> list[LoadedModel]:
        """Return the versions that are served."""
        return [self.stable, self.canary] if self.canary else [self.stable]

    def describe(self) -> dict[str, Any]:
        """Return what GET /model shows, as JSON values."""
        canary = self.canary and self.canary.describe()
        return super().describe() | {"canary": canary, "routing": self.routing.to_json()}

    def __str__(self) -> str:
        canary = f"; for {self.routing.weight:g} % of the requests version {self.canary}" if self.canary else ""
        return f"{super().__str__()}{canary}"


def share_of(key: str, version: str) -> float:
    """Return where a request falls, in percent: at random, or by its key. Requests below its weight are a canary's.

    The version is mixed in, so that one caller is not the first to meet every canary.
    """
    if not key:
        return random.random() * 100  # noqa: S311  # no secret
    digest = hashlib.blake2b(f"{version}:{key}".encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 * 100
