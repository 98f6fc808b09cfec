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


def encode(w: Tensor, scale: Tensor, *, negative: Tensor) -> Tensor:
    """Codes, float8_e4m3fn, of w / scale; both f32, scale broadcasts.

    negative: bool, the sign bit of every element in its source dtype. It becomes that of the code,
    also of -0.0, of what underflows, and of NaN (0x7F), whose sign is lost when CUDA widens f16.
    One rounding, nearest even, after an f32 division and a clamp to 448, where Inf ends too.
    """
    clamped = (w.abs() / scale).clamp(max=E4M3_MAX)
    codes = clamped.to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes.masked_fill(w.isnan(), 0x7F)
    return (codes | negative.to(torch.uint8) << 7).view(torch.float8_e4m3fn)


def sign_bits(w: Tensor) -> Tensor:
    """Mask, bool, of the elements of w (bf16, f16 or f32) whose sign bit is set."""
    return w.view(torch.int32 if w.dtype == torch.float32 else torch.int16) < 0


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
