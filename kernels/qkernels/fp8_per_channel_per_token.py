"""FP8_PER_CHANNEL_PER_TOKEN: e4m3 weights with one f32 scale per output row.

Byte layout, for a weight [N, K]:

    weight        float8_e4m3fn [N, K], row major      one byte per element:  S EEEE MMM
    weight_scale  float32 [N], multiplies on dequantization

Source of truth: NVIDIA ModelOpt 0.47.0, modelopt/torch/export/quant_utils.py
(to_quantized_weight), CPU arithmetic.

Not covered: activation scales (the format computes them per token at run time), stacked 3-D experts
(the caller passes one expert at a time).

Shapes: N rows out, K columns in.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels._e4m3 import decode, encode, saturated, scale_from_amax, sign_bits
from qkernels._tensors import (
    check_dtype,
    check_quantized,
    check_weight,
    run_native_dequantize,
    run_native_quantize,
    use_native,
    weight_shape,
)
from qkernels.stats import SEGMENT, RowStats, by_row_chunks, error_stats

FORMAT = "FP8_PER_CHANNEL_PER_TOKEN"
NAMES = ("weight", "weight_scale")


def quantize_torch(w_NK: Tensor) -> dict[str, Tensor]:
    """weight [N, K] float8_e4m3fn and weight_scale [N] f32, by the reference.

    w_NK: [N, K], bf16, f16 or f32, any strides, any values; N and K may be 0. Any slice of rows
    gives the same bytes.

    amax is the largest finite magnitude of a row, exact; scale = amax / 448 in f32, with amax at
    least the smallest normal number of the source dtype, and 1.0 for a row of zeros. Codes are w
    / scale in f32, clamped to +-448 and rounded once, nearest even. -0.0 and negative numbers
    that underflow give 0x80; NaN gives 0x7F with its sign; Inf gives +-448.

    Raises: KernelError for another rank or dtype.
    """
    check_weight(w_NK)
    w_f32_NK = w_NK.float().contiguous()
    magnitude_NK = w_f32_NK.abs().where(w_f32_NK.isfinite(), 0.0)
    # an empty row has no maximum; like a row of zeros it gets scale 1.0
    amax_N = magnitude_NK.amax(dim=1) if w_NK.shape[1] else magnitude_NK.sum(dim=1)
    scale_N = scale_from_amax(amax_N, source=w_NK.dtype)
    codes_NK = encode(w_f32_NK, scale_N[:, None], negative=sign_bits(w_NK.contiguous()))
    return {"weight": codes_NK, "weight_scale": scale_N}


def quantize_triton(w_NK: Tensor) -> dict[str, Tensor]:
    """The same tensors as quantize_torch, by the Triton kernel, on the device of w_NK."""
    from qkernels import _triton_fp8

    check_weight(w_NK)
    outs = _empty(w_NK)
    _triton_fp8.quantize_rows(w_NK, outs["weight"], outs["weight_scale"])
    return outs


def quantize_native(w_NK: Tensor) -> dict[str, Tensor]:
    """The same tensors as quantize_torch, by the C kernel; w_NK is on the CPU."""
    check_weight(w_NK)
    return run_native_quantize(FORMAT, w_NK, _empty(w_NK))


def quantize(w_NK: Tensor) -> dict[str, Tensor]:
    """The same tensors as quantize_torch, by the fastest implementation for the device of w_NK."""
    if w_NK.is_cuda:
        return quantize_triton(w_NK)
    return quantize_native(w_NK) if use_native(FORMAT, w_NK) else quantize_torch(w_NK)


def dequantize_torch(
    tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The weight, [N, K] of dtype (bf16, f16 or f32), by the reference.

    tensors: weight [N, K] float8_e4m3fn, weight_scale [N] f32; any strides.
    value(code) * scale in f32, rounded once to dtype, nearest even; a product beyond the range of
    dtype becomes infinite; every NaN is the positive quiet NaN.

    Raises: KernelError for other names, dtypes or shapes.
    """
    _check(tensors, dtype)
    return decode(tensors["weight"], tensors["weight_scale"][:, None], dtype=dtype)


def dequantize_triton(
    tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The same weight as dequantize_torch, by the Triton kernel, on the device of the tensors."""
    from qkernels import _triton_fp8

    n, k = _check(tensors, dtype)
    out_NK = torch.empty(n, k, dtype=dtype, device=tensors["weight"].device)
    _triton_fp8.dequantize_rows(tensors["weight"], tensors["weight_scale"], out_NK)
    return out_NK


def dequantize_native(
    tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The same weight as dequantize_torch, by the C kernel; the tensors are on the CPU."""
    _check(tensors, dtype)
    return run_native_dequantize(FORMAT, tensors, NAMES, dtype)


def dequantize(tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The same weight as dequantize_torch, by the fastest implementation for the device."""
    _check(tensors, dtype)
    if tensors["weight"].is_cuda:
        return dequantize_triton(tensors, dtype=dtype)
    if use_native(FORMAT, tensors["weight"]):
        return dequantize_native(tensors, dtype=dtype)
    return dequantize_torch(tensors, dtype=dtype)


def row_stats(w_NK: Tensor, tensors: Mapping[str, Tensor]) -> RowStats:
    """What quantize lost of w_NK, per row; bounded memory, nothing waits for the device.

    Raises: KernelError for other names, dtypes or shapes.
    """
    check_weight(w_NK)
    _check(tensors, w_NK.dtype)

    def chunk(start: int, stop: int) -> RowStats:
        scale_N1 = tensors["weight_scale"][start:stop, None]
        w_f32_NK = w_NK[start:stop].float()
        scale_NS = scale_N1.expand(-1, -(-w_NK.shape[1] // SEGMENT))
        clipped_NK = saturated(w_f32_NK, scale_N1)
        return error_stats(w_f32_NK, tensors["weight"][start:stop].float(), scale_NS, clipped_NK)

    return by_row_chunks(w_NK, chunk)


def _empty(w_NK: Tensor) -> dict[str, Tensor]:
    n, k = w_NK.shape
    return {
        "weight": torch.empty(n, k, dtype=torch.float8_e4m3fn, device=w_NK.device),
        "weight_scale": torch.empty(n, dtype=torch.float32, device=w_NK.device),
    }


def _check(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[int, int]:
    n, k = weight_shape(tensors, NAMES)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.float8_e4m3fn, (n, k)),
        "weight_scale": (torch.float32, (n,)),
    }
    check_quantized(tensors, expected)
    check_dtype(dtype)
    return n, k
