"""One unit from its source spans to its output spans: read a slice, encode it, digest and write it.

The unit is a value, and so is what comes back; what lies between are a reader, a writer, a backend
and one buffer, so the same code serves a thread here and a process elsewhere. Memory in flight is
the buffer, whatever the size of a tensor. Rows are handled in order, so a tensor's digest is that
of its bytes, and results do not depend on how a tensor is cut. Where a format has a scale of the
whole weight, a unit is read twice: for its largest magnitude, then to be encoded.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qconvert import digests
from qconvert.backends import Backend, Task
from qconvert.digests import Digest
from qconvert.errors import ConvertError, human
from qconvert.files import Reader, Writer, output_files
from qconvert.journal import Record, StepDone
from qconvert.scalars import global_scale, input_scale, packed
from qconvert.scaling import scale
from qconvert.slices import Cut, Layout, aligned, cuts, lines_per_slice
from qconvert.smoothing import Vectors
from qconvert.stages import Clock
from qconvert.sums import ExactSum
from qschema.dtypes import HIGH_PRECISION
from qschema.formats import TensorSpec, find
from qschema.plan import Output, Step, Unit

# bytes of a tensor that is only copied, per read
COPY_NBYTES = 4 << 20


@dataclass(frozen=True)
class Context:
    """What all units of a conversion share."""

    reader: Reader
    writer: Writer
    vectors: Vectors
    digest: str
    allow_nonfinite: bool


@dataclass(frozen=True)
class Before:
    """A unit that an interrupted run finished: its record, and where the files lie."""

    record: Record
    folder: Path


def unit_nbytes(unit: Unit) -> int:
    """Return the source bytes that a unit reads."""
    passes = 2 if _global_spec(unit.steps[0]) else 1
    return passes * sum(step.source.nbytes for step in unit.steps if step.action != "drop")


def buffer_nbytes(step: Step, *, preferred: int, limit: int) -> int:
    """Return the bytes of buffer that `step` takes, slices of about `preferred` source bytes.

    Raises ConvertError if it can't be done in `limit` bytes.
    """
    if step.action == "drop":
        return 0
    if step.action == "keep":
        return min(COPY_NBYTES, limit, step.source.nbytes)
    if step.action == "fold":
        # taken as a whole
        if step.source.nbytes > limit:
            raise ConvertError(
                f"{step.source.name}: its {human(step.source.nbytes)} are smoothed at once, a "
                f"worker has {human(limit)}; raise --memory-budget or lower --workers"
            )
        return step.source.nbytes
    return _first_cut(step, preferred, limit).footprint()


def least_nbytes(step: Step) -> int:
    """Return the bytes of buffer without which `step` can't be done."""
    if step.action == "quantize":
        layout = _layout(step)
        return Cut(layout, 0, min(layout.step, layout.lines)).footprint()
    return step.source.nbytes if step.action == "fold" else 0


