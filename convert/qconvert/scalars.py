"""Scales that are one number: f32 arithmetic without numpy or torch.

A quotient of two f32 numbers, divided in f64 and rounded to f32, is the f32 quotient: 53 bits are
more than twice 24 and two, so the second rounding never meets a tie that the first one made.
"""

import math
import struct

from qschema.formats import TensorSpec

# smallest normal numbers
TINY = {"BF16": 2.0**-126, "F16": 2.0**-14, "F32": 2.0**-126}


def f32(number: float) -> float:
    """Return `number` rounded to f32, nearest even."""
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def quotient(amax: float, divisor: float) -> float:
    """Return amax / divisor in f32, of two numbers that are rounded to f32 first."""
    return f32(f32(amax) / f32(divisor))


def global_scale(amax: float, spec: TensorSpec, *, dtype: str) -> float:
    """Return the scale of a whole weight of `dtype` whose largest magnitude is `amax`."""
    return quotient(max(amax, TINY[dtype]), spec.divisor) if amax else 1.0


def input_scale(amax: float, spec: TensorSpec, *, dtype: str) -> float:
    """Return the scale of an input whose largest magnitude was `amax`, for a weight of `dtype`.

    No input but zeros counts as `spec.zero`. Source: ModelOpt 0.47.0
    quantization/nn/modules/tensor_quantizer.py:1087-1145.
    """
    seen = amax if amax and not math.isnan(amax) else spec.zero
    return quotient(max(seen, TINY[dtype]), spec.divisor)


def packed(number: float) -> bytes:
    """Return the bytes of an F32 tensor of one number."""
    return struct.pack("<f", number)
