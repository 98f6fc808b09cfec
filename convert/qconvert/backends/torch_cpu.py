"""Encoding by torch on the CPU: the same bytes as the native kernels, where those were not built.

The readable references do the work, so it is many times slower; `resolve` prefers the native ones.
"""

import mmap

import torch

from qconvert.backends import Counts, Task
from qkernels import kernels_for, native

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TorchBackend:
    """The CPU backend without a C compiler."""

    slice_nbytes = 4 << 20

    def __init__(self) -> None:
        # the workers are the threads
        torch.set_num_threads(1)

    def allocate(self, nbytes: int) -> memoryview:
        """Return zeroed anonymous memory."""
        return memoryview(mmap.mmap(-1, nbytes))

    def quantize(self, task: Task) -> Counts:
        """Encode with the format's reference."""
        kernels = kernels_for(task.declared.name)
        weight = source_tensor(task)
        tensors = kernels.quantize_torch(weight)
        stats = kernels.row_stats(weight, tensors)
        for spec, output in zip(task.declared.tensors, task.outputs, strict=True):
            store(output, tensors[spec.suffix])
        store(task.err2, stats.err2_N)
        store(task.ref2, stats.ref2_N)
        return Counts(int(stats.num_nonfinite), int(stats.num_saturated))

    def count_nonfinite(self, source: memoryview, *, dtype: str) -> int:
        """Return how many elements are NaN or Inf."""
        return count_nonfinite(source, dtype=dtype)


def source_tensor(task: Task) -> torch.Tensor:
    """Return the source of `task` as a tensor [rows, columns] on the same memory."""
    return torch.frombuffer(task.source, dtype=DTYPES[task.dtype]).view(task.rows, task.columns)


def store(target: memoryview, tensor: torch.Tensor) -> None:
    """Copy the bytes of `tensor`, on any device, to host memory; asynchronous if it can be."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    torch.frombuffer(target, dtype=torch.uint8).copy_(data, non_blocking=True)


def count_nonfinite(source: memoryview, *, dtype: str) -> int:
    """Return how many elements of host memory are NaN or Inf."""
    if native.available():
        from qconvert.backends.native import count_nonfinite as count

        return count(source, dtype=dtype)
    return int((~torch.frombuffer(source, dtype=DTYPES[dtype]).isfinite()).sum())
