"""The streaming pipeline: workers that read a slice, encode it, hash it and write it, until done.

Each worker owns a backend and one buffer, an equal share of the memory budget; what is in flight
never exceeds it, whatever the size of a tensor. A tensor is handled by one worker from its first
row to its last, so its digest is that of its bytes in order, and results do not depend on how many
workers there are or how a tensor is cut.
"""

import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qconvert.backends import Backend, Device, Task
from qconvert.errors import ConvertError, human
from qconvert.files import Files
from qconvert.slices import Cut, aligned, cuts, rows_per_slice
from qschema.dtypes import HIGH_PRECISION
from qschema.formats import find
from qschema.plan import Plan, Span, Step
from qschema.report import TensorReport, WrittenTensor

# bytes of a tensor that is only copied, per read
_COPY_NBYTES = 4 << 20
_MIN_SHARE_NBYTES = 64 << 10


@dataclass
class Progress:
    """Source bytes that are done, one slot per worker so that none waits for another."""

    done: list[int]
    total: int


@dataclass
class _Shared:
    work: deque[tuple[int, Step]]
    files: Files
    allow_nonfinite: bool
    progress: Progress
    stop: threading.Event = field(default_factory=threading.Event)
    results: dict[int, TensorReport] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)


def run(
    plan: Plan,
    *,
    source: Path,
    output: Path,
    device: Device,
    workers: int,
    budget: int,
    watch: Callable[[Progress], None],
) -> list[TensorReport]:
    """Return what became of each tensor, in the plan's order, after writing every output shard.

    `watch` is called about ten times a second from the calling thread. The first error of a worker
    stops the others and is raised; KeyboardInterrupt stops them too.
    """
    share = budget // workers
    if share < _MIN_SHARE_NBYTES:
        raise ConvertError(
            f"a memory budget of {human(budget)} leaves {human(share)} for each of {workers} "
            f"workers, {human(_MIN_SHARE_NBYTES)} is the least; raise --memory-budget or lower "
            "--workers"
        )
    files = Files(plan, source=source, output=output)
    # largest first: no worker is left with a big tensor at the end
    steps = sorted(enumerate(plan.steps), key=lambda item: (-item[1].source.nbytes, item[0]))
    shared = _Shared(
        work=deque(steps),
        files=files,
        allow_nonfinite=plan.recipe.allow_nonfinite,
        progress=Progress([0] * workers, sum(step.source.nbytes for step in plan.steps)),
    )
    backend = device.make()
    needed = max(_needed(step, backend.slice_nbytes, share) for step in plan.steps)
    threads = [
        threading.Thread(
            target=_work, args=(shared, device, min(share, needed), slot), name=f"worker-{slot}"
        )
        for slot in range(workers)
    ]
    try:
        files.create_empty()
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
                watch(shared.progress)
    except BaseException:
        shared.stop.set()
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        files.close()
    if shared.errors:
        raise shared.errors[0]
    return [shared.results[place] for place in range(len(steps))]


def _work(shared: _Shared, device: Device, nbytes: int, slot: int) -> None:
    try:
        worker = _Worker(shared, device.make(), nbytes, slot)
        while not shared.stop.is_set():
            try:
                place, step = shared.work.popleft()
            except IndexError:
                return
            shared.results[place] = worker.convert(step)
            shared.files.tensor_done(step.source.file)
    except BaseException as error:
        shared.errors.append(error)
        shared.stop.set()


