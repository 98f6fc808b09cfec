"""The plan: a pure function of headers, JSON and recipe. No weight is read, nothing is written."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from qconvert.decide import Decision, decide, is_stacked, text_model_type
from qconvert.errors import ConvertError, some
from qconvert.excludes import collapse
from qconvert.groups import check_mixed, keep_together, split_groups, torn_groups
from qconvert.kv_cache import kv_constants, kv_notes
from qconvert.placement import check_names, drafted, place
from qconvert.side_files import side_files
from qconvert.smoothing import plan_smoothing
from qconvert.statistics import Statistics, input_amaxes, statistics_notes
from qschema import __version__
from qschema.architectures import (
    KNOWN,
    REFUSED,
    experts_of,
    find_stack,
    has_tied_head,
    matching,
    model_order,
    text_config,
)
from qschema.checkpoint import Checkpoint
from qschema.dtypes import QUANTIZED
from qschema.plan import Plan, SideFile, Source, Tool
from qschema.recipe import Recipe

# tensors that only a quantized checkpoint has, by the end of their names
_QUANTIZED_SUFFIXES = (
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_scale_2",
    ".weight_packed",
    ".qweight",
    ".qzeros",
)
# gpt-oss: codes and exponents, as bytes
_PACKED_SUFFIXES = ("_blocks", "_scales")


@contextmanager
def _uncollected() -> Iterator[None]:
    """Leave the garbage collector out of it: a plan is made of values, which have no cycles.

    Looking through all of them again and again takes longer than to make them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def make_plan(checkpoint: Checkpoint, recipe: Recipe, statistics: Statistics | None = None) -> Plan:
    """Return the plan that converts `checkpoint` by `recipe`, with calibration's `statistics`.

    Raises ConvertError for a source that is quantized already or can't be converted, a recipe that
    quantizes nothing or splits what engines fuse, statistics that lack a module, and output names
    that collide.
    """
    _refuse(checkpoint)
    statistics = statistics or Statistics()
    used: set[str] = set()
    decisions = keep_together(
        [
            decision
            for shard in checkpoint.shards
            for tensor in sorted(shard.tensors.values(), key=lambda tensor: tensor.offset)
            for decision in decide(tensor, recipe=recipe, config=checkpoint.config, used=used)
        ]
    )
    formats = {decision.declared.name for decision in decisions if decision.declared}
    if not formats and recipe.kv_cache is None:
        raise ConvertError(f"{checkpoint.path}: the recipe quantizes none of the weights")
    if len(formats) > 1:
        check_mixed(decisions)
    written = [decision for decision in decisions if not decision.dropped]
    if decisions and not written:
        raise ConvertError(f"{checkpoint.path}: the recipe drops every tensor; nothing is left")
    amaxes = input_amaxes(decisions, statistics)
    smoothing = plan_smoothing(written, statistics, model_type=_model_type(checkpoint))
    drafts = drafted(decisions, smoothing)
    dropped = {decision.tensor.name for decision in decisions if decision.dropped}
    constants = kv_constants(checkpoint, recipe, statistics, dropped=dropped)
    check_names(drafts, constants)
    shards, units, constants = place(checkpoint, drafts, constants, amaxes)
    sides = side_files(checkpoint, recipe)
    return Plan(
        tool=Tool(version=__version__),
        source=Source(
            model_type=_model_type(checkpoint),
            known_architecture=_model_type(checkpoint) in KNOWN,
            digest=checkpoint.digest(),
            nbytes=sum(shard.file_nbytes for shard in checkpoint.shards),
        ),
        recipe=recipe,
        vectors=statistics.sha256,
        exclude_modules=_exclude_modules(checkpoint, written) if len(formats) == 1 else [],
        quantized_layers=_quantized_layers(decisions) if len(formats) > 1 else {},
        shards=shards,
        units=units,
        constants=constants,
        side_files=sides,
        notes=[
            *_notes(checkpoint, decisions),
            *kv_notes(recipe, constants),
            *statistics_notes(decisions, statistics, constants, config=checkpoint.config),
            *_unused(recipe, used),
            *_left(sides, recipe),
        ],
    )


def _refuse(checkpoint: Checkpoint) -> None:
    config, path = checkpoint.config, checkpoint.path
    model_type = _model_type(checkpoint)
    if model_type is not None and model_type in REFUSED:
        raise ConvertError(f"{path}: model type {model_type!r} {REFUSED[model_type]}")
    for name, tensor in checkpoint.tensors.items():
        # three times as many columns as rows: q, k and v side by side, not one above the other
        if name.endswith("attn.c_attn.weight") and tensor.shape[1:] == (3 * tensor.shape[0],):
            raise ConvertError(f"{tensor.file}::{name}: {REFUSED['gpt2']}")
    found = None
    if "hf_quant_config.json" in checkpoint.files:
        found = "it holds hf_quant_config.json"
    elif config.get("quantization_config") or text_config(config).get("quantization_config"):
        found = "config.json has a quantization_config"
    else:
        names = [
            name
            for name, tensor in checkpoint.tensors.items()
            if name.endswith(_QUANTIZED_SUFFIXES)
            or tensor.dtype in QUANTIZED
            or (name.endswith(_PACKED_SUFFIXES) and tensor.dtype == "U8")
        ]
        if names:
            found = f"it holds {some(names)}"
    if found:
        raise ConvertError(f"{path}: is quantized already ({found}); start from the original")


