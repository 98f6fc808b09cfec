"""How vLLM reads a list of exclusions or of quantized layers: its own tests in its own order.

Pure functions. Source: vLLM 0.33.0 model_executor/layers/quantization/modelopt.py:191-226, :266-289
and :1748-1825 (_resolve_quant_algo), quantization/utils/quant_utils.py is_layer_skipped (0.32.0:
modelopt.py:187-222, :262-282, :1717-1811).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from typing import Literal

from qvalidate.rules.vllm_support import FUSED_NAMES, NEVER_QUANTIZED, PLAIN_ROUTERS

_LANGUAGE_MODEL = ("language_model.model.", "model.language_model.")
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\d+\..+")


@dataclass(frozen=True)
class Layer:
    """One layer as vLLM builds it, and the modules that it is loaded from, in row order."""

    name: str
    parts: tuple[str, ...]
    is_experts: bool = False


@dataclass(frozen=True)
class Match:
    """What the list does to a layer; `partial` is the case that vLLM refuses."""

    state: Literal["excluded", "partial", "no"]
    pattern: str = ""
    how: str = ""


def layers(modules: Iterable[str]) -> Mapping[str, Layer]:
    """Return the layers that vLLM builds from the checkpoint's Linear `modules`, by their names."""
    return _grouped(tuple(modules))


# every rule asks for one of the same few lists, which may have tens of thousands of names
@lru_cache(maxsize=4)
def _grouped(modules: tuple[str, ...]) -> Mapping[str, Layer]:
    parts: dict[str, list[str]] = {}
    for module in modules:
        parts.setdefault(layer_name(module), []).append(module)
    return {
        name: Layer(name, tuple(sorted(found, key=_row_order)), name.endswith(".experts"))
        for name, found in parts.items()
    }


def layer_name(module: str) -> str:
    """Return the name of the layer that vLLM loads the checkpoint's `module` into."""
    if match := _EXPERT.fullmatch(module):
        return match["experts"]
    parent, dot, leaf = module.rpartition(".")
    if parent.endswith(".experts"):
        return parent
    fused = next((name for group, name in FUSED_NAMES.items() if leaf in group), leaf)
    return f"{parent}{dot}{fused}"


def match(layer: str, patterns: tuple[str, ...]) -> Match:
    """Return what vLLM makes of `patterns` for its layer `layer`."""
    # "x*" is split into "x" and "x.*" for every model that has a name mapper, which today is all
    split = {text: pattern for pattern in patterns for text in _split(pattern)}
    leaf = layer.rpartition(".")[2]
    group = next((group for group, name in FUSED_NAMES.items() if name == leaf), None)
    if layer in split:
        return Match("excluded", split[layer], "by its name")
    if group is not None:
        hits = [part for part in group if layer.replace(leaf, part) in split]
        if hits:
            pattern = split[layer.replace(leaf, hits[0])]
            state: Literal["excluded", "partial"] = (
                "excluded" if len(hits) == len(group) else "partial"
            )
            return Match(state, pattern, "by the names of its parts")
    elif "experts" in layer:
        for text, pattern in split.items():
            if "experts" in text and layer in text:
                return Match("excluded", pattern, "as one of its experts")
    return _loose(layer, split)


def is_plain(layer: str, model_type: str | None) -> bool:
    """Return whether vLLM builds its layer `layer` unquantized whatever the list says."""
    if any(part in layer for part in NEVER_QUANTIZED):
        return True
    return layer.endswith(".gate") and model_type in PLAIN_ROUTERS


def listed_entry(layer: str, listed: Mapping[str, str]) -> str | None:
    """Return the name in a mixed config's list that vLLM takes for its layer `layer`, or None.

    Where the parts of a fused layer have several algorithms, vLLM stops instead.
    """
    names = _spellings(layer)
    if found := next((name for name in names if name in listed), None):
        return found
    parent, _, leaf = layer.rpartition(".")
    group = next((group for group, name in FUSED_NAMES.items() if name == leaf), ())
    parts = (f"{name}.{part}" for name in _spellings(parent) for part in group)
    if found := next((part for part in parts if part in listed), None):
        return found
    starts = [f"{name}." for name in names]
    if layer.endswith(".experts"):
        starts.append(f"{layer.rsplit('.experts', 1)[0]}.")
    return next((name for start in starts for name in listed if name.startswith(start)), None)


def _spellings(layer: str) -> tuple[str, ...]:
    """Return the names under which vLLM looks for a layer in the list."""
    found = [layer]
    if layer.endswith(".lm_head"):
        found.append("lm_head")
    for one, other in (_LANGUAGE_MODEL, _LANGUAGE_MODEL[::-1]):
        if layer.startswith(one):
            found.append(f"{other}{layer.removeprefix(one)}")
    return tuple(found)


def _loose(layer: str, split: Mapping[str, str]) -> Match:
    for text, pattern in split.items():
        if text in layer or (
            layer.startswith("language_model.") and text in layer.removeprefix("language_model.")
        ):
            return Match("excluded", pattern, f"because {text!r} is part of its name")
    for text, pattern in split.items():
        if fnmatch(layer, text):
            return Match("excluded", pattern, "as a wildcard")
    return Match("no")


def _split(pattern: str) -> tuple[str, ...]:
    if len(pattern) >= 2 and pattern[-1] == "*" and pattern[-2] != ".":
        return pattern[:-1], f"{pattern[:-1]}.*"
    return (pattern,)


def _row_order(module: str) -> tuple[int, str]:
    leaf = module.rpartition(".")[2]
    for group in FUSED_NAMES:
        if leaf in group:
            return group.index(leaf), module
    return 0, module
