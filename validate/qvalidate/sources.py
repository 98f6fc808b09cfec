"""Where the source checkpoint has a tensor that has another name or another shape here.

By the architecture map, for a source as Transformers 5 holds it in memory:

    block_sparse_moe.gate.weight         is mlp.gate.weight (Mixtral)
    experts.E.gate_proj.weight [I, H]    is experts.gate_up_proj [E, 2I, H], its first I rows
    experts.E.up_proj.weight   [I, H]    the other I rows
    experts.E.down_proj.weight [H, I]    experts.down_proj [E, H, I]

E experts, H columns in, I rows between. Stacks of model types that the map does not know are taken
to be like the last three: numbers that agree show that they are. A stack [E, K, N], as Llama 4 and
gpt-oss have it, is compared with a stack.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

from qschema.architectures import find_stack, hub_name, text_config
from qschema.checkpoint import Checkpoint
from qschema.dtypes import HIGH_PRECISION, nbytes
from qschema.safetensors import Stored
from qvalidate.decode import Held, Source, read

# of other model types: stack -> the projections that its rows hold, in order
_ASSUMED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Origin:
    """The source checkpoint, by the names that its tensors have once it is quantized."""

    checkpoint: Checkpoint

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Name -> tensor: its own names, the hub's, and those of the matrices in stacks."""
        found: dict[str, Stored] = {}
        for stored in self.checkpoint.tensors.values():
            found.update(self.parts(stored))
            found[self.hub_name(stored.name)] = stored
        found.update(self.checkpoint.tensors)
        return found

    def hub_name(self, name: str) -> str:
        """Return the name on the hub of a tensor of the source."""
        return hub_name(name, model_type=self._model_type)

    def parts(self, stored: Stored) -> Mapping[str, Stored]:
        """Return name -> matrix of a stack of experts that is split, {} for another tensor."""
        leaves = self._leaves(stored)
        if not leaves or stored.shape[1] % len(leaves):
            return {}
        experts, rows, columns = stored.shape
        shape = (rows // len(leaves), columns)
        size = nbytes(stored.dtype, shape)
        owner = self.hub_name(stored.name.rpartition(".")[0])
        names = (f"{owner}.{index}.{leaf}.weight" for index in range(experts) for leaf in leaves)
        return {
            name: replace(stored, shape=shape, offset=stored.offset + place * size, nbytes=size)
            for place, name in enumerate(names)
        }

    def _leaves(self, stored: Stored) -> tuple[str, ...]:
        """Return the projections that a stack holds, one below the other; () for another tensor."""
        owner, _, leaf = stored.name.rpartition(".")
        if len(stored.shape) != 3 or stored.dtype not in HIGH_PRECISION:
            return ()
        if stack := find_stack(stored.name, model_type=self._model_type):
            return stack.parts
        return _ASSUMED.get(leaf, ()) if owner.rpartition(".")[2] == "experts" else ()

    @cached_property
    def _model_type(self) -> str | None:
        found = text_config(self.checkpoint.config).get("model_type")
        return found if isinstance(found, str) else None


def stacked_pairs(
    weight: Stored, outputs: Mapping[str, Stored]
) -> Iterator[tuple[Held, dict[str, Source]]]:
    """Yield (source, outputs) of every expert of a stack; what has no [E, ...] is everyone's."""
    stacks = {suffix: stored for suffix, stored in outputs.items() if len(stored.shape) == 3}
    shared = {suffix: stored for suffix, stored in outputs.items() if suffix not in stacks}
    experts = zip(_turned(weight), *(_turned(stored) for stored in stacks.values()), strict=True)
    for source, *parts in experts:
        yield source, {**dict(zip(stacks, parts, strict=True)), **shared}


def _turned(stack: Stored) -> Iterator[Held]:
    """Yield the matrices of a stack [E, K, N] one by one, turned to [N, K]."""
    import numpy as np

    count, *shape = stack.shape
    size = nbytes(stack.dtype, tuple(shape))
    width = size // max(1, prod(shape))
    for index in range(count):
        values = np.frombuffer(read(stack, index * size, size), f"V{width}").reshape(shape)
        turned = values.T.copy().tobytes()
        yield Held(stack.dtype, tuple(reversed(shape)), turned)
