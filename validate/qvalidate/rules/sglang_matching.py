"""How SGLang reads a list of exclusions or of quantized layers: its own tests in its own order.

Pure functions. Source: SGLang 0.5.23 layers/quantization/modelopt_quant.py:308-424 and :978-1008,
layers/quantization/utils.py:48-125, fp8.py:357-366; 0.5.17 modelopt_quant.py:336-382, :769-817.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from qvalidate.rules.sglang_support import FUSED_NAMES, SEPARATE_EXPERTS

_EXPERTS = ".experts"
_LANGUAGE_MODEL = "language_model."
# parts of DeepSeek's attention that a pattern may name although they are fused
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
# the fused layers that is_layer_skipped() takes apart
_SHARDS: Mapping[str, tuple[str, ...]] = {
    name: group for group, name in FUSED_NAMES.items() if name in ("qkv_proj", "gate_up_proj")
}


class MixedAlgosError(ValueError):
    """The parts of a fused layer have several algorithms; SGLang stops."""


@dataclass(frozen=True)
class Layer:
    """One layer as SGLang builds and names it, and the modules that it is loaded from."""

    name: str
    parts: tuple[str, ...]
    is_experts: bool = False

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Match:
    """What the list does to a layer; `refused` is a list that SGLang stops at."""

    state: Literal["excluded", "refused", "no"]
    why: str = ""


_NO = Match("no")


def layers(modules: Iterable[str], model_type: str | None) -> tuple[Layer, ...]:
    """Return the layers that SGLang builds from the checkpoint's Linear `modules`."""
    parts: dict[str, list[str]] = {}
    for module in modules:
        parts.setdefault(layer_name(module, model_type), []).append(module)
    return tuple(_layer(name, found) for name, found in parts.items())


def layer_name(module: str, model_type: str | None) -> str:
    """Return SGLang's name of the layer that it loads the checkpoint's `module` into."""
    owner, dot, rest = module.rpartition(f"{_EXPERTS}.")
    if dot and model_type in SEPARATE_EXPERTS:
        return module
    if dot and rest.partition(".")[0].isdigit():
        return f"{owner}{_EXPERTS}"
    parent, dot, leaf = module.rpartition(".")
    if parent.endswith(_EXPERTS):
        return parent
    fused = next((name for group, name in FUSED_NAMES.items() if leaf in group), leaf)
    return f"{parent}{dot}{fused}"


def match(layer: str, patterns: tuple[str, ...], *, is_experts: bool = False) -> Match:
    """Return what ModelOpt's methods make of `patterns` for the layer `layer`.

    Experts are compared as a whole, with the wildcards alone.
    """
    if not is_experts and (skipped := _skipped(layer, patterns)).state != "no":
        return skipped
    return _excluded(layer, patterns)


def match_plainly(layer: str, patterns: tuple[str, ...]) -> Match:
    """Return what the methods for blocks (MXFP8) make of `patterns`: no wildcards, also experts."""
    both = [
        f"{start}{pattern.removeprefix('model.')}"
        for pattern in patterns
        for start in ("", "model.")
    ]
    return _skipped(layer, tuple(both))


def listed_algo(layer: str, listed: Mapping[str, str], *, is_mapped: bool) -> str | None:
    """Return the algorithm that a mixed config's list gives SGLang's layer `layer`, or None.

    `is_mapped` says whether the model's class declares its fused names. Raises MixedAlgosError.
    """
    names = _spellings(layer)
    if found := next((name for name in names if name in listed), None):
        return listed[found].upper()
    parent, _, leaf = layer.rpartition(".")
    group = next((group for group, name in FUSED_NAMES.items() if name == leaf), ())
    if is_mapped and group:
        parts = [f"{name}.{part}" for name in _spellings(parent) for part in group]
        algos = {listed[part].upper() for part in parts if part in listed}
        if len(algos) > 1:
            raise MixedAlgosError(f"Mixed quant_algo within fused layer {leaf}: {sorted(algos)}")
        if algos:
            return algos.pop()
    below = (listed[key] for name in names for key in listed if key.startswith(f"{name}."))
    found = next(below, None)
    return None if found is None else found.upper()


def _skipped(layer: str, patterns: tuple[str, ...]) -> Match:
    """Compare the plain names: of the layer, of what lies above it, or of all its parts."""
    leaf = layer.rpartition(".")[2]
    if leaf in _SHARDS:
        hits = {
            part: next((p for p in patterns if _is_within(layer.replace(leaf, part), p)), None)
            for part in _SHARDS[leaf]
        }
        named = [part for part, pattern in hits.items() if pattern is not None]
        if not named:
            return _NO
        if len(named) < len(hits):
            return Match("refused", f"Detected some but not all shards of {leaf} are quantized")
        return Match("excluded", f"{hits[named[0]]!r} names its parts")
    for pattern in patterns:
        if _is_within(layer, pattern):
            return Match("excluded", f"{pattern!r} is it, above it or part of it")
    if "gate_up_proj" not in layer and "experts" in layer:
        for pattern in patterns:
            if "experts" in pattern and layer in pattern:
                return Match("excluded", f"{pattern!r} is one of its experts")
    return _NO


def _is_within(layer: str, pattern: str) -> bool:
    return f".{pattern.rstrip('.')}." in f".{layer.rstrip('.')}."


def _excluded(layer: str, patterns: tuple[str, ...]) -> Match:
    """Compare the wildcards, as regular expressions, with the name and each of its parts."""
    names = [layer]
    if layer.startswith(_LANGUAGE_MODEL):
        names.append(layer.removeprefix(_LANGUAGE_MODEL))
    for pattern in patterns:
        try:
            expression = re.compile(pattern.replace(".", r"\.").replace("*", ".*"))
        except re.error:
            return Match(
                "refused", f"{pattern!r} is no regular expression, which SGLang makes of it"
            )
        for name in names:
            for text in (name, *name.split(".")):
                if expression.fullmatch(text):
                    what = "its name" if text in names else f"the part {text!r} of its name"
                    return Match("excluded", f"{pattern!r} matches {what}")
        tail = pattern.rpartition(".")[2]
        if tail in _LATENT and any(tail in name.rpartition(".")[2] for name in names):
            return Match("excluded", f"{pattern!r} is a part of it")
    return _NO


def _spellings(layer: str) -> tuple[str, ...]:
    """Return the names under which SGLang looks for a layer in the list."""
    found = [layer]
    if layer.endswith(".lm_head"):
        found.append("lm_head")
    if layer.startswith("language_model.model."):
        found.append(f"model.language_model.{layer.removeprefix('language_model.model.')}")
    elif layer.startswith("model.language_model."):
        rest = layer.removeprefix("model.language_model.")
        found += [f"language_model.model.{rest}", f"model.{rest}"]
    elif layer.startswith("model."):
        found.append(f"model.language_model.{layer.removeprefix('model.')}")
    return tuple(found)


def _layer(name: str, parts: list[str]) -> Layer:
    # there are many experts, and none of them comes first
    if name.endswith(_EXPERTS):
        return Layer(name, tuple(parts), is_experts=True)
    return Layer(name, tuple(sorted(parts, key=_row_order)))


def _row_order(module: str) -> tuple[int, str]:
    leaf = module.rpartition(".")[2]
    group = next((group for group in FUSED_NAMES if leaf in group), ())
    return (group.index(leaf) if group else 0), module
