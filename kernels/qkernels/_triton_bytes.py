"""Triton kernels of codes of one byte (e4m3, int8): a scale per block, per row, or per matrix.

Every program holds its tile in registers: one read of the weight, one write of the codes. A tile
whose elements are all finite and whose scale is far from the ends of f32 takes a short path.

Shapes: N rows out, K columns in.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

import triton
import triton.language as tl

from qkernels._triton_codes import byte_codes, byte_codes_fast, byte_numbers, e8m0_scales
from qkernels._triton_numbers import (
    all_true,
    finite_bits,
    infinity_bits,
    is_ordinary,
    magnitude_bits,
    rounded,
    scale_from_bits,
)


@triton.jit
def _finite_amax_bits(w_ptr, rows, cols, N, K):
    """Per row of the tile at rows x cols, the pattern of its largest finite magnitude."""
    mask = (rows < N)[:, None] & (cols < K)[None, :]
    w = tl.load(w_ptr + rows[:, None] * K + cols[None, :], mask=mask, other=0.0)
    return tl.max(finite_bits(w), axis=1)


@triton.jit
def _encode_tile(
    w_ptr, code_ptr, rows, cols, N, K, scale, inverse, CODES: tl.constexpr, FAST: tl.constexpr
):
    """None, after reading, encoding and writing the tile at rows x cols."""
    mask = (rows < N)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None] * K + cols[None, :]
    w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
    codes = byte_codes_fast(w, scale, inverse, CODES) if FAST else byte_codes(w, scale, CODES)
    tl.store(code_ptr + offsets, codes, mask=mask)


@triton.jit
def quantize_blocks_kernel(
    w_ptr,
    code_ptr,
    scale_ptr,
    N,
    K,
    CODES: tl.constexpr,
    TINY: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    FAST: tl.constexpr,
    REREAD: tl.constexpr,
):
    """One program per block; the slow path, or with REREAD any, reads it again by STEP rows."""
    source = w_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    blocks_per_row = tl.cdiv(K, BLOCK)
    rows = pid // blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    cols = pid % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < N)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None] * K + cols[None, :]
    w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
    amax_bits = tl.max(tl.max(magnitude_bits(w), axis=1), axis=0)
    scale = scale_from_bits(amax_bits, source, TINY, LARGEST)
    some_rows = pid // blocks_per_row * BLOCK + tl.arange(0, STEP)
    if FAST and ((amax_bits < infinity_bits(source)) & is_ordinary(scale)):
        tl.store(scale_ptr + pid, scale)
        inverse = tl.div_rn(1.0, scale)
        if REREAD:
            for start in range(0, BLOCK, STEP):
                _encode_tile(
                    w_ptr, code_ptr, some_rows + start, cols, N, K, scale, inverse, CODES, True
                )
        else:
            codes = byte_codes_fast(w, scale, inverse, CODES)
            tl.store(code_ptr + offsets, codes, mask=mask)
    else:
        amax_bits_S = tl.zeros([STEP], dtype=tl.int32)
        for start in range(0, BLOCK, STEP):
            part = _finite_amax_bits(w_ptr, some_rows + start, cols, N, K)
            amax_bits_S = tl.maximum(amax_bits_S, part)
        scale = scale_from_bits(tl.max(amax_bits_S, axis=0), source, TINY, LARGEST)
        tl.store(scale_ptr + pid, scale)
        for start in range(0, BLOCK, STEP):
            _encode_tile(w_ptr, code_ptr, some_rows + start, cols, N, K, scale, 0.0, CODES, False)


@triton.jit
def quantize_rows_kernel(
    w_ptr,
    code_ptr,
    scale_ptr,
    N,
    K,
    CODES: tl.constexpr,
    TINY: tl.constexpr,
    LARGEST: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    FAST: tl.constexpr,
    REREAD: tl.constexpr,
):
    """One program per TILE_ROWS rows of at most NUM_TILES tiles, which wait in registers.

    The slow path, or with REREAD any, reads them again.
    """
    source = w_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    cols = tl.arange(0, TILE_COLS)
    tiles = ()
    bits = tl.zeros([TILE_ROWS, TILE_COLS], dtype=tl.int32)
    for turn in tl.static_range(NUM_TILES):
        at = cols + turn * TILE_COLS
        mask = (rows < N)[:, None] & (at < K)[None, :]
        w = tl.load(w_ptr + rows[:, None] * K + at[None, :], mask=mask, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(w))
        # the compiler knows no (*tiles, w)
        tiles = tiles + (w,)  # noqa: RUF005
    amax_bits = tl.max(bits, axis=1)
    scale = scale_from_bits(amax_bits, source, TINY, LARGEST)
    ordinary = (amax_bits < infinity_bits(source)) & is_ordinary(scale)
    if FAST and all_true(ordinary):
        tl.store(scale_ptr + rows, scale, mask=rows < N)
        wide_scale, inverse = scale[:, None], tl.div_rn(1.0, scale)[:, None]
        for turn in tl.static_range(NUM_TILES):
            at = cols + turn * TILE_COLS
            if REREAD:
                _encode_tile(w_ptr, code_ptr, rows, at, N, K, wide_scale, inverse, CODES, True)
            else:
                mask = (rows < N)[:, None] & (at < K)[None, :]
                codes = byte_codes_fast(tiles[turn], wide_scale, inverse, CODES)
                tl.store(code_ptr + rows[:, None] * K + at[None, :], codes, mask=mask)
    else:
        amax_bits = tl.zeros([TILE_ROWS], dtype=tl.int32)
        for start in range(0, K, TILE_COLS):
            part = _finite_amax_bits(w_ptr, rows, cols + start, N, K)
            amax_bits = tl.maximum(amax_bits, part)
        slow_scale = scale_from_bits(amax_bits, source, TINY, LARGEST)
        tl.store(scale_ptr + rows, slow_scale, mask=rows < N)
        slow_scale = slow_scale[:, None]
        for start in range(0, K, TILE_COLS):
            at = cols + start
            _encode_tile(w_ptr, code_ptr, rows, at, N, K, slow_scale, 0.0, CODES, False)


# the same for K == 1, with K as an ordinary argument
quantize_columns_kernel = triton.jit(quantize_rows_kernel.fn, do_not_specialize=["K"])


@triton.jit
def quantize_long_rows_kernel(
    w_ptr,
    code_ptr,
    scale_ptr,
    K,
    CODES: tl.constexpr,
    TINY: tl.constexpr,
    LARGEST: tl.constexpr,
    TILE_COLS: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per row, which it reads twice: the second time from cache."""
    source = w_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    w_ptr += row * K
    code_ptr += row * K
    cols = tl.arange(0, TILE_COLS)
    all_bits = tl.zeros([TILE_COLS], dtype=tl.int32)
    some_bits = tl.zeros([TILE_COLS], dtype=tl.int32)
    for start in range(0, K, TILE_COLS):
        w = tl.load(w_ptr + start + cols, mask=start + cols < K, other=0.0)
        all_bits = tl.maximum(all_bits, magnitude_bits(w))
        some_bits = tl.maximum(some_bits, finite_bits(w))
    scale = scale_from_bits(tl.max(some_bits, axis=0), source, TINY, LARGEST)
    tl.store(scale_ptr + row, scale)
    ordinary = (tl.max(all_bits, axis=0) < infinity_bits(source)) & is_ordinary(scale)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, K, TILE_COLS):
        at = start + cols
        w = tl.load(w_ptr + at, mask=at < K, other=0.0)
        if FAST and ordinary:
            tl.store(code_ptr + at, byte_codes_fast(w, scale, inverse, CODES), mask=at < K)
        else:
            tl.store(code_ptr + at, byte_codes(w, scale, CODES), mask=at < K)


