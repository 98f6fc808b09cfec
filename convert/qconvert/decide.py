"""What happens to each source tensor, and why: first the recipe, then the architecture map."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from qconvert.errors import ConvertError
from qschema.architectures import (
    Stack,
    find_stack,
    hub_name,
    keep_reason,
    layer_index,
    matching,
    text_config,
)
from qschema.dtypes import HIGH_PRECISION, nbytes
from qschema.formats import Format, find
from qschema.recipe import Recipe
from qschema.safetensors import Stored
from qschema.strict import Json


@dataclass(frozen=True, slots=True)
class Matrix:
    """The weight of one Linear [rows, columns] within a tensor, or of a stack that stays one.

    `offset` and `nbytes` say where it lies in the tensor. A transposed matrix is stored
    [columns, rows]; `experts` of them, one after the other, are a stack (0: no stack).
    """

    rows: int
    columns: int
    offset: int
    nbytes: int
    part: str | None = None
    # its name below the stack's parent: the expert's number and the part
    leaf: str = ""
    transposed: bool = False
    experts: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """One tensor's fate, or that of a matrix in it: `declared` is its format, None if kept.

    `module` names the outputs. `obstacle` says that a format was wanted that it can't have;
    `dropped`, that the tensor is not written at all.
    """

    tensor: Stored
    module: str
    declared: Format | None
    reason: str
    matrix: Matrix | None = None
    obstacle: bool = False
    dropped: bool = False

    @property
    def owner(self) -> str:
        """The module that engines know: of a stack of experts, what holds them."""
        stacked = self.matrix is not None and self.matrix.experts
        return self.module.rpartition(".")[0] if stacked else self.module

    def name_of(self, suffix: str) -> str:
        """Return the name of the output tensor `suffix`; a stack has its codes under its name."""
        if self.matrix is None or not self.matrix.experts:
            return f"{self.module}.{suffix}"
        assert self.declared is not None
        is_codes = suffix == self.declared.tensors[0].suffix
        return self.module if is_codes else f"{self.module}_{suffix}"


def module_of(name: str) -> str:
    """Return the module that owns the tensor `name`."""
    return name.removesuffix(".weight")


def decide(
    tensor: Stored, *, recipe: Recipe, config: Mapping[str, Json], used: set[str]
) -> list[Decision]:
    """Return what `recipe` and the architecture map make of `tensor`: one decision per matrix.

    `used` collects the recipe's patterns that matched something, of its rules those that matched
    first. Raises ConvertError for a tensor that can be neither quantized nor kept in good
    conscience: experts stacked in a way that the map does not know, a part of a stack that is to be
    treated apart, a weight that its format can't take (unless the recipe keeps such).
    """
    known = text_model_type(config)
    module = hub_name(module_of(tensor.name), model_type=known)
    dropped = _dropped_by(tensor, module, recipe, used)
    if dropped is not None:
        return [Decision(tensor, module, None, f"dropped by {dropped!r}", dropped=True)]
    stack = find_stack(tensor.name, model_type=known) if len(tensor.shape) == 3 else None
    if stack is None or tensor.dtype not in HIGH_PRECISION:
        return [_decide_one(tensor, module, recipe=recipe, config=config, used=used)]
    excluded = _ancestor_matching(tensor.name, recipe.exclude, used)
    if excluded is not None:
        return [Decision(tensor, tensor.name, None, f"excluded by {excluded!r}")]
    matrices = _matrices(tensor, stack, config)
    parent = hub_name(tensor.name.rpartition(".")[0], model_type=known)
    modules = [f"{parent}.{matrix.leaf}" if matrix.leaf else tensor.name for matrix in matrices]
    choices = [_choose(module, recipe=recipe, config=config, used=used) for module in modules]
    formats = {declared.name if declared else None for declared, _ in choices}
    if len(formats) > 1:
        raise ConvertError(
            f"{tensor.file}::{tensor.name}: the recipe treats the experts in it differently; they "
            "are stored as one, so write patterns that match all of them"
        )
    if formats == {None}:
        return [Decision(tensor, module_of(tensor.name), None, choices[0][1])]
    return [
        _quantize(tensor, module, declared, reason, matrix, recipe)
        for module, matrix, (declared, reason) in zip(modules, matrices, choices, strict=True)
        if declared is not None
    ]


def text_model_type(config: Mapping[str, Json]) -> str | None:
    """Return the type of the language model that config.json describes."""
    model_type = text_config(config).get("model_type")
    return model_type if isinstance(model_type, str) else None


def is_stacked(tensor: Stored) -> bool:
    """Return whether `tensor` may hold several matrices: stacked experts, or a convolution."""
    bare = len(tensor.shape) == 2 and not tensor.name.endswith((".weight", "bias"))
    return len(tensor.shape) > 2 or (bare and "experts" in tensor.name)


def _decide_one(
    tensor: Stored, module: str, *, recipe: Recipe, config: Mapping[str, Json], used: set[str]
) -> Decision:
    declared, reason = _choose(module, recipe=recipe, config=config, used=used)
    if reason.startswith("excluded by"):
        return Decision(tensor, module, None, reason)
    if tensor.dtype not in HIGH_PRECISION:
        return Decision(tensor, module, None, f"{tensor.dtype} is not quantized")
    if is_stacked(tensor):
        return Decision(tensor, module, None, _stacked(tensor, module, config))
    if len(tensor.shape) != 2 or not tensor.name.endswith(".weight"):
        return Decision(tensor, module, None, "not the weight of a linear layer")
    if declared is None:
        return Decision(tensor, module, None, reason)
    vocabulary = _vocabulary(tensor, config)
    if vocabulary is not None and not _ancestor_matching(module, recipe.include, used):
        return Decision(tensor, module, None, vocabulary)
    if 0 in tensor.shape:
        return Decision(tensor, module, None, "has no elements")
    rows, columns = tensor.shape
    matrix = Matrix(rows, columns, 0, tensor.nbytes)
    return _quantize(tensor, module, declared, reason, matrix, recipe)


def _choose(
    module: str, *, recipe: Recipe, config: Mapping[str, Json], used: set[str]
) -> tuple[Format | None, str]:
    """Return the format that the recipe wants for `module`, None to keep it, and why."""
    excluded = _ancestor_matching(module, recipe.exclude, used)
    included = _ancestor_matching(module, recipe.include, used)
    rule = next((rule for rule in recipe.rules if matching(module, [rule.match])), None)
    if rule is not None:
        used.add(rule.match)
    if excluded is not None:
        return None, f"excluded by {excluded!r}"
    if included is None:
        reason = keep_reason(module, config=config)
        if reason is not None:
            return None, reason
    if rule is None:
        return None, "no rule matches"
    return find(rule.algo), sys.intern(f"rule {rule.match!r}")


def _quantize(
    tensor: Stored, module: str, declared: Format, reason: str, matrix: Matrix, recipe: Recipe
) -> Decision:
    rows, columns = matrix.rows, matrix.columns
    if matrix.experts and not declared.stackable:
        raise ConvertError(
            f"{tensor.file}::{tensor.name}: {declared.name} has no layout for experts that stay "
            f"stacked in one tensor; choose another format, or keep it with --exclude {module!r}"
        )
    obstacle = declared.obstacle(rows=rows, columns=columns, dtype=tensor.dtype)
    if obstacle is None:
        return Decision(tensor, module, declared, reason, matrix)
    if recipe.on_indivisible == "keep":
        return Decision(tensor, module, None, obstacle, matrix, obstacle=True)
    # a part of a stack can't be kept alone
    whole = tensor.name if matrix.part else module
    raise ConvertError(
        f"{tensor.file}::{tensor.name}: {obstacle}; keep it with --exclude {whole!r}, or all such "
        "with --on-indivisible keep"
    )


def _matrices(tensor: Stored, stack: Stack, config: Mapping[str, Json]) -> list[Matrix]:
    """Return the matrices in a stack, expert by expert; refuse a shape that config.json denies."""
    experts, first, second = tensor.shape
    hidden = text_config(config).get("hidden_size")
    is_down = stack.tail.endswith("down_proj")
    # of [E, rows, columns] and [E, columns, rows] the hidden size tells which
    inward = 1 if bool(stack.parts) == is_down else 2
    parts = len(stack.parts) or 1
    if tensor.shape[inward] != hidden or first % parts or 0 in tensor.shape:
        raise ConvertError(
            f"{tensor.file}::{tensor.name}: {tensor.dtype} {list(tensor.shape)}: expected experts "
            f"stacked with hidden_size {hidden} as dimension {inward}, which tells rows from "
            "columns; keep it as it is with --exclude, or mend config.json"
        )
    if not stack.parts:
        return [Matrix(second, first, 0, tensor.nbytes, transposed=True, experts=experts)]
    rows = first // parts
    size = nbytes(tensor.dtype, (rows, second))
    return [
        Matrix(
            rows,
            second,
            (expert * parts + place) * size,
            size,
            part=f"[{expert}, {place * rows}:{(place + 1) * rows}]",
            leaf=f"{expert}.{part}",
        )
        for expert in range(experts)
        for place, part in enumerate(stack.parts)
    ]


def _stacked(tensor: Stored, module: str, config: Mapping[str, Json]) -> str:
    """Return why a stack of matrices is kept; refuse what may be experts."""
    reason = keep_reason(module, config=config)
    if reason is not None:
        return reason
    if "conv" in module or len(tensor.shape) > 3:
        return "convolution"
    raise ConvertError(
        f"{tensor.file}::{tensor.name}: {tensor.dtype} {list(tensor.shape)} looks like experts "
        "stacked in one tensor, in a layout that the architecture map does not know for this model "
        f"type; keep it as it is with --exclude {module!r}, or save the model with one tensor per "
        "expert"
    )


def _vocabulary(tensor: Stored, config: Mapping[str, Json]) -> str | None:
    """Return why a weight with a row per token is kept: an embedding or a head by any name."""
    size = text_config(config).get("vocab_size")
    if tensor.shape[0] == size and layer_index(tensor.name) is None:
        return "has a row per token of the vocabulary"
    return None


def _dropped_by(tensor: Stored, module: str, recipe: Recipe, used: set[str]) -> str | None:
    """Return the pattern that drops `tensor`, by its own name or by that of a module above it."""
    found = [_ancestor_matching(name, recipe.drop, used) for name in (tensor.name, module)]
    return next((pattern for pattern in found if pattern is not None), None)


def _ancestor_matching(module: str, patterns: list[str], used: set[str]) -> str | None:
    """Return the first pattern that matches `module` or a module above it; note all that do."""
    if not patterns:
        return None
    parts = module.split(".")
    names = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    asked = tuple(patterns)
    matched = {pattern for name in names for pattern in _all_matching(name, asked)}
    used.update(matched)
    return next((pattern for pattern in patterns if pattern in matched), None)


# a module is above many tensors
@lru_cache(maxsize=4096)
def _all_matching(module: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(pattern for pattern in patterns if matching(module, [pattern]))