class UnitWorker:
    """One worker: a backend, its buffer of `nbytes`, and a clock of where its time goes.

    `advance` is told of source bytes that are done, and may raise to stop the worker.
    """

    def __init__(
        self,
        context: Context,
        backend: Backend,
        nbytes: int,
        *,
        clock: Clock,
        advance: Callable[[int], None],
    ) -> None:
        self._shared = context
        self._backend = backend
        self._advance = advance
        self._buffer = backend.allocate(max(8, nbytes))
        self.clock = clock

    def convert(self, unit: Unit) -> tuple[StepDone, ...]:
        """Write the outputs of `unit` and return what came of its steps."""
        spec = _global_spec(unit.steps[0])
        scale = 1.0
        if spec is not None:
            amax = max(self._amax(step) for step in unit.steps)
            # each dtype has a smallest number of its own; one scale for all of them
            dtypes = {step.source.dtype for step in unit.steps}
            scale = max(global_scale(amax, spec, dtype=dtype) for dtype in dtypes)
        done = []
        for step in unit.steps:
            if step.action == "quantize":
                done.append(self._quantize(step, scale))
            elif step.action == "drop":
                done.append(StepDone())
            else:
                done.append(self._keep(step))
        return tuple(done)

    def take_over(self, unit: Unit, before: Before) -> bool:
        """Take over the outputs of `unit` from an interrupted run; return whether they are whole.

        Every byte is read and compared with its recorded digest, and written where the plan of
        this run has another place for it. If not whole, nothing that matters was written.
        """
        record = before.record
        shapes = [len(step.outputs) for step in unit.steps]
        if [len(step.digests) for step in record.steps] != shapes:
            return False
        # closed again at once: there may be many files, of many runs
        reader = Reader(before.folder, Counter())
        try:
            for step, done, places in zip(unit.steps, record.steps, record.places, strict=True):
                for output, digest, place in zip(step.outputs, done.digests, places, strict=True):
                    if self._copied(output, reader, place) != digest:
                        return False
        except (OSError, ConvertError, ValueError):
            # a file that is gone or short; a disk that is full shows again on the way that follows
            return False
        finally:
            reader.close()
        for step, done in zip(unit.steps, record.steps, strict=True):
            self._check(step, done.num_nonfinite or 0)
        self._advance(unit_nbytes(unit))
        return True

    def finish(self, unit: Unit) -> None:
        """Let go of the files of `unit`; those that are complete are flushed to disk."""
        for step in unit.steps:
            self._shared.reader.done(step.source.file)
        self._shared.writer.done(output_files(unit.steps))
        self.clock.lap("sync")

    def _copied(self, output: Output, reader: Reader, place: tuple[str, int]) -> str:
        file, offset = place
        is_moved = (reader.folder / file, offset) != (
            self._shared.writer.folder / output.file,
            output.offset,
        )
        digest = self._new_digest()
        chunk = min(COPY_NBYTES, len(self._buffer))
        for begin in range(0, output.nbytes, chunk):
            view = self._buffer[: min(chunk, output.nbytes - begin)]
            reader.read(file, view, offset=offset + begin)
            self.clock.lap("read", len(view))
            digest.update(view)
            self.clock.lap("digest", len(view))
            if is_moved:
                self._write(output, view, begin)
        return self._named(digest)

    def _keep(self, step: Step) -> StepDone:
        (output,) = step.outputs
        source, digest = step.source, self._new_digest()
        num_nonfinite = 0 if source.dtype in HIGH_PRECISION else None
        # whole elements of any dtype; what takes in smoothing is small and taken as a whole
        chunk = min(COPY_NBYTES, max(8, len(self._buffer) // 8 * 8))
        if step.scalings:
            chunk = max(chunk, source.nbytes)
        for begin in range(0, source.nbytes, chunk):
            view = self._buffer[: min(chunk, source.nbytes - begin)]
            self._shared.reader.read(source.file, view, offset=source.offset + begin)
            self.clock.lap("read", len(view))
            if step.scalings:
                self._scale(step, view, 0, 1, source.shape[-1])
            if num_nonfinite is not None:
                num_nonfinite += self._backend.count_nonfinite(view, dtype=source.dtype)
            self.clock.lap("encode", len(view))
            digest.update(view)
            self.clock.lap("digest", len(view))
            self._write(output, view, begin, None if step.scalings else step)
            self._advance(len(view))
        self._check(step, num_nonfinite or 0)
        return StepDone((self._named(digest),), num_nonfinite)

    def _write(
        self, output: Output, view: memoryview, begin: int, kept: Step | None = None
    ) -> None:
        """Write `view` at `begin` of `output`; of a kept tensor the kernel copies, if it can."""
        writer, to = self._shared.writer, output.offset + begin
        copied = False
        if kept is not None:
            descriptor = self._shared.reader.get(kept.source.file)
            offset = kept.source.offset + begin
            copied = writer.copy(output.file, descriptor, len(view), offset=offset, to=to)
        if not copied:
            writer.write(output.file, view, offset=to)
        self.clock.lap("write", len(view))

    def _amax(self, step: Step) -> float:
        """Return the largest finite magnitude of a whole weight, after smoothing."""
        first = _first_cut(step, self._backend.slice_nbytes, len(self._buffer))
        largest = 0.0
        for cut in cuts(first.layout, each=first.stop):
            view = self._buffer[: cut.source_span()[1]]
            self._load(step, cut, view)
            largest = max(largest, self._backend.amax(view, dtype=step.source.dtype))
            self.clock.lap("encode", len(view))
            self._advance(len(view))
        return largest

    def _quantize(self, step: Step, scale: float) -> StepDone:
        first = _first_cut(step, self._backend.slice_nbytes, len(self._buffer))
        rows = first.layout.declared.specs("codes", "scale")
        found = [self._new_digest() for _ in step.outputs]
        err2, ref2 = ExactSum(), ExactSum()
        num_nonfinite = num_saturated = 0
        for cut in cuts(first.layout, each=first.stop):
            task = self._task(cut, scale)
            self._load(step, cut, task.source)
            counts = self._backend.quantize(task)
            num_nonfinite += counts.num_nonfinite
            num_saturated += counts.num_saturated
            err2.add(task.err2)
            ref2.add(task.ref2)
            self.clock.lap("encode", len(task.source))
            # a tensor with NaN is read to its end, so that the message has the whole count
            if self._shared.allow_nonfinite or not num_nonfinite:
                outputs = step.outputs[: len(rows)]
                for span, (offset, _), view, digest in zip(
                    outputs, cut.output_spans(), task.outputs, found, strict=False
                ):
                    digest.update(view)
                    self.clock.lap("digest", len(view))
                    self._write(span, view, offset)
            self._advance(len(task.source))
        self._check(step, num_nonfinite)
        for span, digest in zip(step.outputs[len(rows) :], found[len(rows) :], strict=True):
            data = self._beside(step, span.suffix, scale)
            digest.update(data)
            self._write(span, memoryview(data), 0)
        return StepDone(
            tuple(self._named(digest) for digest in found),
            num_nonfinite,
            num_saturated,
            (err2.total(), ref2.total()),
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
        self._shared.reader.read(step.source.file, view, offset=step.source.offset + offset)
        self.clock.lap("read", len(view))
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

    def _new_digest(self) -> Digest:
        return digests.maker(self._shared.digest)()

    def _named(self, digest: Digest) -> str:
        return digests.named(self._shared.digest, digest)


def _global_spec(step: Step) -> TensorSpec | None:
    return next(iter(find(step.algo).specs("global")), None) if step.algo else None


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
