"""Where everything lies in the output: what a decision writes, laid out file by file."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from qconvert.decide import Decision, Matrix
from qconvert.errors import ConvertError
from qconvert.groups import sharing_key
from qconvert.smoothing import NOT_SMOOTHED, Smoothing
from qschema.checkpoint import Checkpoint
from qschema.formats import TensorSpec
from qschema.formats.declare import resolve
from qschema.plan import Constant, Output, OutputShard, Span, Step, Unit
from qschema.safetensors import Entry, layout

# (offset, nbytes)
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Draft:
    """A decision with the tensors that it writes, each after its suffix; they have no place yet."""

    decision: Decision
    smoothed: Smoothing
    outputs: list[tuple[str, Entry]]


def drafted(
    decisions: Iterable[Decision], smoothing: Mapping[str, Smoothing]
) -> dict[str, list[Draft]]:
    """Return file -> what is written to it, for the output file is named like the source's."""
    by_file: dict[str, list[Draft]] = defaultdict(list)
    for decision in decisions:
        name = decision.module if decision.declared else decision.tensor.name
        smoothed = NOT_SMOOTHED if decision.dropped else smoothing.get(name, NOT_SMOOTHED)
        draft = Draft(decision, smoothed, list(_outputs(decision, smoothed)))
        by_file[decision.tensor.file.name].append(draft)
    return by_file


def _outputs(decision: Decision, smoothed: Smoothing) -> Iterator[tuple[str, Entry]]:
    tensor, matrix, declared = decision.tensor, decision.matrix, decision.declared
    if decision.dropped:
        return
    if declared is None or matrix is None:
        named = tensor.name.endswith(".weight")
        name = f"{decision.module}.weight" if named else tensor.name
        yield "", Entry(name, tensor.dtype, tensor.shape)
        return
    for spec in declared.tensors:
        if spec.required or (spec.role == "smoothing" and smoothed.written):
            name = decision.name_of(spec.suffix)
            yield spec.suffix, Entry(name, spec.dtype, _shape(spec, matrix))


def _step(draft: Draft, amaxes: Mapping[str, float], placed: Mapping[str, Place]) -> Step:
    decision, smoothed = draft.decision, draft.smoothed
    tensor, matrix, declared = decision.tensor, decision.matrix, decision.declared
    part = matrix if declared is not None and matrix is not None and matrix.part else None
    file = tensor.file.name
    source = Span(
        name=tensor.name,
        file=file,
        dtype=tensor.dtype,
        shape=[part.rows, part.columns] if part else list(tensor.shape),
        offset=tensor.offset + (part.offset if part else 0),
        nbytes=part.nbytes if part else tensor.nbytes,
    )
    outputs = [
        _output(entry, placed[entry.name], file=file, suffix=suffix)
        for suffix, entry in draft.outputs
    ]
    if declared is None or matrix is None:
        return Step(
            source=source,
            action="drop" if decision.dropped else "fold" if smoothed.scalings else "keep",
            reason=smoothed.reason or decision.reason,
            scalings=smoothed.scalings,
            outputs=outputs,
        )
    return Step(
        source=source,
        part=matrix.part,
        action="quantize",
        algo=declared.name,
        reason=decision.reason,
        transposed=matrix.transposed,
        input_amax=amaxes.get(decision.module),
        scalings=smoothed.scalings,
        smoothing=smoothed.written,
        outputs=outputs,
    )


def _shape(spec: TensorSpec, matrix: Matrix) -> tuple[int, ...]:
    """Return the shape of an output: of a stack, the experts and then the other way around."""
    shape = resolve(spec.shape, rows=matrix.rows, columns=matrix.columns)
    if not matrix.experts or spec.role not in ("codes", "scale"):
        return shape
    return (matrix.experts, *reversed(shape))


def _output(entry: Entry, at: Place, *, file: str, suffix: str) -> Output:
    offset, size = at
    return Output(
        name=entry.name,
        file=file,
        dtype=entry.dtype,
        shape=list(entry.shape),
        offset=offset,
        nbytes=size,
        suffix=suffix,
    )


def check_names(drafts: Mapping[str, list[Draft]], constants: list[Constant]) -> None:
    """Raise ConvertError for a name that two tensors of the output would have."""
    written = [
        (draft.decision.tensor.name, entry.name)
        for of_file in drafts.values()
        for draft in of_file
        for _, entry in draft.outputs
    ]
    written += [(constant.reason, constant.output.name) for constant in constants]
    owner: dict[str, str] = {}
    for source, name in written:
        if name in owner:
            raise ConvertError(f"{source} would become {name}, which {owner[name]} is already")
        owner[name] = source


def place(
    checkpoint: Checkpoint,
    drafts: dict[str, list[Draft]],
    constants: list[Constant],
    amaxes: Mapping[str, float],
) -> tuple[list[OutputShard], list[Unit], list[Constant]]:
    """Return the output files, one per source file and named like it, and what lies where in them.

    Takes the drafts out of `drafts`: those of a file are given up as soon as it is laid out. Units
    are in the order of their first tensor; steps that share a scale are in one.
    """
    shards: list[OutputShard] = []
    units: dict[tuple[str, ...], list[Step]] = defaultdict(list)
    added: dict[str, Constant] = {}
    for shard in checkpoint.shards:
        file = shard.file.name
        of_file = drafts.pop(file, [])
        extra = [constant for constant in constants if constant.output.file == file]
        entries = [entry for draft in of_file for _, entry in draft.outputs]
        entries += [_entry(constant.output) for constant in extra]
        opening, placed = layout(entries, metadata=shard.metadata)
        size = len(opening) + sum(size for _, size in placed.values())
        shards.append(OutputShard(file=file, nbytes=size, metadata=shard.metadata))
        for draft in of_file:
            units[_unit_key(draft)].append(_step(draft, amaxes, placed))
        for constant in extra:
            offset, size = placed[constant.output.name]
            output = constant.output.model_copy(update={"offset": offset, "nbytes": size})
            added[output.name] = constant.model_copy(update={"output": output})
    return (
        shards,
        [Unit(steps=steps) for steps in units.values()],
        [added[constant.output.name] for constant in constants],
    )


def _entry(output: Output) -> Entry:
    return Entry(output.name, output.dtype, tuple(output.shape))


def _unit_key(draft: Draft) -> tuple[str, ...]:
    declared, module = draft.decision.declared, draft.decision.module
    if draft.decision.dropped:
        return ("drop", draft.decision.tensor.name)
    shared = next((spec.shared for spec in declared.specs("global")), None) if declared else None
    if declared is None or shared is None:
        return (draft.outputs[0][1].name,)
    return (declared.name, *sharing_key(module, shared))
