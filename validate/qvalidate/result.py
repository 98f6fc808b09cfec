"""What a validation found: one value, from which every report and the exit status are made."""

from typing import Literal, TypeAlias

from pydantic import Field

from qschema.plan import Tool
from qschema.strict import Finding, Strict
from qvalidate.engines.outcome import EngineOutcome

RunLevel: TypeAlias = Literal["rules", "load", "generate", "compare"]
Prediction: TypeAlias = Literal["loads", "refuses", "loads-but-wrong", "unknown"]
Agreement: TypeAlias = Literal["confirmed", "contradicted", "untested"]


class Subject(Strict):
    """The checkpoint that was looked at. `digest` is over its shards' names, sizes and headers."""

    path: str
    digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    model_type: str | None = None
    # as the obeyed config spells it
    algo: str | None = None
    num_tensors: int = Field(default=0, ge=0)
    num_quantized: int = Field(default=0, ge=0)


class EngineReport(Strict):
    """What the rules predict of one engine, what it did, and whether the two agree."""

    engine: str
    predicted: Prediction
    # the rules that the prediction rests on
    predicted_by: list[str] = Field(default_factory=list)
    # None at the level `rules`
    observed: EngineOutcome | None = None
    agreement: Agreement = "untested"


class Result(Strict):
    """The result of one run of qvalidate."""

    document: Literal["qvalidate-result"] = "qvalidate-result"
    version: Literal[1] = 1
    tool: Tool
    checkpoint: Subject
    level: RunLevel
    # ids of the rules that were run, in order; empty if the checkpoint could not be read
    rules: list[str]
    findings: list[Finding]
    engine: EngineReport | None = None

    def count(self, severity: str) -> int:
        """Return the number of findings of that severity."""
        return sum(1 for finding in self.findings if finding.severity == severity)

    def exit_code(self, *, strict: bool) -> int:
        """Return 0 clean, 1 findings, 2 where the engine asked for could not be started."""
        observed = self.engine.observed if self.engine else None
        if observed is not None and observed.verdict == "not-run":
            return 2
        return 1 if self.count("error") or (strict and self.count("warning")) else 0
