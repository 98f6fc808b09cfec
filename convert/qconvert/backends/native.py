"""Encoding by the native kernels, on the worker's own thread. No torch."""

import mmap

from qconvert.backends import Counts, Task, address
from qkernels import native
from qschema.dtypes import BITS


class NativeBackend:
    """The CPU backend: ctypes releases the GIL, so each worker keeps one core busy."""

    # source and output of a slice stay in the cache between read, encode, hash and write
    slice_nbytes = 4 << 20

    def allocate(self, nbytes: int) -> memoryview:
        """Return zeroed, page-aligned anonymous memory."""
        return memoryview(mmap.mmap(-1, nbytes))

    def quantize(self, task: Task) -> Counts:
        """Encode on the CPU."""
        counts = native.quantize(
            task.declared.name,
            address(task.source),
            task.dtype,
            task.rows,
            task.columns,
            [address(output) for output in task.outputs],
            address(task.err2),
            address(task.ref2),
        )
        return Counts(counts.num_nonfinite, counts.num_saturated)

    def count_nonfinite(self, source: memoryview, *, dtype: str) -> int:
        """Return how many elements are NaN or Inf."""
        return count_nonfinite(source, dtype=dtype)


def count_nonfinite(source: memoryview, *, dtype: str) -> int:
    """Return how many elements of `source`, memory of F32, F16 or BF16, are NaN or Inf."""
    return native.count_nonfinite(address(source), dtype, len(source) * 8 // BITS[dtype])
