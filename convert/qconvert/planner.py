"""The plan: a pure function of headers, JSON and recipe. No weight is read, nothing is written."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qconvert.decide import Decision, Matrix, decide, is_stacked, text_model_type
from qconvert.errors import ConvertError, some
from qconvert.excludes import collapse
from qconvert.groups import check_mixed, keep_together, sharing_key, split_groups
from qconvert.kv_cache import kv_constants, kv_notes
from qconvert.side_files import side_files
from qconvert.smoothing import NOT_SMOOTHED, Smoothing, plan_smoothing
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
from qschema.dtypes import QUANTIZED, nbytes
from qschema.formats import TensorSpec
from qschema.formats.declare import resolve
from qschema.plan import (
    Constant,
    Output,
    OutputShard,
    Plan,
    SideFile,
    Source,
    Span,
    Step,
    Tool,
    Unit,
)
from qschema.recipe import Recipe
from qschema.safetensors import Entry, layout

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
    amaxes = input_amaxes(decisions, statistics)
    smoothing = plan_smoothing(decisions, statistics, model_type=_model_type(checkpoint))
    drafts = [_draft(decision, amaxes, smoothing) for decision in decisions]
    constants = kv_constants(checkpoint, recipe, statistics)
    shards, placed = _place(checkpoint, drafts, constants)
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
        exclude_modules=_exclude_modules(checkpoint, decisions) if len(formats) == 1 else [],
        quantized_layers=_quantized_layers(decisions) if len(formats) > 1 else {},
        shards=shards,
        units=_units(drafts, placed),
        constants=[
            constant.model_copy(update={"output": _at(constant.output, placed)})
            for constant in constants
        ],
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


@dataclass(frozen=True)
class _Draft:
    """A step that has no place yet: its outputs have no offsets."""

    decision: Decision
    step: Step


def _draft(
    decision: Decision, amaxes: Mapping[str, float], smoothing: Mapping[str, Smoothing]
) -> _Draft:
    tensor, matrix, declared = decision.tensor, decision.matrix, decision.declared
    smoothed = smoothing.get(decision.module if declared else tensor.name, NOT_SMOOTHED)
    source = Span(
        name=tensor.name,
        file=tensor.file.name,
        dtype=tensor.dtype,
        shape=list(tensor.shape),
        offset=tensor.offset,
        nbytes=tensor.nbytes,
    )
    if declared is None or matrix is None:
        name = tensor.name
        if tensor.name.endswith(".weight"):
            name = f"{decision.module}.weight"
        step = Step(
            source=source,
            action="fold" if smoothed.scalings else "keep",
            reason=smoothed.reason or decision.reason,
            scalings=smoothed.scalings,
            outputs=[_output(name, tensor.dtype, tensor.shape, file=source.file)],
        )
        return _Draft(decision, step)
    if matrix.part is not None:
        source = source.model_copy(
            update={
                "shape": [matrix.rows, matrix.columns],
                "offset": tensor.offset + matrix.offset,
                "nbytes": matrix.nbytes,
            }
        )
    step = Step(
        source=source,
        part=matrix.part,
        action="quantize",
        algo=declared.name,
        reason=decision.reason,
        transposed=matrix.transposed,
        input_amax=amaxes.get(decision.module),
        scalings=smoothed.scalings,
        smoothing=smoothed.written,
        outputs=[
            _output(
                decision.name_of(spec.suffix),
                spec.dtype,
                _shape(spec, matrix),
                file=source.file,
                suffix=spec.suffix,
            )
            for spec in declared.tensors
            if spec.required or (spec.role == "smoothing" and smoothed.written)
        ],
    )
    return _Draft(decision, step)


def _shape(spec: TensorSpec, matrix: Matrix) -> tuple[int, ...]:
    """Return the shape of an output: of a stack, the experts and then the other way around."""
    shape = resolve(spec.shape, rows=matrix.rows, columns=matrix.columns)
    if not matrix.experts or spec.role not in ("codes", "scale"):
        return shape
    return (matrix.experts, *reversed(shape))


def _output(
    name: str, dtype: str, shape: tuple[int, ...], *, file: str, suffix: str = ""
) -> Output:
    """Return an output without a place: offset 8 is where the first tensor might be."""
    size = nbytes(dtype, shape)
    return Output(
        name=name, file=file, dtype=dtype, shape=list(shape), offset=8, nbytes=size, suffix=suffix
    )


def _place(
    checkpoint: Checkpoint, drafts: list[_Draft], constants: list[Constant]
) -> tuple[list[OutputShard], dict[str, tuple[int, int]]]:
    """Return the output files, one per source file and named like it, and every tensor's place."""
    by_file: dict[str, list[Entry]] = defaultdict(list)
    owner: dict[str, str] = {}
    outputs = [(draft.decision.tensor.name, out) for draft in drafts for out in draft.step.outputs]
    outputs += [(constant.reason, constant.output) for constant in constants]
    for source, output in outputs:
        if output.name in owner:
            raise ConvertError(
                f"{source} would become {output.name}, which {owner[output.name]} is already"
            )
        owner[output.name] = source
        by_file[output.file].append(Entry(output.name, output.dtype, tuple(output.shape)))
    shards: list[OutputShard] = []
    placed: dict[str, tuple[int, int]] = {}
    for shard in checkpoint.shards:
        file = shard.file.name
        opening, spans = layout(by_file[file], metadata=shard.metadata)
        placed.update(spans)
        size = len(opening) + sum(size for _, size in spans.values())
        shards.append(OutputShard(file=file, nbytes=size, metadata=shard.metadata))
    return shards, placed


def _at(output: Output, placed: Mapping[str, tuple[int, int]]) -> Output:
    offset, size = placed[output.name]
    return output.model_copy(update={"offset": offset, "nbytes": size})


def _units(drafts: list[_Draft], placed: Mapping[str, tuple[int, int]]) -> list[Unit]:
    """Return the steps in the order of their first tensor, those that share a scale together."""
    units: dict[tuple[str, ...], list[Step]] = defaultdict(list)
    for draft in drafts:
        outputs = [_at(output, placed) for output in draft.step.outputs]
        step = draft.step.model_copy(update={"outputs": outputs})
        units[_unit_key(draft)].append(step)
    return [Unit(steps=steps) for steps in units.values()]


def _unit_key(draft: _Draft) -> tuple[str, ...]:
    declared, module = draft.decision.declared, draft.decision.module
    shared = next((spec.shared for spec in declared.specs("global")), None) if declared else None
    if declared is None or shared is None:
        return (draft.step.outputs[0].name,)
    return (declared.name, *sharing_key(module, shared))


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
    if "lm_head" in quantized and checkpoint.config.get("tie_word_embeddings") is True:
        notes.append(
            "lm_head is quantized, but config.json has tie_word_embeddings: engines take the "
            "embedding in its place"
        )
    stacks = [
        decision.tensor.name
        for decision in decisions
        if decision.declared is None and _is_split_type(decision.tensor.name, checkpoint)
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
    return notes


def _is_split_type(name: str, checkpoint: Checkpoint) -> bool:
    """Return whether the tensor `name` stacks experts that are a tensor each on the hub."""
    stack = find_stack(name, model_type=text_model_type(checkpoint.config))
    return stack is not None and bool(stack.parts)


def _unused(recipe: Recipe, used: set[str]) -> list[str]:
    patterns = [*recipe.exclude, *recipe.include]
    notes = [f"{pattern!r} matches no module" for pattern in patterns if pattern not in used]
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
