"""What the launches of all Triton kernels share: choices, options, views.

Nothing in a Config changes a byte. Where the matrices of a batch are an axis of the grid, there may
be 65535 of them; CUDA refuses more.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Launch choices of one kernel."""

    tile_rows: int = 1
    """Rows of a tile; of kernels by groups, how many groups a program takes."""
    tile_cols: int = 0
    """Columns of a tile; of elementwise kernels, how many elements a program takes."""
    num_warps: int = 4
    step: int = 0
    """How many rows of a block are reread at a time."""
    turns: int = 1
    """How many tiles a program takes, one after another."""
    fast: bool
    """Use the short path for ordinary tiles."""
    reread: bool = False
    """Read the tile again by steps, from the L1 cache, instead of keeping it in registers."""
    maxnreg: int | None = None
    """Limit of registers per thread: fewer let more programs share a multiprocessor."""


def choose(device: torch.device, **choices: Any) -> Config:
    """A Config with the short path where the device has it."""
    return Config(fast=_has_short_path(device), **choices)


def _has_short_path(device: torch.device) -> bool:
    """True when the kernels run on an NVIDIA GPU that converts to e4m3 by itself."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def options(config: Config) -> dict[str, object]:
    """Options of the launch itself; a fused multiply-add would change bytes."""
    chosen: dict[str, object] = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    return chosen if config.maxnreg is None else {**chosen, "maxnreg": config.maxnreg}


def on_device(tensor: Tensor) -> torch.cuda.device:
    """Launches go to the tensor's own device; on the CPU (the interpreter) this does nothing."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


def stored(out: Tensor) -> Tensor:
    """The output as the kernels write it: 16-bit floats as integers."""
    return out if out.dtype == torch.float32 else out.view(torch.int16)


def as_words(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous input as int32, copied where they are not aligned."""
    flat = tensor.view(-1)
    offset = flat.storage_offset() * flat.element_size()
    aligned = flat if flat.data_ptr() % 4 == offset % 4 == 0 else flat.clone()
    return aligned.view(torch.int32)
