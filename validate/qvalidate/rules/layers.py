"""The layers of a checkpoint by what they own, and which of them lack what those like them have.

A layer is the set of its tensors' names below "layers.N.", with `*` for the number of an expert and
without what quantization adds, so that quantized and plain layers compare.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from qvalidate.context import Module
from qvalidate.rules.suffixes import CODES, QUANT_SUFFIX

# six digits are more layers than any model has; longer ones are no number
_LAYER = re.compile(
    r"(?P<stack>(?:.*?\.)?(?:layers?|h|blocks?))\.(?P<index>\d{1,6})(?:\.(?P<rest>.+))?"
)
_EXPERT = re.compile(r"\bexperts\.\d+\.")
# computed, and stored by some for their first layer only
_COMPUTED = frozenset({"inv_freq"})
# what a stack of experts owns beside what quantization adds
_PLAIN = frozenset({"weight", "bias"})
# a kind of layer that is this rare among those that own more is taken for a loss
_RARE = 8

Layers: TypeAlias = Mapping[int, frozenset[str]]


def stacks(modules: Mapping[str, Module]) -> Mapping[str, Layers]:
    """Return stack ("model.layers") -> number -> what the layer owns."""
    found: dict[str, dict[int, set[str]]] = {}
    for name, module in modules.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            continue
        owned = found.setdefault(match["stack"], {}).setdefault(int(match["index"]), set())
        owned.update(_owned(match["rest"] or "", module))
    return {
        stack: {index: frozenset(owned) for index, owned in sorted(layers.items())}
        for stack, layers in found.items()
    }


def files(modules: Mapping[str, Module]) -> Mapping[str, str]:
    """Return layer ("model.layers.0") -> a file that holds some of it."""
    found: dict[str, str] = {}
    for name, module in modules.items():
        if match := _LAYER.fullmatch(name):
            found.setdefault(f"{match['stack']}.{int(match['index'])}", module.file)
    return found


def decoder(found: Mapping[str, Layers]) -> str | None:
    """Return the stack that num_hidden_layers counts, None where no name is an ordinary one."""
    return next((stack for stack in ("model.layers", "layers") if stack in found), None)


def alike(layers: Layers) -> Iterator[tuple[int, frozenset[str], int]]:
    """Yield (layer, what it lacks, how many layers have it) where a layer lacks it alone.

    A layer is compared with those that own all that it owns and more. One that owns anything else
    is of another kind; so are those that lack the same in more than one of eight cases.
    """
    kinds = Counter(layers.values())
    for index, owned in layers.items():
        richer = {kind: num for kind, num in kinds.items() if kind > owned}
        if not richer:
            continue
        kind = max(richer, key=lambda kind: (richer[kind], -len(kind)))
        if richer[kind] >= 2 and kinds[owned] <= max(1, richer[kind] // _RARE):
            yield index, kind - owned, richer[kind]


def _owned(rest: str, module: Module) -> Iterator[str]:
    parent = _EXPERT.sub("experts.*.", f"{rest}." if rest else "")
    if module.is_stack:
        yield from (
            rest if leaf == "weight" else f"{rest}_bias" for leaf in _PLAIN & module.tensors.keys()
        )
        return
    for suffix in module.tensors:
        if CODES.fullmatch(suffix):
            yield f"{parent}weight"
        elif suffix.endswith("_proj_blocks"):
            yield f"{parent}{suffix.removesuffix('_blocks')}"
        elif suffix not in _COMPUTED and not QUANT_SUFFIX.fullmatch(suffix):
            yield f"{parent}{suffix}"
