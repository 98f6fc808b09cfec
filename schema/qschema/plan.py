"""What a conversion will do, tensor by tensor, known before the first weight is read.

A plan is a value: it holds no path of this machine, can be printed, hashed, compared and sent to
another process. Offsets are absolute byte positions in the file that is named.
"""

import hashlib
from typing import Literal

from pydantic import Field

from qschema.recipe import AlgoName, Recipe
from qschema.strict import Strict


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


class Span(Strict):
    """One stored tensor: `nbytes` bytes at `offset` of `file`, a name in the checkpoint."""

    name: str
    file: str
    dtype: str
    shape: list[int]
    offset: int = Field(ge=8)
    nbytes: int = Field(ge=0)


class Step(Strict):
    """What happens to one source tensor. `outputs` of a kept tensor is the tensor itself."""

    source: Span
    action: Literal["quantize", "keep"]
    # the format's name, for `quantize` only
    algo: AlgoName | None = None
    # which rule decided, and why, in words for a person
    reason: str
    outputs: list[Span]


class Unit(Strict):
    """The smallest set of tensors to be quantized together: one weight, or fused siblings."""

    steps: list[Step] = Field(min_length=1)


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


class Plan(Strict):
    """Everything that a conversion reads and writes, accounted for."""

    document: Literal["qconvert-plan"] = "qconvert-plan"
    version: Literal[1] = 1
    tool: Tool
    source: Source
    recipe: Recipe
    # as in hf_quant_config.json
    exclude_modules: list[str]
    shards: list[OutputShard]
    units: list[Unit]
    side_files: list[SideFile]
    # things a person should know before starting: fused siblings split, unknown architecture, ...
    notes: list[str] = Field(default_factory=list)

    @property
    def steps(self) -> list[Step]:
        """All steps, unit by unit."""
        return [step for unit in self.units for step in unit.steps]

    def output_nbytes(self) -> int:
        """Return the bytes of all output shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    def sha256(self) -> str:
        """Return the digest of the plan's canonical JSON, which names a conversion exactly."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
