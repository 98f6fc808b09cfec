"""Every codec by its formulas, in numpy and ml_dtypes: neither torch nor bit tricks.

A weight is [N, K] of ml_dtypes.bfloat16, float16 or float32. Tensors are numpy arrays by suffix.

Shapes: N rows out, K columns in, B = K / group blocks of a row, G = group.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

F32 = NDArray[np.float32]
Arrays = dict[str, NDArray[np.generic]]

E4M3, E2M1, E8M0 = (
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float4_e2m1fn,
    ml_dtypes.float8_e8m0fnu,
)
NUMPY = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
SMALLEST_NORMAL = {
    np.dtype(ml_dtypes.bfloat16): np.float32(2.0**-126),
    np.dtype(np.float16): np.float32(2.0**-14),
    np.dtype(np.float32): np.float32(2.0**-126),
}
# half a step beyond the lowest and the highest code
LIMITS = {"e4m3": (-464, 464), "e2m1": (-7, 7), "int8": (-128.5, 127.5), "int4": (-8.5, 7.5)}


@dataclass(frozen=True, kw_only=True)
class Format:
    """What the formulas of a codec need."""

    element: str
    """Type of the codes: e4m3, e2m1, int8 or int4."""
    largest: float
    """Magnitude that the largest number of a block is scaled to."""
    scale: str
    """Kind of the scales: weight, row, square (128 x 128), f32, e4m3 or e8m0 (by group)."""
    group: int = 0
    """Columns under one scale; 0: any number."""
    divisor: float = 0.0
    """Of the scale of the whole weight; 0: there is none."""
    suffix: str = ""
    """Of that scale's tensor."""


FORMATS = {
    "FP8": Format(element="e4m3", largest=448, scale="weight", divisor=448, suffix="weight_scale"),
    "FP8_PER_CHANNEL_PER_TOKEN": Format(element="e4m3", largest=448, scale="row"),
    "FP8_PB_WO": Format(element="e4m3", largest=448, scale="square"),
    "NVFP4": Format(
        element="e2m1", largest=6, scale="e4m3", group=16, divisor=2688, suffix="weight_scale_2"
    ),
    "W4A8_NVFP4_FP8": Format(
        element="e2m1", largest=6, scale="e4m3", group=32, divisor=448, suffix="weight_scale_2"
    ),
    "MXFP8": Format(element="e4m3", largest=448, scale="e8m0", group=32),
    "MXFP4": Format(element="e2m1", largest=6, scale="e8m0", group=32),
    "W8A16": Format(element="int8", largest=127, scale="row"),
    "W4A16_AWQ": Format(element="int4", largest=7, scale="f32", group=128),
}


