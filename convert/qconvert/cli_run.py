"""What the commands have in common: opening, planning, converting, and what is said of it."""

import gc
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import click

from qconvert.backends import Device, resolve
from qconvert.cli_options import Machine, Running, Words
from qconvert.cli_timings import timing_lines, with_planning, write_timings
from qconvert.convert import convert
from qconvert.errors import ConvertError, human
from qconvert.high_water import disk_mark, high_water, needs
from qconvert.pipeline import fitting_workers
from qconvert.planner import make_plan
from qconvert.progress import progress_bar
from qconvert.side_files import REPORT
from qconvert.statistics import Statistics, open_statistics
from qschema.checkpoint import Checkpoint, open_checkpoint
from qschema.formats import find
from qschema.plan import Plan
from qschema.recipe import Recipe

STDOUT = "standard output"


@dataclass(frozen=True)
class Opened:
    """A source and its statistics, and when they were opened."""

    checkpoint: Checkpoint
    statistics: Statistics
    since: float = field(default_factory=perf_counter)

    def with_plan(self, plan: Plan) -> "Job":
        """Return the job of converting them by `plan`."""
        return Job(self.checkpoint, self.statistics, plan, perf_counter() - self.since)


@dataclass(frozen=True)
class Job:
    """A conversion that is planned; that took `seconds`."""

    checkpoint: Checkpoint
    statistics: Statistics
    plan: Plan
    seconds: float


def opened(source: Path, amax: Path | None) -> Opened:
    """Return the checkpoint in `source` and the statistics in `amax`, none if None."""
    since = perf_counter()
    checkpoint = open_checkpoint(source)
    statistics = open_statistics(amax) if amax is not None else Statistics()
    return Opened(checkpoint, statistics, since)


def planned(source: Path, asked: Recipe, amax: Path | None) -> Job:
    """Return the job of converting `source` by the recipe `asked`."""
    found = opened(source, amax)
    plan = make_plan(found.checkpoint, asked, found.statistics)
    # it stays to the end: no collection needs to walk through it, which takes long if it is large
    gc.freeze()
    return found.with_plan(plan)


def with_marks(plan: Plan, machine: Machine) -> Plan:
    """Return the plan with its high-water marks; a note says why if that of disk is all."""
    budget = machine.memory_budget
    name, workers = machine.device, machine.workers
    try:
        device = _device(plan, machine)
        name, workers = device.name, _workers(plan, device, machine)
        marks = high_water(plan, device=device, workers=workers, budget=budget)
    except ConvertError as error:
        _note(f"no estimate of memory: {error}")
        marks = disk_mark(plan, device=name, workers=workers, budget=budget)
    return plan.model_copy(update={"high_water": marks})


def convert_and_say(
    job: Job, out_dir: Path, machine: Machine, running: Running, words: Words
) -> None:
    """Convert; print the report if asked, the notes, and what `words` asks for."""
    plan = job.plan
    device = _device(plan, machine)
    if device.remark:
        _note(device.remark)
    source = job.checkpoint.path
    with progress_bar(verbose=words.verbose, quiet=words.quiet) as watch:
        outcome = convert(
            job.checkpoint,
            plan,
            out_dir,
            statistics=job.statistics,
            device=device,
            workers=_workers(plan, device, machine),
            budget=machine.memory_budget,
            fresh=running.fresh,
            watch=watch,
        )
    for note in outcome.notes:
        _note(note)
    timings = with_planning(outcome.timings, job.seconds)
    # nothing was done: the timings of the run that did it stay
    if running.timings is not None and not outcome.done_before:
        with _after(out_dir, str(running.timings)):
            write_timings(running.timings, timings)
    if running.style == "json":
        with _after(out_dir, STDOUT), to_stdout():
            _print_report(out_dir)
    if not _speaks(words):
        return
    if words.verbose and not outcome.done_before:
        for line in timing_lines(timings):
            click.echo(line, err=True)
    done = "was there already" if outcome.done_before else f"on {device.name}"
    _say(
        f"{out_dir}: {human(plan.output_nbytes())}, {outcome.report.bits_per_weight:.2f} bits per "
        f"weight, {done}; check it with: qvalidate {quoted(out_dir)} --reference {quoted(source)}"
    )


def say_notes(plan: Plan) -> None:
    """Print the plan's notes: always, they are about the result."""
    for note in plan.notes:
        _note(note)


def say_marks(plan: Plan, file: Path | None, words: Words) -> None:
    """Print what a run of the plan takes and, if it was written to a file, what to do next."""
    if not _speaks(words):
        return
    if plan.high_water is not None:
        _say(f"a run needs {needs(plan.high_water)}")
    if file is not None:
        _say(
            f"{file}: {len(plan.steps)} steps; convert with: qconvert apply {quoted(file)} OUT_DIR"
        )


def printable(text: str) -> str:
    """Return `text` with control characters, which a tensor's name may hold, as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def quoted(path: Path) -> str:
    """Return the path as a shell takes it."""
    return shlex.quote(str(path))


@contextmanager
def to_stdout() -> Iterator[None]:
    """Let what is printed reach stdout within the block, and errors say that it was stdout."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # or the interpreter, at its end, would try to write the rest once more
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, STDOUT) from None


@contextmanager
def _after(out_dir: Path, name: str) -> Iterator[None]:
    """Let errors of writing what comes after the checkpoint say that it is there."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConvertError(
            f"{name}: {error.strerror or error}; the checkpoint {out_dir} is complete"
        ) from None


def _device(plan: Plan, machine: Machine) -> Device:
    return resolve(machine.device, codecs=sorted({find(algo).codec for algo in plan.algos}))


def _workers(plan: Plan, device: Device, machine: Machine) -> int:
    return machine.workers or fitting_workers(
        plan,
        wanted=device.default_workers,
        budget=machine.memory_budget,
        device_factor=device.device_factor,
    )


def _print_report(out_dir: Path) -> None:
    # as it was written: it may be long, and is not held in memory
    with open(out_dir / REPORT, encoding="utf-8") as report:
        shutil.copyfileobj(report, sys.stdout)


def _speaks(words: Words) -> bool:
    """Return whether somebody looks, or asked for words in a log."""
    return words.verbose or (sys.stderr.isatty() and not words.quiet)


def _note(text: str) -> None:
    _say(f"note: {text}")


def _say(text: str) -> None:
    click.echo(printable(text), err=True)
