"""Calls of the native library on numpy arrays, and the oracle's answer in the same form.

Tensors are in the library's order: codes, then scales by row, block or group where there are any.
"""

from collections.abc import Iterable
from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from qkernels import native

from . import oracle

NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Arrays = list[NDArray[np.generic]]


class Codec(NamedTuple):
    """A format by its name."""

    name: str

    @property
    def form(self) -> oracle.Format:
        """Its formulas."""
        return oracle.FORMATS[self.name]

    @property
    def steps(self) -> tuple[int, int]:
        """What the rows and the columns of a weight are multiples of."""
        return 2 if self.form.element == "int4" else 1, self.form.group or 1

    @property
    def block_rows(self) -> int:
        """Rows that a slice has a multiple of."""
        return 128 if self.form.scale == "square" else self.steps[0]


CODECS = {name: Codec(name) for name in oracle.FORMATS}


class Result(NamedTuple):
    """What quantizing a weight gives."""

    outs: Arrays
    sums: NDArray[np.float64]
    counts: tuple[int, int]


def outputs(codec: Codec, n: int, k: int) -> Arrays:
    """Unwritten tensors, full of a byte that shows a missed store."""
    form = codec.form
    packed = {"e2m1": (n, k // 2), "int4": (n // 2, k)}.get(form.element, (n, k))
    shapes = {"row": (n,), "square": (-(-n // 128), 1, -(-k // 128), 1)}
    outs: Arrays = [np.full(packed, 0x5A, np.uint8)]
    if form.scale != "weight":
        shape = shapes.get(form.scale, (n, k // (form.group or 1)))
        outs.append(np.full(shape, 0x5A, np.uint8 if form.scale[0] == "e" else np.float32))
    return outs


def _named(codec: Codec, outs: Arrays, global_scale: float) -> oracle.Arrays:
    codes = outs[0].view(np.int8) if codec.form.element == "int8" else outs[0]
    arrays = dict(zip(("weight", "weight_scale"), (codes, *outs[1:]), strict=False))
    if codec.form.suffix:
        arrays[codec.form.suffix] = np.array(global_scale, np.float32)
    return arrays


def expected(codec: Codec, w: NDArray[np.generic], global_scale: float) -> Result:
    """The oracle's bytes, sums and counts."""
    whole = np.float32(global_scale) if codec.form.suffix else None
    arrays = oracle.quantize(codec.name, w, whole)
    outs = [arrays["weight"]]
    if codec.form.scale != "weight":
        outs.append(arrays["weight_scale"])
    return Result(outs, *oracle.statistics(codec.name, w, arrays))


def restored(
    codec: Codec, outs: Arrays, dtype: str, global_scale: float = 1.0
) -> NDArray[np.generic]:
    """The weight that the oracle makes of the tensors."""
    arrays = _named(codec, outs, global_scale)
    return oracle.to_numpy(oracle.dequantize(codec.name, arrays, TORCH[dtype]))


def addresses(arrays: Iterable[NDArray[np.generic]]) -> list[int]:
    """Where the arrays' bytes are."""
    return [array.ctypes.data for array in arrays]


def quantize(
    codec: Codec,
    w: NDArray[np.generic],
    dtype: str,
    *,
    global_scale: float = 1.0,
    statistics: bool = True,
) -> Result:
    """What the library makes of a contiguous w; without statistics the sums stay NaN."""
    n, k = w.shape
    outs = outputs(codec, n, k)
    sums = np.full((2, n), np.nan)
    counts = native.quantize(
        codec.name,
        w.ctypes.data,
        dtype,
        n,
        k,
        addresses(outs),
        *(addresses(sums) if statistics else (0, 0)),
        global_scale=global_scale,
    )
    return Result(outs, sums, counts)


def dequantize(
    codec: Codec, outs: Arrays, dtype: str, shape: tuple[int, int], global_scale: float = 1.0
) -> NDArray[np.generic]:
    """What the library restores."""
    out = np.full(shape, 0x5A5A, np.uint32 if dtype == "F32" else np.uint16)
    native.dequantize(
        codec.name, addresses(outs), dtype, *shape, out.ctypes.data, global_scale=global_scale
    )
    return out.view(NUMPY[dtype])


def normal(shape: int | tuple[int, ...], dtype: str, seed: int = 0) -> NDArray[np.generic]:
    """Numbers like those of a weight."""
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(NUMPY[dtype])
