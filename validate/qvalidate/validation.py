"""One validation from a path to a Result: load, rules, and the engines that are to be asked."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qschema.plan import Tool
from qschema.strict import DocumentError, Finding
from qvalidate import __version__
from qvalidate.asking import Answer, Ask, answer
from qvalidate.context import Context
from qvalidate.engines import FOUR_BITS, Thresholds
from qvalidate.engines.outcome import FOUR_BIT_INPUTS
from qvalidate.loader import load
from qvalidate.measured import LayerError, measure
from qvalidate.result import (
    Agreement,
    EngineReport,
    Prediction,
    Result,
    RunLevel,
    Subject,
)
from qvalidate.rules import RULES, raw, softened
from qvalidate.rules.outside import WEIGHTS
from qvalidate.rules.registry import Effect
from qvalidate.targets import ONE_GPU, Deployment, Target, every_target
from qvalidate.weights import compared

# each includes the ones before it
LEVELS: Sequence[RunLevel] = ("rules", "dry", "load", "generate", "compare")

_TOOL = Tool(name="qvalidate", version=__version__)


def validate(
    path: Path,
    *,
    reference: Path | None = None,
    targets: Sequence[Target] = (),
    deployment: Deployment = ONE_GPU,
    asks: Sequence[Ask] = (),
    limits: Mapping[str, float] | None = None,
    measures: bool = False,
) -> Result:
    """Return what the rules, and the engines that are asked, say about `path`.

    With `reference` every quantized weight is compared with the one in that source checkpoint. An
    engine is run also where the rules predict that it refuses: the report says whether it did.
    Without `targets` there is a prediction for every version that the rules know, and what only an
    engine minds is softened. `limits` replaces thresholds of comparisons by name; the others follow
    from the codes. With `measures` the result has what its pictures need.
    """
    level = _furthest(asks)
    wanted = tuple(targets) or every_target()
    try:
        context = load(path, deployment)
    except DocumentError as error:
        return Result(
            tool=_TOOL,
            checkpoint=Subject(path=str(path)),
            # nothing else was done
            level="rules",
            rules=[],
            findings=error.findings,
            engines=[_report(target, "unknown") for target in wanted],
            is_for_any_engine=not targets,
        )
    findings = list(raw(context, wanted))
    errors: list[LayerError] | None = None
    if reference is not None:
        seen = list(compared(context, reference))
        findings += [item for item in seen if isinstance(item, Finding)]
        errors = [item for item in seen if isinstance(item, LayerError)]
    reports = [_report(target, *predict(findings, target)) for target in wanted]
    shown = findings if targets else list(softened(findings))
    given = dict(limits or {})
    for ask in asks:
        found = answer(
            ask,
            limits=thresholds(context).model_copy(update=given),
            limits_of_plain=thresholds(context, has_plain_kernels=True).model_copy(update=given),
        )
        shown += found.findings()
        for index, target in enumerate(wanted):
            if target.engine == ask.engine.name:
                other = other_version(findings, target, found.version)
                reports[index] = _answered(reports[index], found, other)
                shown += _other_findings(path, target, found.version)
    return Result(
        tool=_TOOL,
        checkpoint=_subject(context),
        level=level,
        rules=list(RULES),
        findings=shown,
        engines=reports,
        is_for_any_engine=not targets,
        measured=measure(context, errors) if measures else None,
    )


def predict(findings: Sequence[Finding], target: Target) -> tuple[Prediction, list[str]]:
    """Return what `target` will do with a checkpoint that has `findings`, and by which rules."""
    effects: dict[str, list[str]] = {}
    for finding in findings:
        declared = RULES.get(finding.rule)
        # wrong weights load in any engine
        by_weights: Effect | None = "wrong" if finding.rule in WEIGHTS else None
        effect = declared.effect(target) if declared else by_weights
        # a warning that nothing is known
        is_doubt = effect == "unknown" and declared is not None and declared.severity == "warning"
        counts = finding.severity == "error" or is_doubt
        if effect and counts and finding.rule not in effects.get(effect, []):
            effects.setdefault(effect, []).append(finding.rule)
    if "refuses" in effects:
        return "refuses", effects["refuses"]
    if "unknown" in effects:
        return "unknown", effects["unknown"]
    if "wrong" in effects:
        return "loads-but-wrong", effects["wrong"]
    return "loads", []


def agreement(report: EngineReport) -> Agreement:
    """Return whether the engine bears the prediction out; what showed nothing can't."""
    shown, predicted, observed = report.shown, report.predicted, report.observed
    if shown is None or predicted == "unknown":
        return "untested"
    has_compared = observed is not None and observed.reached == "compare"
    if shown == "loads" and predicted == "loads-but-wrong" and not has_compared:
        return "untested"
    return "confirmed" if shown == predicted else "contradicted"


def other_version(findings: Sequence[Finding], target: Target, ran: str | None) -> str | None:
    """Return the version that ran if what is predicted of `target` is not about it, else None.

    It is not where the user meant another version, nor where `target` is several versions and the
    prediction, the worst of them, is not that of the one that ran.
    """
    if ran is None:
        return None
    own = target.only(ran)
    is_meant = target.wants(ran)
    if is_meant and (own is None or predict(findings, own)[0] == predict(findings, target)[0]):
        return None
    return ran


def _other_findings(path: Path, target: Target, ran: str | None) -> Iterator[Finding]:
    if ran is not None and not target.wants(ran):
        message = f"{target.engine} {ran} ran, {target.text} was asked for and not shown"
        yield Finding(file=str(path), where="", rule="engine-version", message=message)


def _furthest(asks: Sequence[Ask]) -> RunLevel:
    asked = {ask.level for ask in asks}
    return next((level for level in ("evaluate", *reversed(LEVELS)) if level in asked), "rules")


def _report(target: Target, predicted: Prediction, by: Sequence[str] = ()) -> EngineReport:
    return EngineReport(
        engine=target.engine,
        versions=list(target.versions),
        predicted=predicted,
        predicted_by=list(by),
    )


def _answered(report: EngineReport, found: Answer, other: str | None) -> EngineReport:
    parts = {
        "other_version": other,
        "dry": found.dry,
        "observed": found.observed,
        "served": found.served,
        "evaluated": found.evaluated,
    }
    told = report.model_copy(update=parts)
    return told.model_copy(update={"agreement": agreement(told)})


def _subject(context: Context) -> Subject:
    return Subject(
        path=str(context.path),
        digest=context.checkpoint.digest(),
        model_type=context.model_type,
        algo=context.obeyed.algo if context.obeyed else None,
        num_tensors=len(context.checkpoint.tensors),
        num_quantized=len(context.quantized),
    )


def thresholds(context: Context, *, has_plain_kernels: bool = False) -> Thresholds:
    """Return what a comparison may show at worst, by the coarsest codes in the checkpoint.

    Plain kernels quantize the inputs of NVFP4 too, which Marlin's on Hopper do not.
    """
    formats = {declared.name: declared for _, declared in context.encoded}.values()
    has_inputs = [
        declared.element == "E2M1" and bool(declared.specs("input")) for declared in formats
    ]
    if has_plain_kernels and has_inputs and all(has_inputs):
        return FOUR_BIT_INPUTS
    has_four_bits = any(declared.element in ("E2M1", "INT4") for declared in formats)
    return FOUR_BITS if has_four_bits else Thresholds()
