"""The workers of a conversion on this machine: threads that take units until none is left.

Each worker owns a backend and one buffer, an equal share of the memory budget; what is in flight
never exceeds it, on the host nor on the devices. What a unit needs and gives is in `units`; here
are only threads, their order, their errors and their end.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qconvert.backends import Device
from qconvert.errors import ConvertError, human
from qconvert.files import Reader, Writer
from qconvert.journal import Record, StepDone, record_of, unit_key
from qconvert.scalars import packed
from qconvert.schedule import Job, Schedule
from qconvert.smoothing import Vectors
from qconvert.stages import Clock, total
from qconvert.units import (
    Before,
    Context,
    UnitWorker,
    buffer_nbytes,
    least_nbytes,
    unit_nbytes,
)
from qschema.plan import Constant, Plan
from qschema.timings import StageTime

_MIN_SHARE_NBYTES = 64 << 10


class Notebook(Protocol):
    """Where finished units are noted: the journal, or what sends to it. Thread safe."""

    def append(self, record: Record) -> None:
        """Note a unit whose bytes were handed to the kernel."""


@dataclass
class Progress:
    """Source bytes that are done, one slot per worker so that none waits for another."""

    done: list[int]
    total: int


@dataclass
class Done:
    """What a run of the pipeline came to: per unit of the plan its steps, and where time went."""

    units: list[tuple[StepDone, ...]]
    stages: list[StageTime]
    # source bytes of units that an interrupted run had finished
    reused_nbytes: int
    # peak RSS of other processes than this one, in all
    others_rss_nbytes: int = 0


@dataclass
class _Shared:
    schedule: Schedule
    context: Context
    journal: Notebook
    before: Mapping[str, Before]
    progress: Progress
    results: list[tuple[StepDone, ...]]
    reused: list[int]
    stop: threading.Event = field(default_factory=threading.Event)
    # one more for every worker that has ended
    finished: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    clocks: list[Clock] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)


def run(
    plan: Plan,
    *,
    source: Path,
    output: Path,
    journal: Notebook,
    before: Iterable[tuple[Path, Mapping[str, Record]]] = (),
    vectors: Vectors,
    device: Device,
    workers: int,
    budget: int,
    watch: Callable[[Progress], None],
) -> Done:
    """Write every shard of `plan` into `output`, on disk when this returns.

    `before` are folders with the records of what interrupted runs wrote into them, the best last.
    `watch` is called about ten times a second from the calling thread. The first error of a worker
    stops the others and is raised; KeyboardInterrupt stops them too. What was done until then is in
    `journal`.
    """
    share = worker_share(device, workers=workers, budget=budget)
    jobs = [Job(place, unit, unit_nbytes(unit)) for place, unit in enumerate(plan.units)]
    needed = max(
        (buffer_nbytes(step, preferred=device.slice_nbytes, limit=share) for step in plan.steps),
        default=0,
    )
    reader = Reader(source, Counter(step.source.file for step in plan.steps))
    writer = Writer(plan, output)
    shared = _Shared(
        schedule=Schedule(jobs),
        context=Context(
            reader=reader,
            writer=writer,
            vectors=vectors,
            digest=plan.recipe.digest,
            allow_nonfinite=plan.recipe.allow_nonfinite,
        ),
        journal=journal,
        before={
            key: Before(record, folder)
            for folder, records in before
            for key, record in records.items()
        },
        progress=Progress([0] * workers, sum(job.nbytes for job in jobs)),
        results=[()] * len(jobs),
        reused=[0] * workers,
    )
    threads = [
        threading.Thread(
            target=_work, args=(shared, device, min(share, needed), slot), name=f"worker-{slot}"
        )
        for slot in range(workers)
    ]
    try:
        for constant in plan.constants:
            data = memoryview(constant_bytes(constant, vectors))
            writer.write(constant.output.file, data, offset=constant.output.offset)
        for thread in threads:
            thread.start()
        num_finished = 0
        # not join: interrupted, it takes a thread that still runs for one that ended (bpo-45274)
        while num_finished < len(threads):
            num_finished += shared.finished.acquire(timeout=0.1)
            watch(shared.progress)
        if not shared.errors:
            writer.finish()
    except BaseException:
        shared.stop.set()
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        writer.close()
        reader.close()
    if shared.errors:
        raise shared.errors[0]
    for clock in shared.clocks:
        # for the others to end
        clock.lap("wait")
    return Done(
        units=shared.results,
        stages=total(shared.clocks),
        reused_nbytes=sum(shared.reused),
    )


def worker_share(device: Device, *, workers: int, budget: int) -> int:
    """Return the bytes of buffer that each worker may have: host and device stay in the budget."""
    share = int(budget / workers / max(1.0, device.device_factor))
    if share < _MIN_SHARE_NBYTES:
        raise ConvertError(
            f"a memory budget of {human(budget)} leaves {human(share)} for each of {workers} "
            f"workers, {human(_MIN_SHARE_NBYTES)} is the least; raise --memory-budget or lower "
            "--workers"
        )
    return share


def constant_bytes(constant: Constant, vectors: Vectors) -> bytes:
    """Return the bytes of a tensor that no source tensor becomes."""
    if constant.value is not None:
        return packed(constant.value)
    assert constant.vector is not None
    return vectors.stored(constant.vector)


def fitting_workers(plan: Plan, *, wanted: int, budget: int, device_factor: float = 0.0) -> int:
    """Return `wanted` workers, or as many as get the memory that one block of the largest needs."""
    least = max(_MIN_SHARE_NBYTES, max((least_nbytes(step) for step in plan.steps), default=0))
    return max(1, min(wanted, int(budget / max(1.0, device_factor)) // least))


def _work(shared: _Shared, device: Device, nbytes: int, slot: int) -> None:
    clock = Clock()
    shared.clocks.append(clock)
    try:
        progress = shared.progress

        def advance(count: int) -> None:
            progress.done[slot] += count
            if shared.stop.is_set():
                raise _StoppedError

        worker = UnitWorker(shared.context, device.make(slot), nbytes, clock=clock, advance=advance)
        clock.lap("start")
        while not shared.stop.is_set() and (job := shared.schedule.take(slot)) is not None:
            _do(shared, worker, job, slot)
    except BaseException as error:
        shared.errors.append(error)
        shared.stop.set()
    finally:
        shared.finished.release()


def _do(shared: _Shared, worker: UnitWorker, job: Job, slot: int) -> None:
    unit, before = job.unit, None
    if shared.before:
        before = shared.before.get(unit_key(unit, digest=shared.context.digest))
    if before is not None and worker.take_over(unit, before):
        done = before.record.steps
        shared.reused[slot] += sum(step.source.nbytes for step in unit.steps)
    else:
        done = worker.convert(unit)
    shared.results[job.place] = done
    shared.journal.append(record_of(unit, done, digest=shared.context.digest))
    worker.clock.lap("write")
    worker.finish(unit)


class _StoppedError(Exception):
    """Another worker failed, or the user interrupted: this one gives up in silence."""