@triton.jit
def quantize_matrices_kernel(
    w_ptr,
    code_ptr,
    scale_ptr,
    numel,
    CODES: tl.constexpr,
    TILE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per TILE elements of a matrix of `numel`; axis 1 of the grid is the matrices."""
    matrix = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    offsets = matrix * numel + at
    w = tl.load(w_ptr + offsets, mask=at < numel, other=0.0)
    scale = tl.load(scale_ptr + matrix)
    largest = tl.max(magnitude_bits(w), axis=0)
    if FAST and ((largest < infinity_bits(w_ptr.dtype.element_ty)) & is_ordinary(scale)):
        codes = byte_codes_fast(w, scale, tl.div_rn(1.0, scale), CODES)
        tl.store(code_ptr + offsets, codes, mask=at < numel)
    else:
        tl.store(code_ptr + offsets, byte_codes(w, scale, CODES), mask=at < numel)


@triton.jit
def dequantize_tiles_kernel(
    code_ptr,
    scale_ptr,
    out_ptr,
    N,
    K,
    CODES: tl.constexpr,
    KIND: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per tile; a tile lies inside one block when there is a scale per block."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_per_row = tl.cdiv(K, TILE_COLS)
    rows = pid // tiles_per_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
    cols = pid % tiles_per_row * TILE_COLS + tl.arange(0, TILE_COLS)
    mask = (rows < N)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None] * K + cols[None, :]
    codes = tl.load(code_ptr + offsets, mask=mask, other=0)
    if BY_BLOCK:
        block_row = pid // tiles_per_row * TILE_ROWS // BLOCK
        block_col = pid % tiles_per_row * TILE_COLS // BLOCK
        scale = tl.load(scale_ptr + block_row * tl.cdiv(K, BLOCK) + block_col)
    else:
        scale = tl.load(scale_ptr + rows, mask=rows < N, other=1.0)[:, None]
    x = byte_numbers(codes, CODES, FAST) * scale
    tl.store(out_ptr + offsets, rounded(x, KIND, FAST), mask=mask)


@triton.jit
def dequantize_flat_kernel(
    code_ptr,
    scale_ptr,
    out_ptr,
    numel,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    FAST: tl.constexpr,
):
    """The same for dequantization; an f32 scale of the matrix, or e8m0 ones per GROUP elements."""
    matrix = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    offsets = matrix * numel + at
    codes = tl.load(code_ptr + offsets, mask=at < numel, other=0)
    if GROUP:
        scale_code = tl.load(scale_ptr + offsets // GROUP, mask=at < numel, other=127)
        scale = e8m0_scales(scale_code.to(tl.int32))
    else:
        scale = tl.load(scale_ptr + matrix)
    x = byte_numbers(codes, "e4m3", FAST) * scale
    tl.store(out_ptr + offsets, rounded(x, KIND, FAST), mask=at < numel)
