"""Where the source checkpoint has the weight of a module, also in another arrangement of experts.

    experts.E.gate_proj.weight [I, H]    is experts.gate_up_proj [E, 2I, H], its first I rows
    experts.E.up_proj.weight   [I, H]    the other I rows
    experts.E.down_proj.weight [H, I]    experts.down_proj [E, H, I]

E experts, H columns in, I rows between. A stack [E, K, N], as Llama 4 and gpt-oss have it, is
compared with a stack.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from qschema.dtypes import HIGH_PRECISION, nbytes
from qschema.safetensors import Stored
from qvalidate.context import Module
from qvalidate.decode import Held, Source, read

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d{1,6})\.(?P<leaf>[a-z0-9_]+)")
# stack -> the projections that its rows hold, in order
_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def source_weight(tensors: Mapping[str, Stored], module: Module) -> Stored | None:
    """Return where `tensors` have the weight of `module`, None if nowhere."""
    if module.weight_name in tensors:
        return tensors[module.weight_name]
    match = _EXPERT.fullmatch(module.name)
    for stack, leaves in _STACKS.items():
        if match is not None and match["leaf"] in leaves:
            stored = tensors.get(f"{match['experts']}.{stack}")
            return _part(stored, int(match["index"]), leaves.index(match["leaf"]), len(leaves))
    return None


def split_names(stored: Stored) -> tuple[str, ...]:
    """Return the names of the weights that a stack of experts holds, () for another tensor."""
    experts, _, leaf = stored.name.rpartition(".")
    if not experts.endswith(".experts") or leaf not in _STACKS or len(stored.shape) != 3:
        return ()
    return tuple(
        f"{experts}.{index}.{part}.weight"
        for index in range(stored.shape[0])
        for part in _STACKS[leaf]
    )


def experts_of(stack: Stored) -> Iterator[Held]:
    """Yield the matrices of a stack [E, K, N] one by one, turned to [N, K]."""
    import numpy as np

    count, *shape = stack.shape
    size = nbytes(stack.dtype, tuple(shape))
    width = size // max(1, prod(shape))
    for index in range(count):
        values = np.frombuffer(read(stack, index * size, size), f"V{width}").reshape(shape)
        turned = values.T.copy().tobytes()
        yield Held(stack.dtype, tuple(reversed(shape)), turned)


def stacked_pairs(
    weight: Stored, outputs: Mapping[str, Stored]
) -> Iterator[tuple[Held, dict[str, Source]]]:
    """Yield (source, outputs) of every expert of a stack; what has no [E, ...] is everyone's."""
    stacks = {suffix: stored for suffix, stored in outputs.items() if len(stored.shape) == 3}
    shared = {suffix: stored for suffix, stored in outputs.items() if suffix not in stacks}
    experts = zip(
        experts_of(weight), *(experts_of(stored) for stored in stacks.values()), strict=True
    )
    for source, *parts in experts:
        yield source, {**dict(zip(stacks, parts, strict=True)), **shared}


def _part(stored: Stored | None, index: int, place: int, count: int) -> Stored | None:
    """Return the matrix `index` of a stack, the part `place` of `count` of its rows."""
    if stored is None or len(stored.shape) != 3 or stored.dtype not in HIGH_PRECISION:
        return None
    experts, rows, columns = stored.shape
    if index >= experts or rows % count:
        return None
    shape = (rows // count, columns)
    size = nbytes(stored.dtype, shape)
    offset = stored.offset + (index * count + place) * size
    return replace(stored, shape=shape, offset=offset, nbytes=size)
