"""What is reported of a finished step: digests, and what quantization lost."""

import math

from qschema.plan import Step
from qschema.report import TensorReport, WrittenTensor


def report_of(
    step: Step,
    digests: list[str],
    *,
    num_nonfinite: int | None,
    num_saturated: int | None = None,
    error: tuple[float, float] | None = None,
) -> TensorReport:
    """Return the report of a finished step; `error` is (sum((w - dequantized)^2), sum(w^2))."""
    return TensorReport(
        source=step.source.name,
        part=step.part,
        dtype=step.source.dtype,
        shape=step.source.shape,
        action=step.action,
        algo=step.algo,
        reason=step.reason,
        outputs=[
            WrittenTensor(name=span.name, dtype=span.dtype, shape=span.shape, sha256=digest)
            for span, digest in zip(step.outputs, digests, strict=True)
        ],
        sqnr=None if error is None else _sqnr(*error),
        relative_error=None if error is None else _relative_error(*error),
        num_saturated=num_saturated,
        num_nonfinite=num_nonfinite,
    )


def _relative_error(err2: float, ref2: float) -> float:
    # the sums are exact (fsum), so the order and the cutting of rows leave no trace; six digits
    # hide the last bits of the row sums, which devices add up in their own order
    return float(f"{math.sqrt(err2 / ref2):.6g}") if ref2 else 0.0


def _sqnr(err2: float, ref2: float) -> float | None:
    error = _relative_error(err2, ref2)
    return round(-20.0 * math.log10(error), 2) if error else None
