"""Line charts as SVG text: panels beside each other over one x axis, and a legend below.

Text and lines have middle tones and there is no background, so that the picture reads on light and
on dark pages. Standard library only.
"""

import math
from dataclasses import dataclass
from html import escape

INK = "#747c87"
FONT = "font-family='system-ui,Segoe UI,Helvetica,Arial,sans-serif'"
WIDTH, HEIGHT = 880, 380
# of the area that a panel draws in
TOP, BOTTOM, LEFT, GAP = 46, 270, 56, 68
LEGEND_TOP, LEGEND_STEP = 326, 22


@dataclass(frozen=True)
class Series:
    """A line, or points alone if `dash` is None; `mark` is circle, square or ring."""

    label: str
    color: str
    mark: str
    dash: str | None
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A set of series over the shared x axis."""

    title: str
    series: list[Series]


def steps(largest: float) -> list[float]:
    """Returns round numbers from 0 to at least `largest`, 4 to 6 of them."""
    rough = max(largest, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 2.5, 5, 10) if k * power >= rough)
    return [i * step for i in range(math.ceil(largest / step - 1e-9) + 1)]


def mark(kind: str, x: float, y: float, color: str) -> str:
    """Returns one data point."""
    if kind == "square":
        return f"<rect x='{x - 4:.1f}' y='{y - 4:.1f}' width='8' height='8' fill='{color}'/>"
    paint = f"fill='none' stroke='{color}' stroke-width='2.5'"
    if kind == "circle":
        paint = f"fill='{color}'"
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{5 if kind == 'ring' else 4.2}' {paint}/>"


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 13) -> str:
    """Returns a line of text."""
    place = f"x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}'"
    return f"<text {place} fill='{INK}'>{escape(words)}</text>"


def stroke(x1: float, y1: float, x2: float, y2: float, *, opacity: float) -> str:
    """Returns a thin line of a grid or an axis."""
    ends = f"x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'"
    return f"<line {ends} stroke='{INK}' stroke-opacity='{opacity}'/>"


def draw_panel(panel: Panel, left: float, right: float, x_label: str, xs: list[float]) -> list[str]:
    """Returns the elements of one panel between `left` and `right`."""
    ys = steps(max(y for series in panel.series for _, y in series.points))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / xs[-1] * (right - left), BOTTOM - y / ys[-1] * (BOTTOM - TOP)

    found = [f"<g font-weight='600'>{text(left, TOP - 20, panel.title, size=15)}</g>"]
    for y in ys:
        height = at(0, y)[1]
        found.append(stroke(left, height, right, height, opacity=0.7 if y == 0 else 0.22))
        found.append(text(left - 8, height + 4.5, f"{y:g}", anchor="end"))
    for x in xs:
        place = at(x, 0)[0]
        found.append(stroke(place, BOTTOM, place, BOTTOM + 4, opacity=0.7))
        found.append(text(place, BOTTOM + 19, f"{x:g}", anchor="middle"))
    found.append(text((left + right) / 2, BOTTOM + 38, x_label, anchor="middle"))
    for series in panel.series:
        places = [at(x, y) for x, y in sorted(series.points)]
        if series.dash is not None:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            look = f"fill='none' stroke-width='2' stroke-dasharray='{series.dash}'"
            found.append(f"<polyline points='{path}' stroke='{series.color}' {look}/>")
        found += [mark(series.mark, x, y, series.color) for x, y in places]
    return found


def draw_legend(series: list[Series]) -> list[str]:
    """Returns the legend: three columns, filled from the top."""
    found = []
    num_rows = math.ceil(len(series) / 3)
    for number, entry in enumerate(series):
        x = LEFT + (number // num_rows) * (WIDTH - LEFT) / 3
        y = LEGEND_TOP + (number % num_rows) * LEGEND_STEP
        if entry.dash is not None:
            dash = f"stroke-width='2' stroke-dasharray='{entry.dash}'"
            ends = f"x1='{x:.1f}' y1='{y}' x2='{x + 30:.1f}' y2='{y}'"
            found.append(f"<line {ends} stroke='{entry.color}' {dash}/>")
        found += [mark(entry.mark, x + 15, y, entry.color), text(x + 38, y + 4.5, entry.label)]
    return found


def draw(panels: list[Panel], *, x_label: str, title: str) -> str:
    """Returns the SVG document; every series is named once, in the order of its first panel."""
    legend: dict[str, Series] = {}
    for panel in panels:
        for series in panel.series:
            legend.setdefault(series.label, series)
    width = (WIDTH - LEFT - GAP * (len(panels) - 1) - 16) / len(panels)
    height = max(HEIGHT, LEGEND_TOP + math.ceil(len(legend) / 3) * LEGEND_STEP)
    size = f"width='{WIDTH}' height='{height}' viewBox='0 0 {WIDTH} {height}'"
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img' {FONT}>",
        f"<title>{escape(title)}</title>",
    ]
    for number, panel in enumerate(panels):
        left = LEFT + number * (width + GAP)
        xs = steps(max(x for series in panel.series for x, _ in series.points))
        lines += draw_panel(panel, left, left + width, x_label, xs)
    lines += [*draw_legend(list(legend.values())), "</svg>"]
    return "\n".join(lines) + "\n"
