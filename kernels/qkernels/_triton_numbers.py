"""Device functions for numbers of the source and output types, of no format in particular.

The same in Triton's interpreter: what it or a GPU does in a way of its own is done in integers.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

# A branch on a compile-time value needs its else: what follows a plain `if` is compiled for every
# type.


@triton.jit
def magnitude_bits(w):
    """|w| as its bit pattern in the type of w: ordered like the numbers, then infinity, then NaN.

    The short patterns, not f32: a 16-bit tile then stays packed in registers while it waits for the
    scale.
    """
    if w.dtype == tl.float32:
        return w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        return w.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@triton.jit
def infinity_bits(source: tl.constexpr):
    """Pattern of infinity in the source type."""
    if source == tl.float32:
        return 0x7F800000
    else:
        return 0x7F80 if source == tl.bfloat16 else 0x7C00


@triton.jit
def finite_bits(w):
    """|w| as its bit pattern, 0 for NaN and Inf."""
    bits = magnitude_bits(w)
    return tl.where(bits < infinity_bits(w.dtype), bits, 0)


@triton.jit
def to_f32(w):
    """w as f32, exact. In integers for bf16: Triton's interpreter loses bf16 subnormals."""
    if w.dtype == tl.bfloat16:
        return (w.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return w.to(tl.float32)


@triton.jit
def from_bits(bits, source: tl.constexpr):
    """The magnitude that a pattern of the source type stands for, f32."""
    if source == tl.float32:
        return bits.to(tl.float32, bitcast=True)
    else:
        return to_f32(bits.to(tl.int16).to(source, bitcast=True))


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def amax_or_nan(x, axis: tl.constexpr):
    """Largest |x| along an axis, NaN where there is a NaN; for GPUs alone."""
    return tl.reduce(tl.abs(x), axis, _larger_or_nan)


@triton.jit
def all_true(condition):
    """Whether all of [T] are true."""
    return tl.min(tl.where(condition, 1, 0), axis=0) == 1


@triton.jit
def scale_from_bits(amax_bits, source: tl.constexpr, TINY: tl.constexpr, LARGEST: tl.constexpr):
    """Scale of the largest finite magnitude, given as its bit pattern in the source type."""
    amax = from_bits(amax_bits, source)
    return tl.where(amax_bits == 0, 1.0, tl.div_rn(tl.maximum(amax, TINY), LARGEST))


@triton.jit
def is_ordinary(scale):
    """True when `quotient` is exact for the scale."""
    return (scale > 2.0**-100) & (scale < 2.0**100)


@triton.jit
def quotient(w, scale, inverse, NARROW: tl.constexpr):
    """w / scale as IEEE division rounds it, for an `inverse` that is 1 / scale, correctly rounded.

    Newton steps on the remainder: after the first the quotient is off by less than an ulp, and then
    the second is correctly rounded (Markstein 1990). NARROW, for w of at most 11 significant bits:
    the first is so already, which a test enumerates. With scales in (2^-100, 2^100) that fails only
    by underflow, far below the smallest code. The remainder has its sign turned so that -0.0 stays
    -0.0.
    """
    # not -w, which is 0 - w and an instruction
    minus_w = w * -1.0
    minus_inverse = inverse * -1.0
    result = w * inverse
    result = tl.fma(tl.fma(result, scale, minus_w), minus_inverse, result)
    if NARROW:
        return result
    else:
        return tl.fma(tl.fma(result, scale, minus_w), minus_inverse, result)


@triton.jit
def quotient_without_minus_zero(w, scale, inverse, NARROW: tl.constexpr):
    """The same, but -0.0 gives 0.0."""
    result = w * inverse
    result = tl.fma(tl.fma(result * -1.0, scale, w), inverse, result)
    if NARROW:
        return result
    else:
        return tl.fma(tl.fma(result * -1.0, scale, w), inverse, result)


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
def rounded(x, KIND: tl.constexpr, FAST: tl.constexpr, NUMBERS: tl.constexpr = False):
    """x as it is stored: f32, or the bits of bf16 or f16; every NaN the positive quiet one.

    NUMBERS: there is no NaN.
    """
    if KIND == "f32":
        bits, nan = x, float("nan")
    elif KIND == "bf16":
        # the GPU's own NaN has another pattern
        bits = x.to(tl.bfloat16).to(tl.int16, bitcast=True) if FAST else _bf16_bits(x)
        nan = 0x7FC0
    else:
        bits = x.to(tl.float16).to(tl.int16, bitcast=True) if FAST else _f16_bits(x)
        nan = 0x7E00
    if NUMBERS:
        return bits
    else:
        return tl.where(x == x, bits, nan)