def _model_type(checkpoint: Checkpoint) -> str | None:
    model_type = checkpoint.config.get("model_type")
    return model_type if isinstance(model_type, str) else None


def _quantized_layers(decisions: Iterable[Decision]) -> dict[str, str]:
    """Return module -> format as engines look it up; the experts of a layer are one entry."""
    layers: dict[str, str] = {}
    for decision in decisions:
        if decision.declared:
            expert = experts_of(decision.module)
            layers[expert[0] if expert else decision.owner] = decision.declared.name
    return {module: layers[module] for module in sorted(layers, key=model_order)}


def _exclude_modules(checkpoint: Checkpoint, decisions: Iterable[Decision]) -> list[str]:
    """Return the collapsed names of modules that hold a matrix which stays as it is."""
    kept, quantized = [], []
    for decision in decisions:
        if decision.declared:
            quantized.append(decision.owner)
        elif len(decision.tensor.shape) == 2 and decision.tensor.name.endswith(".weight"):
            kept.append(decision.module)
        elif is_stacked(decision.tensor):
            # stacked experts have no module of their own: their parent is what engines look up
            named = decision.tensor.name.endswith(".weight")
            kept.append(decision.module if named else decision.module.rpartition(".")[0])
    if has_tied_head(checkpoint.config) and "lm_head" not in (*kept, *quantized):
        kept.append("lm_head")
    return collapse(kept, quantized)


def _notes(checkpoint: Checkpoint, decisions: list[Decision]) -> list[str]:
    notes = list(checkpoint.conflicts)
    model_type = _model_type(checkpoint)
    if model_type not in KNOWN:
        notes.append(
            f"model type {model_type!r} is not in the architecture map: generic rules applied, "
            "look through --dry-run"
        )
    dropped = {decision.tensor.name for decision in decisions if decision.dropped}
    unindexed = [name for name in checkpoint.unindexed_tensors if name not in dropped]
    if unindexed:
        notes.append(f"in a shard but not in the index, converted and indexed: {some(unindexed)}")
    quantized = {decision.module for decision in decisions if decision.declared}
    if "lm_head" in quantized and checkpoint.config.get("tie_word_embeddings") is True:
        notes.append(
            "lm_head is quantized, but config.json has tie_word_embeddings: engines take the "
            "embedding in its place"
        )
    stacks = [
        decision.tensor.name
        for decision in decisions
        if decision.declared is None
        and not decision.dropped
        and _is_split_type(decision.tensor.name, checkpoint)
    ]
    if stacks:
        notes.append(
            f"kept as stacks of experts, not split into the hub's tensors: {some(stacks)}; engines "
            "may look for one tensor per expert"
        )
    differing, partial = split_groups(decisions)
    if differing or partial:
        notes.append(
            "engines load these as one and refuse them when only some are quantized: "
            f"{some([*differing, *partial])}"
        )
    torn = torn_groups(decisions) if dropped else []
    if torn:
        notes.append(f"dropped, while engines load these as one: {some(torn)}")
    return notes


def _is_split_type(name: str, checkpoint: Checkpoint) -> bool:
    """Return whether the tensor `name` stacks experts that are a tensor each on the hub."""
    stack = find_stack(name, model_type=text_model_type(checkpoint.config))
    return stack is not None and bool(stack.parts)


def _unused(recipe: Recipe, used: set[str]) -> list[str]:
    patterns = [*recipe.exclude, *recipe.include]
    notes = [f"{pattern!r} matches no module" for pattern in patterns if pattern not in used]
    notes += [
        f"--drop {pattern!r} matches no tensor" for pattern in recipe.drop if pattern not in used
    ]
    return notes + [
        f"rule {rule.match!r} decides nothing: it matches no module that earlier rules leave"
        for rule in recipe.rules
        if rule.match not in used
    ]


def _left(sides: list[SideFile], recipe: Recipe) -> list[str]:
    """Return notes on the files that stay behind, and on file patterns that did nothing."""
    left = [side.file for side in sides if side.action == "leave" and not side.file.startswith(".")]
    notes = [f"left behind: {some(left)}"] if left else []
    for action, patterns in (("leave", recipe.leave), ("copy", recipe.copy_files)):
        files = [side.file for side in sides if side.action == action]
        notes += [
            f"--{action} {pattern!r} does nothing"
            for pattern in patterns
            if not any(matching(file, [pattern]) for file in files)
        ]
    return notes
