"""Encoding on a CUDA device: pinned buffers, one stream per worker, Triton kernels.

Copies in, kernels and copies out of one worker are in order on its stream and overlap with those of
the other workers, with their reads, hashes and writes.
"""

import torch

from qconvert.backends import Counts, Task
from qconvert.backends.torch_cpu import amax, count_nonfinite, source_tensor, store
from qconvert.errors import ConvertError
from qkernels import kernels_for


def check_torch() -> None:
    """Raise ConvertError if this torch was built without CUDA, whatever the machine has."""
    if not torch.cuda.is_available():
        raise ConvertError(
            f"torch {torch.__version__} does not see the CUDA device: install a CUDA build of "
            "torch, or convert with --device cpu"
        )


class CudaBackend:
    """One worker's stream on the device `name` ("cuda:0")."""

    # enough for the copy engines; small enough that many workers share a budget
    slice_nbytes = 32 << 20

    def __init__(self, name: str) -> None:
        self._device = torch.device(name)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._counts = torch.empty(2, dtype=torch.int64, pin_memory=True)

    def allocate(self, nbytes: int) -> memoryview:
        """Return page-locked host memory, which the device reads and writes by itself."""
        pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return memoryview(pinned.numpy())  # type: ignore[arg-type]

    def quantize(self, task: Task) -> Counts:
        """Encode on the device; returns when the outputs are in host memory."""
        kernels = kernels_for(task.declared.codec)
        with torch.cuda.stream(self._stream):
            weight = source_tensor(task).to(self._device, non_blocking=True)
            if task.transposed:
                weight = weight.T.contiguous()
            scale = None
            if kernels.global_scale is not None:
                scale = torch.full((), task.global_scale, dtype=torch.float32, device=self._device)
            tensors = kernels.quantize_triton(weight, global_scale=scale)
            stats = kernels.row_stats(weight, tensors)
            specs = task.declared.specs("codes", "scale")
            for spec, output in zip(specs, task.outputs, strict=True):
                tensor = tensors[spec.suffix]
                store(output, tensor.T if task.transposed else tensor)
            store(task.err2, stats.err2_N)
            store(task.ref2, stats.ref2_N)
            counts = torch.stack([stats.num_nonfinite, stats.num_saturated])
            self._counts.copy_(counts, non_blocking=True)
        self._stream.synchronize()
        num_nonfinite, num_saturated = self._counts.tolist()
        return Counts(num_nonfinite, num_saturated)

    def amax(self, source: memoryview, *, dtype: str) -> float:
        """Return the largest finite magnitude; on the host, where it is already."""
        return amax(source, dtype=dtype)

    def count_nonfinite(self, source: memoryview, *, dtype: str) -> int:
        """Return how many elements are NaN or Inf; on the host, where they are already."""
        return count_nonfinite(source, dtype=dtype)
