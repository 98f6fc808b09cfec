"""What is reported of a finished step, and the report as a file that is never whole in memory."""

import math
from collections.abc import Iterable, Iterator

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


def report_bytes(head: Report, tensors: Iterable[TensorReport]) -> Iterator[bytes]:
    """Yield the JSON of `head`, which has no tensors, with `tensors` in their place."""
    before, after = head.model_dump_json(indent=1).split('"tensors": []', 1)
    yield f'{before}"tensors": ['.encode()
    comma = ""
    for tensor in tensors:
        indented = tensor.model_dump_json(indent=1).replace("\n", "\n  ")
        yield f"{comma}\n  {indented}".encode()
        comma = ","
    yield f"\n ]{after}\n".encode()


def _relative_error(err2: float, ref2: float) -> float:
    # the sums are exact (fsum), so the order and the cutting of rows leave no trace; six digits
    # hide the last bits of the row sums, which devices add up in their own order
    return float(f"{math.sqrt(err2 / ref2):.6g}") if ref2 else 0.0


def _sqnr(err2: float, ref2: float) -> float | None:
    error = _relative_error(err2, ref2)
    return round(-20.0 * math.log10(error), 2) if error else None
