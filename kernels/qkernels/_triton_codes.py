"""Device functions from quotients to codes and back: e4m3, e2m1, e8m0 scales, integers.

Two ways to the same codes: a short one for tiles whose elements are all finite and whose scales are
far from the ends of f32, by what a GPU has in hardware; and one for everything, step by step, the
same everywhere and in Triton's interpreter.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from qkernels._triton_numbers import quotient, to_f32

# added to a number below 2^22, leaves steps of 1: the addition itself rounds, nearest even
ROUNDER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _sign_code(w):
    """Sign bit of w where e4m3 has it; from w itself, for a GPU widens an f16 NaN without it."""
    if w.dtype == tl.float32:
        bits = w.to(tl.int32, bitcast=True) >> 24
    else:
        bits = w.to(tl.int16, bitcast=True).to(tl.int32) >> 8
    return bits & 0x80


@triton.jit
def e4m3_of_magnitude(magnitude):
    """Codes, int32, of numbers from 0 to 448.

    Adding 2^(e+20) to a number in [2^e, 2^(e+1)) leaves steps of 2^(e-3): the addition itself
    rounds to three mantissa bits, nearest even, and with e held at -6 or above to the subnormal
    step 2^-9.
    """
    exponent = magnitude.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.maximum(exponent, 0x3C800000)
    addend = exponent + (20 << 23)
    total = magnitude + addend.to(tl.float32, bitcast=True)
    steps = total.to(tl.int32, bitcast=True) - addend
    return ((exponent - 0x3C800000) >> 20) + steps


@triton.jit
def e4m3_codes(w, scale):
    """Codes of w / scale for every w."""
    w_magnitude = to_f32(w).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    finite = tl.where(w_magnitude < 0x7F800000, w_magnitude, 0).to(tl.float32, bitcast=True)
    code = e4m3_of_magnitude(tl.minimum(tl.div_rn(finite, scale), 448.0))
    code = tl.where(w_magnitude == 0x7F800000, 0x7E, code)
    code = tl.where(w_magnitude > 0x7F800000, 0x7F, code)
    return (code | _sign_code(w)).to(tl.uint8)


@triton.jit
def e4m3_numbers(code, FAST: tl.constexpr):
    """Numbers of the codes, f32; NaN for the two NaN codes."""
    if FAST:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        magnitude = ((code.to(tl.int32) & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
        bits = tl.where((code & 0x7F) == 0x7F, 0x7FC00000, magnitude.to(tl.int32, bitcast=True))
        sign = (code.to(tl.int32) & 0x80) << 24
        return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit
def integer_bits(y):
    """Integers nearest to y, even at ties, |y| < 2^22, in the low bits of int32."""
    return (y + ROUNDER).to(tl.int32, bitcast=True)


@triton.jit
def integer_codes(w, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Integers nearest to w / scale, clamped, for every w; the low bits of int32 count."""
    y = tl.div_rn(to_f32(w), scale)
    return integer_bits(tl.where(y == y, tl.minimum(tl.maximum(y, LOW), HIGH), 0.0))


@triton.jit
def byte_codes(w, scale, CODES: tl.constexpr):
    """Codes of one byte, uint8, of w / scale for every w."""
    if CODES == "e4m3":
        return e4m3_codes(w, scale)
    else:
        return integer_codes(w, scale, -128.0, 127.0).to(tl.uint8)


@triton.jit
def byte_codes_fast(w, scale, inverse, CODES: tl.constexpr):
    """The same of an ordinary tile; e4m3 by the GPU's own conversion: nearest even, saturating."""
    y = quotient(w.to(tl.float32), scale, inverse, w.dtype != tl.float32)
    if CODES == "e4m3":
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return integer_bits(y).to(tl.uint8)


@triton.jit
def byte_numbers(code, CODES: tl.constexpr, FAST: tl.constexpr):
    """Numbers of codes of one byte, f32."""
    if CODES == "e4m3":
        return e4m3_numbers(code, FAST)
    else:
        return code.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def e2m1_bits(magnitude):
    """Codes of numbers from 0 to below 7, in the low 3 bits of ROUNDER's pattern, 0x4B400000.

    The code of a number t is the smallest of 2t, t + 2 and t/2 + 4, rounded to nearest even: each
    is right between the numbers where its slope is that of the codes. Products are exact and each
    addition rounds once.
    """
    steps = tl.minimum(tl.fma(magnitude, 2.0, ROUNDER), tl.fma(magnitude, 1.0, ROUNDER + 2.0))
    steps = tl.minimum(steps, tl.fma(magnitude, 0.5, ROUNDER + 4.0))
    return steps.to(tl.int32, bitcast=True)


@triton.jit
def e2m1_codes_fast(y):
    """As e2m1_bits with the sign of y in bit 3; y is no NaN and no -0.0, |y| < 7."""
    return e2m1_bits(tl.abs(y)) | ((y.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def e2m1_codes(w, scale):
    """The same of w / scale, for every w, f32, and every scale that is not negative."""
    y = tl.div_rn(tl.abs(w), scale)
    bits = e2m1_bits(tl.where(y == y, tl.minimum(y, 6.0), 0.0))
    return bits | tl.where(w < 0.0, 8, 0)


@triton.jit
def pack_words(bits):
    """Words [..], int32, of results of e2m1_codes [.., 8]; the first in the low bits."""
    axis: tl.constexpr = len(bits.shape) - 1
    places = tl.arange(0, 8) * 4
    shifted = bits << (places[None, :] if axis == 1 else places[None, None, :])
    # that pattern shifted by 0, 4 and 8 bits; farther left nothing of it remains
    return tl.sum(shifted, axis=axis) - 0x3F400000


@triton.jit
def unpack_words(words):
    """Numbers [W, 8], f32, of the e2m1 codes in words [W], times 2^-126."""
    places = tl.arange(0, 8) * 4
    codes = words[:, None] >> places[None, :]
    # the exponent and the mantissa bit where f32 has them, the smallest of both as a subnormal
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e2m1_numbers(codes):
    """Numbers, f32, of the e2m1 codes in the low 4 bits of int32; as unpack_words has them."""
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def nibble_numbers(codes):
    """Numbers, f32, of two's complement codes in the low 4 bits of int32."""
    # 2^23 + 8 + the number, since the code without its sign's weight is 8 more
    biased = ((codes & 15) ^ 0x4B000008).to(tl.float32, bitcast=True)
    return biased - 8388616.0


@triton.jit
def e8m0_of_amax(amax_bits, LARGEST_BITS: tl.constexpr):
    """Bytes, int32, of the smallest powers of two with amax <= largest * 2^e; both as f32 bits."""
    ceiling = (amax_bits + (0x7FFFFF - (LARGEST_BITS & 0x7FFFFF))) >> 23
    return tl.maximum(ceiling - ((LARGEST_BITS >> 23) - 127), 0)


@triton.jit
def e8m0_scales(code):
    """Scales, f32, of bytes as int32; byte 0 is the subnormal 2^-127, 255 is NaN."""
    bits = tl.where(code == 0, 0x00400000, code << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_inverses(code):
    """1 / scale, f32 and exact, of bytes below 254 as int32."""
    return ((254 - code) << 23).to(tl.float32, bitcast=True)
