"""One validation from a path to a Result: load, rules, and the engine if one is named."""

from collections.abc import Mapping
from pathlib import Path

from qschema.plan import Tool
from qschema.strict import DocumentError, Finding
from qvalidate import __version__
from qvalidate.context import Context
from qvalidate.engines import FOUR_BITS, Engine, EngineOutcome, EngineRequest, Thresholds
from qvalidate.loader import load
from qvalidate.result import Agreement, EngineReport, Prediction, Result, RunLevel, Subject
from qvalidate.rules import RULES, run
from qvalidate.rules.outside import WEIGHTS
from qvalidate.rules.registry import Effect
from qvalidate.weights import weight_findings

# what a run shows about the checkpoint itself, by the rule of its finding
_SHOWS: dict[str, Prediction] = {
    "engine-refused": "refuses",
    "generate-nonfinite": "loads-but-wrong",
    "compare-nonfinite": "loads-but-wrong",
    "compare-kl": "loads-but-wrong",
    "compare-top1": "loads-but-wrong",
    "compare-relative-error": "loads-but-wrong",
}

_TOOL = Tool(name="qvalidate", version=__version__)


def validate(
    path: Path,
    *,
    reference: Path | None = None,
    engine: Engine | None = None,
    request: EngineRequest | None = None,
    limits: Mapping[str, float] | None = None,
) -> Result:
    """Return what the rules, and the engine if a `request` goes with it, say about `path`.

    With `reference` every quantized weight is compared with the one in that source checkpoint. The
    engine is run also where the rules predict that it refuses: the report says whether it did.
    `limits` replaces thresholds of its comparison by name; the others follow from the codes.
    """
    name = engine.name if engine else None
    level: RunLevel = request.level if request else "rules"
    try:
        context = load(path)
    except DocumentError as error:
        report = EngineReport(engine=name, predicted="unknown") if name else None
        return Result(
            tool=_TOOL,
            checkpoint=Subject(path=str(path)),
            level=level,
            rules=[],
            findings=error.findings,
            engine=report,
        )
    findings = list(run(context, engine=name))
    if reference is not None:
        findings += weight_findings(context, reference)
    report = None
    if engine is not None:
        predicted, predicted_by = predict(findings, engine=engine.name)
        if request is not None:
            found = thresholds(context).model_copy(update=dict(limits or {}))
            request = request.model_copy(update={"thresholds": found})
        observed = engine.run(request) if request else None
        if observed is not None:
            findings += observed.findings
        report = EngineReport(
            engine=engine.name,
            predicted=predicted,
            predicted_by=predicted_by,
            observed=observed,
            agreement=agreement(predicted, observed),
        )
    return Result(
        tool=_TOOL,
        checkpoint=_subject(context),
        level=level,
        rules=list(RULES),
        findings=findings,
        engine=report,
    )


def predict(findings: list[Finding], *, engine: str) -> tuple[Prediction, list[str]]:
    """Return what `engine` will do with a checkpoint that has `findings`, and by which rules."""
    effects: dict[str, list[str]] = {}
    for finding in findings:
        declared = RULES.get(finding.rule)
        # wrong weights load in any engine
        by_weights: Effect | None = "wrong" if finding.rule in WEIGHTS else None
        effect = declared.effects.get(engine) if declared else by_weights
        if effect and finding.severity == "error" and finding.rule not in effects.get(effect, []):
            effects.setdefault(effect, []).append(finding.rule)
    if "refuses" in effects:
        return "refuses", effects["refuses"]
    if "unknown" in effects:
        return "unknown", effects["unknown"]
    if "wrong" in effects:
        return "loads-but-wrong", effects["wrong"]
    return "loads", []


def agreement(predicted: Prediction, observed: EngineOutcome | None) -> Agreement:
    """Return whether the run bears the prediction out.

    A machine without the kernel, a crash, memory that ran out, no answer in time, a source that
    fails itself: none of them shows anything. That a checkpoint is right only a comparison shows.
    """
    if observed is None or predicted == "unknown" or observed.verdict in ("no-kernel", "not-run"):
        return "untested"
    if observed.verdict == "passed":
        if predicted == "loads-but-wrong" and observed.reached != "compare":
            return "untested"
        return "confirmed" if predicted == "loads" else "contradicted"
    rules = [finding.rule for finding in observed.findings if finding.severity == "error"]
    if not rules or not all(rule in _SHOWS for rule in rules):
        return "untested"
    return "confirmed" if all(_SHOWS[rule] == predicted for rule in rules) else "contradicted"


def _subject(context: Context) -> Subject:
    return Subject(
        path=str(context.path),
        digest=context.checkpoint.digest(),
        model_type=context.model_type,
        algo=context.obeyed.algo if context.obeyed else None,
        num_tensors=len(context.checkpoint.tensors),
        num_quantized=len(context.quantized),
    )


def thresholds(context: Context) -> Thresholds:
    """Return what a comparison may show at worst, by the coarsest codes in the checkpoint."""
    has_four_bits = any(declared.element in ("E2M1", "INT4") for _, declared in context.encoded)
    return FOUR_BITS if has_four_bits else Thresholds()
