"""The e4m3 arithmetic of the torch references, written from the definition.

e4m3fn is S.EEEE.MMM with bias 7: no infinity, NaN 0x7F and 0xFF, largest 448, smallest step 2^-9.

Shapes: N rows out, K columns in.
"""

import torch
from torch import Tensor

E4M3_MAX = 448.0
# 448 plus half a step: what is larger rounds above the largest code
E4M3_LIMIT = 464.0


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
