"""Which tensor of A is which of B, and which of them have the same bytes. Needs no numpy."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from blake3 import blake3

from qschema.safetensors import Stored
from qvalidate.context import Context
from qvalidate.decode import read
from qvalidate.diff.names import natural, renames
from qvalidate.diff.result import Renamed, Restacked, Retyped, TensorDiff, TensorEntry
from qvalidate.sources import Origin

# bytes of each side that are compared at a time
_SLICE_NBYTES = 4 << 20


@dataclass(frozen=True)
class TensorPair:
    """A tensor, or one matrix of a stack of experts, on both sides; `name` is B's mostly."""

    name: str
    a: Stored
    b: Stored

    @property
    def has_equal_layout(self) -> bool:
        """Whether dtype and shape are the same, so that bytes can be."""
        return (self.a.dtype, self.a.shape) == (self.b.dtype, self.b.shape)

    @cached_property
    def has_equal_bytes(self) -> bool:
        """Whether it is the same tensor. Reads it, once, up to the first difference."""
        return self.has_equal_layout and _has_equal_bytes(self.a, self.b)


@dataclass
class Matching:
    """The tensors of both sides brought together."""

    pairs: list[TensorPair]
    renamed: list[Renamed]
    restacked: list[Restacked] = field(default_factory=list)
    added: list[Stored] = field(default_factory=list)
    removed: list[Stored] = field(default_factory=list)


def match(a: Context, b: Context, *, reads: bool) -> Matching:
    """Return which tensor is which. Without `reads` no bytes are read, and names alone tell."""
    ours = a.checkpoint.tensors
    renamed = renames(ours, b.checkpoint.tensors, digest=_digest if reads else None)
    names = {pair.a: pair.b for pair in renamed}
    only_a, only_b = dict[str, Stored](), dict(b.checkpoint.tensors)
    found = Matching(pairs=[], renamed=renamed)
    for name, stored in ours.items():
        there = only_b.pop(names.get(name, name), None)
        if there is None:
            only_a[name] = stored
        else:
            found.pairs.append(TensorPair(there.name, stored, there))
    for stack, parts in _split(a, only_a, only_b):
        found.restacked.append(Restacked(side="a", name=stack, num_parts=len(parts)))
        found.pairs += [TensorPair(name, part, only_b.pop(name)) for name, part in parts.items()]
        del only_a[stack]
    for stack, parts in _split(b, only_b, only_a):
        found.restacked.append(Restacked(side="b", name=stack, num_parts=len(parts)))
        found.pairs += [TensorPair(name, only_a.pop(name), part) for name, part in parts.items()]
        del only_b[stack]
    found.added, found.removed = list(only_b.values()), list(only_a.values())
    return found


def tensor_diff(matching: Matching, *, decoded: Collection[str] | None) -> TensorDiff:
    """Return the differences as a document.

    decoded: the pairs that a comparison of numbers speaks for; None where no tensor was read.
    """
    same_layout = [pair for pair in matching.pairs if pair.has_equal_layout]
    changed: list[str] = []
    if decoded is not None:
        changed = [pair.name for pair in same_layout if not pair.has_equal_bytes]
    return TensorDiff(
        added=_entries(matching.added),
        removed=_entries(matching.removed),
        renamed=sorted(matching.renamed, key=lambda pair: natural(pair.b)),
        restacked=matching.restacked,
        retyped=[
            Retyped(name=pair.name, a=_entry(pair.a), b=_entry(pair.b))
            for pair in _ordered(matching.pairs)
            if not pair.has_equal_layout
        ],
        changed=sorted(changed, key=natural),
        undecoded=sorted((name for name in changed if name not in (decoded or ())), key=natural),
        num_equal=None if decoded is None else len(same_layout) - len(changed),
    )


def shard_notes(a: Context, b: Context, matching: Matching) -> Iterator[str]:
    """Yield how the tensors lie in other files than on the other side, which changes nothing."""
    counts = [len(side.checkpoint.shards) for side in (a, b)]
    if counts[0] != counts[1]:
        yield f"A has {counts[0]} shards, B has {counts[1]}"
        return
    moved = sum(pair.a.file.name != pair.b.file.name for pair in matching.pairs)
    if moved:
        yield f"{moved} tensors are in a shard of another name"


def _split(
    side: Context, mine: Mapping[str, Stored], others: Mapping[str, Stored]
) -> Iterator[tuple[str, Mapping[str, Stored]]]:
    """Yield the stacks of experts of one side that the other has expert by expert, with parts."""
    origin = Origin(side.checkpoint)
    for name, stored in list(mine.items()):
        parts = origin.parts(stored)
        if parts and all(part in others for part in parts):
            yield name, parts


def _has_equal_bytes(a: Stored, b: Stored) -> bool:
    if a.offset == b.offset and _identity(a.file) == _identity(b.file):
        return True
    for offset in range(0, a.nbytes, _SLICE_NBYTES):
        size = min(_SLICE_NBYTES, a.nbytes - offset)
        if read(a, offset, size) != read(b, offset, size):
            return False
    return True


def _identity(file: Path) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_dev, status.st_ino


def _digest(stored: Stored) -> str:
    state = blake3()
    for offset in range(0, stored.nbytes, _SLICE_NBYTES):
        state.update(read(stored, offset, min(_SLICE_NBYTES, stored.nbytes - offset)))
    return state.hexdigest()


def _entries(tensors: Iterable[Stored]) -> list[TensorEntry]:
    return [_entry(stored) for stored in sorted(tensors, key=lambda stored: natural(stored.name))]


def _entry(stored: Stored) -> TensorEntry:
    return TensorEntry(name=stored.name, dtype=stored.dtype, shape=list(stored.shape))


def _ordered(pairs: Iterable[TensorPair]) -> list[TensorPair]:
    return sorted(pairs, key=lambda pair: natural(pair.name))
