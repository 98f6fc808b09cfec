"""The findings, by rule: what each rule is about, then every place that breaks it."""

from collections.abc import Sequence

from qschema.strict import Finding
from qvalidate.reports.markup import Html, breakable, join, tag
from qvalidate.reports.wording import SEVERITIES, by_rule, relative_file, summary_of, worst
from qvalidate.result import Result
from qvalidate.rules import RULES

# findings of one rule that are on the page
_MOST_ROWS = 200


def groups(result: Result) -> Html:
    """Return a part that opens and closes for each rule, errors open; the filter needs the script.

    Of more than 200 findings of one rule the rest is counted.
    """
    found = by_rule(result.findings)
    if not found:
        return tag("p", "Nothing was found.", class_="lead")
    made = [_group(rule_id, items, result) for rule_id, items in found.items()]
    return join([_filter(result), tag("div", *made, id="groups")])


def _filter(result: Result) -> Html:
    boxes = [
        tag(
            "label",
            tag("input", type="checkbox", name="severity", value=severity, checked=True),
            f" {severity}s",
        )
        for severity in SEVERITIES
        if result.count(severity)
    ]
    label = tag("label", "Filter", for_="filter-text")
    field = tag(
        "input",
        id="filter-text",
        type="search",
        placeholder="tensor, rule, file or words",
        autocomplete="off",
    )
    return tag(
        "form",
        tag("div", label, field, class_="field"),
        tag("div", *boxes, class_="boxes", role="group", aria_label="Severities"),
        tag(
            "div",
            tag("button", "Open all", type="button", data_open="yes"),
            tag("button", "Close all", type="button", data_open="no"),
            class_="buttons",
        ),
        tag("output", for_="filter-text", aria_live="polite", id="filter-count"),
        id="filter",
        role="search",
        hidden=True,
    )


def _group(rule_id: str, found: Sequence[Finding], result: Result) -> Html:
    severity = SEVERITIES[worst(found)]
    shown = found[:_MOST_ROWS]
    heading = tag(
        "h3",
        tag("span", severity, class_=f"badge {severity}"),
        " ",
        tag("code", rule_id),
        tag("span", str(len(found)), class_="count", title="findings"),
    )
    declared = RULES.get(rule_id)
    left_out = len(found) - len(shown)
    more = f"{left_out} more are left out; --format json has all of them."
    return tag(
        "details",
        tag("summary", heading, tag("span", summary_of(rule_id), class_="what")),
        tag("p", declared.text, class_="why") if declared else None,
        tag("p", tag("code", f"qvalidate explain {rule_id}"), class_="why") if declared else None,
        _table(rule_id, shown, result, group=severity),
        tag("p", more, class_="muted") if left_out else None,
        class_="group",
        id=f"rule-{rule_id}",
        open=severity == "error",
    )


def _table(rule_id: str, found: Sequence[Finding], result: Result, *, group: str) -> Html:
    heads = ("Where", "What was found", "File")
    return tag(
        "table",
        tag("caption", f"Findings of {rule_id}", class_="hidden"),
        tag("thead", tag("tr", *(tag("th", head, scope="col") for head in heads))),
        tag("tbody", *(_row(finding, result, group=group) for finding in found)),
        class_="findings",
    )


def _row(finding: Finding, result: Result, *, group: str) -> Html:
    file = relative_file(finding, result) or finding.file
    severity = finding.severity
    badge = tag("span", severity, class_=f"badge {severity}") if severity != group else None
    return tag(
        "tr",
        tag("th", tag("code", breakable(finding.where or "the whole file")), scope="row"),
        tag("td", badge, " " if badge else None, finding.message),
        tag("td", tag("code", breakable("the directory" if file == "." else file))),
        data_severity=severity,
    )
