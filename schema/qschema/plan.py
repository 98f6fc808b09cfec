"""What a conversion will do, tensor by tensor, known before the first weight is read.

A plan is a value: it can be printed, written to a file, hashed, compared and sent to another
process. What it says of one machine, `where` and `high_water`, stands apart and is no part of its
digest, nor is the digest in a file of it. Offsets are absolute byte positions in the file that is
named.
"""

import hashlib
from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from qschema.recipe import AlgoName, Recipe
from qschema.strict import Numerous, Strict


class Tool(Strict):
    """Who made a document."""

    name: str = "qconvert"
    version: str


class Source(Strict):
    """The checkpoint that was read; `digest` is a sha256 of its shards' names, sizes, headers."""

    model_type: str | None
    # False where only the generic rules of the architecture map applied
    known_architecture: bool
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    nbytes: int = Field(ge=0)


class Span(Numerous):
    """One stored tensor: `nbytes` bytes at `offset` of `file`, a name in the checkpoint."""

    name: str
    file: str
    dtype: str
    shape: list[int]
    offset: int = Field(ge=8)
    nbytes: int = Field(ge=0)


# quantize: codes and scales; keep: the same bytes; fold: a norm or a bias that takes in smoothing;
# drop: not written at all
Action: TypeAlias = Literal["quantize", "keep", "fold", "drop"]


class Output(Span):
    """One tensor that a step writes; `suffix` names it in the format's declaration."""

    suffix: str = ""


class Vector(Strict):
    """Numbers per column or row, from the pre_quant_scale p of modules in the statistics.

    inverse: 1 / p in f32. rounded: p in bf16. mean: the f32 mean of the rounded ones, in bf16.
    """

    kind: Literal["inverse", "rounded", "mean"]
    of: list[str] = Field(min_length=1)


class Scaling(Strict):
    """w = round(w * factor / divisor): f32 operations, one rounding to the weight's dtype."""

    axis: Literal["columns", "rows"]
    factor: Vector
    divisor: Vector | None = None


class Step(Numerous):
    """What happens to one source tensor, or to one matrix of a stack of experts."""

    source: Span
    # which rows of which expert, "[3, 0:768]"; None for a whole tensor
    part: str | None = None
    action: Action
    # the format's name, for `quantize` only
    algo: AlgoName | None = None
    # which rule decided, and why, in words for a person
    reason: str
    # the Linear's weight is stored [columns, rows], experts one after the other
    transposed: bool = False
    # the largest |input|, shared as the format says, where it has an input scale
    input_amax: float | None = None
    # before anything else, in this order
    scalings: list[Scaling] = Field(default_factory=list)
    # what the format's smoothing tensor holds, if it is written
    smoothing: Vector | None = None
    # of a kept tensor the tensor itself, of a dropped one nothing
    outputs: list[Output]


class Unit(Numerous):
    """The smallest set of tensors to be quantized together: one weight, or fused siblings.

    A scale of the whole weight is that of the unit's largest magnitude.
    """

    steps: list[Step] = Field(min_length=1)


class Constant(Strict):
    """A tensor that no source tensor becomes: a scale or a bias of the KV cache."""

    output: Output
    # a number, or the tensor of this name in the statistics
    value: float | None = None
    vector: str | None = None
    reason: str


class OutputShard(Strict):
    """One safetensors file to write; its header follows from the spans in it and `metadata`."""

    file: str
    nbytes: int = Field(ge=8)
    metadata: dict[str, str] = Field(default_factory=dict)


class SideFile(Strict):
    """One file beside the weights: copied byte for byte, left behind, or written anew."""

    file: str
    action: Literal["copy", "leave", "write"]
    reason: str
    nbytes: int | None = Field(default=None, ge=0)


# a NUL is in no path
AbsolutePath: TypeAlias = Annotated[str, Field(pattern=r"^/[^\x00]*$")]


class Where(Strict):
    """The places that a plan was made from, as absolute paths of the machine that made it."""

    source: AbsolutePath
    statistics: AbsolutePath | None = None


class HighWater(Strict):
    """The most that a run takes, on this device, with so many workers and this budget.

    disk: what must be free beside the source. host: memory of the process. gpu: memory of each GPU.
    Memory is null where the plan was made without the device, or for a budget that is too small.
    """

    device: str
    # null if the device would have decided
    workers: int | None = Field(ge=1)
    memory_budget: int = Field(ge=0)
    disk_nbytes: int = Field(ge=0)
    host_nbytes: int | None = Field(default=None, ge=0)
    gpu_nbytes: int | None = Field(default=None, ge=0)


# what a plan says of one machine, and its own digest
LOCAL = frozenset({"plan_sha256", "where", "high_water"})


class Plan(Strict):
    """Everything that a conversion reads and writes, accounted for."""

    document: Literal["qconvert-plan"] = "qconvert-plan"
    version: Literal[1] = 1
    tool: Tool
    # the digest of the plan as it was made; a plan that was edited has another
    plan_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    where: Where | None = None
    high_water: HighWater | None = None
    source: Source
    recipe: Recipe
    # sha256 of the statistics' vectors, if any are used
    vectors: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    # as in hf_quant_config.json, for a checkpoint of one format
    exclude_modules: list[str]
    # module, or "....experts" for all of a layer -> format, for a mixed one
    quantized_layers: dict[str, AlgoName] = Field(default_factory=dict)
    shards: list[OutputShard]
    units: list[Unit]
    constants: list[Constant] = Field(default_factory=list)
    side_files: list[SideFile]
    # things a person should know before starting: fused siblings split, unknown architecture, ...
    notes: list[str] = Field(default_factory=list)

    @property
    def algos(self) -> list[str]:
        """The formats in use, sorted."""
        return sorted({step.algo for step in self.steps if step.algo})

    @property
    def steps(self) -> list[Step]:
        """All steps, unit by unit."""
        return [step for unit in self.units for step in unit.steps]

    def outputs(self) -> Iterator[Output]:
        """Yield every tensor that is written."""
        for step in self.steps:
            yield from step.outputs
        for constant in self.constants:
            yield constant.output

    def output_nbytes(self) -> int:
        """Return the bytes of all output shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    def sha256(self) -> str:
        """Return the digest of the plan's canonical JSON, which names a conversion exactly.

        It is that of every machine: what is `LOCAL` is left out.
        """
        state = hashlib.sha256()
        for part in self._canonical():
            state.update(part.encode())
        return state.hexdigest()

    def _canonical(self) -> Iterator[str]:
        """Yield the text of `model_dump_json`, without what is local, a unit at a time."""
        opening = "{"
        for name in type(self).model_fields:
            if name in LOCAL:
                continue
            if name == "units":
                yield f'{opening}"units":['
                for place, unit in enumerate(self.units):
                    yield f"{',' if place else ''}{unit.model_dump_json()}"
                yield "]"
            else:
                # without the braces
                yield opening + self.model_dump_json(include={name})[1:-1]
            opening = ","
        yield "}"
