"""Launches of the FP8 Triton kernels: a scale per block, per row, or per matrix.

Weights are contiguous and not empty. Shapes: N rows out, K columns in, E matrices, R rows of all.
"""

import torch
import triton
from torch import Tensor

from qkernels import _triton_bytes as kernels
from qkernels._e4m3 import E4M3_MAX
from qkernels._triton_launch import (
    KINDS,
    Config,
    choose,
    on_device,
    options,
    stored,
)
from qkernels._triton_rows import dequantize_tiles, launch_rows

BLOCK = 128


def block_config(device: torch.device) -> Config:
    """Launch choices for quantize_blocks; the fastest that `kernels_gpu.py --sweep` found."""
    return choose(
        device,
        tile_rows=BLOCK,
        tile_cols=BLOCK,
        # in the interpreter steps cost time, on a GPU they save registers
        step=16 if device.type == "cuda" else BLOCK,
    )


def flat_config(device: torch.device) -> Config:
    """Launch choices for quantize_matrices; found as block_config was."""
    if device.type != "cuda":
        return choose(device, tile_cols=65536)
    return choose(device, tile_cols=2048, num_warps=1)


def decode_config(device: torch.device) -> Config:
    """Launch choices for dequantize_flat; found as block_config was."""
    return choose(device, tile_cols=2048 if device.type == "cuda" else 65536)


def quantize_blocks(
    w_RK: Tensor, codes_RK: Tensor, scale: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling codes_RK (e4m3) and scale (f32, one per block, row major)."""
    n, k = w_RK.shape
    config = config or block_config(w_RK.device)
    with on_device(w_RK):
        kernels.quantize_blocks_kernel[(scale.numel(),)](
            w_RK,
            codes_RK.view(torch.uint8),
            scale,
            n,
            k,
            CODES="e4m3",
            TINY=torch.finfo(w_RK.dtype).tiny,
            LARGEST=E4M3_MAX,
            BLOCK=BLOCK,
            STEP=config.step,
            FAST=config.fast,
            REREAD=config.reread,
            **options(config),
        )


def quantize_rows(
    w_RK: Tensor, codes_RK: Tensor, scale_R: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling codes_RK (e4m3) and scale_R (f32)."""
    launch_rows(w_RK, codes_RK, scale_R, codes="e4m3", largest=E4M3_MAX, config=config)


def quantize_matrices(
    w_RK: Tensor, codes_RK: Tensor, scale_E: Tensor, n: int, *, config: Config | None = None
) -> None:
    """None, after filling codes_RK (e4m3); row r has the scale scale_E[r // n], f32."""
    numel = n * w_RK.shape[1]
    config = config or flat_config(w_RK.device)
    grid = (triton.cdiv(numel, config.tile_cols), scale_E.numel())
    with on_device(w_RK):
        kernels.quantize_matrices_kernel[grid](
            w_RK,
            codes_RK.view(torch.uint8),
            scale_E,
            numel,
            CODES="e4m3",
            TILE=config.tile_cols,
            FAST=config.fast,
            **options(config),
        )


def dequantize_blocks(
    codes_RK: Tensor, scale: Tensor, out_RK: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling out_RK (bf16, f16 or f32); scale has one per block."""
    dequantize_tiles(codes_RK, scale, out_RK, codes="e4m3", block=BLOCK, config=config)


def dequantize_rows(
    codes_RK: Tensor, scale_R: Tensor, out_RK: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling out_RK (bf16, f16 or f32); one scale per row."""
    dequantize_tiles(codes_RK, scale_R, out_RK, codes="e4m3", config=config)


def dequantize_matrices(
    codes_RK: Tensor, scale_E: Tensor, n: int, out_RK: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling out_RK (bf16, f16 or f32); row r has the scale scale_E[r // n]."""
    dequantize_flat(codes_RK, scale_E, n * out_RK.shape[1], out_RK, config=config)


def dequantize_flat(
    codes: Tensor,
    scale: Tensor,
    numel: int,
    out: Tensor,
    *,
    group: int = 0,
    config: Config | None = None,
) -> None:
    """None, after filling `out`; scale is f32 per `numel` elements, or e8m0 bytes per `group`."""
    config = config or decode_config(codes.device)
    grid = (triton.cdiv(numel, config.tile_cols), out.numel() // numel)
    with on_device(codes):
        kernels.dequantize_flat_kernel[grid](
            codes.view(torch.uint8),
            scale,
            stored(out),
            numel,
            KIND=KINDS[out.dtype],
            GROUP=group,
            TILE=config.tile_cols,
            FAST=config.fast,
            **options(config),
        )
