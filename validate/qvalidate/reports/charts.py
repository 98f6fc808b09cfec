"""Pictures of what was measured: errors as a table that is a heat map, scales as small bar charts.

Colours are classes, never styles: the page's policy allows its own style sheet alone.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qvalidate.measured import LayerError, Measured, ScaleHistogram, kind_of
from qvalidate.reports.markup import Html, breakable, join, tag
from qvalidate.reports.verdicts import scroller
from qvalidate.reports.wording import command_for
from qvalidate.result import Result

# steps of colour; the last one is for what the format can't explain
_NUM_STEPS = 8
# without an expectation the steps are doublings, the first one below this
_FIRST_ERROR = 0.0025
_WIDTH, _HEIGHT, _AXIS = 240, 72, 16
_LEAST_POWERS = 8
_ROLES = {
    "scale": "Scales of the codes",
    "global": "Scales of whole weights",
    "input": "Scales of inputs",
    "smoothing": "Smoothing",
    "kv": "Scales of the KV cache",
}


_RAISED = str.maketrans(
    "-0123456789",
    "\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT ZERO}\N{SUPERSCRIPT ONE}\N{SUPERSCRIPT TWO}"
    "\N{SUPERSCRIPT THREE}\N{SUPERSCRIPT FOUR}\N{SUPERSCRIPT FIVE}\N{SUPERSCRIPT SIX}"
    "\N{SUPERSCRIPT SEVEN}\N{SUPERSCRIPT EIGHT}\N{SUPERSCRIPT NINE}",
)


class _Place(NamedTuple):
    """Where a module stands: under `model.layers`, in layer 3, as `mlp.experts.*.up_proj`."""

    stack: str
    layer: int
    kind: str


def errors(measured: Measured | None, result: Result) -> Html:
    """Return a heat map for each stack of layers; a sentence where nothing was compared."""
    if measured is None or measured.errors_from is None:
        command = f"{command_for(result)} --reference SOURCE --format html"
        lead = "No weight was compared with the source. This does it: "
        return tag("p", lead, tag("code", command), class_="lead")
    beyond = frozenset(
        finding.where.removesuffix(".weight")
        for finding in result.findings
        if finding.rule == "weight-error"
    )
    has_expected = any(error.expected is not None for error in measured.errors)
    stacks: dict[str, dict[_Place, list[LayerError]]] = {}
    outside: list[LayerError] = []
    for error in measured.errors:
        place = _place(error.module)
        if place is None:
            outside.append(error)
        else:
            stacks.setdefault(place.stack, {}).setdefault(place, []).append(error)
    origin = {
        "reference": "decoded and compared with the source's here",
        "conversion-report": "as the conversion reported them; nothing was compared here",
    }[measured.errors_from]
    lead = f"Relative error of each quantized weight in percent, {origin}."
    parts = [tag("p", lead, class_="lead"), _legend(has_expected=has_expected)]
    for stack, cells in stacks.items():
        parts.append(scroller(_heat_map(stack, cells, beyond), f"Errors of {stack}"))
    if outside:
        parts.append(scroller(_list(outside, beyond), "Errors outside the layers"))
    parts.append(tag("output", id="readout", aria_live="polite"))
    return join(parts)


def _place(module: str) -> _Place | None:
    parts = module.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if first is None:
        return None
    rest = kind_of(".".join(parts[first + 1 :]))
    return _Place(".".join(parts[:first]), int(parts[first]), rest)


def _heat_map(
    stack: str, cells: Mapping[_Place, Sequence[LayerError]], beyond: frozenset[str]
) -> Html:
    # in the order of the checkpoint, what has the same owner side by side
    owners: dict[str, list[str]] = {}
    for kind in dict.fromkeys(place.kind for place in cells):
        owners.setdefault(kind.rpartition(".")[0], []).append(kind)
    kinds = [kind for group in owners.values() for kind in group]
    groups = [
        tag("th", owner or stack, scope="colgroup", colspan=len(group))
        for owner, group in owners.items()
    ]
    leaves = [
        tag("th", tag("span", kind.rpartition(".")[2]), scope="col", class_="leaf")
        for kind in kinds
    ]
    rows = []
    for layer in sorted({place.layer for place in cells}):
        found = [cells.get(_Place(stack, layer, kind), ()) for kind in kinds]
        head = tag("th", str(layer), scope="row")
        rows.append(tag("tr", head, *(_cell(items, beyond) for items in found)))
    corner = tag("th", "Layer", scope="col", rowspan=2)
    return tag(
        "table",
        tag("caption", tag("code", stack)),
        tag("thead", tag("tr", corner, *groups), tag("tr", *leaves)),
        tag("tbody", *rows),
        class_="heat",
    )


def _list(found: Sequence[LayerError], beyond: frozenset[str]) -> Html:
    heads = tag("tr", tag("th", "Module", scope="col"), tag("th", "Error", scope="col"))
    rows = [
        tag(
            "tr",
            tag("th", tag("code", breakable(error.module)), scope="row"),
            _cell([error], beyond),
        )
        for error in found
    ]
    caption = tag("caption", "Outside the layers")
    return tag("table", caption, tag("thead", heads), tag("tbody", *rows), class_="heat")


def _cell(found: Sequence[LayerError], beyond: frozenset[str]) -> Html:
    """Return the worst of what stands in one place: of a layer's experts there are many."""
    if not found:
        return tag("td", class_="empty")
    worst = max(found, key=lambda error: (error.module in beyond, _step(error), _known(error)))
    is_beyond = worst.module in beyond
    step = _NUM_STEPS if is_beyond else _step(worst)
    error = worst.relative_error
    shown = "NaN" if error is None else _percent(error)
    about = f"{worst.module}: {shown}" + ("" if error is None else " %")
    if worst.expected is not None:
        about += f", its format explains up to {_percent(worst.expected)} %"
    if is_beyond:
        about += "; a part of it is beyond what its format explains"
    if len(found) > 1:
        about += f"; the worst of {len(found)}"
    sign = tag("span", "beyond: ", class_="hidden") if step == _NUM_STEPS else None
    return tag("td", sign, shown, class_=f"h{step}", title=about)


