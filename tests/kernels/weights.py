"""Weights of every kind, as small as a codec's blocks allow.

Shapes: N rows out, K columns in.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qkernels.codec import Codec

INT_VIEW = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
Shape = tuple[int, int]


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Normal numbers, deviation 0.02."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def bits(shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    """Random patterns of a dtype, NaN and Inf among them."""
    info = torch.iinfo(INT_VIEW[dtype])
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(info.min, info.max + 1, shape, generator=generator)
    return patterns.to(INT_VIEW[dtype]).view(dtype)


def _finite_bits(shape: Shape, dtype: torch.dtype) -> Tensor:
    w = bits(shape, dtype, 2)
    return w.where(w.isfinite(), 0.0)


def _nonfinite(shape: Shape, dtype: torch.dtype) -> Tensor:
    """NaN of both signs and several payloads, and both infinities, in and between finite blocks."""
    w = normal(shape, dtype)
    w[3, 5], w[3, 6], w[140, 7], w[141, 139] = torch.inf, -torch.inf, torch.nan, -torch.nan
    special = bits((1, 4096), dtype, 3)
    special = special[~special.isfinite()][:9]
    w[20, : len(special)] = special
    w[30] = torch.nan
    w[31] = torch.inf
    return w


def _outlier(shape: Shape, dtype: torch.dtype) -> Tensor:
    w = normal(shape, dtype)
    w[7, 9] = torch.finfo(dtype).max
    return w


def _negative_underflow(shape: Shape, dtype: torch.dtype) -> Tensor:
    w = torch.full(shape, -1e-4).to(dtype)
    w[:, ::16] = 448.0
    w[5] = -0.0
    return w


def _tiny(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Subnormals of the source, so that amax counts as the smallest normal number."""
    return bits(shape, dtype, 4).abs().clamp(max=torch.finfo(dtype).tiny / 2).nan_to_num(0.0)


def _wide(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A magnitude per 16 columns, from subnormal to the largest: the ratio of two underflows."""
    n, k = shape
    generator = torch.Generator().manual_seed(5)
    exponent = torch.randint(-149, 127, (n, -(-k // 16)), generator=generator)
    w = normal(shape, torch.float32).double() * 64.0
    w = w * torch.exp2(exponent.double()).repeat_interleave(16, 1)[:, :k]
    return w.to(dtype).nan_to_num(0.0, 0.0, 0.0)


def _zero_block(shape: Shape, dtype: torch.dtype) -> Tensor:
    w = normal(shape, dtype)
    w[:130, :130] = 0.0
    w[2, 2] = -0.0
    return w


def _strided(shape: Shape, dtype: torch.dtype) -> Tensor:
    return normal((2 * shape[1], 3 * shape[0]), dtype)[::2, ::3].T


def _part_of_rows(shape: Shape, dtype: torch.dtype) -> Tensor:
    n, k = shape
    return normal((n + 4, k + 160), dtype)[3 : 3 + n, 5 : 5 + k]


def _full(value: float) -> Callable[[Shape, torch.dtype], Tensor]:
    return lambda shape, dtype: torch.full(shape, value, dtype=dtype)


ODD = (150, 140)
# sizes are rounded up to what a codec takes
WEIGHTS: dict[str, tuple[Shape, Callable[[Shape, torch.dtype], Tensor]]] = {
    "normal": ((257, 300), normal),
    "aligned": ((256, 128), normal),
    "finite_bits": (ODD, _finite_bits),
    "nonfinite": (ODD, _nonfinite),
    "only_nan": (ODD, _full(torch.nan)),
    "only_inf": (ODD, _full(-torch.inf)),
    "outlier": (ODD, _outlier),
    "largest": (ODD, lambda shape, dtype: torch.full(shape, torch.finfo(dtype).max, dtype=dtype)),
    "negative_underflow": (ODD, _negative_underflow),
    "tiny": (ODD, _tiny),
    "wide": (ODD, _wide),
    "zeros": (ODD, _full(0.0)),
    "negative_zeros": (ODD, _full(-0.0)),
    "zero_block": ((150, 270), _zero_block),
    "one_row": ((1, 300), normal),
    "one_column": ((300, 1), normal),
    "one_element": ((1, 1), normal),
    "no_rows": ((0, 130), normal),
    "no_columns": ((130, 0), normal),
    "transposed": (ODD, lambda shape, dtype: normal(shape[::-1], dtype).T),
    "part_of_rows": ((1, 140), _part_of_rows),
    "strided": (ODD, _strided),
}
# for what depends on sizes and strides alone
SHAPES = ["normal", "aligned", "one_row", "one_column", "one_element", "no_rows", "no_columns"]


def fitting(codec: Codec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with N and K rounded up to the codec's multiples."""
    *batch, n, k = shape
    return (
        *batch,
        -(-n // codec.multiple_of_n) * codec.multiple_of_n,
        -(-k // codec.multiple_of_k) * codec.multiple_of_k,
    )


def make(kind: str, codec: Codec, dtype: torch.dtype) -> Tensor:
    """A weight of the table, on the CPU."""
    shape, function = WEIGHTS[kind]
    n, k = fitting(codec, shape)
    return function((n, k), dtype)
