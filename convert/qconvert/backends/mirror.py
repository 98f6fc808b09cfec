"""Encoding on a device: a worker's host buffer has a mirror there, byte for byte.

A slice's source is copied to its place in the mirror, the kernels read and write the mirror, and
what they wrote is copied back to the same places. So the device memory of a worker is its share of
the budget, once, and no slice allocates anything. Two slices in flight per worker would need two
mirrors; the workers overlap by themselves.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from qconvert.backends import GPU_SLICE_NBYTES, Counts, Task, address
from qconvert.backends.torch_cpu import DTYPES, count_nonfinite
from qkernels import kernels_for
from qkernels.amax import amax_into_triton
from qkernels.stats import RowStats

_ALIGN = 64


class MirrorBackend(ABC):
    """A backend but for what a device calls its memory, its queue and waiting.

    `device_factor`: bytes of the mirror per byte of the buffer. The allocator of torch rounds the
    mirror up, to 2 MiB, or to 20 MiB in all for mirrors below 10 MiB.
    """

    slice_nbytes = GPU_SLICE_NBYTES
    device_factor = 1.0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @abstractmethod
    def _page_locked(self, nbytes: int) -> memoryview:
        """Return host memory that the device reads and writes by itself."""

    @abstractmethod
    def _queue(self) -> AbstractContextManager[object]:
        """Return a context in which copies and kernels queue up for the device, in order."""

    @abstractmethod
    def _wait(self) -> None:
        """Return when all that was queued is done; the GIL is free until then."""

    def allocate(self, nbytes: int) -> memoryview:
        """Return page-locked host memory and give it a mirror. Called once."""
        # behind the buffer: the two counts, and one f32
        tail = -(-nbytes // _ALIGN) * _ALIGN
        buffer = self._page_locked(tail + _ALIGN)
        self._address = address(buffer)
        self._host = torch.frombuffer(buffer, dtype=torch.uint8)
        with self._queue():
            self._mirror = torch.empty(tail + _ALIGN, dtype=torch.uint8, device=self._device)
        self._counts, self._number = slice(tail, tail + 16), slice(tail + 16, tail + 20)
        return buffer[:nbytes]

    def quantize(self, task: Task) -> Counts:
        """Encode on the device; returns when the outputs are in host memory."""
        self._host[self._number].view(torch.float32).fill_(task.global_scale)
        codec, start = task.declared.codec, self._place(task.source).start
        shape = (codec, task.dtype, task.rows, task.columns, task.transposed, start)
        self._run(shape, lambda: self._quantize(task))
        self._wait()
        num_nonfinite, num_saturated = self._host[self._counts].view(torch.int64).tolist()
        return Counts(num_nonfinite, num_saturated)

    def amax(self, source: memoryview, *, dtype: str) -> float:
        """Return the largest finite magnitude, found on the device: the host has enough to do."""
        if not source:
            return 0.0
        self._run(
            ("amax", dtype, len(source), self._place(source).start),
            lambda: self._amax(source, DTYPES[dtype]),
        )
        self._wait()
        return float(self._host[self._number].view(torch.float32))

    def count_nonfinite(self, source: memoryview, *, dtype: str) -> int:
        """Return how many elements are NaN or Inf; of kept tensors, which never leave the host."""
        return count_nonfinite(source, dtype=dtype)

    def _run(self, steps_of: Hashable, steps: Callable[[], None]) -> None:
        """Queue `steps`: the same ones at the same addresses whenever `steps_of` is the same."""
        with self._queue():
            steps()

    def _amax(self, source: memoryview, dtype: torch.dtype) -> None:
        self._copy_in(source)
        largest = self._mirror[self._number].view(torch.float32)
        amax_into_triton(self._mirrored(source, dtype, (1, -1)), largest)
        self._copy_back(self._number)

    def _quantize(self, task: Task) -> None:
        self._encode(task)
        written = map(self._place, (*task.outputs, task.err2, task.ref2))
        for part in joined([*written, self._counts]):
            self._copy_back(part)

    def _encode(self, task: Task) -> None:
        codec = kernels_for(task.declared.codec)
        dtype, shape = DTYPES[task.dtype], (task.rows, task.columns)
        self._copy_in(task.source)
        source, outputs = task.source, task.outputs
        if task.transposed:
            stored = self._mirrored(source, dtype, shape[::-1])
            source, *others = task.scratch
            outputs = tuple(others)
            self._mirrored(source, dtype, shape).copy_(stored.T)
        weight = self._mirrored(source, dtype, shape)
        tensors = {
            suffix: self._mirrored(output, *spec)
            for (suffix, spec), output in zip(codec.shapes(*shape).items(), outputs, strict=True)
        }
        if codec.global_scale is not None:
            self._mirror[self._number].copy_(self._host[self._number], non_blocking=True)
            scale = self._mirror[self._number].view(torch.float32).view(())
            tensors[codec.global_scale.suffix] = scale
        codec.quantize_into_triton(weight, tensors)
        counts = self._mirror[self._counts].view(torch.int64).zero_()
        stats = RowStats(
            err2_N=self._mirrored(task.err2, torch.float64, (task.rows,)),
            ref2_N=self._mirrored(task.ref2, torch.float64, (task.rows,)),
            num_nonfinite=counts[0],
            num_saturated=counts[1],
        )
        codec.row_stats_into_triton(weight, tensors, stats)
        if task.transposed:
            for output, target in zip(outputs, task.outputs, strict=True):
                # every code and scale of a stackable format is a byte
                by_row = self._mirrored(output, torch.uint8, (task.rows, -1))
                self._mirrored(target, torch.uint8, (-1, task.rows)).copy_(by_row.T)

    def _place(self, view: memoryview) -> slice:
        """Where a part of the buffer lies in it, and hence in the mirror."""
        start = address(view) - self._address
        assert 0 <= start <= start + len(view) <= self._counts.start, "not of this buffer"
        return slice(start, start + len(view))

    def _mirrored(self, view: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return self._mirror[self._place(view)].view(dtype).view(shape)

    def _copy_in(self, view: memoryview) -> None:
        place = self._place(view)
        self._mirror[place].copy_(self._host[place], non_blocking=True)

    def _copy_back(self, place: slice) -> None:
        self._host[place].copy_(self._mirror[place], non_blocking=True)


def joined(parts: list[slice]) -> list[slice]:
    """Return the parts in order, as one where only padding lies between them."""
    parts = sorted(parts, key=lambda part: part.start)
    found = parts[:1]
    for part in parts[1:]:
        if part.start - found[-1].stop < _ALIGN:
            found[-1] = slice(found[-1].start, part.stop)
        else:
            found.append(part)
    return found
