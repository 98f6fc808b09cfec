"""Encoding by the native kernels, on the worker's own thread. No torch."""

import mmap

from qconvert.backends import CPU_SLICE_NBYTES, Counts, Task, address
from qkernels import native
from qschema.dtypes import BITS


class NativeBackend:
    """The CPU backend: ctypes releases the GIL, so each worker keeps one core busy."""

    # source and output of a slice stay in the cache between read, encode, hash and write
    slice_nbytes = CPU_SLICE_NBYTES

    def __init__(self, slot: int = 0) -> None:
        """Every worker's is alike."""

    def allocate(self, nbytes: int) -> memoryview:
        """Return zeroed, page-aligned anonymous memory."""
        return memoryview(mmap.mmap(-1, nbytes))

    def quantize(self, task: Task) -> Counts:
        """Encode on the CPU."""
        source, outputs = task.source, task.outputs
        if task.transposed:
            source, *others = task.scratch
            outputs = tuple(others)
            itemsize = BITS[task.dtype] // 8
            # stored [columns, rows]
            native.transpose(
                address(task.source), address(source), itemsize, task.columns, task.rows
            )
        counts = native.quantize(
            task.declared.codec,
            address(source),
            task.dtype,
            task.rows,
            task.columns,
            [address(output) for output in outputs],
            address(task.err2),
            address(task.ref2),
            global_scale=task.global_scale,
        )
        if task.transposed:
            for output, target in zip(outputs, task.outputs, strict=True):
                # every code and scale of a stackable format is a byte
                width = len(output) // task.rows
                native.transpose(address(output), address(target), 1, task.rows, width)
        return Counts(counts.num_nonfinite, counts.num_saturated)

    def amax(self, source: memoryview, *, dtype: str) -> float:
        """Return the largest finite magnitude."""
        return amax(source, dtype=dtype)

    def count_nonfinite(self, source: memoryview, *, dtype: str) -> int:
        """Return how many elements are NaN or Inf."""
        return count_nonfinite(source, dtype=dtype)


def amax(source: memoryview, *, dtype: str) -> float:
    """Return the largest finite magnitude in `source`, memory of F32, F16 or BF16."""
    return native.amax(address(source), dtype, _numel(source, dtype))[0]


def count_nonfinite(source: memoryview, *, dtype: str) -> int:
    """Return how many elements of `source`, memory of F32, F16 or BF16, are NaN or Inf."""
    return native.count_nonfinite(address(source), dtype, _numel(source, dtype))


def _numel(source: memoryview, dtype: str) -> int:
    return len(source) * 8 // BITS[dtype]
