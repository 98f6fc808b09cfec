"""NVFP4: e2m1 weights, an e4m3 scale per 16 columns, and an f32 scale of the whole weight.

    weight          uint8 [N, K/2], row major      two codes per byte, the even column low
    weight_scale    float8_e4m3fn [N, K/16]
    weight_scale_2  float32 []

A number is e2m1 code * (weight_scale * weight_scale_2), the product in brackets rounded to f32.

Source of truth: NVIDIA ModelOpt 0.47.0, modelopt/torch/quantization/qtensor/nvfp4_tensor.py,
CPU arithmetic. Departures: a weight of zeros gets weight_scale_2 1.0, where ModelOpt writes 0.0,
NaN scales and codes of 6; the global amax counts as the smallest normal number of the source dtype
at least; a negative number whose quotient underflows to zero keeps its sign.

Not covered: input_scale, which follows from activations; block scales other than the largest
magnitude's (MSE search, four-over-six).

Shapes: N rows out, K columns in, B = K / group blocks of a row, G = group.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels import _e2m1
from qkernels._e4m3 import E4M3_MAX
from qkernels._scales import GlobalScale, Layout, finite_amax
from qkernels.codec import Codec, Shapes

SMALLEST_SCALE = 2.0**-9


class Nvfp4(Codec):
    """scale = e4m3(amax / (6 * global)) of a block, 2^-9 at least; codes = e2m1 of the quotient.

    The quotient is w / (scale * global).

    Every operation is an f32 operation of its own; e4m3 and e2m1 round to nearest even. A block of
    zeros gets scale 1.0. A negative number that rounds to zero keeps its sign (code 8), -0.0 has
    code 0; NaN becomes 0, Inf +-6. Any slice of rows gives the same bytes under the same global
    scale.
    """

    packed_k = 2
    limits = (-_e2m1.E2M1_LIMIT, _e2m1.E2M1_LIMIT)

    def __init__(self, *, name: str, group: int, divisor: float) -> None:
        self.name = name
        self.group = group
        self.multiple_of_k = group
        self.layout = Layout(codes="e2m1", scales="e4m3", scale_cols=group)
        self.global_scale = GlobalScale(suffix="weight_scale_2", divisor=divisor)

    def shapes(self, n: int, k: int) -> Shapes:
        """weight [N, K/2], weight_scale [N, B]."""
        return {
            "weight": (torch.uint8, (n, k // 2)),
            "weight_scale": (torch.float8_e4m3fn, (n, k // self.group)),
        }

    def encode(self, w_NK: Tensor, global_scale: Tensor | None) -> tuple[Tensor, ...]:
        """Codes and block scales under the given global scale."""
        assert global_scale is not None
        n, k = w_NK.shape
        w_NBG = w_NK.float().view(n, k // self.group, self.group)
        amax_NB = finite_amax(w_NBG, 2)
        ratio_NB = amax_NB / (_e2m1.E2M1_MAX * global_scale)
        ratio_NB = torch.where(ratio_NB == 0, 1.0, ratio_NB).clamp(SMALLEST_SCALE, E4M3_MAX)
        scale_NB = ratio_NB.to(torch.float8_e4m3fn)
        product_NB1 = (scale_NB.float() * global_scale)[:, :, None]
        codes_NK = _e2m1.encode(w_NBG, product_NB1).view(n, k)
        return _e2m1.pack(codes_NK), scale_NB

    def values(self, codes: Tensor) -> Tensor:
        """Numbers of the codes."""
        return _e2m1.values(codes)

    def scales(self, tensors: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        """Scales of every element, [n, k]."""
        scale_NB = tensors["weight_scale"].float() * tensors["weight_scale_2"]
        return scale_NB.repeat_interleave(self.group, dim=1)

    def launch_quantize(
        self, w_RK: Tensor, outs: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int
    ) -> None:
        """Blocks by blocks."""
        from qkernels import _triton_fp4

        assert global_scale_E is not None
        codes, scale = outs
        _triton_fp4.quantize_nv(w_RK, codes, scale, global_scale_E, n, group=self.group)

    def launch_dequantize(
        self, ins: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int, out_RK: Tensor
    ) -> None:
        """Blocks by blocks."""
        from qkernels import _triton_fp4

        assert global_scale_E is not None
        codes, scale = ins
        _triton_fp4.dequantize_nv(codes, scale, global_scale_E, n, out_RK, group=self.group)


CODEC = Nvfp4(name="NVFP4", group=16, divisor=_e2m1.E2M1_MAX * E4M3_MAX)
