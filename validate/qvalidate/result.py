"""What a validation found: one value, from which every report and the exit status are made."""

from typing import Literal, TypeAlias

from pydantic import Field

from qschema.plan import Tool
from qschema.strict import Finding, Strict
from qvalidate.dry import DryOutcome
from qvalidate.engines.outcome import EngineOutcome
from qvalidate.engines.serve import ServeOutcome
from qvalidate.evaluate import EvalOutcome
from qvalidate.measured import Measured

RunLevel: TypeAlias = Literal["rules", "dry", "load", "generate", "compare", "evaluate"]
Prediction: TypeAlias = Literal["loads", "refuses", "loads-but-wrong", "unknown"]
Agreement: TypeAlias = Literal["confirmed", "contradicted", "untested"]


# what a run shows about the checkpoint itself, by the rule of its finding
_SHOWS: dict[str, Prediction] = {
    "engine-refused": "refuses",
    "generate-nonfinite": "loads-but-wrong",
    "compare-nonfinite": "loads-but-wrong",
    "compare-kl": "loads-but-wrong",
    "compare-top1": "loads-but-wrong",
    "compare-relative-error": "loads-but-wrong",
}


# what a loader leaves uninitialised, cuts off or casts; a tensor that it leaves may be no loss
_GARBLES = frozenset({"dry-missing", "dry-truncated", "dry-cast"})


def shown_by(observed: EngineOutcome) -> Prediction | None:
    """Return what a run shows about the checkpoint, None for nothing.

    A machine without the kernel, a crash, memory that ran out, no answer in time, a source that
    fails itself: none of them shows anything. That a checkpoint is right only a comparison shows.
    """
    if observed.verdict in ("no-kernel", "not-run"):
        return None
    if observed.verdict == "passed":
        return "loads"
    rules = [finding.rule for finding in observed.findings if finding.severity == "error"]
    shown = {_SHOWS.get(rule) for rule in rules}
    return shown.pop() if len(shown) == 1 else None


def shown_by_loader(dry: DryOutcome) -> Prediction | None:
    """Return what a dry load shows, None for nothing: that values are right it can't tell."""
    rules = {finding.rule for finding in dry.findings if finding.severity == "error"}
    if dry.verdict != "failed":
        return None
    if "dry-refused" in rules:
        return "refuses"
    return "loads-but-wrong" if rules & _GARBLES else None


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
    # of those that the rules know; what was observed names its own
    versions: list[str]
    predicted: Prediction
    # the rules that the prediction rests on
    predicted_by: list[str] = Field(default_factory=list)
    # each None where the engine was not asked for it
    dry: DryOutcome | None = None
    observed: EngineOutcome | None = None
    served: ServeOutcome | None = None
    evaluated: EvalOutcome | None = None
    # the version that ran, where the prediction is not about it; then the run shows nothing here
    other_version: str | None = None
    agreement: Agreement = "untested"

    @property
    def shown(self) -> Prediction | None:
        """What the engine shows, None for nothing; a run counts for more than a dry load.

        But that it generates, which garbage does too, does not undo what its loader left out.
        """
        if self.other_version is not None:
            return None
        by_run = shown_by(self.observed) if self.observed else None
        by_loader = shown_by_loader(self.dry) if self.dry else None
        has_compared = self.observed is not None and self.observed.reached == "compare"
        if by_run == "loads" and by_loader == "loads-but-wrong" and not has_compared:
            return by_loader
        return by_run or by_loader

    @property
    def verdict(self) -> Prediction:
        """What is known of the engine: what it did, where that shows something, else the rules."""
        return self.shown or self.predicted


class Result(Strict):
    """The result of one run of qvalidate."""

    document: Literal["qvalidate-result"] = "qvalidate-result"
    version: Literal[2] = 2
    tool: Tool
    checkpoint: Subject
    level: RunLevel
    # ids of the rules that were run, in order; empty if the checkpoint could not be read
    rules: list[str]
    findings: list[Finding]
    # of the engines that were named; of all versions that the rules know, if none was
    engines: list[EngineReport] = Field(default_factory=list)
    is_for_any_engine: bool = False
    # numbers for pictures; None where no report asked for them
    measured: Measured | None = None

    def count(self, severity: str) -> int:
        """Return the number of findings of that severity."""
        return sum(1 for finding in self.findings if finding.severity == severity)

    def exit_code(self, *, strict: bool) -> int:
        """Return 0 clean, 1 findings or nothing shown, 2 where an engine could not be started."""
        parts = (
            part
            for report in self.engines
            for part in (report.dry, report.observed, report.served, report.evaluated)
        )
        if any(part is not None and part.verdict in ("not-run", "no-engine") for part in parts):
            return 2
        if self.count("error") or (strict and self.count("warning")):
            return 1
        # a dry load that nothing follows was all that was asked for
        is_unshown = any(
            report.dry is not None and report.dry.verdict == "unsupported"
            for report in self.engines
            if report.observed is None
        )
        return 1 if is_unshown else 0
