"""Launches of the Triton kernels that quantize whole rows, and dequantize tile by tile.

Weights are contiguous and not empty. Shapes: N rows out, K columns in.
"""

import torch
import triton
from torch import Tensor

from qkernels import _triton_bytes as kernels
from qkernels._triton_launch import KINDS, Config, choose, on_device, options, stored

# the longest row that a program keeps in registers, and the longest that it reads again as a whole
KEPT_COLS = 32768
MAX_COLS = 65536


def row_config(device: torch.device, k: int) -> Config:
    """Launch choices for rows: several to a tile, or tile by tile; the fastest of a sweep."""
    if device.type != "cuda":
        # a program costs the interpreter more than its elements do
        tile_cols = min(triton.next_power_of_2(max(k, 16)), 32768)
        return choose(device, tile_rows=32768 // tile_cols, tile_cols=tile_cols)
    if k <= 4096:
        tile_cols = triton.next_power_of_2(max(k, 16))
        return choose(device, tile_rows=4096 // tile_cols, tile_cols=tile_cols)
    if k <= KEPT_COLS:
        # as many registers as let two programs share a multiprocessor
        return choose(device, tile_cols=2048, num_warps=8, maxnreg=96 if k <= 28672 else 128)
    return choose(device, tile_cols=4096, num_warps=16, reread=True)


def tile_config(device: torch.device, k: int, *, in_blocks: bool) -> Config:
    """Launch choices for dequantization; found as those of row_config were."""
    if device.type != "cuda":
        return choose(device, tile_rows=128, tile_cols=128)
    if in_blocks or k < 2048:
        return choose(device, tile_rows=32, tile_cols=128, num_warps=2)
    return choose(device, tile_rows=4, tile_cols=2048, num_warps=8)


def launch_rows(
    w_NK: Tensor,
    codes_NK: Tensor,
    scale_N: Tensor,
    *,
    codes: str,
    largest: float,
    config: Config | None = None,
) -> None:
    """None, after filling codes_NK (one byte each) and scale_N (f32), amax / largest of a row."""
    n, k = w_NK.shape
    config = config or row_config(w_NK.device, k)
    constants = {
        "CODES": codes,
        "TINY": torch.finfo(w_NK.dtype).tiny,
        "LARGEST": largest,
        "TILE_COLS": config.tile_cols,
        "FAST": config.fast,
        **options(config),
    }
    args = (w_NK, codes_NK.view(torch.uint8), scale_N)
    with on_device(w_NK):
        if k > MAX_COLS:
            kernels.quantize_long_rows_kernel[(n,)](*args, k, **constants)
        else:
            # Triton makes a constant of an argument that is 1, and 3.6 then compiles this kernel
            # wrong for 16-bit weights on sm_90
            kernel = kernels.quantize_rows_kernel if k > 1 else kernels.quantize_columns_kernel
            kernel[(triton.cdiv(n, config.tile_rows),)](
                *args,
                n,
                k,
                TILE_ROWS=config.tile_rows,
                NUM_TILES=triton.cdiv(k, config.tile_cols),
                REREAD=config.reread,
                **constants,
            )


def dequantize_tiles(
    codes_NK: Tensor,
    scale: Tensor,
    out_NK: Tensor,
    *,
    codes: str,
    block: int = 0,
    config: Config | None = None,
) -> None:
    """None, after filling out_NK; scale (f32) has one per row, or one per block x block."""
    n, k = out_NK.shape
    config = config or tile_config(codes_NK.device, k, in_blocks=block > 0)
    grid = triton.cdiv(n, config.tile_rows) * triton.cdiv(k, config.tile_cols)
    with on_device(codes_NK):
        kernels.dequantize_tiles_kernel[(grid,)](
            codes_NK.view(torch.uint8),
            scale,
            stored(out_NK),
            n,
            k,
            CODES=codes,
            KIND=KINDS[out_NK.dtype],
            BY_BLOCK=block > 0,
            BLOCK=block,
            TILE_ROWS=config.tile_rows,
            TILE_COLS=config.tile_cols,
            FAST=config.fast,
            **options(config),
        )
