"""Triton kernels of the e4m3 formats, one scale per block or per row; launched by `_triton_fp8`.

Every program holds its tile in registers: one read of the weight, one write of the codes. A tile
whose elements are all finite and whose scale is far from the ends of f32 takes a short path, if
the GPU has a conversion to e4m3; any other tile is computed step by step in integers, the same
everywhere and in Triton's interpreter.

Shapes: N rows out, K columns in.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

# A branch on a compile-time value needs its else: what follows a plain `if` is compiled for every
# type.


@triton.jit
def _magnitude_bits(w):
    """|w| as its bit pattern in the type of w: ordered like the numbers, then infinity, then NaN.

    The short patterns, not f32: a 16-bit tile then stays packed in registers while it waits for the
    scale.
    """
    if w.dtype == tl.float32:
        return w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        return w.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@triton.jit
def _to_f32(w):
    """w as f32, exact. In integers for bf16: Triton's interpreter loses bf16 subnormals."""
    if w.dtype == tl.bfloat16:
        return (w.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return w.to(tl.float32)


@triton.jit
def _infinity_bits(source: tl.constexpr):
    """Pattern of infinity in the source type."""
    if source == tl.float32:
        return 0x7F800000
    else:
        return 0x7F80 if source == tl.bfloat16 else 0x7C00


@triton.jit
def _scale_from_bits(amax_bits, source: tl.constexpr, TINY: tl.constexpr):
    """Scale of the largest finite magnitude, given as its bit pattern in the source type."""
    if source == tl.float32:
        amax = amax_bits.to(tl.float32, bitcast=True)
    else:
        amax = _to_f32(amax_bits.to(tl.int16).to(source, bitcast=True))
    return tl.where(amax_bits == 0, 1.0, tl.div_rn(tl.maximum(amax, TINY), 448.0))


@triton.jit
def _is_ordinary(amax_bits, source: tl.constexpr, scale):
    """True when nothing is NaN or Inf and _encode_fast is exact for the scale."""
    return (amax_bits < _infinity_bits(source)) & (scale > 2.0**-100) & (scale < 2.0**100)


@triton.jit
def quotient(w, scale, inverse):
    """w / scale as IEEE division rounds it, for an `inverse` that is 1 / scale, correctly rounded.

    Two Newton steps on the remainder: after the first the quotient is off by less than an ulp, and
    then the second is correctly rounded (Markstein 1990). With scales in (2^-100, 2^100) that fails
    only by underflow, far below the smallest code. The remainder has its sign turned so that -0.0
    stays -0.0.
    """
    # not -w, which is 0 - w and an instruction
    minus_w = w * -1.0
    minus_inverse = inverse * -1.0
    result = w * inverse
    result = tl.fma(tl.fma(result, scale, minus_w), minus_inverse, result)
    return tl.fma(tl.fma(result, scale, minus_w), minus_inverse, result)


@triton.jit
def _encode_fast(w, scale, inverse):
    """Codes of w / scale by the GPU's own conversion: nearest even, saturating."""
    codes = quotient(w, scale, inverse).to(tl.float8e4nv)
    return codes.to(tl.uint8, bitcast=True)


@triton.jit
def _sign_code(w):
    """Sign bit of w where e4m3 has it; from w itself, for a GPU widens an f16 NaN without it."""
    if w.dtype == tl.float32:
        bits = w.to(tl.int32, bitcast=True) >> 24
    else:
        bits = w.to(tl.int16, bitcast=True).to(tl.int32) >> 8
    return bits & 0x80


@triton.jit
def _encode(w, scale):
    """Codes of w / scale for every w.

    Adding 2^(e+20) to a number in [2^e, 2^(e+1)) leaves steps of 2^(e-3): the addition itself
    rounds to three mantissa bits, nearest even, and with e held at -6 or above to the subnormal
    step 2^-9.
    """
    w_magnitude = _to_f32(w).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    finite = tl.where(w_magnitude < 0x7F800000, w_magnitude, 0).to(tl.float32, bitcast=True)
    magnitude = tl.minimum(tl.div_rn(finite, scale), 448.0)
    exponent = magnitude.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.maximum(exponent, 0x3C800000)
    addend = exponent + (20 << 23)
    rounded = magnitude + addend.to(tl.float32, bitcast=True)
    steps = rounded.to(tl.int32, bitcast=True) - addend
    code = ((exponent - 0x3C800000) >> 20) + steps
    code = tl.where(w_magnitude == 0x7F800000, 0x7E, code)
    code = tl.where(w_magnitude > 0x7F800000, 0x7F, code)
    return (code | _sign_code(w)).to(tl.uint8)


@triton.jit
def _finite_amax_bits(w_ptr, rows, cols, N, K):
    """Per row of the tile at rows x cols, the pattern of its largest finite magnitude."""
    mask = (rows < N)[:, None] & (cols < K)[None, :]
    w = tl.load(w_ptr + rows[:, None] * K + cols[None, :], mask=mask, other=0.0)
    bits = _magnitude_bits(w)
    return tl.max(tl.where(bits < _infinity_bits(w.dtype), bits, 0), axis=1)


@triton.jit
def _encode_tile(w_ptr, code_ptr, rows, cols, N, K, scale, inverse, FAST: tl.constexpr):
    """None, after reading, encoding and writing the tile at rows x cols."""
    mask = (rows < N)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None] * K + cols[None, :]
    w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
    codes = _encode_fast(w.to(tl.float32), scale, inverse) if FAST else _encode(w, scale)
    tl.store(code_ptr + offsets, codes, mask=mask)