def _known(error: LayerError) -> float:
    return float("inf") if error.relative_error is None else error.relative_error


def _step(error: LayerError) -> int:
    """Return the step of colour: by the share of what the format explains, else by doublings."""
    found = error.relative_error
    if found is None:
        return _NUM_STEPS
    if error.expected is not None:
        if found > error.expected:
            return _NUM_STEPS
        share = found / error.expected if error.expected else 0.0
        return min(_NUM_STEPS - 1, int(share * _NUM_STEPS))
    return sum(found >= _FIRST_ERROR * 2**step for step in range(_NUM_STEPS - 1))


def _percent(share: float) -> str:
    percent = 100 * share
    if percent >= 9.95:
        return f"{percent:.0f}"
    return f"{percent:.1f}" if percent >= 0.095 or percent == 0 else f"{percent:.1g}"


def _power(exponent: int) -> str:
    return "2" + str(exponent).translate(_RAISED)


def _legend(*, has_expected: bool) -> Html:
    if has_expected:
        words = [f"{100 * step // _NUM_STEPS} %" for step in range(_NUM_STEPS)]
        lead = "Share of what the format's rounding explains, from "
    else:
        words = ["0 %", *(f"{_percent(_FIRST_ERROR * 2**step)} %" for step in range(7))]
        lead = "Relative error, from "
    steps = [tag("li", word, class_=f"h{step}") for step, word in enumerate(words)]
    last = tag("li", "beyond", class_=f"h{_NUM_STEPS}")
    return tag("div", tag("span", lead), tag("ul", *steps, last), class_="legend")


def scales(measured: Measured | None) -> Html:
    """Return a bar chart for each kind of scale, those of one role on one axis."""
    if measured is None or not measured.scales:
        return Html("")
    lead = "How many scales lie in each doubling of magnitude, of an even sample where a "
    parts = [tag("p", f"{lead}checkpoint has millions.", class_="lead")]
    roles = dict.fromkeys(histogram.role for histogram in measured.scales)
    for role in roles:
        found = [histogram for histogram in measured.scales if histogram.role == role]
        low = min(histogram.first_log2 for histogram in found)
        high = max(histogram.first_log2 + len(histogram.counts) for histogram in found)
        low, high = _widened(low, high)
        figures = [_figure(histogram, low, high) for histogram in found]
        parts += [tag("h3", _ROLES.get(role, role)), tag("div", *figures, class_="charts")]
    return join(parts)


def _widened(low: int, high: int) -> tuple[int, int]:
    """Return the ends of an axis on which a single bar is no wall."""
    missing = max(0, _LEAST_POWERS - (high - low))
    return low - missing // 2, high + missing - missing // 2


def _figure(histogram: ScaleHistogram, low: int, high: int) -> Html:
    summary = _in_words(histogram)
    return tag(
        "figure",
        tag(
            "figcaption",
            tag("code", breakable(histogram.kind)),
            tag("span", summary, class_="muted"),
        ),
        _bars(histogram, low, high, summary),
    )


def _in_words(histogram: ScaleHistogram) -> str:
    one = histogram.num_tensors == 1
    parts = [f"{histogram.num_scales:,} in {histogram.num_tensors:,} tensor{'' if one else 's'}"]
    if histogram.counts:
        top = histogram.first_log2 + len(histogram.counts)
        parts.append(f"{_power(histogram.first_log2)} to {_power(top)}")
    for count, what in (
        (histogram.num_zero, "zero"),
        (histogram.num_negative, "negative"),
        (histogram.num_nonfinite, "NaN or Inf"),
    ):
        parts += [f"{count:,} {what}"] if count else []
    return ", ".join(parts)


def _bars(histogram: ScaleHistogram, low: int, high: int, summary: str) -> Html:
    top, width = max(histogram.counts, default=1) or 1, _WIDTH / (high - low)
    bars = []
    for index, count in enumerate(histogram.counts):
        if not count:
            continue
        # a single scale must be seen as well
        height = max(1.0, (_HEIGHT - 2) * count / top)
        left = (histogram.first_log2 + index - low) * width
        bars.append(
            tag(
                "rect",
                x=f"{left + 0.5:.2f}",
                y=f"{_HEIGHT - height:.2f}",
                width=f"{max(width - 1, 0.5):.2f}",
                height=f"{height:.2f}",
            )
        )
    base = tag("line", x1=0, y1=_HEIGHT, x2=_WIDTH, y2=_HEIGHT)
    ends = [
        tag("text", _power(low), x=0, y=_HEIGHT + 12),
        tag("text", _power(high), x=_WIDTH, y=_HEIGHT + 12, text_anchor="end"),
    ]
    view = f"0 0 {_WIDTH} {_HEIGHT + _AXIS}"
    return tag("svg", *bars, base, *ends, viewBox=view, role="img", aria_label=summary)
