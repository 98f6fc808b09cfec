"""What happens to each source tensor, and why: first the recipe, then the architecture map."""

from collections.abc import Mapping
from dataclasses import dataclass

from qconvert.errors import ConvertError
from qschema.architectures import keep_reason, layer_index, matching, text_config
from qschema.dtypes import HIGH_PRECISION
from qschema.formats import Format, find
from qschema.recipe import Recipe
from qschema.safetensors import Stored
from qschema.strict import Json


@dataclass(frozen=True)
class Decision:
    """One tensor's fate: `declared` is its format, None if it is kept."""

    tensor: Stored
    module: str
    declared: Format | None
    reason: str


def module_of(name: str) -> str:
    """Return the module that owns the tensor `name`."""
    return name.removesuffix(".weight")


def decide(
    tensor: Stored, *, recipe: Recipe, config: Mapping[str, Json], used: set[str]
) -> Decision:
    """Return what `recipe` and the architecture map make of `tensor`.

    `used` collects the recipe's patterns that matched something. Raises ConvertError for a tensor
    that can be neither quantized nor kept in good conscience: experts stacked in one tensor, or a
    weight that its format can't take.
    """
    module = module_of(tensor.name)
    excluded = _ancestor_matching(module, recipe.exclude, used)
    included = _ancestor_matching(module, recipe.include, used)
    rule = next((rule for rule in recipe.rules if matching(module, [rule.match])), None)
    used.update(rule.match for rule in recipe.rules if matching(module, [rule.match]))

    def keep(reason: str) -> Decision:
        return Decision(tensor, module, None, reason)

    if excluded is not None:
        return keep(f"excluded by {excluded!r}")
    if tensor.dtype not in HIGH_PRECISION:
        return keep(f"{tensor.dtype} is not quantized")
    if is_stacked(tensor):
        return keep(_stacked(tensor, module, config))
    if len(tensor.shape) != 2 or not tensor.name.endswith(".weight"):
        return keep("not the weight of a linear layer")
    if included is None:
        reason = keep_reason(module, config=config) or _vocabulary(tensor, config)
        if reason is not None:
            return keep(reason)
    if 0 in tensor.shape:
        return keep("has no elements")
    if rule is None:
        return keep("no rule matches")
    return _quantize(tensor, module, find(rule.algo), rule.match)


def is_stacked(tensor: Stored) -> bool:
    """Return whether `tensor` may hold several matrices: stacked experts, or a convolution."""
    bare = len(tensor.shape) == 2 and not tensor.name.endswith((".weight", "bias"))
    return len(tensor.shape) > 2 or (bare and "experts" in tensor.name)


def _quantize(tensor: Stored, module: str, declared: Format, match: str) -> Decision:
    rows, columns = tensor.shape
    obstacle = declared.obstacle(rows=rows, columns=columns, dtype=tensor.dtype)
    if obstacle is not None:
        raise ConvertError(
            f"{tensor.file}::{tensor.name}: {obstacle}; keep it with --exclude {module!r}"
        )
    return Decision(tensor, module, declared, f"rule {match!r}")


def _stacked(tensor: Stored, module: str, config: Mapping[str, Json]) -> str:
    """Return why a stack of matrices is kept; refuse what may be experts."""
    reason = keep_reason(module, config=config)
    if reason is not None:
        return reason
    if "conv" in module or len(tensor.shape) > 3:
        return "convolution"
    raise ConvertError(
        f"{tensor.file}::{tensor.name}: {tensor.dtype} {list(tensor.shape)} looks like experts "
        "stacked in one tensor, which this version can't quantize; keep it as it is with "
        f"--exclude {module!r}, or save the model with one tensor per expert"
    )


def _vocabulary(tensor: Stored, config: Mapping[str, Json]) -> str | None:
    """Return why a weight with a row per token is kept: an embedding or a head by any name."""
    size = text_config(config).get("vocab_size")
    if tensor.shape[0] == size and layer_index(tensor.name) is None:
        return "has a row per token of the vocabulary"
    return None


def _ancestor_matching(module: str, patterns: list[str], used: set[str]) -> str | None:
    """Return the first pattern that matches `module` or a module above it; note all that do."""
    if not patterns:
        return None
    parts = module.split(".")
    names = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    found = [pattern for pattern in patterns if any(matching(name, [pattern]) for name in names)]
    used.update(found)
    return found[0] if found else None