@triton.jit
def quantize_blocks_kernel(
    w_ptr,
    code_ptr,
    scale_ptr,
    N,
    K,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    FAST: tl.constexpr,
    REREAD: tl.constexpr,
):
    """One program per block; the slow path, or with REREAD any, reads it again by STEP rows."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_per_row = tl.cdiv(K, BLOCK)
    rows = pid // blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    cols = pid % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < N)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None] * K + cols[None, :]
    w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
    bits = _magnitude_bits(w)
    amax_bits = tl.max(tl.max(bits, axis=1), axis=0)
    scale = _scale_from_bits(amax_bits, w_ptr.dtype.element_ty, TINY)
    some_rows = pid // blocks_per_row * BLOCK + tl.arange(0, STEP)
    if FAST and _is_ordinary(amax_bits, w_ptr.dtype.element_ty, scale):
        tl.store(scale_ptr + pid, scale)
        inverse = tl.div_rn(1.0, scale)
        if REREAD:
            for start in range(0, BLOCK, STEP):
                _encode_tile(w_ptr, code_ptr, some_rows + start, cols, N, K, scale, inverse, True)
        else:
            codes = _encode_fast(w.to(tl.float32), scale, inverse)
            tl.store(code_ptr + offsets, codes, mask=mask)
    else:
        amax_bits_S = tl.zeros([STEP], dtype=tl.int32)
        for start in range(0, BLOCK, STEP):
            part = _finite_amax_bits(w_ptr, some_rows + start, cols, N, K)
            amax_bits_S = tl.maximum(amax_bits_S, part)
        scale = _scale_from_bits(tl.max(amax_bits_S, axis=0), w_ptr.dtype.element_ty, TINY)
        tl.store(scale_ptr + pid, scale)
        for start in range(0, BLOCK, STEP):
            _encode_tile(w_ptr, code_ptr, some_rows + start, cols, N, K, scale, 0.0, False)


@triton.jit
def quantize_rows_kernel(
    w_ptr,
    code_ptr,
    scale_ptr,
    N,
    K,
    TINY: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    STEP: tl.constexpr,
    FAST: tl.constexpr,
    REREAD: tl.constexpr,
):
    """One program per TILE_ROWS rows, K <= TILE_COLS; steps as above, of STEP columns."""
    rows = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    cols = tl.arange(0, TILE_COLS)
    mask = (rows < N)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None] * K + cols[None, :]
    w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
    bits = _magnitude_bits(w)
    amax_bits = tl.max(bits, axis=1)
    scale = _scale_from_bits(amax_bits, w_ptr.dtype.element_ty, TINY)
    some_cols = tl.arange(0, STEP)
    num_other = tl.sum(
        tl.where(_is_ordinary(amax_bits, w_ptr.dtype.element_ty, scale), 0, 1), axis=0
    )
    if FAST and num_other == 0:
        tl.store(scale_ptr + rows, scale, mask=rows < N)
        inverse = tl.div_rn(1.0, scale)[:, None]
        wide_scale = scale[:, None]
        if REREAD:
            for start in range(0, K, STEP):
                _encode_tile(
                    w_ptr, code_ptr, rows, some_cols + start, N, K, wide_scale, inverse, True
                )
        else:
            codes = _encode_fast(w.to(tl.float32), wide_scale, inverse)
            tl.store(code_ptr + offsets, codes, mask=mask)
    else:
        amax_bits = tl.zeros([TILE_ROWS], dtype=tl.int32)
        for start in range(0, K, STEP):
            part = _finite_amax_bits(w_ptr, rows, some_cols + start, N, K)
            amax_bits = tl.maximum(amax_bits, part)
        slow_scale = _scale_from_bits(amax_bits, w_ptr.dtype.element_ty, TINY)
        tl.store(scale_ptr + rows, slow_scale, mask=rows < N)
        slow_scale = slow_scale[:, None]
        for start in range(0, K, STEP):
            _encode_tile(w_ptr, code_ptr, rows, some_cols + start, N, K, slow_scale, 0.0, False)


# the same for K == 1, with K as an ordinary argument
quantize_columns_kernel = triton.jit(quantize_rows_kernel.fn, do_not_specialize=["K"])


@triton.jit
def quantize_long_rows_kernel(
    w_ptr,
    code_ptr,
    scale_ptr,
    N,
    K,
    TINY: tl.constexpr,
    TILE_COLS: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per row, which it reads twice: the second time from cache."""
    row = tl.program_id(0).to(tl.int64)
    w_ptr += row * K
    code_ptr += row * K
    cols = tl.arange(0, TILE_COLS)
    all_bits = tl.zeros([TILE_COLS], dtype=tl.int32)
    finite_bits = tl.zeros([TILE_COLS], dtype=tl.int32)
    for start in range(0, K, TILE_COLS):
        w = tl.load(w_ptr + start + cols, mask=start + cols < K, other=0.0)
        bits = _magnitude_bits(w)
        all_bits = tl.maximum(all_bits, bits)
        finite_bits = tl.maximum(finite_bits, tl.where(bits < _infinity_bits(w.dtype), bits, 0))
    scale = _scale_from_bits(tl.max(finite_bits, axis=0), w_ptr.dtype.element_ty, TINY)
    tl.store(scale_ptr + row, scale)
    ordinary = _is_ordinary(tl.max(all_bits, axis=0), w_ptr.dtype.element_ty, scale)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, K, TILE_COLS):
        mask = start + cols < K
        w = tl.load(w_ptr + start + cols, mask=mask, other=0.0)
        if FAST and ordinary:
            tl.store(
                code_ptr + start + cols, _encode_fast(w.to(tl.float32), scale, inverse), mask=mask
            )
        else:
            tl.store(code_ptr + start + cols, _encode(w, scale), mask=mask)


