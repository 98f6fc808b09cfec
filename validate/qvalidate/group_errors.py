"""How far a decoded weight is from its source, scale group by scale group.

A group is what shares one scale, as the declared shape of the scale tensor says: one wrong scale of
thousands is as visible as a wrong tensor. Needs numpy.

What a group may be off, for ||w - decoded|| over its n elements w with the scale S:

    sqrt((r ||w||)^2 + n (h S)^2)    r the declared relative bound, h half the step between the
                                     smallest codes: every element is rounded to the nearest code
    + 2^-8 ||w||                     other writers round the quotient to bf16 first (ModelOpt's
                                     FP8), or the scale; 2^-6 for a smoothed weight, which they
                                     round three times more

Or else, if no |w| is beyond 2 L S, L the largest code, all of this for w clipped to L S: a search
for the best scale (MSE, awq_clip down to half of the range) clips some elements. The same holds for
any part of a group, so each row of one is judged by itself too: a few wrong rows are lost in the
norm of a large weight with one scale.

S counts as at most twice what the group's largest |w| asks for, so that a scale that is too large
for its weights is not excused by itself; four-over-six scales are 1.5 times that. It counts in full
where the declaration lets several weights share it, and as the smallest scale that can be stored
where the group is below. A group of zeros must be decoded as zeros. Weights whose codes are not the
nearest ones (GPTQ) are beyond this, and can be judged by an engine's output only.

    N  rows out    K  columns in    R  rows of a chunk    G  groups beside each other
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
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
    # over all groups: ||w - decoded||^2, ||w||^2, and the square of what each may be off; they
    # depend on the order of the additions, so no comparison looks at them
    error_squares: float = field(default=0.0, compare=False)
    norm_squares: float = field(default=0.0, compare=False)
    allowed_squares: float = field(default=0.0, compare=False)

    @property
    def whole_error(self) -> float:
        """||w - decoded|| / ||w|| over the whole weight; infinite where only zeros should be."""
        return _ratio(self.error_squares, self.norm_squares)

    @property
    def whole_allowed(self) -> float:
        """The same if every group were off by as much as its format explains, without clipping."""
        return _ratio(self.allowed_squares, self.norm_squares)


def _ratio(squares: float, norm_squares: float) -> float:
    if squares == 0:
        return 0.0
    return math.sqrt(squares / norm_squares) if norm_squares else math.inf


@dataclass
class _Sums:
    """By row or group: sums of squares, the largest |w|, the scale.

    `error` and `norm` are those of the source, the clipped ones of the source within the codes.
    """

    error: "F64"
    norm: "F64"
    clipped_error: "F64"
    clipped_norm: "F64"
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
    # a group that goes through all slices is judged at the end
    waiting: list[_Sums] = []
    with np.errstate(all="ignore"):
        for span in pair.slices():
            sums = _slice_sums(pair, limits, span, found)
            if pair.steps[0] < pair.rows:
                _judge(found, sums, pair, span, limits)
            else:
                waiting.append(sums)
        if waiting:
            _judge(found, _joined(waiting), pair, (0, pair.rows), limits)
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
        clipped_error=np.empty(shape),
        clipped_norm=np.empty(shape),
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
    sums.clipped_error[rows], sums.clipped_norm[rows] = sums.error[rows], sums.norm[rows]
    reach_RG = chunk.scales_RG * np.float32(limits.largest)
    is_clipped = sums.largest[rows] > reach_RG * np.float32(1 + limits.relative)
    if is_clipped.any():
        reach_RG = np.where(is_clipped, reach_RG, np.float32(np.inf))
        reach_RK = np.repeat(reach_RG, step, axis=1)[:, : source_RK.shape[1]]
        clipped_RK = np.clip(source_RK, -reach_RK, reach_RK)
        # NaN and Inf of the source stay out of it
        error_RK = np.where(error_RK == 0, 0, clipped_RK - chunk.decoded_RK)
        sums.clipped_error[rows] = _squares(error_RK, step)
        sums.clipped_norm[rows] = _squares(clipped_RK, step)


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


def _joined(parts: list[_Sums]) -> _Sums:
    import numpy as np

    names = [field.name for field in fields(_Sums)]
    return _Sums(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    )


def _reduced(sums: _Sums, cuts: "npt.NDArray[np.intp]") -> _Sums:
    """Return the sums of the groups of rows that begin at `cuts`."""
    import numpy as np

    return _Sums(
        error=np.add.reduceat(sums.error, cuts, axis=0),
        norm=np.add.reduceat(sums.norm, cuts, axis=0),
        clipped_error=np.add.reduceat(sums.clipped_error, cuts, axis=0),
        clipped_norm=np.add.reduceat(sums.clipped_norm, cuts, axis=0),
        largest=np.maximum.reduceat(sums.largest, cuts, axis=0),
        scales=sums.scales[cuts],
    )


def _judge(
    found: Deviation, sums: _Sums, pair: Pair, span: tuple[int, int], limits: _Limits
) -> None:
    """Count the groups of one slice that are beyond the bound, and keep the worst of them.

    A group is beyond it as a whole, or by one of its rows.
    """
    import numpy as np

    step = pair.steps[0]
    cuts = np.arange(0, span[1] - span[0], step)
    groups = _reduced(sums, cuts)
    is_beyond = _is_beyond(groups, pair, span, step, limits)
    allowed = _allowed(groups.norm, _steps_squares(groups, pair, span, step, limits), limits)
    found.error_squares += float(groups.error.sum())
    found.norm_squares += float(groups.norm.sum())
    found.allowed_squares += float(np.square(allowed).sum())
    _keep_worst(found, groups, is_beyond, pair, span, step)
    if step > 1:
        spread = np.repeat(np.arange(len(cuts)), np.diff([*cuts, span[1] - span[0]]))
        rows = replace(sums, largest=groups.largest[spread])
        is_beyond_row = _is_beyond(rows, pair, span, 1, limits) & ~is_beyond[spread]
        _keep_worst(found, rows, is_beyond_row, pair, span, 1)
        is_beyond |= np.logical_or.reduceat(is_beyond_row, cuts, axis=0)
    found.num_groups += is_beyond.size
    found.num_beyond += int(np.count_nonzero(is_beyond))


def _keep_worst(
    found: Deviation,
    sums: _Sums,
    is_beyond: "npt.NDArray[np.bool_]",
    pair: Pair,
    span: tuple[int, int],
    step: int,
) -> None:
    """Keep the worst part, of `step` rows, if it is worse than what was found before."""
    import numpy as np

    relative = np.where(sums.error == 0, 0.0, np.sqrt(sums.error) / np.sqrt(sums.norm))
    rank = np.where(is_beyond, np.where(np.isnan(relative), np.inf, relative), -1.0)
    at_n, at_k = np.unravel_index(int(rank.argmax()), rank.shape)
    if rank[at_n, at_k] > found.error or (is_beyond[at_n, at_k] and found.rows == (0, 0)):
        row, column = span[0] + int(at_n) * step, int(at_k) * pair.steps[1]
        found.rows = (row, min(span[1], row + step))
        found.columns = (column, min(pair.columns, column + pair.steps[1]))
        found.error = float(relative[at_n, at_k])


def _is_beyond(
    sums: _Sums, pair: Pair, span: tuple[int, int], step: int, limits: _Limits
) -> "npt.NDArray[np.bool_]":
    """Return which parts, of `step` rows, are beyond the bound."""
    import numpy as np

    scale, largest = sums.scales.astype(np.float64), sums.largest.astype(np.float64)
    steps_squares = _steps_squares(sums, pair, span, step, limits)

    def is_within(error: "F64", norm: "F64") -> "npt.NDArray[np.bool_]":
        within: npt.NDArray[np.bool_] = np.sqrt(error) <= _allowed(norm, steps_squares, limits)
        return within

    # a NaN is within nothing
    is_clip = largest <= _LARGEST_CLIP * limits.largest * scale
    return ~(
        is_within(sums.error, sums.norm)
        | (is_clip & is_within(sums.clipped_error, sums.clipped_norm))
    )


def _steps_squares(
    sums: _Sums, pair: Pair, span: tuple[int, int], step: int, limits: _Limits
) -> "F64":
    """Return n (h S)^2 of each part: what rounding to the nearest code can add up to."""
    import numpy as np

    scale, largest = sums.scales.astype(np.float64), sums.largest.astype(np.float64)
    needed = np.maximum(largest, limits.tiny) / limits.largest
    floor = limits.half_step * np.minimum(scale, 2 * needed + limits.free_scale)
    count = np.multiply.outer(_extents(*span, step), _extents(0, pair.columns, pair.steps[1]))
    found: F64 = count * floor**2
    return found


def _allowed(norm: "F64", steps_squares: "F64", limits: _Limits) -> "F64":
    """Return what each part may be off, from its ||w||^2."""
    import numpy as np

    allowed: F64 = np.sqrt(limits.relative**2 * norm + steps_squares)
    allowed += limits.rounding * np.sqrt(norm)
    allowed[norm == 0] = 0
    return allowed


def _extents(start: int, stop: int, step: int) -> "F64":
    """Return the sizes of the groups between `start` and `stop`, the last one ragged."""
    import numpy as np

    starts = np.arange(start, stop, step)
    return (np.minimum(starts + step, stop) - starts).astype(np.float64)
