"""Several processes for one conversion, on a GPU each or some cores: no interpreter is waited for.

What a process gets is an `Assignment`, a value: a plan of some of the shards, complete in itself,
and where things lie. What it sends back are journal records, progress, and at the end what a run of
the pipeline gives. The journal, the partial directory and the rename stay here. A process does not
outlive this one, and until it is gone it holds the lock of the partial directory too.
"""

import os
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from qconvert import pipeline
from qconvert.backends import Device
from qconvert.errors import ConvertError
from qconvert.files import output_files
from qconvert.journal import Journal, Record, StepDone
from qconvert.pipeline import Done, Progress
from qconvert.smoothing import Vectors
from qconvert.stages import STAGES
from qconvert.units import unit_nbytes
from qschema.formats import find
from qschema.plan import Plan, Unit
from qschema.safetensors import Stored
from qschema.timings import StageTime

# what a process that was told to end gets, before it is killed
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Assignment:
    """What one process does. `plan` is JSON."""

    plan: str
    source: Path
    output: Path
    before: list[tuple[Path, dict[str, Record]]]
    vectors: dict[str, Stored]
    device: str
    codecs: list[str]
    workers: int
    budget: int


@dataclass(frozen=True)
class Failure:
    """What ended a process, in words or as an error of the system."""

    message: str
    errno: int | None = None
    file: str | None = None
    is_ours: bool = True


