"""Encoding by torch on the CPU: the same bytes as the native kernels, where those were not built.

The readable references do the work, so it is many times slower; `resolve` prefers the native ones.
"""

import mmap

import torch

from qconvert.backends import CPU_SLICE_NBYTES, Counts, Task
from qkernels import kernels_for, native

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TorchBackend:
    """The CPU backend without a C compiler."""

    slice_nbytes = CPU_SLICE_NBYTES

    def __init__(self, slot: int = 0) -> None:
        # the workers are the threads
        torch.set_num_threads(1)

    def allocate(self, nbytes: int) -> memoryview:
        """Return zeroed anonymous memory."""
        return memoryview(mmap.mmap(-1, nbytes))

    def quantize(self, task: Task) -> Counts:
        """Encode with the format's reference."""
        kernels = kernels_for(task.declared.codec)
        weight = source_tensor(task)
        if task.transposed:
            weight = weight.T
        scale = None
        if kernels.global_scale is not None:
            scale = torch.tensor(task.global_scale, dtype=torch.float32)
        tensors = kernels.quantize_torch(weight, global_scale=scale)
        stats = kernels.row_stats(weight, tensors)
        for spec, output in zip(task.declared.specs("codes", "scale"), task.outputs, strict=True):
            tensor = tensors[spec.suffix]
            store(output, tensor.T if task.transposed else tensor)
        store(task.err2, stats.err2_N)
        store(task.ref2, stats.ref2_N)
        return Counts(int(stats.num_nonfinite), int(stats.num_saturated))

    def amax(self, source: memoryview, *, dtype: str) -> float:
        """Return the largest finite magnitude."""
        return amax(source, dtype=dtype)

    def count_nonfinite(self, source: memoryview, *, dtype: str) -> int:
        """Return how many elements are NaN or Inf."""
        return count_nonfinite(source, dtype=dtype)


def source_tensor(task: Task) -> torch.Tensor:
    """Return the source of `task` as a tensor on the same memory: [rows, columns] as stored."""
    shape = (task.columns, task.rows) if task.transposed else (task.rows, task.columns)
    return torch.frombuffer(task.source, dtype=DTYPES[task.dtype]).view(shape)


def store(target: memoryview, tensor: torch.Tensor) -> None:
    """Copy the bytes of `tensor`, on any device, to host memory; asynchronous if it can be."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    torch.frombuffer(target, dtype=torch.uint8).copy_(data, non_blocking=True)


def amax(source: memoryview, *, dtype: str) -> float:
    """Return the largest finite magnitude of host memory."""
    if native.available():
        from qconvert.backends.native import amax as largest

        return largest(source, dtype=dtype)
    weight = torch.frombuffer(source, dtype=DTYPES[dtype])
    return float(weight.abs().where(weight.isfinite(), 0.0).amax())


def count_nonfinite(source: memoryview, *, dtype: str) -> int:
    """Return how many elements of host memory are NaN or Inf."""
    if native.available():
        from qconvert.backends.native import count_nonfinite as count

        return count(source, dtype=dtype)
    return int((~torch.frombuffer(source, dtype=DTYPES[dtype]).isfinite()).sum())
