"""What the reports say about rules and engines, in words; the numbers are the Result's.

Also which findings are whose: a rule's, or those of an engine's run.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qschema.strict import Finding
from qvalidate.dry import DRY, DryOutcome
from qvalidate.engines.outcome import EngineOutcome
from qvalidate.engines.serve import ServeOutcome
from qvalidate.evaluate import EVALUATE, EvalOutcome
from qvalidate.result import EngineReport, Result
from qvalidate.rules import RULES
from qvalidate.rules.outside import ENGINE, LOADING, SERVE, WEIGHTS

SEVERITIES = ("error", "warning", "note")
# id -> text, by where such findings come from
_ORIGINS: Mapping[str, Mapping[str, str]] = {
    "loading": LOADING,
    "weights": WEIGHTS,
    "dry": DRY,
    "engine": ENGINE,
    "serve": SERVE,
    "tasks": EVALUATE,
}


def summary_of(rule_id: str) -> str:
    """Return one line about the rule, empty for an id that no table has."""
    if rule_id in RULES:
        return RULES[rule_id].summary
    return next((table[rule_id] for table in _ORIGINS.values() if rule_id in table), "")


def origin_of(rule_id: str) -> str:
    """Return `rules`, or which part of a validation finds it; `loading` for a strict model's."""
    if rule_id in RULES:
        return "rules"
    return next((origin for origin, table in _ORIGINS.items() if rule_id in table), "loading")


def own_findings(result: Result) -> list[Finding]:
    """Return the findings that are no engine's: of the rules, of loading, of the weights."""
    engines = engine_findings(result)
    return [finding for finding in result.findings if finding not in engines]


def engine_findings(result: Result) -> frozenset[Finding]:
    """Return the findings of all that the engines were asked for."""
    asked = (
        part
        for report in result.engines
        for part in (report.dry, report.observed, report.served, report.evaluated)
    )
    return frozenset(finding for part in asked if part for finding in part.findings)


def relative_file(finding: Finding, result: Result) -> str | None:
    """Return the finding's file relative to the checkpoint, None if it lies elsewhere."""
    try:
        return Path(finding.file).relative_to(result.checkpoint.path).as_posix()
    except ValueError:
        return None


class Step(NamedTuple):
    """What to do next: a sentence, and the command if one does it."""

    text: str
    command: str | None = None


def next_step(report: EngineReport, result: Result) -> Step:
    """Return what its reader should do about one engine."""
    check = f"{command_for(result)} --engine {report.engine}"
    observed = report.observed
    beside = (report.dry, report.served, report.evaluated)
    failed = next((part for part in beside if part and part.verdict == "failed"), None)
    if failed is not None and (observed is None or observed.verdict == "passed"):
        rule = first_error(failed)
        return Step("See what the failure means:", f"qvalidate explain {rule}" if rule else None)
    if report.other_version is not None:
        return Step(
            "Another version ran. Name the interpreter of one that is meant:",
            f"{check} --python {report.engine}=PATH",
        )
    if observed is None:
        return _next_unobserved(report, check)
    if observed.verdict == "not-run":
        python = f"{check} --python {report.engine}=PATH"
        return Step("The engine could not be started. Install it, or name its interpreter:", python)
    if observed.verdict == "no-kernel":
        return Step("Nothing was shown: run this on a machine whose GPU has the format's kernels.")
    if observed.verdict == "failed":
        rule = first_error(observed)
        command = f"qvalidate explain {rule}" if rule else None
        return Step("See what the failure means:", command)
    if report.agreement == "contradicted":
        return Step("The rules were wrong about this engine: report it with this page.")
    if observed.reached != "compare":
        return Step("It generates, which proves little. Compare it:", f"{check} --reference SOURCE")
    return Step("Nothing is left to do: it was compared with its source.")


def command_for(result: Result) -> str:
    """Return the command that checks the checkpoint again, as a shell reads it."""
    return f"qvalidate {shlex.quote(result.checkpoint.path)}"


def _next_unobserved(report: EngineReport, check: str) -> Step:
    if report.predicted_by:
        command = f"qvalidate explain {report.predicted_by[0]}"
        return Step("Read what the rule means, and convert again:", command)
    if report.predicted == "unknown":
        return Step("The rules can't tell. Ask the engine:", check)
    return Step("A prediction is no proof. Ask the engine:", f"{check} --reference SOURCE")


def first_error(part: DryOutcome | EngineOutcome | ServeOutcome | EvalOutcome) -> str | None:
    """Return the rule of the first error in what an engine was asked for."""
    return next((item.rule for item in part.findings if item.severity == "error"), None)


def by_rule(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Return rule -> its findings, rules with errors first, then in the order they were found."""
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.rule, []).append(finding)
    return dict(sorted(found.items(), key=lambda item: worst(item[1])))


def worst(findings: Sequence[Finding]) -> int:
    """Return the place of the worst severity in SEVERITIES."""
    return min(SEVERITIES.index(finding.severity) for finding in findings)
