"""Triton kernels of formats with a scale per group of 16 or 32 columns: NVFP4, MXFP4, MXFP8.

K is a multiple of the group, so a matrix is one run of groups: rows don't matter. Eight elements,
16 bytes of a 16-bit source, are what a thread reads at a time, and their e2m1 codes are one word.
A tile whose groups are all ordinary takes a short path, as in `_triton_bytes`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from qkernels._triton_codes import (
    e2m1_codes,
    e2m1_codes_fast,
    e4m3_codes,
    e4m3_numbers,
    e4m3_of_magnitude,
    e8m0_inverses,
    e8m0_of_amax,
    e8m0_scales,
    pack_words,
    unpack_words,
)
from qkernels._triton_numbers import (
    all_true,
    amax_or_nan,
    finite_bits,
    from_bits,
    quotient,
    quotient_without_minus_zero,
    rounded,
    to_f32,
)

E4M3_MAX_BITS = tl.constexpr(0x43E00000)
E2M1_MAX_BITS = tl.constexpr(0x40C00000)


@triton.jit
def _wide(x):
    return x[:, None, None]


@triton.jit
def _largest_scale(SOURCE: tl.constexpr):
    """Under scales up to this no quotient underflows to zero, which would lose its sign."""
    return 1.0 if SOURCE == "f32" else 2.0**15


@triton.jit
def _load_groups(word_ptr, groups, mask, GROUP: tl.constexpr, SOURCE: tl.constexpr):
    """The words [T, GROUP / 8, 4] (f32: 8) of groups [T], which wait in registers as they came."""
    each: tl.constexpr = 8 if SOURCE == "f32" else 4
    words = tl.arange(0, GROUP // 8)[None, :, None] * each + tl.arange(0, each)[None, None, :]
    offsets = _wide(groups) * (GROUP // 8 * each) + words
    return tl.load(word_ptr + offsets, mask=_wide(mask), other=0)


@triton.jit
def _half_to_f32(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _unpack_source(words, SOURCE: tl.constexpr):
    """The elements [T, G, 8], f32, of words [T, G, 4] (f32: 8)."""
    if SOURCE == "f32":
        return words.to(tl.float32, bitcast=True)
    else:
        if SOURCE == "bf16":
            even = (words << 16).to(tl.float32, bitcast=True)
            odd = (words & -65536).to(tl.float32, bitcast=True)
        else:
            even, odd = _half_to_f32(words), _half_to_f32(words >> 16)
        return tl.reshape(tl.join(even, odd), [words.shape[0], words.shape[1], 8])


@triton.jit
def _store_words(code_ptr, groups, mask, bits, GROUP: tl.constexpr):
    words = groups[:, None] * (GROUP // 8) + tl.arange(0, GROUP // 8)[None, :]
    tl.store(code_ptr + words, pack_words(bits), mask=mask[:, None])


@triton.jit
def _scales_fast(amax, whole, largest, inverse_largest, SCALES: tl.constexpr, SOURCE: tl.constexpr):
    """Scale codes of groups, what they stand for, its inverse, and which groups are ordinary."""
    if SCALES == "e4m3":
        ratio = quotient(amax, largest, inverse_largest, SOURCE != "f32")
        code = tl.where(amax == 0.0, 1.0, tl.maximum(ratio, 2.0**-9)).to(tl.float8e4nv)
        scale = code.to(tl.float32) * whole
        inverse = tl.div_rn(1.0, scale)
        # nothing is clipped
        ordinary = amax * inverse < 6.9
        return code.to(tl.uint8, bitcast=True), scale, inverse, ordinary
    else:
        code = e8m0_of_amax(amax.to(tl.int32, bitcast=True), E2M1_MAX_BITS)
        inverse = e8m0_inverses(code)
        ordinary = (amax < float("inf")) & (inverse * _largest_scale(SOURCE) >= 1.0)
        return code.to(tl.uint8), inverse, inverse, ordinary


@triton.jit
def _scales(amax, whole, largest, SCALES: tl.constexpr):
    """Scale codes of groups and what they stand for, for every amax."""
    if SCALES == "e4m3":
        ratio = tl.div_rn(amax, largest)
        ratio = tl.where(ratio == 0.0, 1.0, ratio)
        code = e4m3_of_magnitude(tl.minimum(tl.maximum(ratio, 2.0**-9), 448.0))
        return code.to(tl.uint8), e4m3_numbers(code, False) * whole
    else:
        code = e8m0_of_amax(amax.to(tl.int32, bitcast=True), E2M1_MAX_BITS)
        return code.to(tl.uint8), e8m0_scales(code)


@triton.jit
def quantize_fp4_kernel(
    w_ptr,
    code_ptr,
    scale_ptr,
    global_ptr,
    num_groups,
    SOURCE: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    TURNS: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per TURNS tiles of TILE groups of a matrix; axis 1 of the grid is the matrices.

    A thread holds whole groups, so that a scale is worked out once. The next tile is on its way
    while one is encoded. Weight and codes are words. Scales are e4m3 and global, or e8m0.
    """
    matrix = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * (TILE * TURNS)
    # from here on positions count from the program's first group, in 32 bits
    remaining = tl.minimum(num_groups - start, TILE * TURNS).to(tl.int32)
    groups = matrix * num_groups + start
    w_ptr += groups * (GROUP if SOURCE == "f32" else GROUP // 2)
    code_ptr += groups * (GROUP // 8)
    scale_ptr += groups
    if SCALES == "e4m3":
        whole = tl.load(global_ptr + matrix)
        largest = whole * 6.0
        inverse_largest = tl.div_rn(1.0, largest)
        # scales are 2^-9 to 448 times this
        whole_short = (whole > 2.0**-90) & (whole * 448.0 <= _largest_scale(SOURCE))
    else:
        whole, largest, inverse_largest, whole_short = 1.0, 1.0, 1.0, True
    at = tl.arange(0, TILE)
    next_words = _load_groups(w_ptr, at, at < remaining, GROUP, SOURCE)
    for _ in range(TURNS):
        words, place, mask = next_words, at, at < remaining
        at += TILE
        if TURNS > 1:
            next_words = _load_groups(w_ptr, at, at < remaining, GROUP, SOURCE)
        w = _unpack_source(words, SOURCE)
        if FAST:
            amax = amax_or_nan(amax_or_nan(w, 2), 1)
            code, scale, inverse, ordinary = _scales_fast(
                amax, whole, largest, inverse_largest, SCALES, SOURCE
            )
        if FAST and (all_true(ordinary) & whole_short):
            tl.store(scale_ptr + place, code, mask=mask)
            if SCALES == "e4m3":
                y = quotient_without_minus_zero(w, _wide(scale), _wide(inverse), SOURCE != "f32")
            else:
                y = tl.fma(w, _wide(inverse), 0.0)
            _store_words(code_ptr, place, mask, e2m1_codes_fast(y), GROUP)
        else:
            bits = tl.max(tl.max(finite_bits(w), axis=2), axis=1)
            finite = bits.to(tl.float32, bitcast=True)
            slow_code, slow_scale = _scales(finite, whole, largest, SCALES)
            tl.store(scale_ptr + place, slow_code, mask=mask)
            _store_words(code_ptr, place, mask, e2m1_codes(w, _wide(slow_scale)), GROUP)


@triton.jit
def dequantize_fp4_kernel(
    word_ptr,
    scale_ptr,
    global_ptr,
    out_ptr,
    num_words,
    SCALES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per TILE words of a matrix of `num_words`, axis 1 of the grid is the matrices.

    The scales are e4m3 and global, or e8m0.
    """
    matrix = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    offsets = matrix * num_words + at
    mask = at < num_words
    words = tl.load(word_ptr + offsets, mask=mask, other=0)
    code = tl.load(scale_ptr + offsets // (GROUP // 8), mask=mask, other=0)
    if SCALES == "e4m3":
        scale = e4m3_numbers(code, FAST) * tl.load(global_ptr + matrix)
    else:
        scale = e8m0_scales(code.to(tl.int32))
    out_ptr += offsets[:, None] * 8 + tl.arange(0, 8)[None, :]
    tiny = unpack_words(words)
    if FAST and all_true(tl.abs(scale) < 2.0):
        # no product is NaN, and the power of two is exact in the scale
        x = tiny * (scale * 2.0**126)[:, None]
        tl.store(out_ptr, rounded(x, KIND, True, True), mask=mask[:, None])
    else:
        x = tiny * 2.0**126 * scale[:, None]
        tl.store(out_ptr, rounded(x, KIND, FAST), mask=mask[:, None])


@triton.jit
def _of_groups(x_W, GROUP: tl.constexpr):
    """At every eight the largest number of the eights [W] of its group."""
    num_eights: tl.constexpr = x_W.shape[0]
    by_group = tl.reshape(x_W, [num_eights * 8 // GROUP, GROUP // 8])
    largest = tl.broadcast_to(tl.max(by_group, axis=1)[:, None], by_group.shape)
    return tl.reshape(largest, [num_eights])


@triton.jit
def quantize_mxfp8_kernel(
    w_ptr,
    code_ptr,
    scale_ptr,
    num_eights,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per TILE eights of elements."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    offsets = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    mask = at < num_eights
    w = tl.load(w_ptr + offsets, mask=mask[:, None], other=0.0)
    # one eight of a group writes its scale
    scale_ptr += at // (GROUP // 8)
    scale_mask = mask & (at % (GROUP // 8) == 0)
    if FAST:
        w_f32 = to_f32(w)
        # as integers: patterns are ordered like the numbers, then infinity, then NaN
        amax = _of_groups(amax_or_nan(w_f32, 1).to(tl.int32, bitcast=True), GROUP)
    if FAST and all_true(amax < 0x7F800000):
        code = e8m0_of_amax(amax, E4M3_MAX_BITS)
        tl.store(scale_ptr, code.to(tl.uint8), mask=scale_mask)
        y = w_f32 * e8m0_inverses(code)[:, None]
        codes = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        tl.store(code_ptr + offsets, codes, mask=mask[:, None])
    else:
        finite = from_bits(_of_groups(tl.max(finite_bits(w), axis=1), GROUP), w.dtype)
        slow_code = e8m0_of_amax(finite.to(tl.int32, bitcast=True), E4M3_MAX_BITS)
        tl.store(scale_ptr, slow_code.to(tl.uint8), mask=scale_mask)
        slow_codes = e4m3_codes(w, e8m0_scales(slow_code)[:, None])
        tl.store(code_ptr + offsets, slow_codes, mask=mask[:, None])
