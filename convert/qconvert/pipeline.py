"""The streaming pipeline: workers that read a slice, encode it, hash it and write it, until done.

Each worker owns a backend and one buffer, an equal share of the memory budget; what is in flight
never exceeds it, whatever the size of a tensor. A unit is handled by one worker from its first
row to its last, so a tensor's digest is that of its bytes in order, and results do not depend on
how many workers there are or how a tensor is cut. Where a format has a scale of the whole weight, a
unit is read twice: for its largest magnitude, then to be encoded.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from qconvert.backends import Backend, Device, Task
from qconvert.errors import ConvertError, human
from qconvert.files import Files
from qconvert.reports import report_of
from qconvert.scalars import global_scale, input_scale, packed
from qconvert.scaling import scale
from qconvert.slices import Cut, Layout, aligned, cuts, lines_per_slice
from qconvert.smoothing import Vectors
from qconvert.sums import ExactSum
from qschema.dtypes import HIGH_PRECISION
from qschema.formats import TensorSpec, find
from qschema.plan import Constant, Plan, Step, Unit
from qschema.report import TensorReport

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
    work: deque[tuple[int, Unit]]
    files: Files
    vectors: Vectors
    allow_nonfinite: bool
    progress: Progress
    stop: threading.Event = field(default_factory=threading.Event)
    # one more for every worker that has ended
    finished: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    results: dict[int, list[TensorReport]] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)


def run(
    plan: Plan,
    *,
    source: Path,
    output: Path,
    vectors: Vectors,
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
    # largest first: no worker is left with a big unit at the end
    units = sorted(enumerate(plan.units), key=lambda item: (-_nbytes(item[1]), item[0]))
    shared = _Shared(
        work=deque(units),
        files=files,
        vectors=vectors,
        allow_nonfinite=plan.recipe.allow_nonfinite,
        progress=Progress([0] * workers, sum(_nbytes(unit) for unit in plan.units)),
    )
    backend = device.make()
    needed = max((_needed(step, backend.slice_nbytes, share) for step in plan.steps), default=0)
    threads = [
        threading.Thread(
            target=_work, args=(shared, device, min(share, needed), slot), name=f"worker-{slot}"
        )
        for slot in range(workers)
    ]
    try:
        files.create_empty()
        for constant in plan.constants:
            data = memoryview(constant_bytes(constant, vectors))
            files.write(constant.output.file, data, offset=constant.output.offset)
        for thread in threads:
            thread.start()
        num_finished = 0
        # not join: interrupted, it takes a thread that still runs for one that ended (bpo-45274)
        while num_finished < len(threads):
            num_finished += shared.finished.acquire(timeout=0.1)
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
    return [report for place in range(len(units)) for report in shared.results[place]]


def constant_bytes(constant: Constant, vectors: Vectors) -> bytes:
    """Return the bytes of a tensor that no source tensor becomes."""
    if constant.value is not None:
        return packed(constant.value)
    assert constant.vector is not None
    return vectors.stored(constant.vector)


def _work(shared: _Shared, device: Device, nbytes: int, slot: int) -> None:
    try:
        worker = _Worker(shared, device.make(), nbytes, slot)
        while not shared.stop.is_set():
            try:
                place, unit = shared.work.popleft()
            except IndexError:
                return
            shared.results[place] = worker.convert(unit)
    except BaseException as error:
        shared.errors.append(error)
        shared.stop.set()
    finally:
        shared.finished.release()


def fitting_workers(plan: Plan, *, wanted: int, budget: int) -> int:
    """Return `wanted` workers, or as many as get the memory that one block of the largest needs."""
    least = _MIN_SHARE_NBYTES
    for step in plan.steps:
        if step.action == "quantize":
            layout = _layout(step)
            least = max(least, Cut(layout, 0, min(layout.step, layout.lines)).footprint())
        elif step.action == "fold":
            least = max(least, step.source.nbytes)
    return max(1, min(wanted, budget // least))


def _nbytes(unit: Unit) -> int:
    """Return the source bytes that a unit reads."""
    passes = 2 if _global_spec(unit.steps[0]) else 1
    return passes * sum(step.source.nbytes for step in unit.steps)


def _global_spec(step: Step) -> TensorSpec | None:
    return next(iter(find(step.algo).specs("global")), None) if step.algo else None


def _needed(step: Step, preferred: int, limit: int) -> int:
    """Return the bytes of buffer that one slice of `step` takes."""
    if step.action == "keep":
        return min(_COPY_NBYTES, limit, step.source.nbytes)
    if step.action == "fold":
        # taken as a whole
        if step.source.nbytes > limit:
            raise ConvertError(
                f"{step.source.name}: its {human(step.source.nbytes)} are smoothed at once, a "
                f"worker has {human(limit)}; raise --memory-budget or lower --workers"
            )
        return step.source.nbytes
    return _first_cut(step, preferred, limit).footprint()


def _layout(step: Step) -> Layout:
    """Return how the weight of `step`, which is quantized, is stored."""
    assert step.algo is not None
    # experts one after the other
    *lines, width = step.source.shape
    return Layout(find(step.algo), step.source.dtype, prod(lines), width, step.transposed)


def _first_cut(step: Step, preferred: int, limit: int) -> Cut:
    """Return the first, largest slice of `step`."""
    layout = _layout(step)
    each = lines_per_slice(layout, preferred=preferred, limit=limit, name=step.source.name)
    return Cut(layout, 0, each)


class _Worker:
    def __init__(self, shared: _Shared, backend: Backend, nbytes: int, slot: int) -> None:
        self._shared = shared
        self._backend = backend
        self._slot = slot
        self._buffer = backend.allocate(max(8, nbytes))

    def convert(self, unit: Unit) -> list[TensorReport]:
        """Write the outputs of `unit` and return the reports of its steps."""
        spec = _global_spec(unit.steps[0])
        scale = 1.0
        if spec is not None:
            amax = max(self._amax(step) for step in unit.steps)
            # each dtype has a smallest number of its own; one scale for all of them
            dtypes = {step.source.dtype for step in unit.steps}
            scale = max(global_scale(amax, spec, dtype=dtype) for dtype in dtypes)
        reports = []
        for step in unit.steps:
            if step.action == "quantize":
                reports.append(self._quantize(step, scale))
            else:
                reports.append(self._keep(step))
            self._shared.files.tensor_done(step.source.file)
        return reports

    def _keep(self, step: Step) -> TensorReport:
        (output,) = step.outputs
        source, digest = step.source, hashlib.sha256()
        num_nonfinite = 0 if source.dtype in HIGH_PRECISION else None
        # whole elements of any dtype; what takes in smoothing is small and taken as a whole
        chunk = min(_COPY_NBYTES, max(8, len(self._buffer) // 8 * 8))
        if step.scalings:
            chunk = max(chunk, source.nbytes)
        for begin in range(0, source.nbytes, chunk):
            view = self._buffer[: min(chunk, source.nbytes - begin)]
            self._shared.files.read(source.file, view, offset=source.offset + begin)
            if step.scalings:
                self._scale(step, view, 0, 1, source.shape[-1])
            if num_nonfinite is not None:
                num_nonfinite += self._backend.count_nonfinite(view, dtype=source.dtype)
            digest.update(view)
            self._shared.files.write(output.file, view, offset=output.offset + begin)
            self._advance(len(view))
        self._check(step, num_nonfinite or 0)
        return report_of(step, [digest.hexdigest()], num_nonfinite=num_nonfinite)

    def _amax(self, step: Step) -> float:
        """Return the largest finite magnitude of a whole weight, after smoothing."""
        first = _first_cut(step, self._backend.slice_nbytes, len(self._buffer))
        largest = 0.0
        for cut in cuts(first.layout, each=first.stop):
            view = self._buffer[: cut.source_span()[1]]
            self._load(step, cut, view)
            largest = max(largest, self._backend.amax(view, dtype=step.source.dtype))
            self._advance(len(view))
        return largest

    def _quantize(self, step: Step, scale: float) -> TensorReport:
        first = _first_cut(step, self._backend.slice_nbytes, len(self._buffer))
        rows = first.layout.declared.specs("codes", "scale")
        digests = [hashlib.sha256() for _ in step.outputs]
        err2, ref2 = ExactSum(), ExactSum()
        num_nonfinite = num_saturated = 0
        for cut in cuts(first.layout, each=first.stop):
            task = self._task(cut, scale)
            self._load(step, cut, task.source)
            counts = self._backend.quantize(task)
            num_nonfinite += counts.num_nonfinite
            num_saturated += counts.num_saturated
            # a tensor with NaN is read to its end, so that the message has the whole count
            if self._shared.allow_nonfinite or not num_nonfinite:
                outputs = step.outputs[: len(rows)]
                for span, (offset, _), view, digest in zip(
                    outputs, cut.output_spans(), task.outputs, digests, strict=False
                ):
                    digest.update(view)
                    self._shared.files.write(span.file, view, offset=span.offset + offset)
                err2.add(task.err2)
                ref2.add(task.ref2)
            self._advance(len(task.source))
        self._check(step, num_nonfinite)
        for span, digest in zip(step.outputs[len(rows) :], digests[len(rows) :], strict=True):
            data = self._beside(step, span.suffix, scale)
            digest.update(data)
            self._shared.files.write(span.file, memoryview(data), offset=span.offset)
        return report_of(
            step,
            [digest.hexdigest() for digest in digests],
            num_nonfinite=num_nonfinite,
            num_saturated=num_saturated,
            error=(err2.total(), ref2.total()),
        )

    def _beside(self, step: Step, suffix: str, scale: float) -> bytes:
        """Return the bytes of a tensor that does not follow the rows."""
        assert step.algo is not None
        spec = next(spec for spec in find(step.algo).tensors if spec.suffix == suffix)
        if spec.role == "global":
            return packed(scale)
        if spec.role == "input":
            assert step.input_amax is not None
            return packed(input_scale(step.input_amax, spec, dtype=step.source.dtype))
        assert step.smoothing is not None
        return self._shared.vectors.bf16(step.smoothing)

    def _load(self, step: Step, cut: Cut, view: memoryview) -> None:
        """Read a slice and do to it what smoothing does."""
        offset, _ = cut.source_span()
        self._shared.files.read(step.source.file, view, offset=step.source.offset + offset)
        if step.scalings:
            self._scale(step, view, cut.start, cut.rows, cut.columns)

    def _scale(self, step: Step, view: memoryview, start: int, rows: int, columns: int) -> None:
        for scaling in step.scalings:
            numbers = [
                None if vector is None else self._shared.vectors.numbers(vector)
                for vector in (scaling.factor, scaling.divisor)
            ]
            if scaling.axis == "rows":
                part = slice(start, start + rows)
                numbers = [None if found is None else found[part] for found in numbers]
            assert numbers[0] is not None
            scale(
                view,
                dtype=step.source.dtype,
                rows=rows,
                columns=columns,
                along=scaling.axis,
                factor=numbers[0],
                divisor=numbers[1],
            )

    def _task(self, cut: Cut, scale: float) -> Task:
        views, position = [], 0
        for size in cut.sizes():
            views.append(self._buffer[position : position + size])
            position += aligned(size)
        num_outputs = len(cut.output_spans())
        source, outputs = views[0], views[1 : 1 + num_outputs]
        err2, ref2, *scratch = views[1 + num_outputs :]
        return Task(
            declared=cut.layout.declared,
            dtype=cut.layout.dtype,
            rows=cut.rows,
            columns=cut.columns,
            source=source,
            outputs=tuple(outputs),
            err2=err2,
            ref2=ref2,
            global_scale=scale,
            transposed=cut.layout.transposed,
            scratch=tuple(scratch),
        )

    def _check(self, step: Step, num_nonfinite: int) -> None:
        # a kept buffer may hold -inf for good reason (a mask); a weight may not
        is_weight = step.algo is not None or step.source.name.endswith(("weight", "bias"))
        if num_nonfinite and is_weight and not self._shared.allow_nonfinite:
            raise ConvertError(
                f"{step.source.file}::{step.source.name}{step.part or ''}: {num_nonfinite} of "
                f"{prod(step.source.shape)} elements are NaN or Inf; the weights are damaged, "
                "or pass --allow-nonfinite to convert them all the same"
            )

    def _advance(self, nbytes: int) -> None:
        self._shared.progress.done[self._slot] += nbytes
        if self._shared.stop.is_set():
            raise _StoppedError


class _StoppedError(Exception):
    """Another worker failed, or the user interrupted: this one gives up in silence."""
