"""What the reference kernels for vLLM compute: formats decoded, and values rounded to them.

Copied beside `reference_vllm`, into vLLM's interpreter: torch and nothing else (Python 3.10+).
The formulas are those of vLLM's kernels, but for the rounding of sums. Weights are (N, K): N
outputs, K inputs.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

E4M3_MAX = 448.0
E2M1_MAX = 6.0
# by code: bit 3 is the sign, the others count 0 to 6 in steps of 1/2, 1 and 2
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1_VALUES = torch.cat([_E2M1, -_E2M1])
# by vLLM's names, without the end "_no_mul"
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda values: functional.gelu(values, approximate="tanh"),
}


def dequantized_nvfp4(
    codes: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor
) -> torch.Tensor:
    """Return float32 (N, K) from uint8 (N, K/2), low nibble first, E4M3 (N, K/16) and a scalar."""
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    values = _E2M1_VALUES[nibbles.int()]
    return values * (scale.float() * global_scale.float()).repeat_interleave(16, dim=-1)


def dequantized_mxfp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return float32 (N, K) from E4M3 (N, K) and the E8M0 bytes (N, K/32) of its scales."""
    factors = torch.exp2(scale.float() - 127)
    return codes.float() * factors.repeat_interleave(32, dim=-1)


def dequantized_blocks(codes: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Return float32 (N, K) from E4M3 (N, K) and float32 (ceil(N/block), ceil(K/block))."""
    num_n, num_k = codes.shape
    rows = scale.float().repeat_interleave(block, dim=0)[:num_n]
    return codes.float() * rows.repeat_interleave(block, dim=1)[:, :num_k]


def rounded_nvfp4(values: torch.Tensor, inverse_scale: torch.Tensor) -> torch.Tensor:
    """Return float32 `values` (..., K), K a multiple of 16, after a trip through NVFP4.

    inverse_scale: 2688 / the largest magnitude that calibration saw. A block's scale is E4M3, ties
    of the values go to the even code; products are taken in the order of vLLM's own quantization,
    so that ties of the scales fall alike.
    """
    blocks = values.float().reshape(*values.shape[:-1], -1, 16)
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = (inverse_scale * (largest * (1 / E2M1_MAX))).clamp(max=E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn).float() * inverse_scale.reciprocal()
    magnitude = (blocks.abs() * scale.reciprocal()).clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = ((magnitude / step).round() * step * scale).copysign(blocks)
    return torch.where(scale == 0, 0.0, rounded).flatten(-2)


def rounded_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return float32 `values` after a trip through E4M3 with `scale`, saturating."""
    return fp8_codes(values, scale).float() * scale


def fp8_codes(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 codes of `values` with `scale`, saturating."""
    scaled = values.float() * scale.float().reciprocal()
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def activated(values: torch.Tensor, name: str, *, is_gated: bool) -> torch.Tensor:
    """Return the activation of `values` (..., K), in their dtype.

    is_gated: the first half of the columns is activated and multiplied with the second.
    """
    if not is_gated:
        return ACTIVATIONS[name](values)
    gate, up = values.chunk(2, dim=-1)
    return ACTIVATIONS[name](gate) * up
