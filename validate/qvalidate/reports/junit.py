"""A Result as JUnit XML, in the shape that Jenkins and GitLab read (Jenkins xUnit's junit-10.xsd).

What a release pipeline wants of it is one answer, so a case is red exactly where the exit status
of the same run says so:

    rules      a case for each rule that was run; its errors are a failure (with `strict` its
               warnings too), all else it found is in system-out
    prediction a failure where the rules say that an engine that was named refuses the checkpoint
               or gets it wrong; skipped where they can't tell. Of engines that nobody named it is
               only told: they decide nothing
    dry        a failure where the engine's loader minds something; an error where there is no
               engine, or where it could show nothing and no run follows, else then skipped
    load, generate, compare
               a failure of the level at which the run failed; those after it are skipped. A
               missing kernel or engine is an error, not a failure: the checkpoint was not tested,
               which must stop a release as well, but whoever reads it has to mend the machine
    server, tasks
               a failure or an error likewise

Nothing is read and nothing is judged here.
"""

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args
from xml.etree import ElementTree

from qschema.strict import Finding
from qvalidate.dry import DryOutcome
from qvalidate.engines.outcome import EngineOutcome, Level
from qvalidate.engines.serve import ServeOutcome
from qvalidate.evaluate import EvalOutcome
from qvalidate.reports.wording import by_rule, next_step, origin_of, own_findings, summary_of
from qvalidate.result import EngineReport, Result

_State: TypeAlias = Literal["passed", "failure", "error", "skipped"]
_LEVELS: tuple[Level, ...] = get_args(Level)
# GitLab refuses files of 30 MB
_MOST_LINES = 100
# what XML 1.0 has no way to write
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass
class _Case:
    name: str
    # GitLab shows it as the suite
    group: str
    state: _State = "passed"
    message: str = ""
    text: str = ""
    output: str = ""


@dataclass
class _Suite:
    name: str
    cases: list[_Case]
    properties: dict[str, str]
    wall_s: float = 0.0

    def count(self, state: _State) -> int:
        return sum(1 for case in self.cases if case.state == state)


def render(result: Result, *, strict: bool = False) -> str:
    """Return `result` as the text of a JUnit XML file; `strict` makes warnings failures."""
    suites = [_rules(result, strict=strict)]
    suites += [_engine(report, result, strict=strict) for report in result.engines]
    root = ElementTree.Element("testsuites", {"name": "qvalidate", **_totals(suites)})
    for suite in suites:
        _add_suite(root, suite)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'


def _rules(result: Result, *, strict: bool) -> _Suite:
    found = by_rule(own_findings(result))
    ids = [*result.rules, *(rule_id for rule_id in found if rule_id not in result.rules)]
    subject = result.checkpoint
    about = {
        "checkpoint": subject.path,
        "digest": subject.digest,
        "model_type": subject.model_type,
        "algo": subject.algo,
        "quantized modules": str(subject.num_quantized),
        "qvalidate": result.tool.version,
        "level": result.level,
    }
    return _Suite(
        name="qvalidate.rules",
        cases=[_rule(rule_id, found.get(rule_id, []), strict=strict) for rule_id in ids],
        properties={key: value for key, value in about.items() if value},
    )


def _rule(rule_id: str, findings: Sequence[Finding], *, strict: bool) -> _Case:
    failing = _failing(strict=strict)
    wrong = [finding for finding in findings if finding.severity in failing]
    other = [finding for finding in findings if finding.severity not in failing]
    case = _Case(rule_id, f"qvalidate.{origin_of(rule_id)}", output=_lines(other))
    if wrong:
        case.state, case.message = "failure", f"{len(wrong)} x {summary_of(rule_id) or rule_id}"
        case.text = f"{_lines(wrong)}\nqvalidate explain {rule_id}"
    return case


def _failing(*, strict: bool) -> tuple[str, ...]:
    return ("error", "warning") if strict else ("error",)


def _engine(report: EngineReport, result: Result, *, strict: bool) -> _Suite:
    versions = f" {', '.join(report.versions)}" if result.is_for_any_engine else ""
    name = f"qvalidate.{report.engine}{versions}"
    observed, failing = report.observed, _failing(strict=strict)
    cases = [_prediction(report, result, name)]
    about = {"versions known to the rules": ", ".join(report.versions), "verdict": report.verdict}
    if report.dry is not None:
        message = report.dry.message
        cases.append(_one("dry", name, report.dry, message=message, failing=failing))
        if report.dry.verdict == "unsupported" and observed is not None:
            # a run follows; the warning counts only where it is strict
            cases[-1].state = "failure" if cases[-1].text else "skipped"
    if observed is not None:
        cases += _levels(observed, name, failing)
        about |= _observed(observed) | {"agreement": report.agreement}
    if report.served is not None:
        cases.append(_one("server", name, report.served, message="", failing=failing))
    if (tasks := report.evaluated) is not None:
        cases.append(_one("tasks", name, tasks, message=tasks.message, failing=failing))
        about |= {
            f"{score.task} {score.metric}": f"{score.candidate:.6g}" for score in tasks.scores
        }
        about |= {
            f"{score.task} {score.metric} of the source": f"{score.reference:.6g}"
            for score in tasks.scores
        }
    timed = (report.dry, observed, report.served)
    return _Suite(
        name=name,
        cases=cases,
        properties=about,
        wall_s=sum(part.wall_s for part in timed if part is not None),
    )


