"""What every codec refuses of its arguments, whatever the format."""

import torch
from torch import Tensor

from qkernels.errors import KernelError

SOURCE_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def check_dtype(dtype: torch.dtype) -> None:
    """Raises: KernelError for a dtype that weights don't have."""
    if dtype not in SOURCE_DTYPES:
        names = ", ".join(str(known) for known in SOURCE_DTYPES)
        raise KernelError(f"expected a dtype of {names}, got {dtype}")


def check_cpu(tensor: Tensor) -> None:
    """Raises: KernelError for a tensor on another device."""
    if tensor.device.type != "cpu":
        raise KernelError(f"expected a tensor on the CPU, got one on {tensor.device}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raises: KernelError for a tensor with other strides."""
    if not tensor.is_contiguous():
        raise KernelError(f"expected {name} contiguous, got strides {tensor.stride()}")
