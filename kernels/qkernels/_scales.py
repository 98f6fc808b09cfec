"""Scales: where they lie, and those of the torch references, from largest magnitudes."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GlobalScale:
    """The scale of a whole weight: f32, the largest finite magnitude of it over `divisor`.

    The magnitude counts as the smallest normal number of the source dtype at least; a weight of
    zeros gets 1.0. Weights that engines load as one share it: the caller then passes the scale.
    """

    suffix: str
    divisor: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Types of codes and scales, and which elements share a scale, for kernels of any format."""

    codes: str
    """e4m3, int8, e2m1 (two columns to a byte, the even low) or int4 (two rows, the even low)."""
    scales: str
    """f32, e8m0, e4m3 (times the scale of the whole weight), or whole: that one alone."""
    scale_rows: int = 1
    scale_cols: int = 0
    """Columns of a row under one scale; 0: all."""


def scale_from_amax(amax: Tensor, *, source: torch.dtype, divisor: float) -> Tensor:
    """Scales, f32, from the largest finite magnitudes `amax`, f32 and not negative.

    amax == 0 gives 1.0. Otherwise amax, at least the smallest normal number of the source dtype, is
    divided by `divisor` in f32.
    """
    # a tensor, not a number: CUDA turns division by a Python number into a multiplication
    scale = amax.clamp(min=torch.finfo(source).tiny) / torch.full_like(amax, divisor)
    return torch.where(amax == 0, 1.0, scale)


def finite_amax(w: Tensor, dim: int) -> Tensor:
    """Largest finite magnitude of w, f32, along `dim`; 0.0 of nothing."""
    magnitude = w.abs().where(w.isfinite(), 0.0)
    return magnitude.amax(dim) if w.shape[dim] else magnitude.sum(dim)
