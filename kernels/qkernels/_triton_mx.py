"""Launches of the MX Triton kernels: e4m3 or e2m1 with an e8m0 scale per 32 columns.

Weights are contiguous and not empty. Shapes: R rows out, K columns in, B = K / 32.
"""

import torch
import triton
from torch import Tensor

from qkernels import _triton_groups as kernels
from qkernels._triton_fp4 import dequantize_words, quantize_groups
from qkernels._triton_fp8 import dequantize_flat
from qkernels._triton_launch import Config, choose, on_device, options

GROUP = 32


def eight_config(device: torch.device) -> Config:
    """Launch choices for MXFP8, tile_cols eights of elements at a time; found as others."""
    return choose(device, tile_cols=128 if device.type == "cuda" else 4096, num_warps=2)


def quantize_fp8(
    w_RK: Tensor, codes_RK: Tensor, scale_RB: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling codes_RK (e4m3) and scale_RB (uint8)."""
    config = config or eight_config(w_RK.device)
    num_eights = w_RK.numel() // 8
    with on_device(w_RK):
        kernels.quantize_mxfp8_kernel[(triton.cdiv(num_eights, config.tile_cols),)](
            w_RK,
            codes_RK.view(torch.uint8),
            scale_RB,
            num_eights,
            GROUP=GROUP,
            TILE=config.tile_cols,
            FAST=config.fast,
            **options(config),
        )


def quantize_fp4(
    w_RK: Tensor, packed: Tensor, scale_RB: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling packed (uint8 [R, K / 2]) and scale_RB (uint8)."""
    quantize_groups(
        w_RK, packed, scale_RB, None, scale_RB.numel(), scales="e8m0", group=GROUP, config=config
    )


def dequantize_fp8(
    codes_RK: Tensor, scale_RB: Tensor, out_RK: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling out_RK (bf16, f16 or f32)."""
    dequantize_flat(codes_RK, scale_RB, out_RK.numel(), out_RK, group=GROUP, config=config)


def dequantize_fp4(
    packed: Tensor, scale_RB: Tensor, out_RK: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling out_RK (bf16, f16 or f32)."""
    num_words = out_RK.numel() // 8
    dequantize_words(
        packed, scale_RB, None, num_words, out_RK, scales="e8m0", group=GROUP, config=config
    )
