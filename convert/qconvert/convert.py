"""A conversion from end to end: weights, side files, documents, and the rename at the end."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from time import perf_counter

from qconvert import documents
from qconvert.backends import Device
from qconvert.errors import ConvertError, human
from qconvert.files import (
    check_unchanged,
    copy_file,
    disk_full,
    identify,
    named,
    write_file,
)
from qconvert.gates import check_gates
from qconvert.journal import StepDone, header_of
from qconvert.output import (
    Partial,
    check_paths,
    check_space,
    forget,
    partial_directory,
    partial_path,
)
from qconvert.pipeline import Progress, run
from qconvert.reports import report_bytes, reports_of
from qconvert.side_files import CONFIG, QUANT_CONFIG, REPORT
from qconvert.smoothing import Vectors
from qconvert.statistics import Statistics
from qschema.checkpoint import Checkpoint
from qschema.plan import Plan
from qschema.report import Report
from qschema.timings import StageTime, Timings

# room for JSON, directories and the file system's own books
SLACK_NBYTES = 16 << 20
# the report's field that grows with the model; no string in JSON can hold this text
_TENSORS = '"tensors": ['


@dataclass(frozen=True)
class Outcome:
    """What came of a conversion. The report's tensors are in the file only."""

    report: Report
    timings: Timings
    notes: list[str] = field(default_factory=list)
    # the output held this plan's result already; nothing was done
    done_before: bool = False


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
    fresh: bool = False,
) -> Outcome:
    """Return what came of the conversion that `plan` describes, after `output` is in place.

    Goes on from what an interrupted run left in `out_dir.partial`, or with `fresh` starts over.
    Raises ConvertError for bad paths, bad weights, a source that changes, a gate that fails and a
    full disk; `output` then does not exist, and what was done stays in `out_dir.partial`.
    """
    begin = perf_counter()
    check_paths(checkpoint.path, output, known=REPORT)

    def outcome(stages: list[StageTime], reused: int, notes: list[str], done: bool) -> Outcome:
        timings = Timings(
            tool=plan.tool,
            plan_sha256=plan.sha256(),
            device=device.name,
            workers=workers,
            memory_budget=budget,
            wall_s=round(perf_counter() - begin, 6),
            stages=stages,
            source_nbytes=sum(step.source.nbytes for step in plan.steps),
            output_nbytes=plan.output_nbytes(),
            reused_nbytes=reused,
            peak_rss_nbytes=_peak_rss(),
        )
        return Outcome(report_head(plan), timings, notes, done)

    if output.is_dir() and any(output.iterdir()):
        _check_finished(plan, output)
        return outcome([], 0, [f"{output}: is complete already; nothing was done"], True)
    try:
        source = identify(checkpoint)
        with partial_directory(output, header_of(plan, source), fresh=fresh) as partial:
            check_space(output, needed_nbytes(plan) - partial.allocated_nbytes)
            done = run(
                plan,
                source=checkpoint.path,
                output=partial.path,
                journal=partial.journal,
                before=partial.before,
                vectors=Vectors(statistics),
                device=device,
                workers=workers,
                budget=budget,
                watch=watch,
            )
            check_unchanged(checkpoint.path, source)
            if plan.recipe.fail_if:
                check_gates(plan.recipe.fail_if, list(reports_of(plan, done.units)))
            _write_side_files(checkpoint, plan, done.units, partial.path)
    except ConvertError as error:
        error.kept = _kept(output)
        raise
    except OSError as error:
        raise _explained(error, plan, output) from None
    return outcome(done.stages, done.reused_nbytes, _notes(partial, done.reused_nbytes), False)


def needed_nbytes(plan: Plan) -> int:
    """Return the disk that the output takes: shards, copied files, and room for the JSON."""
    copied = sum(side.nbytes or 0 for side in plan.side_files if side.action == "copy")
    return plan.output_nbytes() + copied + SLACK_NBYTES


def report_head(plan: Plan) -> Report:
    """Return the provenance document of a conversion, without its tensors."""
    return Report(
        tool=plan.tool,
        recipe=plan.recipe,
        source=plan.source,
        plan_sha256=plan.sha256(),
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


def _notes(partial: Partial, reused_nbytes: int) -> list[str]:
    if not reused_nbytes:
        return partial.notes
    taken = f"went on from an interrupted run: {human(reused_nbytes)} of the source were done"
    return [*partial.notes, taken]


def _kept(output: Path) -> Path | None:
    path = partial_path(output)
    return path if path.exists() else None


def _explained(error: OSError, plan: Plan, output: Path) -> ConvertError:
    where = error.filename or output
    if disk_full(error):
        found = ConvertError(
            f"{where}: the disk is full; the result takes {human(needed_nbytes(plan))} in all"
        )
    else:
        found = ConvertError(f"{where}: {os.strerror(error.errno) if error.errno else error}")
    found.kept = _kept(output)
    return found


def _check_finished(plan: Plan, output: Path) -> None:
    """Raise ConvertError unless `output` is what `plan` makes, file by file and by size."""
    taken = ConvertError(f"{output}: exists and is not empty; nothing is overwritten")
    head = ""
    with open(output / REPORT, encoding="utf-8", errors="replace") as file:
        while _TENSORS not in head and (more := file.read(1 << 20)):
            head += more
    try:
        found = json.loads(head.partition(_TENSORS)[0] + _TENSORS + "]}")
    except ValueError:
        raise taken from None
    if not isinstance(found, dict) or found.get("plan_sha256") != plan.sha256():
        raise taken
    expected: dict[str, int | None] = {shard.file: shard.nbytes for shard in plan.shards}
    expected |= {
        side.file: side.nbytes if side.action == "copy" else None
        for side in plan.side_files
        if side.action != "leave"
    }
    for name, nbytes in expected.items():
        path = output / name
        if not path.is_file() or (nbytes is not None and path.stat().st_size != nbytes):
            raise ConvertError(
                f"{path}: {output} is the result of this conversion, but this file is not as it "
                "was; remove the directory to convert again"
            )
    forget(output)


def _peak_rss() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    except (OSError, ValueError, IndexError):
        return getrusage(RUSAGE_SELF).ru_maxrss


def _write_side_files(
    checkpoint: Checkpoint, plan: Plan, done: list[tuple[StepDone, ...]], partial: Path
) -> None:
    made: dict[str, Callable[[], Iterable[bytes]]] = {
        CONFIG: lambda: [documents.dump(documents.config(checkpoint.config, plan))],
        QUANT_CONFIG: lambda: [documents.dump(documents.hf_quant_config(plan))],
        REPORT: lambda: report_bytes(report_head(plan), reports_of(plan, done)),
    }
    if checkpoint.index is not None:
        made[checkpoint.index] = lambda: [
            documents.dump(documents.index(checkpoint.index_metadata, plan))
        ]
    for side in plan.side_files:
        path = partial / side.file
        if side.action == "copy":
            copy_file(checkpoint.path / side.file, path)
            with named(path):
                nbytes = path.stat().st_size
            if nbytes != side.nbytes:
                raise ConvertError(
                    f"{checkpoint.path / side.file}: had {side.nbytes} bytes when the conversion "
                    f"was planned and has {nbytes} now; start again when nobody writes to it"
                )
        elif side.action == "write":
            write_file(path, made[side.file]())
