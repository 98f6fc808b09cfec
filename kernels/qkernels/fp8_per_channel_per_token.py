"""FP8_PER_CHANNEL_PER_TOKEN: e4m3 weights with one f32 scale per row (output channel).

    weight        float8_e4m3fn [N, K], row major      one byte per element:  S EEEE MMM
    weight_scale  float32 [N], multiplies on dequantization

Source of truth: NVIDIA ModelOpt 0.47.0, modelopt/torch/export/quant_utils.py
(to_quantized_weight), CPU arithmetic.

Not covered: activation scales, which are dynamic (per token).

Shapes: N rows out, K columns in.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels._e4m3 import E4M3_LIMIT, E4M3_MAX, encode, sign_bits
from qkernels._scales import Layout, finite_amax, scale_from_amax
from qkernels.codec import Codec, Shapes


class _Fp8Rows(Codec):
    """scale = amax / 448 of a row; codes as in FP8.

    amax is the largest finite magnitude, exact, and counts as the smallest normal number of the
    source dtype at least; a row of zeros gets scale 1.0. Any slice of rows gives the same bytes.
    """

    name = "FP8_PER_CHANNEL_PER_TOKEN"
    layout = Layout(codes="e4m3", scales="f32")
    limits = (-E4M3_LIMIT, E4M3_LIMIT)

    def shapes(self, n: int, k: int) -> Shapes:
        """weight [N, K], weight_scale [N]."""
        return {"weight": (torch.float8_e4m3fn, (n, k)), "weight_scale": (torch.float32, (n,))}

    def encode(self, w_NK: Tensor, global_scale: Tensor | None) -> tuple[Tensor, ...]:
        """Codes and scales, row by row."""
        w_f32_NK = w_NK.float()
        amax_N = finite_amax(w_f32_NK, 1)
        scale_N = scale_from_amax(amax_N, source=w_NK.dtype, divisor=E4M3_MAX)
        return encode(w_f32_NK, scale_N[:, None], negative=sign_bits(w_NK)), scale_N

    def scales(self, tensors: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        """A scale per row."""
        return tensors["weight_scale"][:, None]

    def launch_quantize(
        self, w_RK: Tensor, outs: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int
    ) -> None:
        """A program per row or rows."""
        from qkernels import _triton_fp8

        codes, scale = outs
        _triton_fp8.quantize_rows(w_RK, codes, scale)

    def launch_dequantize(
        self, ins: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int, out_RK: Tensor
    ) -> None:
        """Tile by tile."""
        from qkernels import _triton_fp8

        codes, scale = ins
        _triton_fp8.dequantize_rows(codes, scale, out_RK)


CODEC = _Fp8Rows()
