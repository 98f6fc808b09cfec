"""e8m0 scales of the torch references: a byte b stands for 2^(b - 127), 255 for NaN (OCP MX 1.0).

Shapes: any.
"""

import torch
from torch import Tensor


def bytes_from_amax(amax: Tensor, *, largest: float) -> Tensor:
    """Bytes, uint8, of the smallest powers of two with amax <= largest * 2^e, at least 2^-127.

    amax: f32, finite, not negative; 0 gives byte 0. largest: f32 with few mantissa bits, the
    largest number of the element type.

    Both are compared as exponent and mantissa: no logarithm, nothing is rounded. A subnormal amax
    is far below 2^-127 times `largest`, hence byte 0.
    """
    top = torch.tensor(largest).view(torch.int32).item()
    mantissa, exponent = int(top) & 0x7FFFFF, (int(top) >> 23) - 127
    # one more as soon as the mantissa of amax is above that of `largest`
    ceiling = (amax.view(torch.int32) + (0x7FFFFF - mantissa)) >> 23
    return (ceiling - exponent).clamp(min=0).to(torch.uint8)


def scales(encoded: Tensor) -> Tensor:
    """Scales, f32; byte 0 is the subnormal 2^-127."""
    shifted = encoded.int() << 23
    bits = shifted.where(encoded > 0, 0x00400000).where(encoded < 255, 0x7FC00000)
    return bits.view(torch.float32)
