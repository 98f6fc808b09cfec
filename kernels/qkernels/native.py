"""The C kernels on raw addresses: no torch, no numpy, no Python object per element.

The library is compiled at install (hatch_build.py) from `native_src/*.c` and loaded with ctypes,
which releases the GIL while a kernel runs. Nothing is shared between calls, so any number of
threads may call. `QKERNELS_NATIVE=0` in the environment turns it off.

Addresses need the alignment of their element type only. Buffers are C-contiguous, row major, and
must not overlap. A dtype is its safetensors name: "BF16", "F16" or "F32".

`native_src/<codec>.c` exports `qk_<codec>_quantize` and `qk_<codec>_dequantize`; adding a codec
adds a file.
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
    """Finite elements clipped by more than rounding: |w / scale| > 464 for e4m3, > 7 for e2m1, more
    than half a step outside the codes for integers."""


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


def supports(codec: str) -> bool:
    """True when the library is available and has kernels of this name."""
    library = _library()
    return library is not None and hasattr(library, f"qk_{codec.lower()}_quantize")


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


def _check_shape(status: int, codec: str, rows: int, cols: int) -> None:
    """None. Raises: KernelError for the status that is left when the other arguments are right."""
    if status != 0:
        raise KernelError(
            f"{codec}: expected a weight that its groups divide, got shape ({rows}, {cols})"
        )


def quantize(
    codec: str,
    src_addr: int,
    dtype: str,
    rows: int,
    cols: int,
    out_addrs: Sequence[int],
    err2_addr: int = 0,
    ref2_addr: int = 0,
    *,
    global_scale: float = 1.0,
) -> Counts:
    """Counts of one weight, after writing its quantized tensors.

    src_addr: rows x cols elements of dtype. out_addrs: one per tensor whose rows follow the
    weight's, in the order the codec names them (weight, then weight_scale where it has a row
    or block scale). global_scale: the f32 scale of the whole weight, positive and finite, of FP8
    (weight_scale), NVFP4 and W4A8_NVFP4_FP8 (weight_scale_2); the others ignore it. err2_addr,
    ref2_addr: double[rows] that receive per row the sums over finite elements of
    (w - q * scale)^2 and of w^2, or both 0; the same doubles on every instruction set and for
    every way of slicing the rows that does not cut a block. Rounding and special values: see the
    codec's module.

    Raises: KernelError for an unknown dtype or codec, for a shape that the codec's groups do not
    divide, for one of the sums without the other, or when the library is not available.
    """
    function = _symbol(f"qk_{codec.lower()}_quantize")
    if bool(err2_addr) != bool(ref2_addr):
        raise KernelError(
            f"{codec}: expected both or neither of err2_addr and ref2_addr, "
            f"got {err2_addr:#x} and {ref2_addr:#x}"
        )
    counts = (ctypes.c_int64 * 2)()
    status = function(
        ctypes.c_void_p(src_addr),
        ctypes.c_int(_dtype_code(dtype)),
        ctypes.c_int64(rows),
        ctypes.c_int64(cols),
        ctypes.c_float(global_scale),
        _addresses(out_addrs),
        ctypes.c_void_p(err2_addr),
        ctypes.c_void_p(ref2_addr),
        counts,
    )
    _check_shape(status, codec, rows, cols)
    return Counts(num_nonfinite=counts[0], num_saturated=counts[1])


def dequantize(
    codec: str,
    in_addrs: Sequence[int],
    dtype: str,
    rows: int,
    cols: int,
    out_addr: int,
    *,
    global_scale: float = 1.0,
) -> None:
    """None, after writing rows x cols elements of dtype at out_addr.

    in_addrs and global_scale: as out_addrs and global_scale of `quantize`. value(q) * scale in f32
    (NVFP4's scale is itself a product in f32), then one rounding to dtype, ties to even; NaN codes
    and scales become the positive quiet NaN.

    Raises: KernelError for an unknown dtype or codec, for a shape that the codec's groups do not
    divide, or when the library is not available.
    """
    function = _symbol(f"qk_{codec.lower()}_dequantize")
    status = function(
        _addresses(in_addrs),
        ctypes.c_float(global_scale),
        ctypes.c_int(_dtype_code(dtype)),
        ctypes.c_int64(rows),
        ctypes.c_int64(cols),
        ctypes.c_void_p(out_addr),
    )
    _check_shape(status, codec, rows, cols)


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


def amax(addr: int, dtype: str, n: int) -> tuple[float, int]:
    """Largest finite magnitude of the n elements of dtype at addr, exact, and how many are NaN or
    Inf. The magnitude is 0.0 where nothing is finite.

    Raises: KernelError for an unknown dtype, or when the library is not available.
    """
    largest = ctypes.c_float(0.0)
    num_nonfinite = ctypes.c_int64(0)
    _symbol("qk_amax")(
        ctypes.c_void_p(addr),
        ctypes.c_int(_dtype_code(dtype)),
        ctypes.c_int64(n),
        ctypes.byref(largest),
        ctypes.byref(num_nonfinite),
    )
    return largest.value, num_nonfinite.value


def exact_sum(addr: int, n: int, parts: "ctypes.Array[ctypes.c_double]", num_parts: int) -> int:
    """Number of parts after adding the n doubles at addr to the first num_parts of `parts`.

    The sum of the parts is exactly that of all numbers; `parts` has room for 2100. -1, with the
    parts as they were, if a number is not finite.

    Raises: KernelError when the library is not available.
    """
    num = ctypes.c_int64(num_parts)
    status = _symbol("qk_exact_sum")(
        ctypes.c_void_p(addr), ctypes.c_int64(n), parts, ctypes.byref(num)
    )
    return num.value if status == 0 else -1


def transpose(src_addr: int, out_addr: int, itemsize: int, rows: int, cols: int) -> None:
    """None, after writing at out_addr the cols x rows transpose of rows x cols elements.

    Elements are bytes that move as they are; itemsize: 1, 2 or 4.

    Raises: KernelError for another itemsize, or when the library is not available.
    """
    status = _symbol("qk_transpose")(
        ctypes.c_void_p(src_addr),
        ctypes.c_void_p(out_addr),
        ctypes.c_int64(itemsize),
        ctypes.c_int64(rows),
        ctypes.c_int64(cols),
    )
    if status != 0:
        raise KernelError(f"expected an itemsize of 1, 2 or 4, got {itemsize}")


def scale_columns(
    addr: int, dtype: str, rows: int, cols: int, factor_addr: int, divisor_addr: int = 0
) -> None:
    """None, after multiplying column c of the weight at addr by float factor[c], in place.

    Then divides it by float divisor[c], if given. Product and quotient are rounded to f32, the
    result to dtype, ties to even; every NaN becomes the positive quiet NaN.

    Raises: KernelError for an unknown dtype, or when the library is not available.
    """
    _scale("qk_scale_columns", addr, dtype, rows, cols, factor_addr, divisor_addr)


def scale_rows(
    addr: int, dtype: str, rows: int, cols: int, factor_addr: int, divisor_addr: int = 0
) -> None:
    """None, after multiplying row r of the weight at addr by float factor[r], in place.

    Divisor and rounding: see `scale_columns`.

    Raises: KernelError for an unknown dtype, or when the library is not available.
    """
    _scale("qk_scale_rows", addr, dtype, rows, cols, factor_addr, divisor_addr)


def _scale(
    symbol: str, addr: int, dtype: str, rows: int, cols: int, factor_addr: int, divisor_addr: int
) -> None:
    _symbol(symbol)(
        ctypes.c_void_p(addr),
        ctypes.c_int(_dtype_code(dtype)),
        ctypes.c_int64(rows),
        ctypes.c_int64(cols),
        ctypes.c_void_p(factor_addr),
        ctypes.c_void_p(divisor_addr),
    )