def shares(plan: Plan, number: int) -> list[list[int]]:
    """Return places of units, in at most `number` shares of about equal bytes.

    A shard is in one share with all that is written to it, and what is quantized together too.
    """
    group: dict[str, str] = {}

    def root_of(file: str) -> str:
        while group.setdefault(file, file) != file:
            file = group[file]
        return file

    for unit in plan.units:
        first, *others = _files(unit)
        for file in others:
            group[root_of(file)] = root_of(first)
    places: dict[str, list[int]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    for place, unit in enumerate(plan.units):
        root = root_of(_files(unit)[0])
        places[root].append(place)
        sizes[root] += unit_nbytes(unit)
    found: list[list[int]] = [[] for _ in range(number)]
    filled = [0] * number
    for root in sorted(places, key=lambda root: (-sizes[root], root)):
        emptiest = filled.index(min(filled))
        found[emptiest] += places[root]
        filled[emptiest] += sizes[root]
    return [sorted(share) for share in found if share]


def split(plan: Plan, *, device: Device, workers: int) -> list[tuple[list[int], int]]:
    """Return the share of each process and its number of threads, which are `workers` in all.

    As many processes as `device` may have, every one of which has `device.process_nbytes` to do.
    """
    nbytes = [unit_nbytes(unit) for unit in plan.units]
    number = max(1, min(len(device.processes), workers))
    while True:
        found = shares(plan, number)
        sizes = [sum(nbytes[place] for place in share) for share in found]
        if len(found) < 2 or min(sizes) >= device.process_nbytes:
            break
        number = len(found) - 1
    threads = [1] * len(found)
    for _ in range(workers - len(found)) if found else ():
        busiest = max(range(len(found)), key=lambda index: sizes[index] / threads[index])
        threads[busiest] += 1
    return list(zip(found, threads, strict=True))


def run(
    plan: Plan,
    *,
    source: Path,
    output: Path,
    journal: Journal,
    lock: int,
    before: Iterable[tuple[Path, Mapping[str, Record]]] = (),
    vectors: Vectors,
    device: Device,
    workers: int,
    budget: int,
    watch: Callable[[Progress], None],
) -> Done:
    """Do what `pipeline.run` does, in as many of `device.processes` as the plan has work for.

    In this one, if that is one. `lock` is the descriptor of the partial directory's lock. The first
    error ends all.
    """
    parts = split(plan, device=device, workers=workers)
    number = len(parts)
    if number < 2:
        return pipeline.run(
            plan,
            source=source,
            output=output,
            journal=journal,
            before=before,
            vectors=vectors,
            device=device,
            workers=workers,
            budget=budget,
            watch=watch,
        )
    codecs = sorted({find(algo).codec for algo in plan.algos})
    known = [(folder, dict(records)) for folder, records in before]
    progress = Progress([0] * number, sum(unit_nbytes(unit) for unit in plan.units))
    children: dict[Connection, _Child] = {}
    assignments: list[Assignment] = []
    try:
        for index, (places, threads) in enumerate(parts):
            part = _part(plan, places, with_rest=index == 0)
            files = {shard.file for shard in part.shards}
            assignment = Assignment(
                plan=part.model_dump_json(),
                source=source,
                output=output,
                before=[(folder, _of_files(records, files)) for folder, records in known],
                vectors=dict(vectors.stored_tensors),
                device=device.processes[index],
                codecs=codecs,
                workers=threads,
                budget=budget * threads // workers,
            )
            child = _Child.start(places, lock)
            children[child.connection] = child
            assignments.append(assignment)
        # all of them are importing by now
        for child, assignment in zip(children.values(), assignments, strict=True):
            child.connection.send(assignment)
        waiting = set(children)
        while waiting:
            for ready in wait(list(waiting), timeout=0.1):
                assert isinstance(ready, Connection)
                child = children[ready]
                message = child.receive()
                if isinstance(message, Record):
                    journal.append(message)
                elif isinstance(message, int):
                    progress.done[list(children).index(ready)] = message
                else:
                    child.done, child.peak_rss_nbytes = message
                    waiting.discard(ready)
            watch(progress)
    finally:
        for child in children.values():
            child.end()
    return _joined(plan, list(children.values()))


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    connection: Connection
    places: list[int]
    done: Done | None = None
    peak_rss_nbytes: int = 0

    @classmethod
    def start(cls, places: list[int], lock: int) -> "_Child":
        """Return a process that waits for its assignment."""
        here, there = socket.socketpair()
        descriptor = there.fileno()
        argv = [sys.executable, "-m", "qconvert.process_worker", str(descriptor), str(os.getpid())]
        process = subprocess.Popen(
            argv,
            pass_fds=(descriptor, lock),
            stdin=subprocess.DEVNULL,
            # that of a checkout that is not installed, too
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        there.close()
        return cls(process, Connection(here.detach()), places)

    def receive(self) -> Record | int | tuple[Done, int]:
        """Return the next message. Raises what the process raised, or ConvertError if it died."""
        try:
            message: Any = self.connection.recv()
        except (EOFError, ConnectionError):
            raise ConvertError(
                f"a worker process ended with {_ending(self.process.wait())}; run the same "
                "command again to go on"
            ) from None
        if isinstance(message, Failure):
            if message.errno is not None:
                raise OSError(message.errno, os.strerror(message.errno), message.file)
            if message.is_ours:
                raise ConvertError(message.message)
            raise RuntimeError(message.message)
        found: Record | int | tuple[Done, int] = message
        return found

    def end(self) -> None:
        """Return when the process is gone; one that is not done is told to go."""
        self.connection.close()
        if self.done is None:
            self.process.terminate()
        try:
            self.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _files(unit: Unit) -> list[str]:
    sources = [step.source.file for step in unit.steps]
    return [*dict.fromkeys([*sources, *output_files(unit.steps)])]


def _part(plan: Plan, places: list[int], *, with_rest: bool) -> Plan:
    """Return the plan of some units, and if `with_rest` of the shards that no unit writes to."""
    units = [plan.units[place] for place in places]
    files = {file for unit in units for file in output_files(unit.steps)}
    if with_rest:
        everywhere = {file for unit in plan.units for file in output_files(unit.steps)}
        files |= {shard.file for shard in plan.shards} - everywhere
    return plan.model_copy(
        update={
            "units": units,
            "shards": [shard for shard in plan.shards if shard.file in files],
            "constants": [found for found in plan.constants if found.output.file in files],
        }
    )


def _of_files(records: Mapping[str, Record], files: set[str]) -> dict[str, Record]:
    """Return the records whose outputs lie in files of these names, or nowhere."""
    return {
        key: record
        for key, record in records.items()
        if all(file in files for step in record.places for file, _ in step)
    }


def _joined(plan: Plan, children: list[_Child]) -> Done:
    units: list[tuple[StepDone, ...]] = [()] * len(plan.units)
    seconds: dict[str, float] = defaultdict(float)
    nbytes: dict[str, int] = defaultdict(int)
    reused = peak_rss = 0
    for child in children:
        assert child.done is not None
        for place, steps in zip(child.places, child.done.units, strict=True):
            units[place] = steps
        for stage in child.done.stages:
            seconds[stage.stage] += stage.seconds
            nbytes[stage.stage] += stage.nbytes
        reused += child.done.reused_nbytes
        peak_rss += child.peak_rss_nbytes
    stages = [
        StageTime(stage=stage, seconds=round(seconds[stage], 6), nbytes=nbytes[stage])
        for stage in STAGES
    ]
    return Done(units, stages, reused, peak_rss)
