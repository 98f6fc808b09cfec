"""A quantized weight and its source side by side, streamed by rows. Needs numpy.

N  rows out    K  columns in    R  rows of a slice or chunk    G  groups beside each other
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from qschema.dtypes import nbytes
from qschema.formats import Format
from qvalidate.decode import Source, dequantize, element_scales, global_scale, read, widen

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]

# source bytes that are decoded at a time
_SLICE_NBYTES = 4 << 20
# elements that are compared at a time: their float64 stay in a core's cache
_CHUNK_ELEMENTS = 1 << 15
# of the norm of a row, for its factor to be trusted: twice what four bits usually leave
_MOST_RESIDUE = 0.2


@dataclass(frozen=True)
class Smoothing:
    """What was taken out of a weight before it was quantized: w * rows / columns was."""

    columns: "F32 | None" = None
    rows: "F32 | None" = None

    def apply(self, source_RK: "F32", start: int) -> "F32":
        """Return rows from `start` as they were when they were quantized, in float32."""
        if self.columns is not None:
            source_RK = source_RK / self.columns
        if self.rows is not None:
            source_RK = source_RK * self.rows[start : start + len(source_RK), None]
        return source_RK


@dataclass(frozen=True)
class Chunk:
    """Some rows from `start`: the source's, what the codes stand for, and each group's scale."""

    start: int
    source_RK: "F32"
    decoded_RK: "F32"
    scales_RG: "F32"


@dataclass(frozen=True)
class Pair:
    """A source weight [N, K] and the quantized tensors that stand for it."""

    weight: Source
    outputs: Mapping[str, Source]
    declared: Format
    smoothing: Smoothing | None = None
    rows: int = field(init=False)
    columns: int = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = self.weight.shape
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "columns", columns)

    @cached_property
    def steps(self) -> tuple[int, int]:
        """The rows and columns that share a scale."""
        return group_steps(self.declared, rows=self.rows, columns=self.columns)

    @cached_property
    def global_scale(self) -> float:
        """The number of the scale of the whole weight, 1.0 without one."""
        return global_scale(self.declared, self.outputs)

    def slices(self) -> Iterator[tuple[int, int]]:
        """Yield the rows that are decoded at a time, cut between groups where groups end."""
        unit = self.declared.block_rows
        if self.steps[0] < self.rows:
            unit = math.lcm(unit, self.steps[0])
        unit_nbytes = max(1, nbytes(self.weight.dtype, (unit, self.columns)))
        each = max(1, _SLICE_NBYTES // unit_nbytes) * unit
        for start in range(0, self.rows, each):
            yield start, min(self.rows, start + each)

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        """Yield the rows of one slice in chunks."""
        columns, row_nbytes = self.columns, nbytes(self.weight.dtype, (1, self.columns))
        raw = read(self.weight, start * row_nbytes, (stop - start) * row_nbytes)
        spans = self.declared.spans(start=start, stop=stop, columns=columns)
        parts = {suffix: read(self.outputs[suffix], *place) for suffix, place in spans.items()}
        size, whole = stop - start, self.global_scale
        decoded = dequantize(self.declared, parts, rows=size, columns=columns, global_scale=whole)
        scales = element_scales(self.declared, parts, rows=size, global_scale=whole)
        each = max(1, _CHUNK_ELEMENTS // columns)
        for row in range(0, size, each):
            last = min(row + each, size)
            bytes_ = memoryview(raw)[row * row_nbytes : last * row_nbytes]
            source_RK = widen(bytes_, self.weight.dtype).reshape(last - row, columns)
            if self.smoothing is not None:
                source_RK = self.smoothing.apply(source_RK, start + row)
            yield Chunk(start + row, source_RK, decoded[row:last], self._by_row(scales, row, last))

    def _by_row(self, scales_GG: "F32", row: int, last: int) -> "F32":
        import numpy as np

        step = self.steps[0]
        if len(scales_GG) == 1 or step >= self.rows:
            return np.broadcast_to(scales_GG, (last - row, scales_GG.shape[1]))
        return scales_GG[np.arange(row, last) // step]


def group_steps(declared: Format, *, rows: int, columns: int) -> tuple[int, int]:
    """Return the rows and columns that share a scale, all of them where no dimension says less."""
    scales = [spec.shape for spec in declared.specs("scale")]
    return (
        min((_step("N", shape, rows) for shape in scales), default=rows),
        min((_step("K", shape, columns) for shape in scales), default=columns),
    )


@dataclass(frozen=True)
class Fit:
    """The factors that bring a source closest to what was decoded; 1.0 where none above 0 does.

    `is_sure` is False for those, and where what remains is too much for a factor.
    """

    factors: "F32"
    is_sure: "npt.NDArray[np.bool_]"


def fit_rows(pair: Pair) -> Fit:
    """Return a factor for each row, [N]."""
    return _fit(pair, axis=0)


def fit_columns(pair: Pair) -> Fit:
    """Return a factor for each column, [K]."""
    return _fit(pair, axis=1)


def _fit(pair: Pair, *, axis: int) -> Fit:
    import numpy as np

    dot, norm, decoded = np.zeros((3, pair.weight.shape[axis]))
    summed = "rk,rk->r" if axis == 0 else "rk,rk->k"
    with np.errstate(all="ignore"):
        for span in pair.slices():
            for chunk in pair.chunks(*span):
                one = chunk.source_RK.astype(np.float64)
                other = chunk.decoded_RK.astype(np.float64)
                rows = slice(chunk.start, chunk.start + len(one)) if axis == 0 else slice(None)
                dot[rows] += np.einsum(summed, one, other)
                norm[rows] += np.einsum(summed, one, one)
                decoded[rows] += np.einsum(summed, other, other)
        factors = dot / norm
        is_factor = np.isfinite(factors) & (factors > 0)
        is_sure = is_factor & (decoded - dot * factors <= _MOST_RESIDUE**2 * decoded)
    return Fit(np.where(is_factor, factors, 1.0).astype(np.float32), is_sure)


def _step(axis: str, shape: tuple[str, ...], size: int) -> int:
    for dim in shape:
        match = re.fullmatch(rf"(?:ceil\()?{axis}(?:/(\d+))?\)?", dim)
        if match is not None:
            return int(match[1] or 1)
    return size
