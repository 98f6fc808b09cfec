"""What a conversion did: `qconvert_report.json`, written into the checkpoint as its provenance.

Same input, recipe and version give the same bytes: no times, no paths, no machine in it.
"""

from typing import Literal

from pydantic import Field

from qschema.plan import Action, SideFile, Source, Tool
from qschema.recipe import AlgoName, Recipe
from qschema.strict import Numerous, Strict


class WrittenTensor(Numerous):
    """One tensor of the output; `digest` is of its raw bytes in the file, "blake3:..."."""

    name: str
    dtype: str
    shape: list[int]
    digest: str = Field(pattern="^(blake3|sha256):[0-9a-f]{64}$")


class TensorReport(Numerous):
    """What became of one source tensor, or of one matrix of a stack of experts."""

    source: str
    # which rows of which expert, "[3, 0:768]"; null for a whole tensor
    part: str | None = None
    dtype: str
    shape: list[int]
    action: Action
    algo: AlgoName | None = None
    reason: str
    outputs: list[WrittenTensor]
    # signal to quantization noise, 20 log10(||w|| / ||w - dequantized||), in dB with two decimals;
    # null if kept, or without noise
    sqnr: float | None = None
    # ||w - dequantized|| / ||w|| over the finite elements, six significant digits; null if kept
    relative_error: float | None = None
    # finite elements that the largest code clips by more than rounding (E4M3: |w / scale| > 464)
    num_saturated: int | None = None
    # NaN and Inf in the source; above zero only if the recipe allows it; null for integer tensors
    num_nonfinite: int | None = None


class Report(Strict):
    """The provenance of a converted checkpoint, one entry per source tensor."""

    document: Literal["qconvert-report"] = "qconvert-report"
    version: Literal[1] = 1
    tool: Tool
    recipe: Recipe
    source: Source
    plan_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    # stored bits over elements: of the quantized weights, and of the whole checkpoint
    bits_per_quantized_weight: float
    bits_per_weight: float
    tensors: list[TensorReport]
    side_files: list[SideFile]
    notes: list[str] = Field(default_factory=list)
