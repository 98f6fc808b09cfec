"""The digest of a tensor's bytes, in the report and in the journal: `name:hex`."""

import hashlib
from collections.abc import Callable
from typing import Protocol

from blake3 import blake3


class Digest(Protocol):
    """What hashlib's objects are: fed in pieces, without the GIL."""

    def update(self, data: memoryview | bytes, /) -> object:
        """Take in the next bytes."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far."""


# blake3 at three times the speed of sha256 with SHA instructions (docs/performance.md)
_MAKERS: dict[str, Callable[[], Digest]] = {"blake3": blake3, "sha256": hashlib.sha256}


def maker(name: str) -> Callable[[], Digest]:
    """Return what makes a digest by the algorithm `name` of a recipe."""
    return _MAKERS[name]


def named(name: str, digest: Digest) -> str:
    """Return the digest as it is written down."""
    return f"{name}:{digest.hexdigest()}"
