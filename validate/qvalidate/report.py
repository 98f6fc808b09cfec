"""A Result as text. JSON is the model's own dump."""

import shlex
from collections import Counter
from collections.abc import Iterator

import click

from qschema.strict import Finding
from qvalidate.explain import is_explained
from qvalidate.result import EngineReport, Result
from qvalidate.rules import RULES

_COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}
_ORDER = {"error": 0, "warning": 1, "note": 2}
# findings of one rule that are shown without -v
_SHOWN = 10
# rules that are named behind an engine
_REASONS = 2


def lines(result: Result, *, quiet: bool, verbose: bool) -> Iterator[str]:
    """Yield the report line by line, coloured; errors first. `quiet` leaves out the notes."""
    wanted = [
        found
        for found in result.findings
        if found.severity != "note" or not (quiet or _is_aside(found, result, verbose=verbose))
    ]
    seen: Counter[tuple[str, str]] = Counter()
    totals = Counter((found.rule, found.severity) for found in wanted)
    for found in sorted(wanted, key=lambda finding: _ORDER[finding.severity]):
        key = (found.rule, found.severity)
        seen[key] += 1
        if verbose or seen[key] <= _SHOWN:
            yield _line(found)
        elif seen[key] == _SHOWN + 1:
            yield f"... and {totals[key] - _SHOWN} more of {found.rule} (-v shows them)"
    if not result.is_for_any_engine:
        for engine in result.engines:
            yield from engine_lines(engine)


def engine_lines(report: EngineReport) -> Iterator[str]:
    """Yield what was predicted of the engine, what it did, and whether they agree."""
    by = f" ({', '.join(report.predicted_by)})" if report.predicted_by else ""
    yield f"{report.engine}: predicted: {report.predicted}{by}"
    for line in parts(report):
        yield f"{report.engine}: {line}"
    observed = report.observed
    if observed is None:
        if report.dry is not None:
            yield _agreement(report)
        return
    known = [part for part in (observed.version, observed.device) if part]
    where = f" [{', '.join(known)}]" if known else ""
    # the level is named for what was shown, not for what was asked
    said = {
        "passed": f"passed, level {observed.reached}",
        "failed": f"failed{f' after {observed.reached}' if observed.reached else ''}",
        "no-kernel": "no kernel here",
        "not-run": "not run",
    }[observed.verdict]
    message = f": {observed.message}" if observed.message else ""
    yield f"{report.engine}: observed: {said}{where}{message}"
    if observed.comparison is not None:
        compared = observed.comparison
        yield (
            f"{report.engine}: against the source: KL {compared.kl_mean:.4g}, "
            f"top-1 {compared.top1_agreement:.3g}, relative error {compared.relative_error:.3g} "
            f"over {compared.num_positions} positions"
        )
    if observed.kernels:
        yield f"{report.engine}: with plain expressions for {', '.join(observed.kernels)}"
    yield _agreement(report)


def parts(report: EngineReport) -> Iterator[str]:
    """Yield a line for what was asked beside loading and generating."""
    if (dry := report.dry) is not None:
        counted = f"{dry.num_tensors} tensors, {dry.ranks_checked} of {dry.tp} ranks"
        version = f" [{dry.version}]" if dry.version else ""
        message = f": {dry.message}" if dry.message else ""
        yield f"dry load: {dry.verdict}, {counted}{version}{message}"
    if (served := report.served) is not None:
        ready = f", ready in {served.ready_s:.1f} s" if served.ready_s is not None else ""
        chat = f"; chat not asked: {served.chat_skipped}" if served.chat_skipped else ""
        yield f"server: {served.verdict}{ready}{chat}"
    if (evaluated := report.evaluated) is not None:
        scores = ", ".join(
            f"{score.task} {score.candidate:.4f} (source {score.reference:.4f})"
            for score in evaluated.scores
        )
        yield f"tasks: {evaluated.verdict}: {scores or evaluated.message}"


def _agreement(report: EngineReport) -> str:
    said = {
        "confirmed": "confirms the prediction",
        "contradicted": "contradicts the prediction",
        "untested": "says nothing about the prediction",
    }[report.agreement]
    why = f", which is not about {report.other_version}" if report.other_version else ""
    return f"{report.engine}: the run {said}{why}"


def summary(result: Result) -> Iterator[str]:
    """Yield what a person reads last: counts, and which engines it suits if none is named."""
    subject = result.checkpoint
    found: Counter[str] = Counter(
        finding.severity
        for finding in result.findings
        if not _is_aside(finding, result, verbose=False)
    )
    counts = ", ".join(
        f"{found[level]} {level}{'' if found[level] == 1 else 's'}" for level in _ORDER
    )
    what = " ".join(part for part in (subject.model_type, subject.algo) if part)
    about = f" ({what}, {subject.num_quantized} quantized modules)" if what else ""
    yield f"{subject.path}{about}: {counts}"
    if result.is_for_any_engine and result.rules:
        for prediction in ("loads", "loads-but-wrong", "refuses", "unknown"):
            names = [
                f"{report.engine} {', '.join(report.versions)}{_because(report)}"
                for report in result.engines
                if report.predicted == prediction
            ]
            if names:
                yield f"{prediction}: {'; '.join(names)}"


def _because(report: EngineReport) -> str:
    more = "" if len(report.predicted_by) <= _REASONS else ", ..."
    reasons = ", ".join(report.predicted_by[:_REASONS])
    return f" ({reasons}{more})" if reasons else ""


def hint(result: Result) -> str | None:
    """Return what to do next, None if nothing suggests itself."""
    worst = min(result.findings, key=lambda finding: _ORDER[finding.severity], default=None)
    if worst is not None and worst.severity != "note":
        # of what a strict model minds there is no more to say
        return f"qvalidate explain {worst.rule}" if is_explained(worst.rule) else None
    if result.is_for_any_engine:
        path = shlex.quote(result.checkpoint.path)
        return f"no engine was asked: qvalidate {path} --engine vllm"
    return None


def _is_aside(found: Finding, result: Result, *, verbose: bool) -> bool:
    """Return whether a note is about one engine where none is named; the summary has those."""
    declared = RULES.get(found.rule)
    is_engines = declared is not None and declared.engine is not None
    return result.is_for_any_engine and is_engines and not verbose


def _line(found: Finding) -> str:
    place = f"{found.file}::{found.where}" if found.where else found.file
    level = "" if found.severity == "error" else f"{found.severity}: "
    return f"{place}: {click.style(found.rule, fg=_COLORS[found.severity])}: {level}{found.message}"
