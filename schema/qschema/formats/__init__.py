"""The formats, one module each: a module here that defines `FORMAT` is one; there is no list.

What several declarations share stands in modules whose names begin with an underscore.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType

from qschema.formats.declare import Format, TensorSpec

__all__ = ["Format", "TensorSpec", "UnknownFormatError", "find", "formats"]


class UnknownFormatError(ValueError):
    """An algorithm's name that no format declares."""


@cache
def formats() -> Mapping[str, Format]:
    """Return every declared format by its name, in alphabetical order."""
    found = [
        import_module(f"{__name__}.{module.name}").FORMAT
        for module in iter_modules(__path__)
        if module.name != "declare" and not module.name.startswith("_")
    ]
    return MappingProxyType({declared.name: declared for declared in sorted(found, key=_by_name)})


@cache
def find(name: str) -> Format:
    """Return the format called `name`: its name, spelling or an alias, in any case.

    Raises UnknownFormatError, which lists what exists and suggests the nearest.
    """
    spelled: dict[str, Format] = {}
    for declared in formats().values():
        for spelling in (declared.name, declared.spelling, *declared.aliases):
            spelled[spelling.upper()] = declared
    if name.upper() in spelled:
        return spelled[name.upper()]
    near = difflib.get_close_matches(name.upper(), spelled, n=1, cutoff=0.4)
    hint = f"; did you mean {spelled[near[0]].name}?" if near else "."
    raise UnknownFormatError(f"unknown algorithm {name!r}{hint} Known: {', '.join(formats())}")


def _by_name(declared: Format) -> str:
    return declared.name
