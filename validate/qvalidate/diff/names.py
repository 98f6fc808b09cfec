"""Names of tensors: under which other name B has a tensor of A, and how names are shown in groups.

A tensor that only A has and one that only B has are the same one renamed if

    names    they differ as Mixtral's experts do, w1 and gate_proj, in its two spellings
    bytes    dtype, shape and bytes are equal, and they are no mere numbers
    module   another tensor of the same module was renamed from the one to the other
"""

import re
from collections.abc import Callable, Iterable, Mapping

from qschema.safetensors import Stored
from qvalidate.diff.result import Renamed

# a scale that happens to be the same number is no proof of anything
_LEAST_NBYTES = 64
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_LAYER = re.compile(r"(?:.*\.)?(?:layers|layer|h|blocks|block)\.\d+(?=\.|\Z)")
# Mixtral's experts as on the hub, and as the other mixtures of experts spell them
_EXPERT = re.compile(r"(?P<owner>.*\.experts\.\d+)\.(?P<leaf>w[123])(?P<rest>\..*)?")
_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_OLD_BLOCK, _BLOCK = "block_sparse_moe", "mlp"

Digest = Callable[[Stored], str]


def renames(
    a: Mapping[str, Stored], b: Mapping[str, Stored], *, digest: Digest | None
) -> list[Renamed]:
    """Return the tensors of A that have another name in B.

    digest: of a tensor's bytes; without it no bytes are read and none are compared.
    """
    only_a = {name: stored for name, stored in a.items() if name not in b}
    only_b = {name: stored for name, stored in b.items() if name not in a}
    found = [Renamed(a=one, b=other, by="names") for one, other in _by_names(only_a, only_b)]
    if digest is None:
        return found
    for pair in found:
        del only_a[pair.a], only_b[pair.b]
    equal = _by_bytes(only_a, only_b, digest)
    found += [Renamed(a=one, b=other, by="bytes") for one, other in equal]
    for one, other in equal:
        del only_a[one], only_b[other]
    found += [
        Renamed(a=one, b=other, by="module") for one, other in _by_module(only_a, only_b, equal)
    ]
    return found


def pattern(name: str) -> str:
    """Return the name with a star for each number that is a part of it."""
    return _NUMBER.sub("*", name)


def layer_of(name: str) -> str:
    """Return the part of the name that names its layer, "" for what is in none."""
    match = _LAYER.match(name)
    return match[0] if match else ""


def kind_of(name: str) -> str:
    """Return what tensor or module of a layer it is: the name below the layer, as a pattern."""
    return pattern(name.removeprefix(layer_of(name)).removeprefix("."))


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Return a key that sorts numbers in names as numbers."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in name.split("."))


def _by_names(a: Iterable[str], b: Iterable[str]) -> list[tuple[str, str]]:
    ours, theirs = _canonical_names(a), _canonical_names(b)
    return [(ours[name], theirs[name]) for name in ours if name in theirs]


def _canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Return new spelling -> name, for names whose new spelling is that of no other."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(_canonical(name), []).append(name)
    return {spelling: found[0] for spelling, found in grouped.items() if len(found) == 1}


def _canonical(name: str) -> str:
    if match := _EXPERT.fullmatch(name):
        name = f"{match['owner']}.{_LEAVES[match['leaf']]}{match['rest'] or ''}"
    return ".".join(_BLOCK if part == _OLD_BLOCK else part for part in name.split("."))


def _by_bytes(
    a: Mapping[str, Stored], b: Mapping[str, Stored], digest: Digest
) -> list[tuple[str, str]]:
    """Return the tensors of equal bytes. Where several are equal, they go in the order of names."""
    ours, theirs = _by_layout(a), _by_layout(b)
    pairs: list[tuple[str, str]] = []
    for layout in ours.keys() & theirs.keys():
        one, other = _by_digest(ours[layout], digest), _by_digest(theirs[layout], digest)
        for key in one.keys() & other.keys():
            if len(one[key]) == len(other[key]):
                names = (sorted(found, key=natural) for found in (one[key], other[key]))
                pairs += zip(*names, strict=True)
    return sorted(pairs, key=lambda pair: natural(pair[1]))


def _by_layout(tensors: Mapping[str, Stored]) -> dict[tuple[str, tuple[int, ...]], list[Stored]]:
    grouped: dict[tuple[str, tuple[int, ...]], list[Stored]] = {}
    for stored in tensors.values():
        if stored.nbytes >= _LEAST_NBYTES:
            grouped.setdefault((stored.dtype, stored.shape), []).append(stored)
    return grouped


def _by_digest(tensors: list[Stored], digest: Digest) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for stored in tensors:
        grouped.setdefault(digest(stored), []).append(stored.name)
    return grouped


def _by_module(
    a: Mapping[str, Stored], b: Mapping[str, Stored], known: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    owners: dict[str, set[str]] = {}
    for one, other in known:
        (here, _, leaf), (there, _, their_leaf) = one.rpartition("."), other.rpartition(".")
        if leaf == their_leaf:
            owners.setdefault(here, set()).add(there)
    pairs = []
    for name in a:
        owner, _, leaf = name.rpartition(".")
        for there in owners.get(owner, ()) if len(owners.get(owner, ())) == 1 else ():
            if f"{there}.{leaf}" in b:
                pairs.append((name, f"{there}.{leaf}"))
    return pairs
