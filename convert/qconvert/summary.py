"""A plan in words: what becomes what, sizes, effective bits, what stays and why."""

import re
from collections.abc import Iterator
from itertools import groupby
from math import prod

from qconvert.errors import human
from qconvert.high_water import needs
from qconvert.reports import effective_bits
from qschema.plan import Plan, Step

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(r"^\[\d+,")


def describe(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan for a person; layers and experts that are alike share a line."""
    source = plan.source
    yield f"source   {source.model_type or 'unknown model type'}, {human(source.nbytes)}"
    quantized = [step for step in plan.steps if step.algo]
    where = f" ({effective_bits(plan, quantized_only=True):.3f} where quantized)"
    yield (
        f"output   {human(plan.output_nbytes())} in {len(plan.shards)} files, "
        f"{effective_bits(plan, quantized_only=False):.2f} bits per weight"
        f"{where if quantized else ''}"
    )
    if plan.high_water:
        yield f"needs    {needs(plan.high_water)}"
    if plan.quantized_layers:
        for algo in plan.algos:
            of_algo = [step for step in quantized if step.algo == algo]
            yield f"         {algo}: {len(of_algo)} tensors, {_sizes(of_algo)}, {_bits(of_algo)}"
    yield f"quantize {len(quantized)} tensors, {_sizes(quantized)}"
    yield from _lines(quantized)
    for kind in ("fold", "keep", "drop"):
        steps = [step for step in plan.steps if step.action == kind]
        if steps or kind == "keep":
            nbytes = human(sum(step.source.nbytes for step in steps))
            yield f"{kind:8} {len(steps)} tensors, {nbytes}"
            yield from _lines(steps)
    for constant in plan.constants:
        yield f"add      {constant.output.name}: {constant.reason}"
    yield f"exclude  {', '.join(plan.exclude_modules) or 'nothing'}"
    for action in ("write", "copy", "leave"):
        files = [side for side in plan.side_files if side.action == action]
        yield f"{action:8} {len(files)} files"
        for side in files:
            size = f" ({human(side.nbytes)})" if side.nbytes is not None else ""
            yield f"  {side.file}{size}: {side.reason}"


def _sizes(steps: list[Step]) -> str:
    before = sum(step.source.nbytes for step in steps)
    after = sum(span.nbytes for step in steps for span in step.outputs)
    return f"{human(before)} -> {human(after)}"


def _bits(steps: list[Step]) -> str:
    stored = sum(span.nbytes for step in steps for span in step.outputs)
    return f"{8 * stored / sum(prod(step.source.shape) for step in steps):.3f} bits per weight"


def _lines(steps: list[Step]) -> Iterator[str]:
    def likeness(step: Step) -> tuple[str, str, str]:
        name = _NUMBER.sub("*", step.source.name) + _EXPERT.sub("[*,", step.part or "")
        return name, _becomes(step), _NUMBER.sub("*", step.reason)

    for (name, becomes, reason), group in groupby(sorted(steps, key=likeness), key=likeness):
        same = list(group)
        count = f" x{len(same)}" if len(same) > 1 else ""
        shown = name if len(same) > 1 else same[0].source.name + (same[0].part or "")
        yield f"  {shown}{count}: {becomes} ({reason})"


def _becomes(step: Step) -> str:
    source = f"{step.source.dtype} {step.source.shape}"
    if not step.algo:
        return source
    parts = ", ".join(f"{span.suffix} {span.dtype} {span.shape}" for span in step.outputs)
    codes = step.outputs[0]
    # an expert's matrix gets a name that is not its source's
    module = _NUMBER.sub("*", codes.name).removesuffix(f".{codes.suffix}") if step.part else ""
    return f"{source} -> {step.algo}{module and ' ' + module}: {parts}"
