"""Which format a quantization config gives each module.

A config names one format for the whole checkpoint, or (MIXED_PRECISION) one for each module that
`quantized_layers` lists. There, a key that ends in `.experts` stands for all experts below it, and
a module that no key names is unquantized.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qschema.formats import Format, UnknownFormatError, find
from qvalidate.documents import QuantConfig

EXPERTS = ".experts"


@dataclass(frozen=True)
class Assignment:
    """The formats by module. `whole` is that of a checkpoint of one format.

    `layers` are the entries of a mixed one, with None for an algorithm that no format declares.
    """

    whole: Format | None = None
    is_mixed: bool = False
    layers: Mapping[str, Format | None] = field(default_factory=dict)

    @property
    def formats(self) -> tuple[Format, ...]:
        """Every format that is given to anything, once, in order of appearance."""
        named = [self.whole, *self.layers.values()]
        return tuple({declared.name: declared for declared in named if declared}.values())

    def key(self, module: str) -> str | None:
        """Return the entry of `quantized_layers` that names `module`, None without one."""
        if module in self.layers:
            return module
        at = len(module)
        while (at := module.rfind(EXPERTS, 0, at)) >= 0:
            name = module[: at + len(EXPERTS)]
            if name in self.layers and module[len(name) :].startswith("."):
                return name
        return None

    def format_of(self, module: str) -> Format | None:
        """Return the format of `module`, None where none is named or declared."""
        if not self.is_mixed:
            return self.whole
        key = self.key(module)
        return None if key is None else self.layers[key]


def assign(obeyed: QuantConfig | None, other: QuantConfig | None) -> Assignment:
    """Return what the `obeyed` config says.

    A mixed one without layers takes them from the `other` one, as vLLM does.
    """
    if obeyed is None:
        return Assignment()
    if not obeyed.is_mixed:
        return Assignment(whole=declared_as(obeyed.algo))
    layers = obeyed.layers or (other.layers if other else {})
    found = {name: declared_as(algo) for name, algo in layers.items()}
    return Assignment(is_mixed=True, layers=found)


def declared_as(algo: str | None) -> Format | None:
    """Return the format called `algo`, None if none is declared under that name."""
    try:
        return find(algo) if algo else None
    except UnknownFormatError:
        return None
