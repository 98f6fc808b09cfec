"""How far a decoded weight is from its source, scale group by scale group.

A group is what shares one scale, as the declared shape of the scale tensor says: one wrong scale of
thousands is as visible as a wrong tensor. Needs numpy.

What a group may be off, for ||w - decoded|| over its n elements w with the scale S:

    sqrt((r ||w||)^2 + n (h S)^2)    r the declared relative bound, h half the step between the
                                     smallest codes: every element is rounded to the nearest code
    + 2^-8 ||w||                     other writers round the quotient to bf16 first (ModelOpt's
                                     FP8), or the scale; 2^-6 for a smoothed weight, which they
                                     round three times more
    + ||what is beyond the codes||   (|w| - L S, L the largest code) of elements that are clipped,
                                     if none is beyond 2 L S: a search for the best scale
                                     (MSE, awq_clip down to half of the range) clips some

S counts as at most twice what the group's largest |w| asks for, so that a scale that is too large
for its weights is not excused by itself; four-over-six scales are 1.5 times that. It counts in full
where the declaration lets several weights share it, and as the smallest scale that can be stored
where the group is below. A group of zeros must be decoded as zeros. Weights whose codes are not the
nearest ones (GPTQ) are beyond this, and can be judged by an engine's output only.

    N  rows out    K  columns in    R  rows of a chunk    G  groups beside each other
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qschema.formats import Format
from qvalidate.decode import global_spec
from qvalidate.pairs import Chunk, Pair

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]
    F64 = npt.NDArray[np.float64]

# smallest normal number; a group's largest magnitude counts as that much at least
_TINY = {"F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-14}
# element -> (largest number, half of the step between the smallest)
_CODES = {
    "E4M3": (448.0, 2.0**-10),
    "E2M1": (6.0, 0.25),
    "INT8": (127.0, 0.5),
    "INT4": (7.0, 0.5),
}
# the smallest scale that can be stored, before the scale of the whole weight
_SMALLEST = {"F8_E4M3": 2.0**-9, "U8": 2.0**-127, "F32": 0.0}
_OTHER_WRITERS, _SMOOTHED = 2.0**-8, 2.0**-6
_LARGEST_CLIP = 2.0


@dataclass
class Deviation:
    """What was found in one weight; `error` and the ranges are of the worst group.

    `error` is ||w - decoded|| / ||w|| over the group, w as it was quantized: after smoothing. NaN
    and Inf of the source count nowhere but in `num_nonfinite`.
    """

    error: float = 0.0
    rows: tuple[int, int] = (0, 0)
    columns: tuple[int, int] = (0, 0)
    num_groups: int = 0
    num_beyond: int = 0
    num_nonfinite: int = 0


@dataclass
class _Sums:
    """By row or group: squares of error, source and what is clipped; the largest |w|; the scale."""

    error: "F64"
    norm: "F64"
    clipped: "F64"
    largest: "F32"
    scales: "F32"


@dataclass(frozen=True)
class _Limits:
    """What the format makes of a group."""

    relative: float
    rounding: float
    largest: float
    half_step: float
    tiny: float
    # a scale may be that large however small the group is
    free_scale: float


def deviation(pair: Pair) -> Deviation:
    """Return how far the decoded weight of `pair` is from its source."""
    import numpy as np

    found = Deviation()
    if not pair.rows * pair.columns:
        return found
    limits = _limits(pair)
    carried: _Sums | None = None
    with np.errstate(all="ignore"):
        for start, stop in pair.slices():
            sums = _slice_sums(pair, limits, (start, stop), found)
            if pair.steps[0] < pair.rows:
                cuts = np.arange(0, stop - start, pair.steps[0])
                _judge(found, _reduced(sums, cuts), pair, (start, stop), limits)
                continue
            # a group goes through all slices
            part = _reduced(sums, np.zeros(1, np.intp))
            carried = part if carried is None else _added(carried, part)
        if carried is not None:
            _judge(found, carried, pair, (0, pair.rows), limits)
    return found


def _limits(pair: Pair) -> _Limits:
    declared = pair.declared
    largest, half_step = _CODES[declared.element]
    return _Limits(
        relative=declared.error_bound,
        rounding=_OTHER_WRITERS if pair.smoothing is None else _SMOOTHED,
        largest=largest,
        half_step=half_step,
        tiny=_TINY[pair.weight.dtype],
        free_scale=_free_scale(declared, pair.global_scale),
    )


def _free_scale(declared: Format, global_scale: float) -> float:
    scales, whole = declared.specs("scale"), global_spec(declared)
    if scales:
        return _SMALLEST[scales[0].dtype] * global_scale
    return float("inf") if whole is not None and whole.shared != "own" else 0.0


def _slice_sums(pair: Pair, limits: _Limits, span: tuple[int, int], found: Deviation) -> _Sums:
    """Return the sums by row and group; counts what is not finite."""
    import numpy as np

    shape = (span[1] - span[0], -(-pair.columns // pair.steps[1]))
    sums = _Sums(
        error=np.empty(shape),
        norm=np.empty(shape),
        clipped=np.zeros(shape),
        largest=np.empty(shape, np.float32),
        scales=np.empty(shape, np.float32),
    )
    for chunk in pair.chunks(*span):
        first = chunk.start - span[0]
        rows = slice(first, first + len(chunk.source_RK))
        sums.scales[rows] = chunk.scales_RG
        _add_chunk(chunk, sums, rows, pair.steps[1], limits, found)
    return sums


def _add_chunk(
    chunk: Chunk, sums: _Sums, rows: slice, step: int, limits: _Limits, found: Deviation
) -> None:
    import numpy as np

    source_RK = chunk.source_RK
    error_RK = source_RK - chunk.decoded_RK
    sums.norm[rows] = _squares(source_RK, step)
    if not np.isfinite(sums.norm[rows].sum()):
        wrong = ~np.isfinite(source_RK)
        found.num_nonfinite += int(np.count_nonzero(wrong))
        error_RK[wrong] = 0
        source_RK = np.where(wrong, np.float32(0), source_RK)
        sums.norm[rows] = _squares(source_RK, step)
    sums.error[rows] = _squares(error_RK, step)
    magnitude_RK = np.abs(source_RK)
    sums.largest[rows] = _largest(magnitude_RK, step)
    reach_RG = chunk.scales_RG * np.float32(limits.largest)
    explained = np.float32(1 + limits.relative)
    if (sums.largest[rows] > reach_RG * explained).any():
        reach_RK = np.repeat(reach_RG, step, axis=1)[:, : source_RK.shape[1]]
        clipped_RK = np.where(magnitude_RK > reach_RK * explained, magnitude_RK - reach_RK, 0)
        sums.clipped[rows] = _squares(clipped_RK, step)


def _squares(values_RK: "F32", step: int) -> "F64":
    """Return the sum of squares of every `step` columns, in float64: f32 would underflow."""
    import numpy as np

    parts = _parts(values_RK.astype(np.float64), step)
    found: F64 = np.concatenate([np.einsum("rgk,rgk->rg", part, part) for part in parts], axis=1)
    return found


def _largest(values_RK: "F32", step: int) -> "F32":
    """Return the largest of every `step` columns."""
    import numpy as np

    found: F32 = np.concatenate([part.max(-1) for part in _parts(values_RK, step)], axis=1)
    return found


def _parts(
    values_RK: "npt.NDArray[np.floating]", step: int
) -> "Iterator[npt.NDArray[np.floating]]":
    """Yield [R, G, step], then [R, 1, rest] where `step` does not divide the columns."""
    rows, columns = values_RK.shape
    whole = columns // step
    if whole:
        yield values_RK[:, : whole * step].reshape(rows, whole, step)
    if whole * step < columns:
        yield values_RK[:, None, whole * step :]


def _reduced(sums: _Sums, cuts: "npt.NDArray[np.intp]") -> _Sums:
    """Return the sums of the groups of rows that begin at `cuts`."""
    import numpy as np

    return _Sums(
        error=np.add.reduceat(sums.error, cuts, axis=0),
        norm=np.add.reduceat(sums.norm, cuts, axis=0),
        clipped=np.add.reduceat(sums.clipped, cuts, axis=0),
        largest=np.maximum.reduceat(sums.largest, cuts, axis=0),
        scales=sums.scales[cuts],
    )


def _added(one: _Sums, other: _Sums) -> _Sums:
    import numpy as np

    return _Sums(
        error=one.error + other.error,
        norm=one.norm + other.norm,
        clipped=one.clipped + other.clipped,
        largest=np.maximum(one.largest, other.largest),
        scales=one.scales,
    )


def _judge(
    found: Deviation, sums: _Sums, pair: Pair, span: tuple[int, int], limits: _Limits
) -> None:
    """Count the groups of one slice that are beyond the bound, and keep the worst group."""
    import numpy as np

    error, norm = np.sqrt(sums.error), np.sqrt(sums.norm)
    # a NaN is not below the bound either
    is_beyond = ~(error <= _allowed(sums, norm, pair, span, limits))
    relative = np.where(error == 0, 0.0, error / norm)
    rank = np.where(is_beyond, np.where(np.isnan(relative), np.inf, relative), -1.0)
    at_n, at_k = np.unravel_index(int(rank.argmax()), rank.shape)
    is_worse = not found.num_beyond or rank[at_n, at_k] > found.error
    if is_beyond[at_n, at_k] and is_worse:
        row, column = span[0] + int(at_n) * pair.steps[0], int(at_k) * pair.steps[1]
        found.rows = (row, min(span[1], row + pair.steps[0]))
        found.columns = (column, min(pair.columns, column + pair.steps[1]))
        found.error = float(relative[at_n, at_k])
    found.num_groups += rank.size
    found.num_beyond += int(np.count_nonzero(is_beyond))


def _allowed(sums: _Sums, norm: "F64", pair: Pair, span: tuple[int, int], limits: _Limits) -> "F64":
    """Return how large the error of each group may be."""
    import numpy as np

    scale, largest = sums.scales.astype(np.float64), sums.largest.astype(np.float64)
    needed = np.maximum(largest, limits.tiny) / limits.largest
    floor = limits.half_step * np.minimum(scale, 2 * needed + limits.free_scale)
    count = np.multiply.outer(
        _extents(*span, pair.steps[0]), _extents(0, pair.columns, pair.steps[1])
    )
    allowed: F64 = np.sqrt((limits.relative * norm) ** 2 + count * floor**2)
    allowed += limits.rounding * norm
    is_clip = largest <= _LARGEST_CLIP * limits.largest * scale
    allowed += np.where(is_clip, np.sqrt(sums.clipped), 0.0)
    allowed[norm == 0] = 0
    return allowed


def _extents(start: int, stop: int, step: int) -> "F64":
    """Return the sizes of the groups between `start` and `stop`, the last one ragged."""
    import numpy as np

    starts = np.arange(start, stop, step)
    return (np.minimum(starts + step, stop) - starts).astype(np.float64)
