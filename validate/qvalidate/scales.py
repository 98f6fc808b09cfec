"""What a scale tensor holds, read in pieces by position: no numpy, no torch, flat memory."""

import math
import os
import struct
import sys
from array import array
from dataclasses import dataclass

from qschema.dtypes import BITS
from qschema.safetensors import Stored

_PIECE_NBYTES = 1 << 20
# smallest normal f32; below it a division on a GPU may flush to zero
F32_TINY = 2.0**-126


@dataclass(frozen=True)
class ScaleStats:
    """Counts and extremes of one scale tensor; minimum and maximum are over its finite values."""

    stored: Stored
    count: int
    num_nan: int
    num_inf: int
    num_zero: int
    num_negative: int
    num_denormal: int
    minimum: float
    maximum: float


def scale_stats(stored: Stored) -> ScaleStats | None:
    """Return what `stored` holds, None if its dtype is not F32, BF16, F16 or F64."""
    if stored.dtype not in ("F32", "BF16", "F16", "F64"):
        return None
    count = num_nan = num_inf = num_zero = num_negative = num_denormal = 0
    minimum, maximum = math.inf, -math.inf
    with open(stored.file, "rb") as file:
        for start in range(0, stored.nbytes, _PIECE_NBYTES):
            want = min(_PIECE_NBYTES, stored.nbytes - start)
            piece = os.pread(file.fileno(), want, stored.offset + start)
            values = _decode(piece, stored.dtype)
            count += len(values)
            # one pass in C tells whether anything is odd; a sum keeps every NaN and Inf
            if not math.isfinite(sum(values)):
                num_nan += sum(1 for value in values if math.isnan(value))
                num_inf += sum(1 for value in values if math.isinf(value))
                values = array("d", (value for value in values if math.isfinite(value)))
            if not values:
                continue
            low, high = min(values), max(values)
            minimum, maximum = min(minimum, low), max(maximum, high)
            if low < F32_TINY:
                num_zero += sum(1 for value in values if value == 0)
                num_negative += sum(1 for value in values if value < 0)
                num_denormal += sum(1 for value in values if 0 < value < F32_TINY)
    return ScaleStats(
        stored=stored,
        count=count,
        num_nan=num_nan,
        num_inf=num_inf,
        num_zero=num_zero,
        num_negative=num_negative,
        num_denormal=num_denormal,
        minimum=minimum,
        maximum=maximum,
    )


def _decode(piece: bytes, dtype: str) -> "array[float]":
    if dtype == "F16":
        return array("d", struct.unpack(f"<{len(piece) // 2}e", piece))
    if dtype == "BF16":
        # a bf16 is the upper half of an f32
        wide = bytearray(2 * len(piece))
        wide[2::4], wide[3::4] = piece[::2], piece[1::2]
        piece = bytes(wide)
    values = array("d" if BITS[dtype] == 64 else "f", piece)
    if sys.byteorder == "big":
        values.byteswap()
    return values
