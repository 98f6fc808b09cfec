"""What a scale tensor holds, read in pieces by position: no numpy, no torch, flat memory.

Scales are floats of 16, 32 or 64 bits, E4M3 (block scales of NVFP4) or, as U8, E8M0: the exponent
of two plus 127, and 255 for NaN.
"""

import math
import os
import struct
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

from qschema.dtypes import BITS
from qschema.safetensors import Stored

# as in the declarations; kv: of the KV cache
ScaleRole: TypeAlias = Literal["codes", "scale", "global", "input", "smoothing", "kv"]

_PIECE_NBYTES = 1 << 20
# smallest normal f32; below it a division on a GPU may flush to zero
F32_TINY = 2.0**-126


def _e4m3(code: int) -> float:
    magnitude = code & 0x7F
    if magnitude == 0x7F:
        return math.nan
    exponent, mantissa = magnitude >> 3, magnitude & 7
    value = math.ldexp(8 + mantissa if exponent else mantissa, max(exponent, 1) - 10)
    return -value if code & 0x80 else value


E4M3 = tuple(_e4m3(code) for code in range(256))
E8M0 = tuple(math.nan if code == 255 else math.ldexp(1.0, code - 127) for code in range(256))
# what one byte stands for
BYTES: Mapping[str, tuple[float, ...]] = {"F8_E4M3": E4M3, "U8": E8M0}
_FLOATS = ("F32", "BF16", "F16", "F64")


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


@dataclass(frozen=True)
class Scale:
    """One scale tensor: what it is for, and what it holds."""

    role: ScaleRole
    stats: ScaleStats


def all_stats(wanted: Sequence[tuple[Stored, ScaleRole]]) -> list[ScaleStats | None]:
    """Return `scale_stats` of each; a file is opened once, and told before what will be read."""
    found: list[ScaleStats | None] = [None] * len(wanted)
    places: dict[Path, list[int]] = defaultdict(list)
    for place, (stored, _) in enumerate(wanted):
        places[stored.file].append(place)
    for path, members in places.items():
        with open(path, "rb") as file:
            # thousands of small reads far apart: the disk can have them all at once
            for stored in (wanted[place][0] for place in members):
                os.posix_fadvise(
                    file.fileno(), stored.offset, stored.nbytes, os.POSIX_FADV_WILLNEED
                )
            for place in members:
                stored, role = wanted[place]
                found[place] = _stats(stored, role, file.fileno())
    return found


def scale_stats(stored: Stored, *, role: ScaleRole = "scale") -> ScaleStats | None:
    """Return what `stored` holds, None if its dtype is none of scales (U8 only of row scales)."""
    return all_stats([(stored, role)])[0]


def _stats(stored: Stored, role: ScaleRole, descriptor: int) -> ScaleStats | None:
    if stored.dtype in _FLOATS:
        return _float_stats(stored, descriptor)
    if stored.dtype == "F8_E4M3" or (stored.dtype == "U8" and role == "scale"):
        return _byte_stats(stored, BYTES[stored.dtype], descriptor)
    return None


def scalar(stored: Stored) -> float | None:
    """Return the number that a tensor of one float holds, None if it is no such tensor."""
    if stored.dtype not in _FLOATS or stored.nbytes * 8 != BITS[stored.dtype]:
        return None
    with open(stored.file, "rb") as file:
        (piece,) = _pieces(stored, file.fileno())
    return float(_decode(piece, stored.dtype)[0])


def _float_stats(stored: Stored, descriptor: int) -> ScaleStats:
    count = num_nan = num_inf = num_zero = num_negative = num_denormal = 0
    minimum, maximum = math.inf, -math.inf
    for piece in _pieces(stored, descriptor):
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


def _byte_stats(stored: Stored, values: tuple[float, ...], descriptor: int) -> ScaleStats:
    """Return the stats of scales of one byte each; the smallest E8M0 is no denormal there."""
    ascending = sorted((code for code in range(256) if values[code] > 0), key=values.__getitem__)
    positive, found = bytes(ascending), set[int]()
    others: Counter[int] = Counter()
    for piece in _pieces(stored, descriptor):
        # searches in C: one for what is odd, and one for every code beyond the extremes
        others.update(piece.translate(None, positive))
        for codes in (positive, positive[::-1]):
            found.update(islice((code for code in codes if code in piece), 1))
    finite = [values[code] for code in found.union(others) if math.isfinite(values[code])]
    return ScaleStats(
        stored=stored,
        count=stored.nbytes,
        num_nan=sum(num for code, num in others.items() if math.isnan(values[code])),
        num_inf=0,
        num_zero=sum(num for code, num in others.items() if values[code] == 0),
        num_negative=sum(num for code, num in others.items() if values[code] < 0),
        num_denormal=0,
        minimum=min(finite, default=math.inf),
        maximum=max(finite, default=-math.inf),
    )


def _pieces(stored: Stored, descriptor: int) -> Iterator[bytes]:
    for start in range(0, stored.nbytes, _PIECE_NBYTES):
        want = min(_PIECE_NBYTES, stored.nbytes - start)
        yield os.pread(descriptor, want, stored.offset + start)


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
