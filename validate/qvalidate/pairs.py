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
    F64 = npt.NDArray[np.float64]

# source bytes that are decoded at a time
_SLICE_NBYTES = 4 << 20
# elements that are compared at a time: their float64 stay in a core's cache
_CHUNK_ELEMENTS = 1 << 15


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


def row_factors(pair: Pair) -> "F64":
    """Return for each row the factor that brings the source closest to what was decoded, [N].

    It is 1.0 for a row of zeros.
    """
    import numpy as np

    found = np.ones(pair.rows)
    with np.errstate(all="ignore"):
        for span in pair.slices():
            for chunk in pair.chunks(*span):
                source_RK = chunk.source_RK.astype(np.float64)
                norm_R = np.einsum("rk,rk->r", source_RK, source_RK)
                dot_R = np.einsum("rk,rk->r", source_RK, chunk.decoded_RK.astype(np.float64))
                stop = chunk.start + len(source_RK)
                found[chunk.start : stop] = np.where(norm_R > 0, dot_R / norm_R, 1.0)
    return found


def _step(axis: str, shape: tuple[str, ...], size: int) -> int:
    for dim in shape:
        match = re.fullmatch(rf"(?:ceil\()?{axis}(?:/(\d+))?\)?", dim)
        if match is not None:
            return int(match[1] or 1)
    return size
