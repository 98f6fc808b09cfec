"""What is known of engines and formats, as tables; this checkpoint's format first."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qschema.formats import UnknownFormatError, find
from qvalidate.matrix import Cell
from qvalidate.matrix.text import why
from qvalidate.reports.markup import Html, join, tag
from qvalidate.reports.verdicts import scroller
from qvalidate.result import Result

_HEADS = ("Engine", "Version", "Format", "Architecture", "GPU", "State", "Source")
# state -> the class that colours it
_CLASSES = {
    "verified": "loads",
    "documented": "documented",
    "fails": "refuses",
    "loads-but-wrong": "loads-but-wrong",
}


class Row(NamedTuple):
    """One cell of the support matrix; `source` is a document, or what a run of ours showed."""

    engine: str
    version: str
    format: str
    architecture: str
    gpu: str
    state: str
    source: str


def rows(cells: Iterable[Cell]) -> list[Row]:
    """Return the cells of a matrix as the page shows them."""
    return [
        Row(
            cell.engine,
            cell.version,
            cell.format,
            cell.architecture,
            cell.gpu,
            cell.state,
            why(cell),
        )
        for cell in cells
    ]


def tables(rows: Sequence[Row], result: Result) -> Html:
    """Return the matrix, empty without one: the checkpoint's format, then one part per engine."""
    if not rows:
        return Html("")
    name, parts = _format_of(result), []
    if own := [row for row in rows if row.format == name]:
        parts.append(_part(f"This checkpoint's format, {name}", own, is_open=True))
    engines = dict.fromkeys((row.engine, row.version) for row in rows)
    for engine, version in engines:
        its = [row for row in rows if (row.engine, row.version) == (engine, version)]
        parts.append(_part(f"{engine} {version}", its, is_open=False))
    return join(parts)


def _format_of(result: Result) -> str | None:
    """Return the public name of the checkpoint's format, None of a mixed or unknown one."""
    try:
        return find(result.checkpoint.algo or "").name
    except UnknownFormatError:
        return None


def _part(title: str, rows: Sequence[Row], *, is_open: bool) -> Html:
    states = Counter(row.state for row in rows)
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    table = tag(
        "table",
        tag("caption", title, class_="hidden"),
        tag("thead", tag("tr", *(tag("th", head, scope="col") for head in _HEADS))),
        tag("tbody", *map(_row, rows)),
    )
    return tag(
        "details",
        tag("summary", tag("h3", title), tag("span", counted, class_="what")),
        scroller(table, title),
        class_="group",
        open=is_open,
    )


def _row(row: Row) -> Html:
    state = tag("span", row.state, class_=f"badge {_CLASSES.get(row.state, 'unknown')}")
    return tag(
        "tr",
        tag("th", row.engine, scope="row"),
        tag("td", row.version),
        tag("td", tag("code", row.format)),
        tag("td", tag("code", row.architecture)),
        tag("td", row.gpu),
        tag("td", state),
        tag("td", row.source, class_="source"),
    )
