"""The e2m1 arithmetic of the torch references, written from the definition.

e2m1 is S.EE.M with bias 1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; no infinity, no NaN. Two
codes to a byte, the even column in the low nibble.

Shapes: N rows out, K columns in.
"""

import torch
from torch import Tensor

E2M1_MAX = 6.0
# 6 plus half the step that a larger number would have: what is beyond is clipped, not rounded
E2M1_LIMIT = 7.0
# midpoints between neighbours, and whether a tie goes up to the even code
_MIDPOINTS = (
    (0.25, False),
    (0.75, True),
    (1.25, False),
    (1.75, True),
    (2.5, False),
    (3.5, True),
    (5.0, False),
)


def encode(w: Tensor, scale: Tensor) -> Tensor:
    """Codes, uint8, of w / scale; both f32, scale broadcasts and is positive.

    One rounding, nearest even, after an f32 division; what is beyond 6 becomes 6, also Inf. The
    sign bit says w < 0: both zeros are code 0, a negative number that rounds to zero is code 8. NaN
    becomes 0, since there is no code for it.
    """
    magnitude = w.abs() / scale
    codes = torch.zeros(magnitude.shape, dtype=torch.uint8, device=w.device)
    for middle, tie_goes_up in _MIDPOINTS:
        codes += magnitude >= middle if tie_goes_up else magnitude > middle
    return codes | (w < 0).to(torch.uint8) << 3


def pack(codes_NK: Tensor) -> Tensor:
    """Bytes, uint8 [N, K / 2]."""
    return codes_NK[:, 0::2] | codes_NK[:, 1::2] << 4


def values(packed: Tensor) -> Tensor:
    """Numbers of the codes, f32 [N, K], from bytes [N, K / 2].

    Bit by bit, since a table would have to be copied to the device first.
    """
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).int()
    exponent, mantissa = codes >> 1 & 3, codes & 1
    normal = exponent + 126 << 23 | mantissa << 22
    # 0 or 0.5
    subnormal = mantissa * 0x3F000000
    magnitude = torch.where(exponent > 0, normal, subnormal)
    return (magnitude | (codes & 8) << 28).view(torch.float32)
