"""Checks of tensor arguments, and the calls into the native library that take tensors.

Shapes: N rows out, K columns in.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels import native
from qkernels.errors import KernelError

SOURCE_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def check_weight(w_NK: Tensor) -> None:
    """None. Raises: KernelError unless w_NK is 2-D and bf16, f16 or f32."""
    if w_NK.ndim != 2:
        raise KernelError(f"expected a weight of shape (N, K), got shape {tuple(w_NK.shape)}")
    check_dtype(w_NK.dtype)


def check_dtype(dtype: torch.dtype) -> None:
    """None. Raises: KernelError unless dtype is bf16, f16 or f32."""
    if dtype not in SOURCE_DTYPES:
        names = ", ".join(str(known) for known in SOURCE_DTYPES)
        raise KernelError(f"expected a dtype of {names}, got {dtype}")


def check_quantized(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    """None. Raises: KernelError unless `tensors` has exactly these names, dtypes and shapes."""
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise KernelError(
                f"expected {name} of dtype {dtype} and shape {shape}, "
                f"got dtype {tensor.dtype} and shape {tuple(tensor.shape)}"
            )
        if tensor.device != tensors["weight"].device:
            raise KernelError(
                f"expected {name} on {tensors['weight'].device} beside weight, got {tensor.device}"
            )


def weight_shape(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> tuple[int, int]:
    """(N, K) of the quantized weight. Raises: KernelError for other names or another rank."""
    if set(tensors) != set(names):
        raise KernelError(f"expected the tensors {sorted(names)}, got {sorted(tensors)}")
    shape = tuple(tensors["weight"].shape)
    if len(shape) != 2:
        raise KernelError(f"expected weight of shape (N, K), got shape {shape}")
    return shape


def use_native(format_name: str, tensor: Tensor) -> bool:
    """True when the native library has this format and the tensor is where it can read it."""
    return tensor.device.type == "cpu" and native.supports(format_name)


def run_native_quantize(
    format_name: str, w_NK: Tensor, outs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """`outs`, filled by the native library; in the order the format declares them, contiguous.

    Raises: KernelError when w_NK is not on the CPU or there is no native kernel.
    """
    _check_cpu(w_NK)
    source = w_NK.detach().contiguous()
    rows, cols = source.shape
    addresses = [tensor.data_ptr() for tensor in outs.values()]
    dtype = SOURCE_DTYPES[source.dtype]
    native.quantize(format_name, source.data_ptr(), dtype, rows, cols, addresses)
    return outs


def run_native_dequantize(
    format_name: str, tensors: Mapping[str, Tensor], names: tuple[str, ...], dtype: torch.dtype
) -> Tensor:
    """The weight, [N, K] of dtype, decoded by the native library from tensors in the order `names`.

    Raises: KernelError when the tensors are not on the CPU or there is no native kernel.
    """
    _check_cpu(tensors["weight"])
    sources = [tensors[name].detach().contiguous() for name in names]
    rows, cols = sources[0].shape
    out_NK = torch.empty(rows, cols, dtype=dtype)
    addresses = [tensor.data_ptr() for tensor in sources]
    native.dequantize(format_name, addresses, SOURCE_DTYPES[dtype], rows, cols, out_NK.data_ptr())
    return out_NK


def _check_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise KernelError(f"expected a tensor on the CPU, got one on {tensor.device}")
