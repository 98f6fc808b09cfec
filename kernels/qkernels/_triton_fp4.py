"""Launches of the e2m1 Triton kernels, and those of NVFP4 for both groups.

Weights are contiguous and not empty. Shapes: R rows out of E matrices with n rows each, K columns
in, B = K / group.
"""

import torch
import triton
from torch import Tensor

from qkernels import _triton_groups as kernels
from qkernels._triton_launch import (
    KINDS,
    Config,
    as_words,
    choose,
    on_device,
    options,
    stored,
)

# a program takes fewer tiles where fewer programs than this would share the work
MANY_PROGRAMS = 132 * 64


def group_config(device: torch.device, num_groups: int, *, scales: str, group: int) -> Config:
    """Launch choices for num_groups in all; found as those of `_triton_fp8` were."""
    if device.type != "cuda":
        return choose(device, tile_rows=2048)
    turns = min(triton.cdiv(num_groups, 32 * MANY_PROGRAMS), 8 if scales == "e4m3" else 4)
    # a group to a thread, of one warp: what all of a tile agree on takes no barrier
    limit = 96 if group == 32 else None
    return choose(device, tile_rows=32, num_warps=1, turns=turns, maxnreg=limit)


def word_config(device: torch.device) -> Config:
    """Launch choices for dequantization, tile_cols words of eight codes at a time."""
    if device.type != "cuda":
        return choose(device, tile_cols=4096)
    return choose(device, tile_cols=256, num_warps=2)


def quantize_nv(
    w_RK: Tensor,
    codes: Tensor,
    scale_RB: Tensor,
    global_scale_E: Tensor,
    n: int,
    *,
    group: int,
    config: Config | None = None,
) -> None:
    """None, after filling codes (uint8 [R, K / 2]) and scale_RB (e4m3)."""
    quantize_groups(
        w_RK,
        codes,
        scale_RB.view(torch.uint8),
        global_scale_E,
        n * w_RK.shape[1] // group,
        scales="e4m3",
        group=group,
        config=config,
    )


def quantize_groups(
    w_RK: Tensor,
    codes: Tensor,
    scale: Tensor,
    global_scale_E: Tensor | None,
    num_groups: int,
    *,
    scales: str,
    group: int,
    config: Config | None = None,
) -> None:
    """None, after filling codes and scale (uint8); num_groups belong to each matrix."""
    config = config or group_config(w_RK.device, scale.numel(), scales=scales, group=group)
    grid = (
        triton.cdiv(num_groups, config.tile_rows * config.turns),
        scale.numel() // num_groups,
    )
    with on_device(w_RK):
        kernels.quantize_fp4_kernel[grid](
            as_words(w_RK),
            # fresh, hence aligned; torch refuses this view of anything else
            codes.view(-1).view(torch.int32),
            scale,
            global_scale_E,
            num_groups,
            SOURCE=KINDS[w_RK.dtype],
            SCALES=scales,
            GROUP=group,
            TILE=config.tile_rows,
            TURNS=config.turns,
            FAST=config.fast,
            **options(config),
        )


def dequantize_nv(
    codes: Tensor,
    scale_RB: Tensor,
    global_scale_E: Tensor,
    n: int,
    out_RK: Tensor,
    *,
    group: int,
    config: Config | None = None,
) -> None:
    """None, after filling out_RK (bf16, f16 or f32)."""
    dequantize_words(
        codes,
        scale_RB.view(torch.uint8),
        global_scale_E,
        n * out_RK.shape[1] // 8,
        out_RK,
        scales="e4m3",
        group=group,
        config=config,
    )


def dequantize_words(
    codes: Tensor,
    scale: Tensor,
    global_scale_E: Tensor | None,
    num_words: int,
    out_RK: Tensor,
    *,
    scales: str,
    group: int,
    config: Config | None = None,
) -> None:
    """None, after filling out_RK; num_words words of codes belong to each matrix."""
    config = config or word_config(codes.device)
    grid = (triton.cdiv(num_words, config.tile_cols), out_RK.numel() // (num_words * 8))
    with on_device(codes):
        kernels.dequantize_fp4_kernel[grid](
            as_words(codes),
            scale,
            global_scale_E,
            stored(out_RK),
            num_words,
            SCALES=scales,
            KIND=KINDS[out_RK.dtype],
            GROUP=group,
            TILE=config.tile_cols,
            FAST=config.fast,
            **options(config),
        )
