"""A Result as one HTML page: no network, works without JavaScript, on paper and in the dark.

The page carries a policy that allows it its own style and script, by their hashes, and nothing
else. The sections are made by the modules beside this one; here they are put together.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from qvalidate.measured import Measured
from qvalidate.reports import charts, findings, support, verdicts
from qvalidate.reports.markup import Html, join, tag
from qvalidate.reports.support import Row
from qvalidate.reports.wording import SEVERITIES, command_for
from qvalidate.result import Result


def render(
    result: Result,
    *,
    measured: Measured | None = None,
    support_matrix: Sequence[Row] = (),
) -> str:
    """Return `result` as the text of an HTML file.

    With `measured` there are pictures of the weights' errors and of the scales, with
    `support_matrix` what is known of engines and formats.
    """
    sections = [
        ("verdicts", "Verdicts", verdicts.cards(result)),
        ("comparison", "Against the source", verdicts.comparison(result)),
        ("findings", "Findings", findings.groups(result)),
        ("errors", "Errors of the weights", charts.errors(measured, result)),
        ("scales", "Scales", charts.scales(measured)),
        ("support", "Support matrix", support.tables(support_matrix, result)),
        ("about", "About this report", _about(result)),
    ]
    shown = [(key, title, body) for key, title, body in sections if body]
    style, script = _asset("report.css"), _asset("report.js")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{_name(result)}: qvalidate"),
        tag("style", Html(style)),
    )
    links = [tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in shown]
    body = tag(
        "body",
        _masthead(result),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag("main", *(_section(*section) for section in shown)),
        tag("script", Html(script)),
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n{body}\n</html>\n'


def _asset(name: str) -> str:
    return (files("qvalidate.reports") / "assets" / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    hashes = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    sources = "style-src 'sha256-{}'; script-src 'sha256-{}'".format(*hashes)
    return f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'"


def _name(result: Result) -> str:
    # the path may be "." or end with a slash
    return Path(result.checkpoint.path).absolute().name or result.checkpoint.path


def _masthead(result: Result) -> Html:
    subject = result.checkpoint
    known = [part for part in (subject.model_type, subject.algo) if part]
    if known:
        known.append(f"{subject.num_quantized} quantized modules in {subject.num_tensors} tensors")
    counts = [(severity, result.count(severity)) for severity in SEVERITIES]
    return tag(
        "header",
        tag("p", "qvalidate", class_="eyebrow"),
        tag("h1", _name(result)),
        tag("p", " \N{MIDDLE DOT} ".join(known), class_="subject") if known else None,
        tag(
            "ul",
            *(
                tag(
                    "li",
                    tag("strong", str(count)),
                    f" {severity}{'' if count == 1 else 's'}",
                    class_=f"tally {severity if count else 'none'}",
                )
                for severity, count in counts
            ),
            class_="tallies",
        ),
    )


def _section(key: str, title: str, body: Html) -> Html:
    heading = tag("h2", title, id=f"{key}-title")
    return tag("section", heading, body, id=key, aria_labelledby=f"{key}-title")


def _about(result: Result) -> Html:
    subject = result.checkpoint
    rows = [
        ("Checkpoint", tag("code", subject.path)),
        ("Digest of names, sizes and headers", tag("code", subject.digest or "not readable")),
        ("Made by", f"{result.tool.name} {result.tool.version}"),
        ("Level", result.level),
        ("Rules that were run", str(len(result.rules))),
    ]
    for report in result.engines:
        if report.observed is not None:
            run = report.observed
            parts = [run.version, run.torch and f"torch {run.torch}", run.device]
            parts.append(f"{run.wall_s:.1f} s")
            rows.append((f"Run of {report.engine}", ", ".join(part for part in parts if part)))
    commands = (
        tag("code", "qvalidate explain ID"),
        " says what a rule means and how that is known, ",
        tag("code", f"{command_for(result)} --format json"),
        " gives the same result as data.",
    )
    facts = join(join([tag("dt", key), tag("dd", value)]) for key, value in rows)
    return join([tag("dl", facts, class_="facts"), tag("p", *commands, class_="muted")])
