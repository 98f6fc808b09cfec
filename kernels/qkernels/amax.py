"""The largest finite magnitude of a weight, whatever it becomes: f32 [], or [E] of a batch.

Exact, the same by torch, Triton and C; 0.0 of nothing. A weight is [N, K] or [E, N, K], bf16, f16
or f32, any strides.
"""

from math import prod

import torch
from torch import Tensor

from qkernels import native
from qkernels._checks import SOURCE_DTYPES, check_cpu


def amax_torch(w: Tensor) -> Tensor:
    """Largest finite magnitudes, f32, by torch."""
    magnitude = w.detach().abs().flatten(w.ndim - 2)
    finite = magnitude.where(magnitude.isfinite(), 0.0)
    return (finite.amax(-1) if finite.shape[-1] else finite.sum(-1)).float()


def amax_triton(w: Tensor) -> Tensor:
    """The same as amax_torch, by a Triton kernel, on the device of w."""
    flat_EM = w.detach().contiguous().view(prod(w.shape[:-2]), w.shape[-2] * w.shape[-1])
    amax_E = torch.empty(flat_EM.shape[0], dtype=torch.float32, device=w.device)
    amax_into_triton(flat_EM, amax_E)
    return amax_E.view(w.shape[:-2])


def amax_into_triton(flat_EM: Tensor, amax_E: Tensor) -> None:
    """None, after writing the amax of each row of flat_EM, contiguous, to amax_E, f32."""
    from qkernels import _triton_amax

    amax_E.zero_()
    if flat_EM.numel():
        _triton_amax.amax(flat_EM, amax_E)


def amax_native(w: Tensor) -> Tensor:
    """The same as amax_torch, by the C kernel; w is on the CPU."""
    check_cpu(w)
    if w.ndim == 3:
        parts = [amax_native(matrix) for matrix in w]
        return torch.stack(parts) if parts else torch.empty(0)
    source = w.detach().contiguous()
    amax, _ = native.amax(source.data_ptr(), SOURCE_DTYPES[w.dtype], source.numel())
    return torch.tensor(amax, dtype=torch.float32)