def _one(
    name: str,
    group: str,
    part: DryOutcome | ServeOutcome | EvalOutcome,
    *,
    message: str,
    failing: Container[str],
) -> _Case:
    """Return the one case of what is no level of a run."""
    wrong = [finding for finding in part.findings if finding.severity in failing]
    others = _lines(finding for finding in part.findings if finding.severity not in failing)
    case = _Case(name, group, output=others)
    if part.verdict != "passed" or wrong:
        case.state = "failure" if part.verdict in ("passed", "failed") else "error"
        case.message = message or (wrong[0].message if wrong else part.verdict)
        case.text = _lines(wrong)
    return case


def _prediction(report: EngineReport, result: Result, group: str) -> _Case:
    by = f" ({', '.join(report.predicted_by)})" if report.predicted_by else ""
    said = f"{report.predicted}{by}"
    case = _Case("prediction", group)
    if report.predicted == "unknown":
        case.state, case.message = "skipped", f"the rules can't tell{by}"
    elif report.predicted == "loads" or result.is_for_any_engine:
        case.output = said
    else:
        step = next_step(report, result)
        case.state, case.message = "failure", said
        case.text = "\n".join(part for part in (said, step.text, step.command) if part)
    return case


def _levels(observed: EngineOutcome, group: str, failing: Container[str]) -> list[_Case]:
    """Return a case for each level up to the one that was asked for."""
    asked = _LEVELS[: _LEVELS.index(observed.level) + 1]
    errors = [finding for finding in observed.findings if finding.severity in failing]
    notes = _lines(finding for finding in observed.findings if finding.severity not in failing)
    failed = _failed(observed, errors) if errors or observed.verdict != "passed" else None
    cases = [_Case(level, group) for level in asked]
    for level, case in zip(asked, cases, strict=True):
        if failed is None or _LEVELS.index(level) < _LEVELS.index(failed):
            continue
        if level == failed:
            is_tested = observed.verdict in ("passed", "failed")
            case.state = "failure" if is_tested else "error"
            case.message = observed.message or (errors[0].message if errors else observed.verdict)
            case.text = _lines(errors) or case.message
        else:
            case.state, case.message = "skipped", f"{failed} did not pass"
    cases[0].output = notes
    return cases


def _failed(observed: EngineOutcome, errors: Sequence[Finding]) -> Level:
    """Return the level that did not pass: the one named by an error, or the first not reached."""
    named = [
        level
        for level in _LEVELS
        if any(finding.rule.startswith(f"{level}-") for finding in errors)
    ]
    if named:
        return named[0]
    reached = -1 if observed.reached is None else _LEVELS.index(observed.reached)
    return _LEVELS[min(reached + 1, _LEVELS.index(observed.level))]


def _observed(observed: EngineOutcome) -> dict[str, str]:
    found = {"version": observed.version, "torch": observed.torch, "device": observed.device}
    about = {key: value for key, value in found.items() if value}
    if observed.kernels:
        about["kernels"] = f"not the engine's: {', '.join(observed.kernels)}"
    if observed.comparison is not None:
        compared = observed.comparison.model_dump()
        about |= {key: format(value, ".6g") for key, value in compared.items()}
    return about


def _lines(findings: Iterable[Finding]) -> str:
    lines = [str(finding) for finding in findings]
    more = len(lines) - _MOST_LINES
    if more > 0:
        lines = [*lines[:_MOST_LINES], f"... and {more} more"]
    return "\n".join(lines)


def _totals(suites: Sequence[_Suite]) -> dict[str, str]:
    return {
        "tests": str(sum(len(suite.cases) for suite in suites)),
        "failures": str(sum(suite.count("failure") for suite in suites)),
        "errors": str(sum(suite.count("error") for suite in suites)),
        "time": f"{sum(suite.wall_s for suite in suites):.3f}",
    }


def _add_suite(root: ElementTree.Element, suite: _Suite) -> None:
    counts = {**_totals([suite]), "skipped": str(suite.count("skipped"))}
    node = ElementTree.SubElement(root, "testsuite", {"name": suite.name, **counts})
    properties = ElementTree.SubElement(node, "properties")
    for key, value in suite.properties.items():
        ElementTree.SubElement(properties, "property", name=key, value=_writable(value))
    for case in suite.cases:
        child = ElementTree.SubElement(
            node, "testcase", classname=case.group, name=_writable(case.name), time="0.000"
        )
        if case.state != "passed":
            why = ElementTree.SubElement(child, case.state, message=_writable(case.message))
            # GitLab shows the text, Jenkins the message
            why.text = _writable(case.text or case.message)
        if case.output:
            ElementTree.SubElement(child, "system-out").text = _writable(case.output)


def _writable(text: str) -> str:
    """Return `text` with its unwritable characters as Python spells them: an escape is \\x1b."""
    return _UNWRITABLE.sub(lambda match: ascii(match[0])[1:-1], text)
