"""FP8_PB_WO: e4m3 weights with one f32 scale per block of 128 x 128.

Byte layout, for a weight [N, K]:

    weight        float8_e4m3fn [N, K], row major      one byte per element:  S EEEE MMM
    weight_scale  float32 [ceil(N/128), 1, ceil(K/128), 1], multiplies on dequantization

Blocks at the right and bottom edge may be ragged: they count as zero padded. The two middle
dimensions of the scale stay, also when there is a single block.

Source of truth: NVIDIA ModelOpt 0.47.0, modelopt/torch/export/quant_utils.py
(to_quantized_weight) and modelopt/torch/quantization/qtensor/fp8_tensor.py (FP8QTensor.quantize),
CPU arithmetic. Departure: a layer of one block keeps a 4-D scale here, where ModelOpt collapses
it to 0-D.

Not covered: other block sizes, fp8_pb_real (bf16 scales), activation scales, stacked 3-D experts
(the caller passes one expert at a time).

Shapes: N rows out, K columns in, R = ceil(N / 128), C = ceil(K / 128).
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
from qkernels.stats import RowStats, by_row_chunks, error_stats

FORMAT = "FP8_PB_WO"
BLOCK = 128
NAMES = ("weight", "weight_scale")


def quantize_torch(w_NK: Tensor) -> dict[str, Tensor]:
    """weight [N, K] float8_e4m3fn and weight_scale [R, 1, C, 1] f32, by the reference.

    w_NK: [N, K], bf16, f16 or f32, any strides, any values; N and K may be 0. Rows sliced at
    multiples of 128 give the same bytes.

    amax is the largest finite magnitude of a block, exact; scale = amax / 448 in f32, with amax
    at least the smallest normal number of the source dtype, and 1.0 for a block of zeros. Codes
    are w / scale in f32, clamped to +-448 and rounded once, nearest even. -0.0 and negative
    numbers that underflow give 0x80; NaN gives 0x7F with its sign; Inf gives +-448.

    Raises: KernelError for another rank or dtype.
    """
    check_weight(w_NK)
    n, k = w_NK.shape
    rows, cols = _num_blocks(n), _num_blocks(k)
    padding = (0, cols * BLOCK - k, 0, rows * BLOCK - n)
    blocks = torch.nn.functional.pad(w_NK.float(), padding).view(rows, BLOCK, cols, BLOCK)
    negative = torch.nn.functional.pad(sign_bits(w_NK), padding).view(rows, BLOCK, cols, BLOCK)
    amax_R1C1 = blocks.abs().where(blocks.isfinite(), 0.0).amax(dim=(1, 3), keepdim=True)
    scale_R1C1 = scale_from_amax(amax_R1C1, source=w_NK.dtype)
    codes = encode(blocks, scale_R1C1, negative=negative)
    padded_codes = codes.view(rows * BLOCK, cols * BLOCK)
    # not .contiguous(), which leaves the strides of a single row or column alone
    codes_NK = padded_codes[:n, :k].clone(memory_format=torch.contiguous_format)
    return {"weight": codes_NK, "weight_scale": scale_R1C1}


def quantize_triton(w_NK: Tensor) -> dict[str, Tensor]:
    """The same tensors as quantize_torch, by the Triton kernel, on the device of w_NK."""
    from qkernels import _triton_fp8

    check_weight(w_NK)
    outs = _empty(w_NK)
    _triton_fp8.quantize_blocks(w_NK, outs["weight"], outs["weight_scale"])
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

    tensors: weight [N, K] float8_e4m3fn, weight_scale [R, 1, C, 1] f32; any strides.
    value(code) * scale in f32, rounded once to dtype, nearest even; a product beyond the range of
    dtype becomes infinite; every NaN is the positive quiet NaN.

    Raises: KernelError for other names, dtypes or shapes.
    """
    n, k = _check(tensors, dtype)
    scale_NK = _expand(tensors["weight_scale"], n, k)
    return decode(tensors["weight"], scale_NK, dtype=dtype)


def dequantize_triton(
    tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The same weight as dequantize_torch, by the Triton kernel, on the device of the tensors."""
    from qkernels import _triton_fp8

    n, k = _check(tensors, dtype)
    out_NK = torch.empty(n, k, dtype=dtype, device=tensors["weight"].device)
    _triton_fp8.dequantize_blocks(tensors["weight"], tensors["weight_scale"], out_NK)
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
    _, k = _check(tensors, w_NK.dtype)

    def chunk(start: int, stop: int) -> RowStats:
        scale_R1C1 = tensors["weight_scale"][start // BLOCK : _num_blocks(stop)]
        scale_NS = scale_R1C1[:, 0, :, 0].repeat_interleave(BLOCK, dim=0)[: stop - start]
        w_f32_NK = w_NK[start:stop].float()
        clipped_NK = saturated(w_f32_NK, _expand(scale_R1C1, stop - start, k))
        return error_stats(w_f32_NK, tensors["weight"][start:stop].float(), scale_NS, clipped_NK)

    return by_row_chunks(w_NK, chunk, multiple=BLOCK)


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK)


def _empty(w_NK: Tensor) -> dict[str, Tensor]:
    n, k = w_NK.shape
    scale_shape = (_num_blocks(n), 1, _num_blocks(k), 1)
    return {
        "weight": torch.empty(n, k, dtype=torch.float8_e4m3fn, device=w_NK.device),
        "weight_scale": torch.empty(scale_shape, dtype=torch.float32, device=w_NK.device),
    }


def _check(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[int, int]:
    n, k = weight_shape(tensors, NAMES)
    scale_shape = (_num_blocks(n), 1, _num_blocks(k), 1)
    expected = {
        "weight": (torch.float8_e4m3fn, (n, k)),
        "weight_scale": (torch.float32, scale_shape),
    }
    check_quantized(tensors, expected)
    check_dtype(dtype)
    return n, k


def _expand(scale_R1C1: Tensor, n: int, k: int) -> Tensor:
    """Scales of every element, [n, k]."""
    rows, _, cols, _ = scale_R1C1.shape
    full = scale_R1C1.expand(rows, BLOCK, cols, BLOCK).reshape(rows * BLOCK, cols * BLOCK)
    return full[:n, :k]
