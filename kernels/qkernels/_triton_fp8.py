"""Launches of the e4m3 Triton kernels: grid, tile and warp choices.

Shapes: N rows out, K columns in.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from qkernels import _triton_e4m3 as kernels

BLOCK = 128
# one pass over a row while it fits into a program's registers
MAX_TILE_COLS = 65536
LONG_ROW_TILE_COLS = 16384


@dataclass(frozen=True, kw_only=True)
class Config:
    """Launch choices of one kernel; none of them changes a byte."""

    tile_rows: int
    tile_cols: int
    num_warps: int
    step: int
    """How many rows (of blocks) or columns (of rows) are reread at a time."""
    fast: bool
    """Use the short path for ordinary tiles."""
    reread: bool = False
    """Read the tile again by steps, from the L1 cache, instead of keeping it in registers."""
    maxnreg: int | None = None
    """Limit of registers per thread: fewer let more programs share a multiprocessor."""


def _has_e4m3_cast(device: torch.device) -> bool:
    """True when the kernels run on an NVIDIA GPU that converts to e4m3 by itself."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def block_config(device: torch.device) -> Config:
    """Launch choices for quantize_blocks; the fastest that `kernels_gpu.py --sweep` found."""
    return Config(
        tile_rows=BLOCK,
        tile_cols=BLOCK,
        num_warps=4,
        # in the interpreter steps cost time, on a GPU they save registers
        step=16 if device.type == "cuda" else BLOCK,
        fast=_has_e4m3_cast(device),
    )


def tile_config(device: torch.device) -> Config:
    """Launch choices for both dequantize functions; found as block_config was."""
    return Config(
        tile_rows=32 if device.type == "cuda" else BLOCK,
        tile_cols=BLOCK,
        num_warps=4,
        step=BLOCK,
        fast=_has_e4m3_cast(device),
    )


def row_config(device: torch.device, k: int) -> Config:
    """Launch choices for quantize_rows: one tile per row, or for long rows two passes of tiles."""
    fits = k <= MAX_TILE_COLS
    tile_cols = triton.next_power_of_2(max(k, 16)) if fits else LONG_ROW_TILE_COLS
    # a program costs the interpreter more than its elements do
    tile_rows = max((4096 if device.type == "cuda" else 32768) // tile_cols, 1)
    num_warps = min(max(tile_rows * tile_cols // 2048, 4), 16)
    return Config(
        tile_rows=tile_rows,
        tile_cols=tile_cols,
        num_warps=num_warps,
        # 16 bytes per thread at a time
        step=max(num_warps * 256 // tile_rows, 16) if device.type == "cuda" else tile_cols,
        fast=_has_e4m3_cast(device),
        reread=tile_cols >= 16384,
    )


def quantize_blocks(
    w_NK: Tensor, codes_NK: Tensor, scale: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling codes_NK (e4m3, contiguous) and scale (f32, one per block, row major)."""
    n, k = w_NK.shape
    config = config or block_config(w_NK.device)
    if codes_NK.numel() == 0:
        return
    with _on_device(w_NK):
        kernels.quantize_blocks_kernel[(scale.numel(),)](
            w_NK.contiguous(),
            codes_NK.view(torch.uint8),
            scale,
            n,
            k,
            TINY=torch.finfo(w_NK.dtype).tiny,
            BLOCK=BLOCK,
            STEP=config.step,
            FAST=config.fast,
            REREAD=config.reread,
            **_options(config),
        )


def quantize_rows(
    w_NK: Tensor, codes_NK: Tensor, scale_N: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling codes_NK (e4m3, contiguous) and scale_N (f32)."""
    n, k = w_NK.shape
    config = config or row_config(w_NK.device, k)
    if n == 0 or k == 0:
        # a row of nothing gets scale 1.0
        scale_N.fill_(1.0)
        return
    args = (w_NK.contiguous(), codes_NK.view(torch.uint8), scale_N, n, k)
    tiny = torch.finfo(w_NK.dtype).tiny
    with _on_device(w_NK):
        if k > config.tile_cols:
            kernels.quantize_long_rows_kernel[(n,)](
                *args,
                TINY=tiny,
                TILE_COLS=config.tile_cols,
                FAST=config.fast,
                **_options(config),
            )
        else:
            # Triton makes a constant of an argument that is 1, and 3.6 then compiles this kernel
            # wrong for 16-bit weights on sm_90
            kernel = kernels.quantize_rows_kernel if k > 1 else kernels.quantize_columns_kernel
            kernel[(triton.cdiv(n, config.tile_rows),)](
                *args,
                TINY=tiny,
                TILE_ROWS=config.tile_rows,
                TILE_COLS=config.tile_cols,
                STEP=min(config.step, config.tile_cols),
                FAST=config.fast,
                REREAD=config.reread,
                **_options(config),
            )


def dequantize_blocks(
    codes_NK: Tensor, scale: Tensor, out_NK: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling out_NK (bf16, f16 or f32, contiguous); scale has one per block."""
    config = config or tile_config(codes_NK.device)
    _dequantize(codes_NK, scale, out_NK, by_block=True, config=config)


def dequantize_rows(
    codes_NK: Tensor, scale_N: Tensor, out_NK: Tensor, *, config: Config | None = None
) -> None:
    """None, after filling out_NK (bf16, f16 or f32, contiguous); one scale per row."""
    config = config or tile_config(codes_NK.device)
    _dequantize(codes_NK, scale_N, out_NK, by_block=False, config=config)


def _dequantize(
    codes_NK: Tensor, scale: Tensor, out_NK: Tensor, *, by_block: bool, config: Config
) -> None:
    n, k = codes_NK.shape
    if out_NK.numel() == 0:
        return
    grid = triton.cdiv(n, config.tile_rows) * triton.cdiv(k, config.tile_cols)
    with _on_device(codes_NK):
        kernels.dequantize_tiles_kernel[(grid,)](
            codes_NK.contiguous().view(torch.uint8),
            scale.contiguous(),
            out_NK if out_NK.dtype == torch.float32 else out_NK.view(torch.int16),
            n,
            k,
            KIND={torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[out_NK.dtype],
            BY_BLOCK=by_block,
            BLOCK=BLOCK,
            TILE_ROWS=config.tile_rows,
            TILE_COLS=config.tile_cols,
            FAST=config.fast,
            **_options(config),
        )


def _options(config: Config) -> dict[str, object]:
    """Options of the launch itself; a fused multiply-add would change bytes."""
    options: dict[str, object] = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    return options if config.maxnreg is None else {**options, "maxnreg": config.maxnreg}


def _on_device(tensor: Tensor) -> torch.cuda.device:
    """Launches go to the tensor's own device; on the CPU (the interpreter) this does nothing."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)