def fitting_workers(plan: Plan, *, wanted: int, budget: int) -> int:
    """Return `wanted` workers, or as many as get the memory that one block of the largest needs."""
    least = _MIN_SHARE_NBYTES
    for step in plan.steps:
        if step.algo is not None:
            declared = find(step.algo)
            rows, columns = step.source.shape
            smallest = Cut(declared, step.source.dtype, 0, min(declared.block_rows, rows), columns)
            least = max(least, smallest.footprint())
    return max(1, min(wanted, budget // least))


def _needed(step: Step, preferred: int, limit: int) -> int:
    """Return the bytes of buffer that one slice of `step` takes."""
    if step.algo is None:
        return min(_COPY_NBYTES, limit, step.source.nbytes)
    return _cut(step, preferred, limit).footprint()


def _cut(step: Step, preferred: int, limit: int) -> Cut:
    """Return the first, largest slice of `step`."""
    assert step.algo is not None
    declared = find(step.algo)
    rows, columns = step.source.shape
    each = rows_per_slice(
        declared,
        dtype=step.source.dtype,
        rows=rows,
        columns=columns,
        preferred=preferred,
        limit=limit,
        name=step.source.name,
    )
    return Cut(declared, step.source.dtype, 0, each, columns)


class _Worker:
    def __init__(self, shared: _Shared, backend: Backend, nbytes: int, slot: int) -> None:
        self._shared = shared
        self._backend = backend
        self._slot = slot
        self._buffer = backend.allocate(max(8, nbytes))

    def convert(self, step: Step) -> TensorReport:
        """Write the outputs of `step` and return its report."""
        return self._keep(step) if step.algo is None else self._quantize(step)

    def _keep(self, step: Step) -> TensorReport:
        (output,) = step.outputs
        source, digest = step.source, hashlib.sha256()
        num_nonfinite = 0 if source.dtype in HIGH_PRECISION else None
        # whole elements of any dtype
        chunk = min(_COPY_NBYTES, max(8, len(self._buffer) // 8 * 8))
        for begin in range(0, source.nbytes, chunk):
            view = self._buffer[: min(chunk, source.nbytes - begin)]
            self._shared.files.read(source.file, view, offset=source.offset + begin)
            if num_nonfinite is not None:
                num_nonfinite += self._backend.count_nonfinite(view, dtype=source.dtype)
            digest.update(view)
            self._shared.files.write(output.file, view, offset=output.offset + begin)
            self._advance(len(view))
        self._check(step, num_nonfinite or 0)
        return _report(step, [digest.hexdigest()], num_nonfinite=num_nonfinite)

    def _quantize(self, step: Step) -> TensorReport:
        first = _cut(step, self._backend.slice_nbytes, len(self._buffer))
        digests = [hashlib.sha256() for _ in step.outputs]
        err2: list[float] = []
        ref2: list[float] = []
        num_nonfinite = num_saturated = 0
        rows, columns = step.source.shape
        for cut in cuts(
            first.declared, dtype=first.dtype, rows=rows, columns=columns, each=first.rows
        ):
            task = self._task(cut)
            offset, nbytes = cut.source_span()
            self._shared.files.read(
                step.source.file, task.source, offset=step.source.offset + offset
            )
            counts = self._backend.quantize(task)
            num_nonfinite += counts.num_nonfinite
            num_saturated += counts.num_saturated
            # a tensor with NaN is read to its end, so that the message has the whole count
            if self._shared.allow_nonfinite or not num_nonfinite:
                self._write(step.outputs, cut, task, digests)
                err2.extend(task.err2.cast("d"))
                ref2.extend(task.ref2.cast("d"))
            self._advance(nbytes)
        self._check(step, num_nonfinite)
        return _report(
            step,
            [digest.hexdigest() for digest in digests],
            num_nonfinite=num_nonfinite,
            num_saturated=num_saturated,
            relative_error=_relative_error(err2, ref2),
        )

    def _task(self, cut: Cut) -> Task:
        views, position = [], 0
        for size in cut.sizes():
            views.append(self._buffer[position : position + size])
            position += aligned(size)
        source, *outputs, err2, ref2 = views
        return Task(
            declared=cut.declared,
            dtype=cut.dtype,
            rows=cut.rows,
            columns=cut.columns,
            source=source,
            outputs=tuple(outputs),
            err2=err2,
            ref2=ref2,
        )

    def _write(
        self, outputs: list[Span], cut: Cut, task: Task, digests: list["hashlib._Hash"]
    ) -> None:
        for span, (offset, _), view, digest in zip(
            outputs, cut.output_spans(), task.outputs, digests, strict=True
        ):
            digest.update(view)
            self._shared.files.write(span.file, view, offset=span.offset + offset)

    def _check(self, step: Step, num_nonfinite: int) -> None:
        # a kept buffer may hold -inf for good reason (a mask); a weight may not
        is_weight = step.algo is not None or step.source.name.endswith(("weight", "bias"))
        if num_nonfinite and is_weight and not self._shared.allow_nonfinite:
            raise ConvertError(
                f"{step.source.file}::{step.source.name}: {num_nonfinite} of "
                f"{math.prod(step.source.shape)} elements are NaN or Inf; the weights are damaged, "
                "or pass --allow-nonfinite to convert them all the same"
            )

    def _advance(self, nbytes: int) -> None:
        self._shared.progress.done[self._slot] += nbytes
        if self._shared.stop.is_set():
            raise _StoppedError


class _StoppedError(Exception):
    """Another worker failed, or the user interrupted: this one gives up in silence."""


def _report(
    step: Step,
    digests: list[str],
    *,
    num_nonfinite: int | None,
    num_saturated: int | None = None,
    relative_error: float | None = None,
) -> TensorReport:
    return TensorReport(
        source=step.source.name,
        dtype=step.source.dtype,
        shape=step.source.shape,
        action=step.action,
        algo=step.algo,
        reason=step.reason,
        outputs=[
            WrittenTensor(name=span.name, dtype=span.dtype, shape=span.shape, sha256=digest)
            for span, digest in zip(step.outputs, digests, strict=True)
        ],
        relative_error=relative_error,
        num_saturated=num_saturated,
        num_nonfinite=num_nonfinite,
    )


def _relative_error(err2: list[float], ref2: list[float]) -> float:
    # fsum is exact, so the order and the cutting of rows leave no trace; six digits hide the last
    # bits of the row sums, which devices add up in their own order
    reference = math.fsum(ref2)
    return float(f"{math.sqrt(math.fsum(err2) / reference):.6g}") if reference else 0.0
