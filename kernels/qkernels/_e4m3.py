"""The e4m3 arithmetic of the torch references, written from the definition.

e4m3fn is S.EEEE.MMM with bias 7: no infinity, NaN 0x7F and 0xFF, largest 448, smallest step 2^-9.

Shapes: N rows out, K columns in.
"""

import torch
from torch import Tensor

E4M3_MAX = 448.0
# 448 plus half a step: what is larger rounds above the largest code
E4M3_LIMIT = 464.0


def scale_from_amax(amax: Tensor, *, source: torch.dtype) -> Tensor:
    """Scales, f32, from the largest finite magnitudes `amax`, f32 and not negative.

    amax == 0 gives 1.0. Otherwise amax, at least the smallest normal number of the source dtype, is
    divided by 448 in f32.
    """
    # a tensor, not a number: CUDA turns division by a Python number into a multiplication
    largest = torch.full_like(amax, E4M3_MAX)
    scale = amax.clamp(min=torch.finfo(source).tiny) / largest
    return torch.where(amax == 0, 1.0, scale)


def encode(w: Tensor, scale: Tensor) -> Tensor:
    """Codes, float8_e4m3fn, of w / scale; both f32, scale broadcasts.

    One rounding, nearest even, after an f32 division and a clamp to +-448, where Inf ends too.
    -0.0 and negative numbers that underflow give 0x80. NaN gives 0x7F with its sign.
    """
    clamped = (w / scale).clamp(-E4M3_MAX, E4M3_MAX)
    codes = clamped.to(torch.float8_e4m3fn).view(torch.uint8)
    signed_nan = 0x7F + 0x80 * torch.signbit(w).to(torch.uint8)
    return torch.where(w.isnan(), signed_nan, codes).view(torch.float8_e4m3fn)


def decode(codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """value(codes) * scale, an f32 product rounded once to dtype, nearest even; contiguous.

    Every NaN is the positive quiet NaN of dtype. Products beyond the range of dtype become
    infinite.
    """
    product = codes.to(torch.float32, memory_format=torch.contiguous_format) * scale
    return product.to(dtype).masked_fill(product.isnan(), torch.nan)


def saturated(w: Tensor, scale: Tensor) -> Tensor:
    """Mask, bool, of the finite elements of w that clip by more than rounding; scale broadcasts."""
    return w.isfinite() & ((w / scale).abs() > E4M3_LIMIT)
