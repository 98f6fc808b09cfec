"""How far a decoded weight is from its source, scale group by scale group, streamed by rows.

A group is what shares one scale, as the declared shape of the scale tensor says: one wrong scale of
thousands is as visible as a wrong tensor. Needs numpy.

    N  rows out    K  columns in    R  rows of a slice or chunk    G  groups beside each other
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qschema.dtypes import nbytes
from qschema.formats import Format
from qschema.safetensors import Stored
from qvalidate.decode import dequantize, read, widen

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]
    F64 = npt.NDArray[np.float64]

# source bytes that are decoded at a time
_SLICE_NBYTES = 4 << 20
# elements that are compared at a time: their float64 stay in a core's cache
_CHUNK_ELEMENTS = 1 << 15
# smallest normal number; a group's largest magnitude counts as that much at least
_TINY = {"F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-14}
# codes -> (largest number, half of the step between the smallest)
_CODES = {"F8_E4M3": (448.0, 2.0**-10)}


@dataclass
class Deviation:
    """What was found in one weight; `error` and the ranges are of the worst group.

    `error` is ||w - decoded|| / ||w|| over the group. NaN and Inf of the source count nowhere but
    in `num_nonfinite`.
    """

    error: float = 0.0
    rows: tuple[int, int] = (0, 0)
    columns: tuple[int, int] = (0, 0)
    num_groups: int = 0
    num_beyond: int = 0
    num_nonfinite: int = 0


@dataclass
class _Grid:
    """The groups of one weight: cuts every `row_step` rows and `column_step` columns."""

    rows: int
    columns: int
    row_step: int
    column_step: int

    def heights(self, start: int, stop: int) -> "F64":
        import numpy as np

        starts = np.arange(start, stop, self.row_step)
        return (np.minimum(starts + self.row_step, stop) - starts).astype(np.float64)

    def widths(self) -> "F64":
        import numpy as np

        starts = np.arange(0, self.columns, self.column_step)
        return (np.minimum(starts + self.column_step, self.columns) - starts).astype(np.float64)


def deviation(weight: Stored, outputs: Mapping[str, Stored], declared: Format) -> Deviation:
    """Return how far the decoded `outputs` are from `weight`.

    A group is beyond what the format explains if its error is above the declared bound, plus half
    a step of the smallest codes per element, which is what remains of weights near underflow. A
    group of zeros must be decoded as zeros.
    """
    import numpy as np

    rows, columns = weight.shape
    found = Deviation()
    if not rows * columns:
        return found
    grid = _Grid(rows, columns, *group_steps(declared, rows=rows, columns=columns))
    floor = _floor(weight, declared)
    carried: F64 | None = None
    for start, stop in _slices(weight, grid, declared):
        with np.errstate(all="ignore"):
            sums_2RG = _slice_sums(weight, outputs, declared, grid, (start, stop), found)
        if grid.row_step >= rows:
            # a group goes through all slices
            part = sums_2RG.sum(1, keepdims=True)
            carried = part if carried is None else carried + part
            if stop == rows:
                _judge(found, carried, grid, (0, rows), declared.error_bound, floor)
        else:
            cuts = np.arange(0, stop - start, grid.row_step)
            sums = np.add.reduceat(sums_2RG, cuts, axis=1)
            _judge(found, sums, grid, (start, stop), declared.error_bound, floor)
    return found


def group_steps(declared: Format, *, rows: int, columns: int) -> tuple[int, int]:
    """Return the rows and columns that share a scale, all of them where no dimension says less."""
    scales = [spec.shape for spec in declared.tensors if spec.role == "scale"]
    return (
        min((_step("N", shape, rows) for shape in scales), default=rows),
        min((_step("K", shape, columns) for shape in scales), default=columns),
    )


def _step(axis: str, shape: tuple[str, ...], size: int) -> int:
    for dim in shape:
        match = re.fullmatch(rf"(?:ceil\()?{axis}(?:/(\d+))?\)?", dim)
        if match is not None:
            return int(match[1] or 1)
    return size


def _slices(weight: Stored, grid: _Grid, declared: Format) -> Iterator[tuple[int, int]]:
    unit = declared.block_rows
    if grid.row_step < grid.rows:
        unit = math.lcm(unit, grid.row_step)
    unit_nbytes = max(1, nbytes(weight.dtype, (unit, grid.columns)))
    each = max(1, _SLICE_NBYTES // unit_nbytes) * unit
    for start in range(0, grid.rows, each):
        yield start, min(grid.rows, start + each)


def _slice_sums(
    weight: Stored,
    outputs: Mapping[str, Stored],
    declared: Format,
    grid: _Grid,
    span: tuple[int, int],
    found: Deviation,
) -> "F64":
    """Return the sums of squares of error and source, [2, R, G]; counts what is not finite."""
    import numpy as np

    (start, stop), columns = span, grid.columns
    row_nbytes = nbytes(weight.dtype, (1, columns))
    raw = read(weight, start * row_nbytes, (stop - start) * row_nbytes)
    spans = declared.spans(start=start, stop=stop, columns=columns)
    parts = {suffix: read(outputs[suffix], *place) for suffix, place in spans.items()}
    decoded_RK = dequantize(declared, parts, rows=stop - start, columns=columns)
    sums_2RG = np.empty((2, stop - start, -(-columns // grid.column_step)))
    each = max(1, _CHUNK_ELEMENTS // columns)
    for row in range(0, stop - start, each):
        chunk = slice(row, row + each)
        last = min(row + each, stop - start)
        source_RK = widen(memoryview(raw)[row * row_nbytes : last * row_nbytes], weight.dtype)
        source_RK = source_RK.reshape(last - row, columns)
        error_RK = source_RK - decoded_RK[chunk]
        _squares(source_RK, grid.column_step, sums_2RG[1, chunk])
        if not np.isfinite(sums_2RG[1, chunk].sum()):
            wrong = ~np.isfinite(source_RK)
            found.num_nonfinite += int(np.count_nonzero(wrong))
            error_RK[wrong] = 0
            _squares(
                np.where(wrong, np.float32(0), source_RK), grid.column_step, sums_2RG[1, chunk]
            )
        _squares(error_RK, grid.column_step, sums_2RG[0, chunk])
    return sums_2RG


def _squares(values_RK: "F32", step: int, out_RG: "F64") -> None:
    """Write the sum of squares of every `step` columns, in float64: f32 would underflow."""
    import numpy as np

    wide_RK = values_RK.astype(np.float64)
    rows, columns = wide_RK.shape
    whole = columns // step
    if whole:
        parts = wide_RK[:, : whole * step].reshape(rows, whole, step)
        np.einsum("rgk,rgk->rg", parts, parts, out=out_RG[:, :whole])
    if whole * step < columns:
        rest = wide_RK[:, whole * step :]
        np.einsum("rk,rk->r", rest, rest, out=out_RG[:, whole])


def _floor(weight: Stored, declared: Format) -> tuple[float, float]:
    """Return (share of the largest magnitude that an element may be off, its smallest value)."""
    dtype = next(spec.dtype for spec in declared.tensors if spec.role == "codes")
    largest, half_step = _CODES.get(dtype, (1.0, 0.0))
    return half_step / largest, _TINY[weight.dtype]


def _judge(
    found: Deviation,
    sums_2GG: "F64",
    grid: _Grid,
    span: tuple[int, int],
    bound: float,
    floor: tuple[float, float],
) -> None:
    """Count the groups of one slice that are beyond the bound, and keep the worst group."""
    import numpy as np

    error, norm = np.sqrt(sums_2GG)
    count = np.multiply.outer(grid.heights(*span), grid.widths())
    # the scale follows the largest magnitude, which the norm is at least
    allowed = bound * norm + np.sqrt(count) * floor[0] * np.maximum(norm, floor[1])
    allowed[norm == 0] = 0
    # a NaN is not below the bound either
    is_beyond = ~(error <= allowed)
    with np.errstate(all="ignore"):
        relative = np.where(error == 0, 0.0, error / norm)
    rank = np.where(is_beyond, np.where(np.isnan(relative), np.inf, relative), -1.0)
    at_n, at_k = np.unravel_index(int(rank.argmax()), rank.shape)
    is_worse = not found.num_beyond or rank[at_n, at_k] > found.error
    if is_beyond[at_n, at_k] and is_worse:
        row, column = span[0] + int(at_n) * grid.row_step, int(at_k) * grid.column_step
        found.rows = (row, min(span[1], row + grid.row_step))
        found.columns = (column, min(grid.columns, column + grid.column_step))
        found.error = float(relative[at_n, at_k])
    found.num_groups += rank.size
    found.num_beyond += int(np.count_nonzero(is_beyond))