def to_numpy(tensor: Tensor) -> NDArray[np.generic]:
    """The same bits as an array; e4m3 as bytes."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(arrays: Arrays) -> dict[str, Tensor]:
    """The same bits as tensors."""
    tensors = {}
    for suffix, array in arrays.items():
        if array.dtype == E4M3:
            tensors[suffix] = torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
        else:
            tensors[suffix] = torch.from_numpy(np.asarray(array))
    return tensors


def global_scale(name: str, w: NDArray[np.generic]) -> np.float32 | None:
    """The scale that a weight has by itself."""
    divisor = FORMATS[name].divisor
    amax = _magnitude(w.astype(np.float32)).max(initial=np.float32(0.0))
    return _scale(amax, w.dtype, divisor)[()] if divisor else None


def quantize(name: str, w: NDArray[np.generic], whole: np.float32 | None = None) -> Arrays:
    """The quantized tensors, under the scale `whole` of the weight or its own."""
    form = FORMATS[name]
    whole = global_scale(name, w) if whole is None else whole
    w_f32 = w.astype(np.float32)
    with np.errstate(all="ignore"):
        stored, scale_NK = _SCALES[form.scale](form, w_f32, w.dtype, whole)
        codes = _ENCODE[form.element](w_f32, scale_NK)
    arrays = {"weight": pack(form.element, codes)}
    if form.scale != "weight":
        arrays["weight_scale"] = stored
    if whole is not None:
        arrays[form.suffix] = np.array(whole, np.float32)
    return arrays


def dequantize(name: str, arrays: Arrays, dtype: torch.dtype) -> Tensor:
    """The weight: the product in f32, rounded once; every NaN the positive quiet one."""
    with np.errstate(all="ignore"):
        product = values(name, arrays["weight"]) * scales(name, arrays)
        rounded = product.astype(NUMPY[dtype])
    bits = torch.from_numpy(rounded.view(np.int32 if rounded.itemsize == 4 else np.int16))
    return bits.view(dtype).masked_fill(torch.from_numpy(np.isnan(product)), torch.nan)


def values(name: str, stored: NDArray[np.generic]) -> F32:
    """Numbers that the codes stand for, [N, K]."""
    return decode(FORMATS[name].element, unpack(FORMATS[name].element, stored))


def scales(name: str, arrays: Arrays) -> F32:
    """What each number is multiplied with, [N, K]."""
    form = FORMATS[name]
    stored = arrays["weight_scale"]
    n, k = unpack(form.element, arrays["weight"]).shape
    if form.scale == "weight":
        return np.broadcast_to(stored, (n, k))
    if form.scale == "row":
        return np.broadcast_to(stored[:, None], (n, k))
    if form.scale == "square":
        return stored[:, 0, :, 0].repeat(128, 0).repeat(128, 1)[:n, :k]
    if form.scale == "e4m3":
        stored = stored.view(E4M3).astype(np.float32) * arrays[form.suffix]
    if form.scale == "e8m0":
        stored = stored.view(E8M0).astype(np.float32)
    return stored.repeat(form.group, 1)


def statistics(
    name: str, w: NDArray[np.generic], arrays: Arrays
) -> tuple[NDArray[np.float64], tuple[int, int]]:
    """Sums of squared errors and of squares of each row, [2, N]; and how many elements are not
    finite, how many finite ones clipped."""
    x, scale_NK = w.astype(np.float32), scales(name, arrays)
    finite = np.isfinite(x)
    low, high = LIMITS[FORMATS[name].element]
    with np.errstate(all="ignore"):
        quotient = x / scale_NK
        clipped = finite & ((quotient < low) | (quotient > high))
        value = np.where(finite, values(name, arrays["weight"]), np.float32(0.0))
        sums_2N = _sums(np.where(finite, x, np.float32(0.0)), value, scale_NK)
    return sums_2N, (int(np.count_nonzero(~finite)), int(np.count_nonzero(clipped)))


def _sums(x: F32, value: F32, scale: F32) -> NDArray[np.float64]:
    """In the order of the C kernels: 16 lanes, f32 sums of eight squares of numbers times a power
    of two near 1 / the segment's largest scale, then f64."""
    n, k = x.shape
    lanes = np.zeros((2, n, 16))
    for start in range(0, k, 128):
        part = slice(start, min(start + 128, k))
        exponent = scale[:, part].max(1).view(np.uint32) >> 23
        unit = np.ldexp(np.float32(1), 127 - np.clip(exponent.astype(np.int32), 27, 227))[:, None]
        ref = x[:, part] * unit
        diff = ref - value[:, part] * (scale[:, part] * unit)
        for index, numbers in enumerate((diff, ref)):
            squares = np.zeros((n, 128), np.float32)
            squares[:, : numbers.shape[1]] = numbers * numbers
            lane = squares[:, :16]
            for i in range(16, 128, 16):
                lane = lane + squares[:, i : i + 16]
            lanes[index] += lane.astype(np.float64) / (unit.astype(np.float64) ** 2)
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes[..., 0]


def encode(element: str, w: F32, scale: F32) -> NDArray[np.generic]:
    """Codes of w / scale, one in each byte."""
    with np.errstate(all="ignore"):
        return _ENCODE[element](w, scale)


def decode(element: str, codes: NDArray[np.generic]) -> F32:
    """Numbers of codes, one in each byte."""
    kinds = {"e4m3": E4M3, "e2m1": E2M1}
    return (codes.view(kinds[element]) if element in kinds else codes).astype(np.float32)


def pack(element: str, codes: NDArray[np.generic]) -> NDArray[np.generic]:
    """The tensor of codes: pairs of columns (e2m1) or of rows (int4) share a byte."""
    if element == "e2m1":
        return codes[:, 0::2] + 16 * codes[:, 1::2]
    if element == "int4":
        nibbles = codes.astype(np.uint8) % 16
        return nibbles[0::2] + 16 * nibbles[1::2]
    return codes.view(E4M3) if element == "e4m3" else codes


