"""Triton kernels of int4 in blocks of columns, two rows to a byte: row 2r low, row 2r + 1 high.

Shapes: N rows out, K columns in, P = N / 2 pairs of rows, B = K / block blocks of a row.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from qkernels._triton_codes import integer_bits, integer_codes, nibble_numbers
from qkernels._triton_numbers import (
    all_true,
    amax_or_nan,
    finite_bits,
    is_ordinary,
    quotient,
    rounded,
    scale_from_bits,
    to_f32,
)


@triton.jit
def _blocks(P, B, TILE_PAIRS: tl.constexpr, TILE: tl.constexpr):
    """Of this program's blocks [T]: their pairs of rows, places in a row, and which there are."""
    at = tl.arange(0, TILE_PAIRS * TILE)
    pairs = tl.program_id(0).to(tl.int64) * TILE_PAIRS + at // TILE
    blocks = tl.program_id(1) * TILE + at % TILE
    return pairs, blocks, (pairs < P) & (blocks < B)


@triton.jit
def _columns(blocks, BLOCK: tl.constexpr):
    """Positions [T, BLOCK] of the elements of blocks [T]."""
    return blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _fast_scale(w_f32, source: tl.constexpr, TINY: tl.constexpr):
    """Scales [T] of blocks [T, BLOCK], and whether they are ordinary."""
    amax = amax_or_nan(w_f32, 1)
    scale = quotient(tl.maximum(amax, TINY), 7.0, 1.0 / 7.0, source != tl.float32)
    scale = tl.where(amax == 0.0, 1.0, scale)
    return scale, (amax < float("inf")) & is_ordinary(scale)


@triton.jit
def _fast_codes(w_f32, scale, source: tl.constexpr):
    inverse = tl.div_rn(1.0, scale)[:, None]
    return integer_bits(quotient(w_f32, scale[:, None], inverse, source != tl.float32))


@triton.jit
def quantize_pairs_kernel(
    w_ptr,
    code_ptr,
    scale_ptr,
    P,
    B,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per TILE blocks of TILE_PAIRS pairs of rows."""
    source = w_ptr.dtype.element_ty
    pairs, blocks, mask = _blocks(P, B, TILE_PAIRS, TILE)
    low_blocks = pairs * 2 * B + blocks
    cols = _columns(low_blocks, BLOCK)
    wide_mask = mask[:, None]
    low = tl.load(w_ptr + cols, mask=wide_mask, other=0.0)
    high = tl.load(w_ptr + B * BLOCK + cols, mask=wide_mask, other=0.0)
    code_ptr += _columns(pairs * B + blocks, BLOCK)
    if FAST:
        low_f32, high_f32 = to_f32(low), to_f32(high)
        low_scale, low_short = _fast_scale(low_f32, source, TINY)
        high_scale, high_short = _fast_scale(high_f32, source, TINY)
    if FAST and all_true(low_short & high_short):
        tl.store(scale_ptr + low_blocks, low_scale, mask=mask)
        tl.store(scale_ptr + B + low_blocks, high_scale, mask=mask)
        low_codes = _fast_codes(low_f32, low_scale, source)
        codes = (low_codes & 15) | (_fast_codes(high_f32, high_scale, source) << 4)
        tl.store(code_ptr, codes.to(tl.uint8), mask=wide_mask)
    else:
        low_slow = scale_from_bits(tl.max(finite_bits(low), axis=1), source, TINY, 7.0)
        high_slow = scale_from_bits(tl.max(finite_bits(high), axis=1), source, TINY, 7.0)
        tl.store(scale_ptr + low_blocks, low_slow, mask=mask)
        tl.store(scale_ptr + B + low_blocks, high_slow, mask=mask)
        low_bits = integer_codes(low, low_slow[:, None], -8.0, 7.0)
        high_bits = integer_codes(high, high_slow[:, None], -8.0, 7.0)
        slow_codes = (low_bits & 15) | (high_bits << 4)
        tl.store(code_ptr, slow_codes.to(tl.uint8), mask=wide_mask)


@triton.jit
def dequantize_pairs_kernel(
    code_ptr,
    scale_ptr,
    out_ptr,
    P,
    B,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per TILE blocks of TILE_PAIRS pairs of rows."""
    pairs, blocks, mask = _blocks(P, B, TILE_PAIRS, TILE)
    low_blocks = pairs * 2 * B + blocks
    wide_mask = mask[:, None]
    code_cols = _columns(pairs * B + blocks, BLOCK)
    codes = tl.load(code_ptr + code_cols, mask=wide_mask, other=0).to(tl.int32)
    low_scale = tl.load(scale_ptr + low_blocks, mask=mask, other=1.0)
    high_scale = tl.load(scale_ptr + B + low_blocks, mask=mask, other=1.0)
    low = nibble_numbers(codes) * low_scale[:, None]
    high = nibble_numbers(codes >> 4) * high_scale[:, None]
    out_ptr += _columns(low_blocks, BLOCK)
    finite = (tl.abs(low_scale) < float("inf")) & (tl.abs(high_scale) < float("inf"))
    if FAST and all_true(finite):
        tl.store(out_ptr, rounded(low, KIND, True, True), mask=wide_mask)
        tl.store(out_ptr + B * BLOCK, rounded(high, KIND, True, True), mask=wide_mask)
    else:
        tl.store(out_ptr, rounded(low, KIND, FAST), mask=wide_mask)
        tl.store(out_ptr + B * BLOCK, rounded(high, KIND, FAST), mask=wide_mask)
