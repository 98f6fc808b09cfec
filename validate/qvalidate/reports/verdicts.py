"""The verdict on each engine, and how close it came to the source: the first things to be read."""

from collections.abc import Iterator, Mapping, Sequence

from qvalidate.engines.outcome import EngineOutcome
from qvalidate.report import parts
from qvalidate.reports.markup import Html, join, tag
from qvalidate.reports.wording import first_error, next_step, summary_of
from qvalidate.result import (
    Agreement,
    EngineReport,
    Prediction,
    Result,
    shown_by,
    shown_by_loader,
)

# what a run showed, what the rules predict, and a sign for both: colour alone tells nothing
_WORDS: Mapping[Prediction, tuple[str, str, str]] = {
    "loads": ("Loads", "Would load", "\N{CHECK MARK}"),
    "refuses": ("Refuses", "Would refuse", "\N{MULTIPLICATION X}"),
    "loads-but-wrong": ("Loads, but wrong", "Would load, but wrong", "\N{WARNING SIGN}\ufe0e"),
    "unknown": ("Unknown", "Unknown", "?"),
}
_AGREEMENTS: Mapping[Agreement, str] = {
    "confirmed": "The run confirms what the rules predicted.",
    "contradicted": "The run contradicts what the rules predicted.",
    "untested": "The run says nothing about what the rules predicted.",
}
# continuations of one engine that are shown
_MOST_TEXTS = 3


def cards(result: Result) -> Html:
    """Return a card for each engine: verdict, reasons, next step."""
    if not result.engines:
        return Html("")
    found = {finding.rule for finding in result.findings}
    made = [_card(report, result, found) for report in result.engines]
    lead = None
    if result.is_for_any_engine:
        text = "No engine was named: this is what the rules predict of each version they know."
        lead = tag("p", text, class_="lead")
    return join([lead, tag("div", *made, class_="cards")])


def _card(report: EngineReport, result: Result, found: set[str]) -> Html:
    seen, predicted, sign = _WORDS[report.verdict]
    is_seen = report.shown is not None
    if report.shown == "loads" and report.observed is not None:
        seen = "Loads and agrees" if report.observed.reached == "compare" else seen
    versions = f" {', '.join(report.versions)}"
    step = next_step(report, result)
    reasons = [_reason(rule_id, found) for rule_id in _rules(report)]
    beside = [tag("li", line) for line in parts(report)]
    has_run = report.observed is not None or report.dry is not None
    return tag(
        "article",
        tag(
            "p",
            tag("span", sign, aria_hidden="true"),
            f" {seen if is_seen else predicted}",
            class_="state",
        ),
        tag("h3", report.engine, tag("span", versions, class_="version")),
        tag("p", _basis(report), class_="basis"),
        tag("ul", *reasons, class_="reasons") if reasons else None,
        _last_words(report.observed),
        tag("ul", *beside, class_="reasons") if beside else None,
        tag("p", _AGREEMENTS[report.agreement], class_="muted") if has_run else None,
        tag(
            "div",
            tag("p", tag("strong", "Next: "), step.text),
            tag("pre", tag("code", step.command)) if step.command else None,
            class_="next",
        ),
        class_=f"card {report.verdict}{'' if is_seen else ' predicted'}",
    )


def _basis(report: EngineReport) -> str:
    """Return what the verdict rests on."""
    observed, dry = report.observed, report.dry
    by_loader = shown_by_loader(dry) if dry is not None else None
    by_run = shown_by(observed) if observed is not None else None
    if dry is not None and by_loader not in (None, by_run) and report.shown == by_loader:
        version = f" {dry.version}" if dry.version else ""
        return f"Seen in a dry load by {report.engine}{version}, from headers alone."
    if observed is None:
        if dry is None:
            return "By the rules. The engine was not asked."
        return "By the rules alone; the engine was asked for a dry load only."
    where = ", ".join(part for part in (observed.version, observed.device) if part)
    run = f"a run of {report.engine}" + (f" ({where})" if where else "")
    if observed.kernels:
        run += f" with stand-ins for {', '.join(observed.kernels)}"
    if report.other_version is not None:
        return f"By the rules alone; {run} is not what they are about."
    if shown_by(observed) is not None:
        after = f", level {observed.reached}" if observed.reached else ", before it had loaded"
        return f"Seen in {run}{after}."
    why = {
        "no-kernel": "there is no kernel for the format on this machine",
        "not-run": "the engine could not be started",
    }.get(observed.verdict, "the run failed without showing why")
    return f"By the rules alone; {run} showed nothing: {why}."


def _rules(report: EngineReport) -> list[str]:
    """Return the rules that the verdict rests on, those of the run first."""
    asked = (report.observed, report.dry, report.served, report.evaluated)
    own = [rule for part in asked if part and (rule := first_error(part))]
    by = [] if report.agreement == "contradicted" else report.predicted_by
    return list(dict.fromkeys([*own, *by]))


def _reason(rule_id: str, found: set[str]) -> Html:
    code = tag("code", rule_id)
    name = tag("a", code, href=f"#rule-{rule_id}") if rule_id in found else code
    return tag("li", name, f": {summary_of(rule_id)}")


def _last_words(observed: EngineOutcome | None) -> Html | None:
    if observed is None or not observed.message:
        return None
    return tag("p", observed.message, class_="message")


def comparison(result: Result) -> Html:
    """Return the numbers of the comparisons and the first texts, empty without any."""
    runs = [report.observed for report in result.engines if report.observed is not None]
    rows = list(_rows(runs))
    parts: list[Html] = []
    if rows:
        heads = (
            "Engine", "Mean KL, nats", "Largest KL, nats", "Top-1 agreement",
            "Relative error", "Perplexity", "of the source", "Ratio", "Positions",
        )  # fmt: skip
        table = tag(
            "table",
            tag("caption", "Log-probabilities of the prompts, the source's in the same engine"),
            tag("thead", tag("tr", *(tag("th", head, scope="col") for head in heads))),
            tag("tbody", *rows),
            class_="numbers",
        )
        parts.append(scroller(table, "Comparison with the source"))
    parts += [_texts(run) for run in runs if run.tokens]
    return join(parts)


def _rows(runs: Sequence[EngineOutcome]) -> Iterator[Html]:
    for run in runs:
        compared = run.comparison
        if compared is None:
            continue
        ratio = compared.perplexity_candidate / compared.perplexity_reference
        cells = (
            f"{compared.kl_mean:.4g}",
            f"{compared.kl_max:.4g}",
            f"{100 * compared.top1_agreement:.1f} %",
            f"{compared.relative_error:.3g}",
            f"{compared.perplexity_candidate:.4g}",
            f"{compared.perplexity_reference:.4g}",
            f"{ratio:.4g}",
            str(compared.num_positions),
        )
        head = tag("th", run.engine, scope="row")
        yield tag("tr", head, *(tag("td", cell) for cell in cells))


def _texts(run: EngineOutcome) -> Html:
    """Return the first greedy continuations, as token ids where there is no tokenizer."""
    shown = run.texts or [" ".join(map(str, ids)) for ids in run.tokens]
    items = [tag("li", tag("pre", text)) for text in shown[:_MOST_TEXTS]]
    what = "" if run.texts else ", as token ids: the checkpoint has no tokenizer"
    title = f"First greedy continuations by {run.engine}{what}"
    return join([tag("h3", title), tag("ol", *items, class_="texts")])


def scroller(table: Html, label: str) -> Html:
    """Return `table` in a box that scrolls by itself, also with the keyboard."""
    return tag("div", table, class_="scroller", role="region", tabindex=0, aria_label=label)