def unpack(element: str, stored: NDArray[np.generic]) -> NDArray[np.generic]:
    """Codes, one in each byte, [N, K]."""
    if element == "e2m1":
        n, k = stored.shape
        return np.stack([stored % 16, stored // 16], 2).reshape(n, 2 * k)
    if element == "int4":
        n, k = stored.shape
        nibbles = np.stack([stored % 16, stored // 16], 1).reshape(2 * n, k).astype(np.int8)
        return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)
    return stored


def _magnitude(w: F32) -> F32:
    return np.where(np.isfinite(w), np.abs(w), np.float32(0.0))


def _scale(amax: F32, dtype: np.dtype[np.generic], divisor: float) -> F32:
    scale = np.maximum(amax, SMALLEST_NORMAL[dtype]) / np.float32(divisor)
    return np.where(amax == 0, np.float32(1.0), scale)


def _encode_e4m3(w: F32, scale: F32) -> NDArray[np.uint8]:
    """ml_dtypes turns what is above 464 into NaN, hence the clip; the sign of a NaN that went
    through a division is the CPU's affair, hence the explicit NaN."""
    quotient = np.where(np.isnan(w), np.float32(0.0), w) / scale
    codes = np.clip(quotient, -448, 448).astype(E4M3).view(np.uint8)
    return np.where(np.isnan(w), np.where(np.signbit(w), 0xFF, 0x7F), codes).astype(np.uint8)


def _encode_e2m1(w: F32, scale: F32) -> NDArray[np.uint8]:
    """ml_dtypes keeps the sign of zero and has its own idea of NaN."""
    zero = np.isnan(w) | (w == 0)
    quotient = np.where(zero, np.float32(0.0), w) / scale
    codes = np.clip(quotient, -6, 6).astype(E2M1).view(np.uint8)
    return np.where(zero, np.uint8(0), codes)


def _encode_integer(low: int, high: int) -> Callable[[F32, F32], NDArray[np.int8]]:
    def encode_integer(w: F32, scale: F32) -> NDArray[np.int8]:
        quotient = np.where(np.isnan(w), np.float32(0.0), w) / scale
        return np.clip(np.rint(quotient), low, high).astype(np.int8)

    return encode_integer


_ENCODE = {
    "e4m3": _encode_e4m3,
    "e2m1": _encode_e2m1,
    "int8": _encode_integer(-128, 127),
    "int4": _encode_integer(-8, 7),
}


def _group_amax(form: Format, w: F32) -> F32:
    n, k = w.shape
    return _magnitude(w).reshape(n, k // form.group, form.group).max(2)


def _by_weight(form, w, dtype, whole):
    return np.array(whole), np.array(whole)


def _by_row(form, w, dtype, whole):
    scale_N = _scale(_magnitude(w).max(1, initial=np.float32(0.0)), dtype, form.largest)
    return scale_N, scale_N[:, None]


def _by_square(form, w, dtype, whole):
    n, k = w.shape
    rows, cols = -(-n // 128), -(-k // 128)
    padded = np.zeros((rows * 128, cols * 128), np.float32)
    padded[:n, :k] = _magnitude(w)
    amax = padded.reshape(rows, 128, cols, 128).max((1, 3), keepdims=True)
    scale = _scale(amax, dtype, form.largest)
    return scale, scale[:, 0, :, 0].repeat(128, 0).repeat(128, 1)[:n, :k]


def _by_f32_group(form, w, dtype, whole):
    scale_NB = _scale(_group_amax(form, w), dtype, form.largest)
    return scale_NB, scale_NB.repeat(form.group, 1)


def _by_e4m3_group(form, w, dtype, whole):
    ratio = _group_amax(form, w) / (np.float32(form.largest) * whole)
    ratio = np.clip(np.where(ratio == 0, np.float32(1.0), ratio), 2.0**-9, 448)
    scale_NB = ratio.astype(E4M3)
    return scale_NB, (scale_NB.astype(np.float32) * whole).repeat(form.group, 1)


def _by_e8m0_group(form, w, dtype, whole):
    """amax = m * 2^e and largest = M * 2^E with m, M in [1/2, 1): 2^(e - E), twice if m > M."""
    amax_NB = _group_amax(form, w)
    mantissa, exponent = np.frexp(amax_NB)
    top_mantissa, top_exponent = np.frexp(np.float32(form.largest))
    power = exponent - top_exponent + (mantissa > top_mantissa)
    power = np.where(amax_NB == 0, -127, np.maximum(power, -127))
    scale_NB = np.ldexp(np.float32(1.0), power).astype(np.float32)
    return (power + 127).astype(np.uint8), scale_NB.repeat(form.group, 1)


_SCALES = {
    "weight": _by_weight,
    "row": _by_row,
    "square": _by_square,
    "f32": _by_f32_group,
    "e4m3": _by_e4m3_group,
    "e8m0": _by_e8m0_group,
}
