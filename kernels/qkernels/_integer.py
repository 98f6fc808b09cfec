"""The integer arithmetic of the torch references: two's complement, no zero point."""

import torch
from torch import Tensor


def encode(w: Tensor, scale: Tensor, *, low: int, high: int) -> Tensor:
    """w / scale in f32, rounded to nearest even and clamped, int8; NaN becomes 0, Inf the bound."""
    return (w / scale).nan_to_num(0.0).round().clamp(low, high).to(torch.int8)
