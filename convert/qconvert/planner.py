"""The plan: a pure function of headers, JSON and recipe. No weight is read, nothing is written."""

from collections import defaultdict
from collections.abc import Iterable

from qconvert.decide import Decision, decide, is_stacked
from qconvert.errors import ConvertError, some
from qconvert.excludes import collapse
from qconvert.side_files import side_files
from qschema import __version__
from qschema.architectures import (
    KNOWN,
    REFUSED,
    fused_siblings,
    has_tied_head,
    matching,
    text_config,
)
from qschema.checkpoint import Checkpoint
from qschema.dtypes import QUANTIZED
from qschema.plan import OutputShard, Plan, SideFile, Source, Span, Step, Tool, Unit
from qschema.recipe import Recipe
from qschema.safetensors import Entry, Stored, layout

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


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Return the plan that converts `checkpoint` by `recipe`.

    Raises ConvertError for a source that is quantized already or can't be converted, a recipe that
    quantizes nothing, and output names that collide.
    """
    _refuse(checkpoint)
    used: set[str] = set()
    decisions = [
        decide(tensor, recipe=recipe, config=checkpoint.config, used=used)
        for shard in checkpoint.shards
        for tensor in sorted(shard.tensors.values(), key=lambda tensor: tensor.offset)
    ]
    algos = sorted({decision.declared.name for decision in decisions if decision.declared})
    if not algos:
        raise ConvertError(f"{checkpoint.path}: the recipe quantizes none of the weights")
    if len(algos) > 1:
        raise ConvertError(
            f"the recipe mixes {', '.join(algos)}; this version writes one format per checkpoint"
        )
    shards, placed = _place(checkpoint, decisions)
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
        exclude_modules=_exclude_modules(checkpoint, decisions),
        shards=shards,
        units=[Unit(steps=[_step(decision, placed)]) for decision in decisions],
        side_files=sides,
        notes=[*_notes(checkpoint, decisions), *_unused(recipe, used), *_left(sides, recipe)],
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


def _entries(decision: Decision) -> list[Entry]:
    tensor = decision.tensor
    if decision.declared is None:
        return [Entry(tensor.name, tensor.dtype, tensor.shape)]
    rows, columns = tensor.shape
    outputs = decision.declared.outputs(rows=rows, columns=columns)
    return [
        Entry(f"{decision.module}.{suffix}", dtype, shape)
        for suffix, (dtype, shape) in outputs.items()
    ]


def _place(
    checkpoint: Checkpoint, decisions: list[Decision]
) -> tuple[list[OutputShard], dict[str, Span]]:
    """Return the output files, one per source file and named like it, and every tensor's place."""
    by_file: dict[str, list[Entry]] = defaultdict(list)
    owner: dict[str, str] = {}
    for decision in decisions:
        for entry in _entries(decision):
            if entry.name in owner:
                raise ConvertError(
                    f"{decision.tensor.name} would become {entry.name}, which "
                    f"{owner[entry.name]} is already"
                )
            owner[entry.name] = decision.tensor.name
            by_file[decision.tensor.file.name].append(entry)
    shards, placed = [], {}
    for source in checkpoint.shards:
        file = source.file.name
        opening, spans = layout(by_file[file], metadata=source.metadata)
        for entry in by_file[file]:
            offset, nbytes = spans[entry.name]
            placed[entry.name] = Span(
                name=entry.name,
                file=file,
                dtype=entry.dtype,
                shape=list(entry.shape),
                offset=offset,
                nbytes=nbytes,
            )
        size = len(opening) + sum(nbytes for _, nbytes in spans.values())
        shards.append(OutputShard(file=file, nbytes=size, metadata=source.metadata))
    return shards, placed


def _step(decision: Decision, placed: dict[str, Span]) -> Step:
    return Step(
        source=_span(decision.tensor),
        action="quantize" if decision.declared else "keep",
        algo=decision.declared.name if decision.declared else None,
        reason=decision.reason,
        outputs=[placed[entry.name] for entry in _entries(decision)],
    )


def _span(tensor: Stored) -> Span:
    return Span(
        name=tensor.name,
        file=tensor.file.name,
        dtype=tensor.dtype,
        shape=list(tensor.shape),
        offset=tensor.offset,
        nbytes=tensor.nbytes,
    )


def _exclude_modules(checkpoint: Checkpoint, decisions: Iterable[Decision]) -> list[str]:
    """Return the collapsed names of modules that hold a matrix which stays as it is."""
    kept, quantized = [], []
    for decision in decisions:
        if decision.declared:
            quantized.append(decision.module)
        elif len(decision.tensor.shape) == 2 and decision.tensor.name.endswith(".weight"):
            kept.append(decision.module)
        elif is_stacked(decision.tensor):
            # stacked experts have no module of their own: their parent is what engines look up
            named = decision.tensor.name.endswith(".weight")
            kept.append(decision.module if named else decision.module.rpartition(".")[0])
    if has_tied_head(checkpoint.config) and "lm_head.weight" not in checkpoint.tensors:
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
    if checkpoint.unindexed_tensors:
        names = some(list(checkpoint.unindexed_tensors))
        notes.append(f"in a shard but not in the index, converted and indexed: {names}")
    quantized = {decision.module for decision in decisions if decision.declared}
    modules = {decision.module for decision in decisions}
    split = sorted(
        {
            " + ".join(group)
            for module in quantized
            if not set(group := fused_siblings(module)) & modules <= quantized
        }
    )
    if split:
        notes.append(
            f"engines fuse these and refuse them when only some are quantized: {some(split)}"
        )
    return notes


def _unused(recipe: Recipe, used: set[str]) -> list[str]:
    patterns = [*recipe.exclude, *recipe.include, *(rule.match for rule in recipe.rules)]
    return [f"{pattern!r} matches no module" for pattern in patterns if pattern not in used]


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
