"""A conversion from end to end: weights, side files, documents, and the rename at the end."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
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
    vector_files,
    write_file,
)
from qconvert.finished import check_finished
from qconvert.gates import check_gates
from qconvert.journal import header_of
from qconvert.memory import peak_rss_nbytes
from qconvert.output import (
    Partial,
    check_paths,
    check_space,
    partial_directory,
)
from qconvert.pipeline import Progress
from qconvert.processes import run
from qconvert.reports import report_bytes, report_head, reports_of
from qconvert.side_files import REPORT
from qconvert.smoothing import Vectors
from qconvert.statistics import Statistics
from qschema.checkpoint import Checkpoint
from qschema.plan import Plan
from qschema.report import Report
from qschema.timings import StageTime, Timings

# room for directories and the file system's own books
SLACK_NBYTES = 16 << 20
# of report, journal and index, beside the names: per step, and per tensor that is written
_STEP_NBYTES, _OUTPUT_NBYTES = 768, 512
_NAMES_NBYTES = 4


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
    digest = plan.sha256()

    def outcome(
        stages: list[StageTime], notes: list[str], *, reused: int = 0, others: int = 0
    ) -> Outcome:
        timings = Timings(
            tool=plan.tool,
            plan_sha256=digest,
            device=device.name,
            workers=workers,
            memory_budget=budget,
            wall_s=round(perf_counter() - begin, 6),
            stages=stages,
            source_nbytes=sum(step.source.nbytes for step in plan.steps),
            output_nbytes=plan.output_nbytes(),
            reused_nbytes=reused,
            peak_rss_nbytes=peak_rss_nbytes() + others,
        )
        return Outcome(report_head(plan, digest), timings, notes, done_before=not stages)

    if output.is_dir() and any(output.iterdir()):
        check_finished(checkpoint, plan, digest, output)
        return outcome([], [f"{output}: is complete already; nothing was done"])
    partial = None
    try:
        source, vectors = identify(checkpoint), vector_files(statistics)
        with partial_directory(output, header_of(plan, digest, source), fresh=fresh) as partial:
            check_space(output, needed_nbytes(plan) - partial.allocated_nbytes)
            done = run(
                plan,
                source=checkpoint.path,
                output=partial.path,
                journal=partial.journal,
                lock=partial.lock,
                before=partial.before,
                vectors=Vectors(statistics),
                device=device,
                workers=workers,
                budget=budget,
                watch=watch,
            )
            ended = perf_counter()
            check_unchanged(checkpoint.path, source)
            if vector_files(statistics) != vectors:
                raise ConvertError(
                    f"{', '.join(map(str, vectors))}: changed while it was used; start again with "
                    "--fresh when nobody writes to it"
                )
            if plan.recipe.fail_if:
                check_gates(plan.recipe.fail_if, list(reports_of(plan, done.units)))
            tensors = reports_of(plan, done.units)
            report = report_bytes(report_head(plan, digest), tensors)
            _write_side_files(checkpoint, plan, report, partial.path)
    except ConvertError as error:
        error.kept = _kept(partial)
        raise
    except OSError as error:
        raise _explained(error, plan, output, _kept(partial)) from None
    finish = StageTime(stage="finish", seconds=round(perf_counter() - ended, 6), nbytes=0)
    return outcome(
        [*done.stages, finish],
        _notes(partial, done.reused_nbytes),
        reused=done.reused_nbytes,
        others=done.others_rss_nbytes,
    )


def needed_nbytes(plan: Plan) -> int:
    """Return the disk that a run takes: shards, copied files, report, journal, index, and slack."""
    copied = sum(side.nbytes or 0 for side in plan.side_files if side.action == "copy")
    books = 0
    for step in plan.steps:
        names = [step.source.name, step.reason, *(output.name for output in step.outputs)]
        books += _STEP_NBYTES + _OUTPUT_NBYTES * len(step.outputs)
        books += _NAMES_NBYTES * sum(map(len, names))
    return plan.output_nbytes() + copied + books + SLACK_NBYTES


def _notes(partial: Partial, reused_nbytes: int) -> list[str]:
    if not reused_nbytes:
        return partial.notes
    taken = f"went on from an interrupted run: {human(reused_nbytes)} of the source were done"
    return [*partial.notes, taken]


def _kept(partial: Partial | None) -> Path | None:
    return partial.path if partial is not None and partial.path.exists() else None


def _explained(error: OSError, plan: Plan, output: Path, kept: Path | None) -> ConvertError:
    where = error.filename or output
    if disk_full(error):
        found = ConvertError(
            f"{where}: the disk is full; the result takes {human(needed_nbytes(plan))} in all"
        )
    else:
        found = ConvertError(f"{where}: {os.strerror(error.errno) if error.errno else error}")
    found.kept = kept
    return found


def _write_side_files(
    checkpoint: Checkpoint, plan: Plan, report: Iterable[bytes], partial: Path
) -> None:
    made = documents.files(checkpoint, plan)
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
            write_file(path, report if side.file == REPORT else [made[side.file]()])
