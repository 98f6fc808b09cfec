"""Launches of the integer Triton kernels: int8 by rows, int4 by blocks in pairs of rows.

Weights are contiguous and not empty. Shapes: N rows out, K columns in, P = N / 2, B = K / 128.
"""

import torch
import triton
from torch import Tensor

from qkernels import _triton_pairs as kernels
from qkernels._triton_launch import KINDS, Config, choose, on_device, options, stored
from qkernels._triton_rows import dequantize_tiles, launch_rows

BLOCK = 128


def pair_config(device: torch.device, num_blocks: int) -> Config:
    """Launch choices for quantize_pairs, tile_cols blocks of tile_rows pairs of rows at a time."""
    tile, num_warps = (8, 1) if device.type == "cuda" else (256, 4)
    tile_cols = min(triton.next_power_of_2(num_blocks), tile)
    return choose(device, tile_rows=tile // tile_cols, tile_cols=tile_cols, num_warps=num_warps)


def pair_decode_config(device: torch.device, num_blocks: int) -> Config:
    """The same for dequantize_pairs; both found as those of `_triton_fp8` were."""
    tile = 16 if device.type == "cuda" else 256
    tile_cols = min(triton.next_power_of_2(num_blocks), tile)
    return choose(device, tile_rows=tile // tile_cols, tile_cols=tile_cols, num_warps=8)


def quantize_rows(
    w_NK: Tensor, codes_NK: Tensor, scale_N: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling codes_NK (int8) and scale_N (f32)."""
    launch_rows(w_NK, codes_NK, scale_N, codes="int8", largest=127.0, config=config)


def dequantize_rows(
    codes_NK: Tensor, scale_N: Tensor, out_NK: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling out_NK (bf16, f16 or f32); one scale per row."""
    dequantize_tiles(codes_NK, scale_N, out_NK, codes="int8", config=config)


def quantize_pairs(
    w_NK: Tensor, codes_PK: Tensor, scale_NB: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling codes_PK (uint8, two rows to a byte) and scale_NB (f32)."""
    num_pairs, k = codes_PK.shape
    num_blocks = k // BLOCK
    config = config or pair_config(w_NK.device, num_blocks)
    grid = (
        triton.cdiv(num_pairs, config.tile_rows),
        triton.cdiv(num_blocks, config.tile_cols),
    )
    with on_device(w_NK):
        kernels.quantize_pairs_kernel[grid](
            w_NK,
            codes_PK,
            scale_NB,
            num_pairs,
            num_blocks,
            TINY=torch.finfo(w_NK.dtype).tiny,
            BLOCK=BLOCK,
            TILE_PAIRS=config.tile_rows,
            TILE=config.tile_cols,
            FAST=config.fast,
            **options(config),
        )


def dequantize_pairs(
    codes_PK: Tensor, scale_NB: Tensor, out_NK: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling out_NK (bf16, f16 or f32)."""
    num_pairs, k = codes_PK.shape
    num_blocks = k // BLOCK
    config = config or pair_decode_config(codes_PK.device, num_blocks)
    grid = (
        triton.cdiv(num_pairs, config.tile_rows),
        triton.cdiv(num_blocks, config.tile_cols),
    )
    with on_device(codes_PK):
        kernels.dequantize_pairs_kernel[grid](
            codes_PK,
            scale_NB,
            stored(out_NK),
            num_pairs,
            num_blocks,
            KIND=KINDS[out_NK.dtype],
            BLOCK=BLOCK,
            TILE_PAIRS=config.tile_rows,
            TILE=config.tile_cols,
            FAST=config.fast,
            **options(config),
        )
