"""Largest finite magnitudes of whole weights, by Triton.

Shapes: E matrices of M elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels._triton_launch import Config, choose, on_device, options
from qkernels._triton_numbers import finite_bits, from_bits

# a program takes fewer tiles where fewer programs than this would share the work
MANY_PROGRAMS = 132 * 16


@triton.jit
def _amax_kernel(w_ptr, amax_ptr, M, chunk, TILE: tl.constexpr):
    """One program per `chunk` elements of a matrix; axis 1 of the grid is the matrices."""
    matrix = tl.program_id(1).to(tl.int64)
    w_ptr += matrix * M
    start = tl.program_id(0).to(tl.int64) * chunk
    at = tl.arange(0, TILE)
    bits = tl.zeros([TILE], dtype=tl.int32)
    for place in range(start, tl.minimum(start + chunk, M), TILE):
        w = tl.load(w_ptr + place + at, mask=place + at < M, other=0.0)
        bits = tl.maximum(bits, finite_bits(w))
    amax = from_bits(tl.max(bits, axis=0), w_ptr.dtype.element_ty)
    # patterns of numbers that are not negative are ordered like them
    tl.atomic_max(amax_ptr + matrix, amax.to(tl.int32, bitcast=True), sem="relaxed")


def amax_config(device: torch.device) -> Config:
    """Launch choices for amax; found as those of `_triton_fp8` were."""
    if device.type != "cuda":
        return choose(device, tile_cols=65536, turns=16)
    return choose(device, tile_cols=1024, turns=16)


def amax(flat_EM: Tensor, amax_E: Tensor, *, config: Config | None = None) -> None:
    """None, after raising amax_E (f32, zeros) to the largest finite magnitudes of the rows.

    flat_EM: bf16, f16 or f32, contiguous, not empty. Exact, the same in any order.
    """
    e, m = flat_EM.shape
    config = config or amax_config(flat_EM.device)
    turns = triton.cdiv(e * m, MANY_PROGRAMS * config.tile_cols)
    chunk = min(turns, config.turns) * config.tile_cols
    with on_device(flat_EM):
        _amax_kernel[(triton.cdiv(m, chunk), e)](
            flat_EM,
            amax_E.view(torch.int32),
            m,
            chunk,
            TILE=config.tile_cols,
            **options(config),
        )
