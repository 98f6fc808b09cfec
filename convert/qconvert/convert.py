"""A conversion from end to end: weights, side files, documents, and the rename at the end."""

import os
from collections.abc import Callable
from math import prod
from pathlib import Path

from qconvert import documents
from qconvert.backends import Device
from qconvert.errors import ConvertError
from qconvert.files import disk_full
from qconvert.gates import check_gates
from qconvert.output import check_paths, check_space, copy_file, partial_directory, write_file
from qconvert.pipeline import Progress, run
from qconvert.side_files import CONFIG, QUANT_CONFIG, REPORT
from qconvert.smoothing import Vectors
from qconvert.statistics import Statistics
from qschema.checkpoint import Checkpoint
from qschema.plan import Plan
from qschema.report import Report, TensorReport

# room for JSON, directories and the file system's own books
_SLACK_NBYTES = 16 << 20


def convert(
    checkpoint: Checkpoint,
    plan: Plan,
    output: Path,
    *,
    statistics: Statistics,
    device: Device,
    workers: int,
    budget: int,
    watch: Callable[[Progress], None],
) -> Report:
    """Return the report of the conversion that `plan` describes, after `output` is in place.

    Raises ConvertError for bad paths, bad weights, a gate that fails and a full disk; `output` then
    does not exist.
    """
    check_paths(checkpoint.path, output)
    copied = sum(side.nbytes or 0 for side in plan.side_files if side.action == "copy")
    try:
        with partial_directory(output) as partial:
            # after what a killed run left has been cleared away
            check_space(output, plan.output_nbytes() + copied + _SLACK_NBYTES)
            tensors = run(
                plan,
                source=checkpoint.path,
                output=partial,
                vectors=Vectors(statistics),
                device=device,
                workers=workers,
                budget=budget,
                watch=watch,
            )
            check_gates(plan.recipe.fail_if, tensors)
            report = make_report(plan, tensors)
            _write_side_files(checkpoint, plan, report, partial)
    except OSError as error:
        if disk_full(error):
            raise ConvertError(
                f"{output}: the disk is full; nothing was left behind, free "
                f"{plan.output_nbytes()} bytes and start again"
            ) from None
        raise ConvertError(f"{error.filename or output}: {os.strerror(error.errno or 0)}") from None
    return report


def make_report(plan: Plan, tensors: list[TensorReport]) -> Report:
    """Return the provenance document of a finished conversion."""
    return Report(
        tool=plan.tool,
        recipe=plan.recipe,
        source=plan.source,
        plan_sha256=plan.sha256(),
        bits_per_quantized_weight=effective_bits(plan, quantized_only=True),
        bits_per_weight=effective_bits(plan, quantized_only=False),
        tensors=tensors,
        side_files=plan.side_files,
        notes=plan.notes,
    )


def effective_bits(plan: Plan, *, quantized_only: bool) -> float:
    """Return stored bits per source element, scales included, to four decimals."""
    steps = [step for step in plan.steps if step.algo or not quantized_only]
    elements = sum(prod(step.source.shape) for step in steps)
    stored = sum(span.nbytes for step in steps for span in step.outputs)
    return round(8 * stored / elements, 4) if elements else 0.0


def _write_side_files(checkpoint: Checkpoint, plan: Plan, report: Report, partial: Path) -> None:
    made: dict[str, Callable[[], bytes]] = {
        CONFIG: lambda: documents.dump(documents.config(checkpoint.config, plan)),
        QUANT_CONFIG: lambda: documents.dump(documents.hf_quant_config(plan)),
        REPORT: lambda: (report.model_dump_json(indent=1) + "\n").encode(),
    }
    if checkpoint.index is not None:
        made[checkpoint.index] = lambda: documents.dump(
            documents.index(checkpoint.index_metadata, plan)
        )
    for side in plan.side_files:
        if side.action == "copy":
            copy_file(checkpoint.path / side.file, partial / side.file)
        elif side.action == "write":
            write_file(partial / side.file, made[side.file]())
