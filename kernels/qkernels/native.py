"""The C kernels on raw addresses: no torch, no numpy, no Python object per element.

The library is compiled at install (hatch_build.py) from `native_src/*.c` and loaded with ctypes,
which releases the GIL while a kernel runs. Nothing is shared between calls, so any number of
threads may call. `QKERNELS_NATIVE=0` in the environment turns it off.

Addresses need the alignment of their element type only. Buffers are C-contiguous, row major, and
must not overlap. A dtype is its safetensors name: "BF16", "F16" or "F32".

Adding a format: one C file in `native_src/` that exports `qk_<name>_quantize` and
`qk_<name>_dequantize`.
"""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from qkernels.errors import KernelError

LIBRARY = Path(__file__).with_name("libqkernels.so")
DTYPES = {"BF16": 0, "F16": 1, "F32": 2}


class Counts(NamedTuple):
    """What one `quantize` call met."""

    num_nonfinite: int
    """NaN and Inf elements."""
    num_saturated: int
    """Finite elements clipped by more than rounding: |w / scale| > 464 for e4m3."""


@cache
def _load(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _library() -> ctypes.CDLL | None:
    """The library, or None when it was not built, does not load or is turned off."""
    if os.environ.get("QKERNELS_NATIVE", "1") == "0":
        return None
    return _load(LIBRARY)


def available() -> bool:
    """True when the compiled library is there and not turned off."""
    return _library() is not None


def supports(format_name: str) -> bool:
    """True when the library is available and has kernels for this format."""
    library = _library()
    return library is not None and hasattr(library, f"qk_{format_name.lower()}_quantize")


def _symbol(name: str) -> "ctypes._NamedFuncPointer":
    library = _library()
    if library is None:
        raise KernelError(
            f"the native library {LIBRARY} is not available: it was not built at install "
            "(no C compiler?), or QKERNELS_NATIVE=0 is set"
        )
    try:
        return library[name]
    except AttributeError:
        raise KernelError(f"{LIBRARY} has no symbol {name}: no native kernel for this") from None


def _dtype_code(dtype: str) -> int:
    if dtype not in DTYPES:
        raise KernelError(f"expected a dtype of {', '.join(DTYPES)}, got {dtype}")
    return DTYPES[dtype]


def _addresses(addresses: Sequence[int]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(addresses))(*addresses)


def quantize(
    format_name: str,
    src_addr: int,
    dtype: str,
    rows: int,
    cols: int,
    out_addrs: Sequence[int],
    err2_addr: int = 0,
    ref2_addr: int = 0,
) -> Counts:
    """Counts of one weight, after writing its quantized tensors.

    src_addr: rows x cols elements of dtype. out_addrs: one per tensor, in the order the format
    declares them (weight, weight_scale). err2_addr, ref2_addr: double[rows] that receive per row
    the sums over finite elements of (w - q * scale)^2 and of w^2, or both 0; the same doubles on
    every instruction set and for every way of slicing the rows. Rounding and special values: see
    the format's module.

    Raises: KernelError for an unknown dtype or format, or when the library is not available.
    """
    function = _symbol(f"qk_{format_name.lower()}_quantize")
    counts = (ctypes.c_int64 * 2)()
    status = function(
        ctypes.c_void_p(src_addr),
        ctypes.c_int(_dtype_code(dtype)),
        ctypes.c_int64(rows),
        ctypes.c_int64(cols),
        _addresses(out_addrs),
        ctypes.c_void_p(err2_addr),
        ctypes.c_void_p(ref2_addr),
        counts,
    )
    if status != 0:
        raise KernelError(
            f"{format_name}: expected both or neither of err2_addr and ref2_addr, "
            f"got {err2_addr:#x} and {ref2_addr:#x}"
        )
    return Counts(num_nonfinite=counts[0], num_saturated=counts[1])


def dequantize(
    format_name: str,
    in_addrs: Sequence[int],
    dtype: str,
    rows: int,
    cols: int,
    out_addr: int,
) -> None:
    """None, after writing rows x cols elements of dtype at out_addr.

    in_addrs: one per tensor, in the order the format declares them. value(q) * scale in f32, then
    one rounding to dtype, ties to even; NaN codes become the positive quiet NaN.

    Raises: KernelError for an unknown dtype or format, or when the library is not available.
    """
    function = _symbol(f"qk_{format_name.lower()}_dequantize")
    function(
        _addresses(in_addrs),
        ctypes.c_int(_dtype_code(dtype)),
        ctypes.c_int64(rows),
        ctypes.c_int64(cols),
        ctypes.c_void_p(out_addr),
    )


def count_nonfinite(addr: int, dtype: str, n: int) -> int:
    """Number of NaN and Inf among the n elements of dtype at addr.

    Raises: KernelError for an unknown dtype, or when the library is not available.
    """
    total = ctypes.c_int64(0)
    _symbol("qk_count_nonfinite")(
        ctypes.c_void_p(addr),
        ctypes.c_int(_dtype_code(dtype)),
        ctypes.c_int64(n),
        ctypes.byref(total),
    )
    return total.value
