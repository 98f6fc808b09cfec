"""What quantization lost, per row, by Triton: `stats.error_stats` for any codec, in one launch.

Shapes: N rows out, K columns in. A segment is 128 columns, its squares are added in 16 lanes.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels._scales import Layout
from qkernels._triton_codes import (
    byte_numbers,
    e2m1_numbers,
    e4m3_numbers,
    e8m0_scales,
    nibble_numbers,
)
from qkernels._triton_launch import Config, choose, on_device, options
from qkernels._triton_numbers import infinity_bits, magnitude_bits, to_f32
from qkernels.stats import RowStats

SEGMENT = tl.constexpr(128)
LANES = tl.constexpr(16)
# more columns than a row has
ALL_COLS = 1 << 30


@triton.jit
def _numbers(code_ptr, rows, cols, mask, K, CODES: tl.constexpr, FAST: tl.constexpr):
    """Numbers, f32, of the codes at rows x cols."""
    if CODES == "e2m1":
        codes = tl.load(code_ptr + rows * (K // 2) + cols // 2, mask=mask, other=0).to(tl.int32)
        return e2m1_numbers(codes >> cols % 2 * 4)
    elif CODES == "int4":
        codes = tl.load(code_ptr + rows // 2 * K + cols, mask=mask, other=0).to(tl.int32)
        return nibble_numbers(codes >> (rows % 2 * 4).to(tl.int32))
    else:
        return byte_numbers(tl.load(code_ptr + rows * K + cols, mask=mask, other=0), CODES, FAST)


@triton.jit
def _scales(
    scale_ptr,
    whole,
    rows,
    cols,
    mask,
    K,
    SCALES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Scales, f32, of the elements at rows x cols; 0 or the smallest one outside of the mask."""
    if SCALES == "whole":
        return tl.zeros(mask.shape, dtype=tl.float32) + whole
    else:
        at = rows // SCALE_ROWS * tl.cdiv(K, SCALE_COLS) + cols // SCALE_COLS
        code = tl.load(scale_ptr + at, mask=mask, other=0)
        if SCALES == "e4m3":
            return e4m3_numbers(code, FAST) * whole
        else:
            return e8m0_scales(code.to(tl.int32)) if SCALES == "e8m0" else code


