"""HTML as values: text is escaped unless it was made here, so nothing in a checkpoint can inject.

tag("p", "a < b", tag("code", "x"), id="first", class_="lead")
"""

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

# controls that HTML can't hold, and halves of characters, which UTF-8 can't
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"input", "meta", "rect", "line", "br", "col"})


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Child: TypeAlias = str | Html | None


def tag(name: str, /, *children: Child, **attributes: str | int | bool | None) -> Html:
    """Return one element; `class_` is class, `data_x` is data-x.

    Children that are not Html are escaped, None is left out. An attribute that is True has no
    value; one that is None or False is left out.
    """
    written = "".join(
        f" {_attribute(key)}" + ("" if value is True else f'="{escaped(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Return the children one after the other, escaped where they are text."""
    return Html(
        "".join(
            child if isinstance(child, Html) else escaped(child)
            for child in children
            if child is not None
        )
    )


def breakable(name: str) -> Html:
    """Return a dotted name, a path or a JSON path that may break after its separators."""
    parts = re.split(r"(?<=[./_\]])(?=.)", name)
    return Html("<wbr>".join(escaped(part) for part in parts))


def escaped(text: str) -> Html:
    """Return text as HTML; what can't be written is spelled as Python does: an escape is \\x1b."""
    return Html(html.escape(_UNWRITABLE.sub(lambda match: ascii(match[0])[1:-1], text)))


def _attribute(key: str) -> str:
    # SVG spells its view in two cases
    return "viewBox" if key == "viewBox" else key.rstrip("_").replace("_", "-")
