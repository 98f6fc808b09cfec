"""What is reported of a finished step, and the report as a file that is never whole in memory."""

import math
from collections.abc import Iterable, Iterator
from math import prod

from qconvert.journal import StepDone
from qschema.plan import Plan, Step
from qschema.report import Report, TensorReport, WrittenTensor


def reports_of(plan: Plan, done: Iterable[tuple[StepDone, ...]]) -> Iterator[TensorReport]:
    """Yield the report of each step, in the plan's order; `done` has the steps of each unit."""
    for unit, steps in zip(plan.units, done, strict=True):
        for step, found in zip(unit.steps, steps, strict=True):
            yield report_of(step, found)


def report_of(step: Step, done: StepDone) -> TensorReport:
    """Return the report of a finished step."""
    return TensorReport(
        source=step.source.name,
        part=step.part,
        dtype=step.source.dtype,
        shape=step.source.shape,
        action=step.action,
        algo=step.algo,
        reason=step.reason,
        outputs=[
            WrittenTensor(name=span.name, dtype=span.dtype, shape=span.shape, digest=digest)
            for span, digest in zip(step.outputs, done.digests, strict=True)
        ],
        sqnr=None if done.error is None else _sqnr(*done.error),
        relative_error=None if done.error is None else _relative_error(*done.error),
        num_saturated=done.num_saturated,
        num_nonfinite=done.num_nonfinite,
    )


def report_head(plan: Plan, digest: str) -> Report:
    """Return the provenance of a conversion without its tensors; `digest` is the plan's."""
    return Report(
        tool=plan.tool,
        recipe=plan.recipe,
        source=plan.source,
        plan_sha256=digest,
        bits_per_quantized_weight=effective_bits(plan, quantized_only=True),
        bits_per_weight=effective_bits(plan, quantized_only=False),
        tensors=[],
        side_files=plan.side_files,
        notes=plan.notes,
    )


def effective_bits(plan: Plan, *, quantized_only: bool) -> float:
    """Return stored bits per source element, scales included, to four decimals.

    A tensor that is dropped has no part in it.
    """
    steps = [
        step for step in plan.steps if step.algo or (not quantized_only and step.action != "drop")
    ]
    elements = sum(prod(step.source.shape) for step in steps)
    stored = sum(span.nbytes for step in steps for span in step.outputs)
    return round(8 * stored / elements, 4) if elements else 0.0


def around_tensors(head: Report) -> tuple[bytes, bytes]:
    """Return what stands before and after the tensors in the report that begins with `head`."""
    # no string in JSON can hold this text
    before, after = head.model_dump_json(indent=1).split('"tensors": []', 1)
    return f'{before}"tensors": ['.encode(), f"]{after}\n".encode()


def report_bytes(head: Report, tensors: Iterable[TensorReport]) -> Iterator[bytes]:
    """Yield the JSON of `head`, which has no tensors, with `tensors` in their place."""
    before, after = around_tensors(head)
    yield before
    comma = ""
    for tensor in tensors:
        indented = tensor.model_dump_json(indent=1).replace("\n", "\n  ")
        yield f"{comma}\n  {indented}".encode()
        comma = ","
    yield b"\n " + after


def _relative_error(err2: float, ref2: float) -> float:
    # the sums are exact (fsum), so the order and the cutting of rows leave no trace; six digits
    # hide the last bits of the row sums, which devices add up in their own order
    return float(f"{math.sqrt(err2 / ref2):.6g}") if ref2 else 0.0


def _sqnr(err2: float, ref2: float) -> float | None:
    error = _relative_error(err2, ref2)
    return round(-20.0 * math.log10(error), 2) if error else None
