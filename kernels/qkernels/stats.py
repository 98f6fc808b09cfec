"""What quantization lost, per row, in torch: the definition that C and Triton compute too.

Shapes: N rows out, K columns in, S = ceil(K / 128) segments, C columns of a segment.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# columns under one scale, and sums that are kept apart within them; as in native_src/qk.h
SEGMENT = 128
LANES = 16
# elements that are decoded to f32 at a time
CHUNK_NUMEL = {"cpu": 1 << 20, "cuda": 1 << 22}


@dataclass(frozen=True, kw_only=True)
class RowStats:
    """Error sums and counts, on the weight's device: reading one waits for the device."""

    err2_N: Tensor
    """[N] f64: per row, the sum over finite elements of (w - q * scale)^2."""
    ref2_N: Tensor
    """[N] f64: per row, the sum over finite elements of w^2."""
    num_nonfinite: Tensor
    """[] int64: NaN and Inf elements."""
    num_saturated: Tensor
    """[] int64: finite elements clipped by more than rounding."""

    @classmethod
    def empty(cls, n: int, device: torch.device) -> "RowStats":
        """Sums to be written, counts of nothing yet."""
        sums_2N = torch.empty(2, n, dtype=torch.float64, device=device)
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        return cls(
            err2_N=sums_2N[0], ref2_N=sums_2N[1], num_nonfinite=counts[0], num_saturated=counts[1]
        )


def error_stats(w_NK: Tensor, value_NK: Tensor, scale_NK: Tensor, saturated_NK: Tensor) -> RowStats:
    """Statistics of w_NK (f32) against value_NK * scale_NK, per row.

    value_NK: f32, what the codes stand for before scaling. scale_NK: f32, positive. saturated_NK:
    bool, finite elements clipped by more than rounding.

    Up to eight squares are added in f32, 16 columns apart, in the order and the unit that the
    native library uses; the f64 sums of those differ from its in the last bits only. So the two
    agree to about 15 digits, while all but an eighth of the work is f32.
    """
    finite_NK = w_NK.isfinite()
    unit_NS1 = _unit(_segments(scale_NK).amax(2, keepdim=True))
    ref_NSC = _segments(w_NK.where(finite_NK, 0.0)) * unit_NS1
    value_NSC = _segments(value_NK.where(finite_NK, 0.0))
    diff_NSC = ref_NSC - value_NSC * (_segments(scale_NK) * unit_NS1)
    back_NS1 = 1.0 / unit_NS1.double().square()
    return RowStats(
        err2_N=(_lane_squares(diff_NSC) * back_NS1).sum(dim=(1, 2)),
        ref2_N=(_lane_squares(ref_NSC) * back_NS1).sum(dim=(1, 2)),
        num_nonfinite=(~finite_NK).sum(),
        num_saturated=saturated_NK.sum(),
    )


def _unit(scale: Tensor) -> Tensor:
    """A power of two near 1 / scale: squares of numbers times this stay inside f32's range."""
    exponent = (scale.view(torch.int32) >> 23).clamp(27, 227)
    return ((254 - exponent) << 23).view(torch.float32)


def _segments(x_NK: Tensor) -> Tensor:
    """The columns in segments of 128, padded with zeros: [N, S, 128]."""
    n, k = x_NK.shape
    segments = -(-k // SEGMENT)
    padded = torch.nn.functional.pad(x_NK, (0, segments * SEGMENT - k))
    return padded.view(n, segments, SEGMENT)


def _lane_squares(x_NSC: Tensor) -> Tensor:
    """f32 sums, as f64, of the squares of every 16th column of a segment: [N, S, 16]."""
    n, segments, _ = x_NSC.shape
    squares = x_NSC.square().view(n, segments, SEGMENT // LANES, LANES)
    total = squares[:, :, 0]
    for step in range(1, SEGMENT // LANES):
        total = total + squares[:, :, step]
    return total.double()


def by_row_chunks(
    w_NK: Tensor, chunk_stats: Callable[[int, int], RowStats], *, multiple: int = 1
) -> RowStats:
    """Statistics of all rows, from `chunk_stats(start, stop)` on bounded chunks of rows.

    Chunks start at multiples of `multiple` rows. Nothing waits for the device.
    """
    n, k = w_NK.shape
    numel = CHUNK_NUMEL.get(w_NK.device.type, CHUNK_NUMEL["cpu"])
    step = max(numel // max(k, 1) // multiple, 1) * multiple
    sums_2N = torch.zeros(2, n, dtype=torch.float64, device=w_NK.device)
    counts = torch.zeros(2, dtype=torch.int64, device=w_NK.device)
    for start in range(0, n, step):
        stop = min(start + step, n)
        part = chunk_stats(start, stop)
        sums_2N[0, start:stop] = part.err2_N
        sums_2N[1, start:stop] = part.ref2_N
        counts[0] += part.num_nonfinite
        counts[1] += part.num_saturated
    return RowStats(
        err2_N=sums_2N[0], ref2_N=sums_2N[1], num_nonfinite=counts[0], num_saturated=counts[1]
    )
