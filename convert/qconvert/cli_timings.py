"""Timings in words: seconds, bytes per second and share of each stage, and what held a run up."""

import os
from collections.abc import Iterator
from pathlib import Path

from qconvert.errors import ConvertError, human
from qconvert.output import partial_path
from qschema.strict import DocumentError, load_json
from qschema.timings import Stage, StageTime, Timings

# the timings of a run are far below
_MOST_NBYTES = 1 << 20
_ADVICE: dict[Stage, str] = {
    "plan": "headers and JSON, before the first weight",
    "start": "contexts of the devices and buffers, before the first weight",
    "read": "the source's disk sets the pace",
    "encode": "arithmetic sets the pace: more cores, or a GPU, would help",
    "digest": "the digests set the pace: more cores would help",
    "write": "the output's disk sets the pace",
    "sync": "the output's disk sets the pace: it was still writing at the end",
    "wait": "workers had nothing to do: fewer would do",
    "finish": "files beside the weights, the report, flushing to disk",
}


def timing_lines(timings: Timings) -> Iterator[str]:
    """Yield a table of the stages and a line that names the bottleneck."""
    yield f"{'stage':8}{'busy':>10}{'share':>9}{'GB/s':>8}"
    for stage in timings.stages:
        rate = (
            f"{stage.nbytes / stage.seconds / 1e9:.2f}" if stage.nbytes and stage.seconds else "-"
        )
        share = f"{100 * _share(stage, timings):.1f} %"
        yield f"{stage.stage:8}{stage.seconds:8.2f} s{share:>9}{rate:>8}"
    yield (
        f"{'all':8}{timings.wall_s:8.2f} s{'':9}{_rate(timings):>8}  "
        f"{timings.workers} workers on {timings.device}, {human(timings.peak_rss_nbytes)} of memory"
    )
    worst = bottleneck(timings)
    if worst is not None:
        share = f"{100 * _share(worst, timings):.0f} % of the time"
        yield f"bottleneck: {worst.stage}, {share}; {_ADVICE[worst.stage]}"


def bottleneck(timings: Timings) -> StageTime | None:
    """Return the stage that took the most of the run's time, None if nothing took any."""
    busy = [stage for stage in timings.stages if stage.seconds > 0]
    return max(busy, key=lambda stage: _share(stage, timings), default=None)


def _share(stage: StageTime, timings: Timings) -> float:
    """Return the share of the run's time; while it is planned no worker is at work."""
    workers = 1 if stage.stage in ("plan", "finish") else timings.workers
    return stage.seconds / workers / timings.wall_s if timings.wall_s else 0.0


def with_planning(timings: Timings, seconds: float) -> Timings:
    """Return the timings of a run, and of the opening and planning before it."""
    stages = list(timings.stages)
    found = next((place for place, stage in enumerate(stages) if stage.stage == "plan"), None)
    if found is None:
        stages.insert(0, StageTime(stage="plan", seconds=round(seconds, 6), nbytes=0))
    else:
        total = round(stages[found].seconds + seconds, 6)
        stages[found] = stages[found].model_copy(update={"seconds": total})
    wall_s = round(timings.wall_s + seconds, 6)
    return timings.model_copy(update={"stages": stages, "wall_s": wall_s})


def check_timings(path: Path | None, *, source: Path, output: Path) -> None:
    """Raise ConvertError if timings at `path` would be a file of a checkpoint, or replace another.

    Those of an earlier run are replaced, and an empty file; pipes and devices are written to.
    """
    if path is None:
        return
    real = Path(os.path.realpath(path))
    for folder in (source, output, partial_path(output)):
        if folder.resolve() in (real, *real.parents):
            raise ConvertError(f"--timings {path}: lies in {folder}; write it elsewhere")
    if path.is_file() and not _is_timings(path):
        raise ConvertError(
            f"--timings {path}: exists and holds no timings; nothing else is overwritten"
        )


def _is_timings(path: Path) -> bool:
    nbytes = path.stat().st_size
    if nbytes == 0 or nbytes > _MOST_NBYTES:
        return nbytes == 0
    try:
        document = load_json(path)
    except DocumentError:
        return False
    return isinstance(document, dict) and document.get("document") == "qconvert-timings"


def write_timings(path: Path, timings: Timings) -> None:
    """Write the timings to `path`, in place of those of an earlier run."""
    path.write_text(timings.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _rate(timings: Timings) -> str:
    done = timings.source_nbytes - timings.reused_nbytes
    return f"{done / timings.wall_s / 1e9:.2f}" if timings.wall_s and done > 0 else "-"