@triton.jit(do_not_specialize=["N"])
def row_stats_kernel(
    w_ptr,
    code_ptr,
    scale_ptr,
    global_ptr,
    err2_ptr,
    ref2_ptr,
    nonfinite_ptr,
    clipped_ptr,
    N,
    K,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLS: tl.constexpr,
    SCALE_STEP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_SEGMENTS: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per TILE_ROWS rows, TILE_SEGMENTS segments of each at a time.

    A tile is [TILE_ROWS, lanes of all segments]: eight turns, each 16 columns further, add up in
    the order that `error_stats` has. SCALE_STEP: columns of a segment under one scale.
    """
    source = w_ptr.dtype.element_ty
    rows = (tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS))[:, None]
    lanes = tl.arange(0, TILE_SEGMENTS * LANES)
    first_cols = (lanes // LANES * SEGMENT + lanes % LANES)[None, :]
    err2 = tl.zeros([TILE_ROWS, TILE_SEGMENTS * LANES], dtype=tl.float64)
    ref2 = tl.zeros([TILE_ROWS, TILE_SEGMENTS * LANES], dtype=tl.float64)
    nonfinite = tl.zeros([TILE_ROWS, TILE_SEGMENTS * LANES], dtype=tl.int32)
    clipped = tl.zeros([TILE_ROWS, TILE_SEGMENTS * LANES], dtype=tl.int32)
    whole = 1.0
    if SCALES == "whole" or SCALES == "e4m3":
        whole = tl.load(global_ptr)
    for start in range(0, K, TILE_SEGMENTS * SEGMENT):
        cols = first_cols + start
        # a lane of a ragged segment has its first column or none, so its scale is there if needed
        bits = tl.zeros([TILE_ROWS, TILE_SEGMENTS * LANES], dtype=tl.int32)
        for step in tl.static_range(0, SEGMENT, SCALE_STEP):
            mask = (rows < N) & (cols + step < K)
            scale = _scales(
                scale_ptr, whole, rows, cols + step, mask, K, SCALES, SCALE_ROWS, SCALE_COLS, FAST
            )
            # patterns of numbers that are not negative are ordered like them
            bits = tl.maximum(bits, scale.to(tl.int32, bitcast=True))
        exponent = tl.minimum(tl.maximum(bits >> 23, 27), 227)
        unit = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        err_lane = tl.zeros([TILE_ROWS, TILE_SEGMENTS * LANES], dtype=tl.float32)
        ref_lane = tl.zeros([TILE_ROWS, TILE_SEGMENTS * LANES], dtype=tl.float32)
        for step in tl.static_range(0, SEGMENT, LANES):
            at = cols + step
            mask = (rows < N) & (at < K)
            if SCALE_STEP < SEGMENT:
                scale = _scales(
                    scale_ptr, whole, rows, at, mask, K, SCALES, SCALE_ROWS, SCALE_COLS, FAST
                )
            w = tl.load(w_ptr + rows * K + at, mask=mask, other=0.0)
            w_f32 = to_f32(w)
            finite = magnitude_bits(w) < infinity_bits(source)
            y = tl.div_rn(w_f32, scale)
            clipped += tl.where(finite & ((y > HIGH) | (y < LOW)), 1, 0)
            nonfinite += tl.where(finite, 0, 1)
            number = _numbers(code_ptr, rows, at, mask, K, CODES, FAST)
            ref = tl.where(finite, w_f32, 0.0) * unit
            err = ref - tl.where(finite, number, 0.0) * (scale * unit)
            err_lane += err * err
            ref_lane += ref * ref
        # 1 / unit, squared: exact
        back = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float64)
        back = back * back
        err2 += err_lane.to(tl.float64) * back
        ref2 += ref_lane.to(tl.float64) * back
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    tl.store(err2_ptr + row, tl.sum(err2, axis=1), mask=row < N)
    tl.store(ref2_ptr + row, tl.sum(ref2, axis=1), mask=row < N)
    num_nonfinite = tl.sum(tl.sum(nonfinite, axis=1), axis=0).to(tl.int64)
    num_clipped = tl.sum(tl.sum(clipped, axis=1), axis=0).to(tl.int64)
    tl.atomic_add(nonfinite_ptr, num_nonfinite, mask=num_nonfinite > 0, sem="relaxed")
    tl.atomic_add(clipped_ptr, num_clipped, mask=num_clipped > 0, sem="relaxed")


# the same for K == 1, with K as an ordinary argument, as in `_triton_rows`
column_stats_kernel = triton.jit(row_stats_kernel.fn, do_not_specialize=["N", "K"])


def stats_config(device: torch.device, k: int) -> Config:
    """Launch choices: tile_rows x tile_cols segments of 128 columns.

    On a GPU a lane to a thread: with more, Triton gives w, codes and scales layouts of their own,
    and what it takes to bring them together spills registers.
    """
    segments = triton.next_power_of_2(max(triton.cdiv(k, SEGMENT.value), 1))
    if device.type != "cuda":
        tile_cols = min(segments, 4096)
        return choose(device, tile_rows=4096 // tile_cols, tile_cols=tile_cols)
    tile_cols = min(segments, 32)
    # two segments to a warp
    num_warps = max(tile_cols // 2, 4)
    return choose(
        device, tile_rows=2 * num_warps // tile_cols, tile_cols=tile_cols, num_warps=num_warps
    )


def row_stats(
    w_NK: Tensor,
    ins: Sequence[Tensor],
    global_scale: Tensor | None,
    stats: RowStats,
    *,
    layout: Layout,
    limits: tuple[float, float],
    config: Config | None = None,
) -> None:
    """None, after writing the sums of `stats` and adding to its counts.

    w_NK: bf16, f16 or f32, contiguous, N > 0. ins: codes, then scales where there are any.
    """
    n, k = w_NK.shape
    config = config or stats_config(w_NK.device, k)
    codes, scale = ins[0], ins[1] if len(ins) > 1 else None
    kernel = row_stats_kernel if k > 1 else column_stats_kernel
    with on_device(w_NK):
        kernel[(triton.cdiv(n, config.tile_rows),)](
            w_NK,
            codes.view(torch.uint8),
            scale.view(torch.uint8) if layout.scales == "e4m3" and scale is not None else scale,
            global_scale,
            stats.err2_N,
            stats.ref2_N,
            stats.num_nonfinite,
            stats.num_saturated,
            n,
            k,
            LOW=limits[0],
            HIGH=limits[1],
            CODES=layout.codes,
            SCALES=layout.scales,
            SCALE_ROWS=layout.scale_rows,
            SCALE_COLS=layout.scale_cols or ALL_COLS,
            SCALE_STEP=min(layout.scale_cols or ALL_COLS, SEGMENT.value),
            TILE_ROWS=config.tile_rows,
            TILE_SEGMENTS=config.tile_cols,
            FAST=config.fast,
            **options(config),
        )