@triton.jit
def _decode(code, FAST: tl.constexpr):
    """Numbers of the codes, f32; NaN for the two NaN codes."""
    if FAST:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        magnitude = ((code.to(tl.int32) & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
        bits = tl.where((code & 0x7F) == 0x7F, 0x7FC00000, magnitude.to(tl.int32, bitcast=True))
        sign = (code.to(tl.int32) & 0x80) << 24
        return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit
def _bf16_bits(x):
    """x, not NaN, rounded to bf16, nearest even, as int16."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def _f16_bits(x):
    """x, not NaN, rounded to f16, nearest even, as int16."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    # adding 0.5 leaves steps of 2^-24, the subnormal step of f16
    small = tl.minimum(magnitude, 0x38800000).to(tl.float32, bitcast=True) + 0.5
    subnormal = small.to(tl.int32, bitcast=True) - 0x3F000000
    half = tl.where(magnitude < 0x38800000, subnormal, normal)
    half = tl.where(magnitude >= 0x477FF000, 0x7C00, half)
    return (half | ((bits >> 16) & 0x8000)).to(tl.int16)


@triton.jit
def dequantize_tiles_kernel(
    code_ptr,
    scale_ptr,
    out_ptr,
    N,
    K,
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
    x = _decode(codes, FAST) * scale
    if KIND == "f32":
        out = tl.where(x == x, x, float("nan"))
    elif KIND == "bf16":
        # the GPU's own NaN has another pattern
        rounded = x.to(tl.bfloat16).to(tl.int16, bitcast=True) if FAST else _bf16_bits(x)
        out = tl.where(x == x, rounded, 0x7FC0)
    else:
        rounded = x.to(tl.float16).to(tl.int16, bitcast=True) if FAST else _f16_bits(x)
        out = tl.where(x == x, rounded, 0x7E00)
    tl.store(out_ptr + offsets, out, mask=mask)
