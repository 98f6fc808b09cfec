"""Weights as matrices of float32, whatever they are stored as, and what two of them differ by.

N  rows out    K  columns in    R  rows of a slice
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from qschema.dtypes import nbytes
from qschema.formats import Format
from qvalidate.decode import Source, dequantize, global_scale, read, widen

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]

# elements of each side that are decoded at a time
_SLICE_ELEMENTS = 1 << 20
# elements that are compared at a time: their float64 stay in a core's cache, and OpenBLAS starts
# threads for a dot product of more than 10 000, which cost more than they bring
_CHUNK_ELEMENTS = 1 << 13


class Matrix(Protocol):
    """A weight [N, K] that can be read by rows."""

    @property
    def size(self) -> tuple[int, int]:
        """Return (rows, columns)."""

    @property
    def unit(self) -> int:
        """Return the rows that can't be told apart: slices start at multiples of it."""

    def rows(self, start: int, stop: int) -> "F32":
        """Return rows [start, stop) as float32; raises OSError for a file that ends before."""


@dataclass(frozen=True)
class Plain:
    """A tensor of BF16, F16 or F32; the dimensions but the last one are its rows."""

    source: Source

    unit = 1

    @property
    def size(self) -> tuple[int, int]:
        shape = self.source.shape
        return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)

    def rows(self, start: int, stop: int) -> "F32":
        columns = self.size[1]
        row = nbytes(self.source.dtype, (columns,))
        raw = read(self.source, start * row, (stop - start) * row)
        return widen(raw, self.source.dtype).reshape(stop - start, columns)


@dataclass(frozen=True)
class Encoded:
    """A quantized weight: its tensors by the suffixes of their declaration."""

    declared: Format
    outputs: Mapping[str, Source]
    size: tuple[int, int]

    @property
    def unit(self) -> int:
        return self.declared.block_rows

    def rows(self, start: int, stop: int) -> "F32":
        columns = self.size[1]
        spans = self.declared.spans(start=start, stop=stop, columns=columns)
        parts = {suffix: read(self.outputs[suffix], *place) for suffix, place in spans.items()}
        decoded = dequantize(
            self.declared, parts, rows=stop - start, columns=columns, global_scale=self._global
        )
        return decoded if self._smoothing is None else decoded * self._smoothing

    @cached_property
    def _global(self) -> float:
        return global_scale(self.declared, self.outputs)

    @cached_property
    def _smoothing(self) -> "F32 | None":
        """What the input is multiplied with, [K]: as good as multiplying the columns with it."""
        spec = next(iter(self.declared.specs("smoothing")), None)
        source = self.outputs.get(spec.suffix) if spec else None
        if source is None:
            return None
        return widen(read(source, 0, nbytes(source.dtype, source.shape)), source.dtype)


@dataclass
class Errors:
    """Sums over the elements that are finite on both sides."""

    error: float = 0.0
    norm: float = 0.0
    max_abs: float = 0.0
    num_nonfinite: int = 0

    @property
    def relative(self) -> float | None:
        """||A - B|| / ||A||; None if A is all zeros and B is not."""
        if self.error == 0:
            return 0.0
        return math.sqrt(self.error / self.norm) if self.norm else None

    def add(self, other: "Errors") -> None:
        """Take in the sums of another weight."""
        self.error += other.error
        self.norm += other.norm
        self.max_abs = max(self.max_abs, other.max_abs)
        self.num_nonfinite += other.num_nonfinite


def add_errors(found: Errors, a: Matrix, b: Matrix) -> None:
    """Add to `found` what `a` and `b`, of one size, differ by."""
    import numpy as np

    rows, columns = a.size
    unit = math.lcm(a.unit, b.unit)
    each = max(1, _SLICE_ELEMENTS // max(1, unit * columns)) * unit
    with np.errstate(all="ignore"):
        for start in range(0, rows if columns else 0, each):
            stop = min(rows, start + each)
            one, other = a.rows(start, stop).reshape(-1), b.rows(start, stop).reshape(-1)
            for place in range(0, len(one), _CHUNK_ELEMENTS):
                chunk = slice(place, place + _CHUNK_ELEMENTS)
                _add_chunk(found, one[chunk], other[chunk])


def _add_chunk(found: Errors, a: "F32", b: "F32") -> None:
    import numpy as np

    error, norm = _difference(a, b), a.astype(np.float64)
    total = float(np.dot(error, error))
    if not math.isfinite(total) or not math.isfinite(float(norm.sum())):
        wrong = ~(np.isfinite(a) & np.isfinite(b))
        is_same = (a == b) | (np.isnan(a) & np.isnan(b))
        found.num_nonfinite += int(np.count_nonzero(wrong & ~is_same))
        error[wrong] = norm[wrong] = 0
        total = float(np.dot(error, error))
    found.error += total
    found.norm += float(np.dot(norm, norm))
    found.max_abs = max(found.max_abs, float(np.abs(error).max(initial=0.0)))


def _difference(a: "F32", b: "F32") -> "npt.NDArray[np.float64]":
    import numpy as np

    found: npt.NDArray[np.float64] = np.subtract(a, b, dtype=np.float64)
    return found
