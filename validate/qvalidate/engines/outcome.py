"""What is asked of an engine and what came of it. Values only: nothing here starts anything."""

from pathlib import Path
from typing import Literal, Self, TypeAlias

from pydantic import Field, model_validator

from qschema.strict import Finding, Strict, violation

Level: TypeAlias = Literal["load", "generate", "compare"]
Kernels: TypeAlias = Literal["native", "reference"]
Verdict: TypeAlias = Literal["passed", "failed", "no-kernel", "not-run"]


class Thresholds(Strict):
    """The worst comparison that still passes, of a checkpoint with 8-bit codes.

    Measured with vLLM 0.32 and 0.33 on tiny random models, which exaggerate all three: 8-bit
    weights end at a mean KL of 0.02 to 0.21, a top-1 agreement of 0.71 to 0.89, a relative error of
    0.08 to 0.24. One projection with scales times 8 or inverted, or gate and up swapped, ends at a
    KL above 1.5, an agreement below 0.32, a relative error above 0.64. KL grows with the spread of
    the logits, the relative error does not.
    """

    # nats per token, mean over the positions
    max_kl: float = Field(default=0.3, gt=0, allow_inf_nan=False)
    min_top1: float = Field(default=0.6, ge=0, le=1)
    max_relative_error: float = Field(default=0.4, gt=0, allow_inf_nan=False)


# the same of 4-bit codes: NVFP4 ends at a KL of 0.29 to 0.80, an agreement of 0.39 to 0.53 and a
# relative error of 0.28 to 0.46, with a scale times 8 at 3.99, 0.04 and 1.03
FOUR_BITS = Thresholds(max_kl=1.2, min_top1=0.3, max_relative_error=0.6)

# the same where the inputs have four bits too: NVFP4 with plain kernels ends at a KL of 0.60 to
# 1.27, an agreement of 0.32 to 0.45 and a relative error of 0.39 to 0.58, with a scale times 8 at
# 4.21, 0.07 and 1.06
FOUR_BIT_INPUTS = Thresholds(max_kl=2.0, min_top1=0.2, max_relative_error=0.75)


class EngineRequest(Strict):
    """One checkpoint for one engine. Each level includes the ones before it."""

    checkpoint: Path
    # the source checkpoint; needed by `compare`, loaded by the same engine
    reference: Path | None = None
    # the engine's interpreter; None is the one that runs this
    python: str | None = None
    level: Level = "generate"
    # for each start of the engine; `compare` starts it twice
    timeout_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    thresholds: Thresholds = Thresholds()
    # `reference` puts plain expressions in place of the kernels that this machine lacks
    kernels: Kernels = "native"

    @model_validator(mode="after")
    def _reference_to_compare_with(self) -> Self:
        if self.level == "compare" and self.reference is None:
            raise violation("engine-reference", "level compare needs a reference checkpoint")
        return self


class Comparison(Strict):
    """How far the candidate's prompt log-probabilities are from the reference's; all finite.

    A position is one prompt token and the distribution over the whole vocabulary that follows it.
    """

    num_positions: int = Field(ge=1)
    vocab: int = Field(ge=1)
    # KL(reference || candidate) in nats, over the positions
    kl_mean: float
    kl_max: float
    # share of positions where the candidate's first choice is one of the reference's
    top1_agreement: float = Field(ge=0, le=1)
    # ||centred difference|| / ||centred reference||, each position centred over the vocabulary
    relative_error: float = Field(ge=0)
    # exp of the mean negative log-probability of the prompts' own tokens
    perplexity_reference: float
    perplexity_candidate: float


class EngineOutcome(Strict):
    """What one engine said about one checkpoint.

    `passed` only if the level that was asked for was reached and no finding is an error.
    `no-kernel` says something about the machine, `not-run` about the installation: neither is about
    the checkpoint, and neither is a pass.
    """

    engine: str
    # None where the engine did not get as far as telling
    version: str | None = None
    torch: str | None = None
    device: str | None = None
    # operations that were not the engine's own; empty if all were
    kernels: list[str] = Field(default_factory=list)
    level: Level
    verdict: Verdict
    reached: Level | None = None
    # the engine's own last words, short; empty if it had nothing to complain about
    message: str = ""
    prompts: list[list[int]] = Field(default_factory=list)
    # greedy continuations, one per prompt; their text if the checkpoint has a tokenizer
    tokens: list[list[int]] = Field(default_factory=list)
    texts: list[str] | None = None
    comparison: Comparison | None = None
    wall_s: float = 0.0
    findings: list[Finding] = Field(default_factory=list)
