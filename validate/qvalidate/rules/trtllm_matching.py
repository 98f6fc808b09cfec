"""How TensorRT-LLM reads a list of exclusions or of quantized layers: its own tests, in order.

Pure functions. Both are matched with the names of its module tree, which are taken to be those of
the checkpoint, with its fused layers; the prefixes that it changes for some models are not known
here. Sources: models/modeling_utils.py QuantConfig.is_module_excluded_from_quantization,
_torch/models/modeling_utils.py apply_quant_config_exclude_modules and apply_layerwise_quant_config.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from functools import lru_cache
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["linear", "qkv", "gate_up", "experts"]

# fused layer -> the modules that it is loaded from, in row order
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_FUSED_OF = {part: name for name, parts in FUSED.items() for part in parts}
_KINDS: dict[str, Kind] = {"qkv_proj": "qkv", "gate_up_proj": "gate_up"}
_EXPERTS = ".experts"


@dataclass(frozen=True)
class Layer:
    """One layer as TensorRT-LLM builds it, and the modules it is loaded from, in row order."""

    name: str
    kind: Kind
    parts: tuple[str, ...]


def layers(modules: Iterable[str]) -> Mapping[str, Layer]:
    """Return the layers that are built from the checkpoint's Linear `modules`, by their names."""
    return _grouped(tuple(modules))


# every rule asks for one of the same few lists, which may have tens of thousands of names
@lru_cache(maxsize=4)
def _grouped(modules: tuple[str, ...]) -> Mapping[str, Layer]:
    parts: dict[str, list[str]] = {}
    for module in modules:
        parts.setdefault(layer_name(module), []).append(module)
    return {
        name: Layer(name, _kind(name), tuple(sorted(found, key=_row_order)))
        for name, found in parts.items()
    }


def layer_name(module: str) -> str:
    """Return the name of the layer that the checkpoint's `module` is loaded into."""
    at = module.find(f"{_EXPERTS}.")
    if at >= 0:
        return module[: at + len(_EXPERTS)]
    parent, dot, leaf = module.rpartition(".")
    return f"{parent}{dot}{_FUSED_OF.get(leaf, leaf)}"


def spellings(layer: str) -> tuple[str, ...]:
    """Return the names under which a list may exclude `layer`: its own and those of its parts."""
    leaf = layer.rpartition(".")[2]
    return (layer, *(layer.replace(leaf, part) for part in FUSED.get(leaf, ())))


def excluded_by(layer: str, patterns: Iterable[str], *, walks: bool) -> tuple[str, str] | None:
    """Return (pattern, the name it matches) if a list excludes `layer`, None if it does not.

    One hit among the parts of a fused layer excludes all of it. With `walks` (1.3) a name that is
    an ancestor counts, `re:` begins a regular expression, and `x.*` matches `x`; without (1.2), the
    full name has to match as a shell wildcard, whose `*` goes across dots.
    """
    listed = tuple(patterns)
    wild = _any_of(listed, walks)
    expressions = [pattern for pattern in listed if pattern.startswith("re:")] if walks else []
    for name in spellings(layer):
        for candidate in _upwards(name) if walks else (name,):
            # one expression over all wildcards: almost every name matches none of them
            if wild.match(candidate) or any(_is_regex_of(candidate, text) for text in expressions):
                return next(text for text in listed if _matches(candidate, text, walks)), name
    return None


def listed_entry(layer: Layer, names: Iterable[str]) -> str | None:
    """Return the first of the `names` of quantized layers that decides about `layer`, or None.

    Of q, k and v it is q's; of an expert any name that contains the layer's.
    """
    parent = layer.name.rpartition(".")[0]
    if layer.kind == "experts":
        return next((name for name in names if layer.name in name), None)
    if layer.kind == "qkv":
        return next((name for name in names if f"{parent}.q_proj" in name), None)
    if layer.kind == "gate_up":
        wanted = (f"{parent}.gate_proj", f"{parent}.gate_up_proj")
        return next((name for name in names if any(text in name for text in wanted)), None)
    return next((name for name in names if name == layer.name), None)


def _kind(layer: str) -> Kind:
    if layer.endswith(_EXPERTS):
        return "experts"
    return _KINDS.get(layer.rpartition(".")[2], "linear")


def _row_order(module: str) -> int:
    leaf = module.rpartition(".")[2]
    return FUSED[_FUSED_OF[leaf]].index(leaf) if leaf in _FUSED_OF else 0


def _upwards(name: str) -> Iterator[str]:
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


@lru_cache(maxsize=8)
def _any_of(patterns: tuple[str, ...], walks: bool) -> re.Pattern[str]:
    """Return one expression for all shell wildcards among `patterns`."""
    wild = [text for pattern in patterns for text in _wildcards(pattern, walks)]
    return re.compile("|".join(map(translate, wild)) or r"(?!)")


def _wildcards(pattern: str, walks: bool) -> tuple[str, ...]:
    if not walks:
        return (pattern,)
    if pattern.startswith("re:"):
        return ()
    return (pattern, pattern.removesuffix(".*")) if pattern.endswith(".*") else (pattern,)


def _matches(name: str, pattern: str, walks: bool) -> bool:
    if walks and pattern.startswith("re:"):
        return _is_regex_of(name, pattern)
    return any(fnmatchcase(name, text) for text in _wildcards(pattern, walks))


def _is_regex_of(name: str, pattern: str) -> bool:
    try:
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    except re.error:
        return False
