"""MXFP8: e4m3 weights with an e8m0 scale (a power of two) per 32 columns.

    weight        float8_e4m3fn [N, K], row major      one byte per element:  S EEEE MMM
    weight_scale  uint8 [N, K/32]                      2^(byte - 127), 255 is NaN

Source of truth: NVIDIA ModelOpt 0.47.0, modelopt/torch/quantization/qtensor/mxfp8_tensor.py, CPU
arithmetic; element and scale types: OCP Microscaling Formats 1.0. ModelOpt takes a logarithm in
f32; here the power of two is exact, which is the same for every bf16 and f16 weight.

Shapes: N rows out, K columns in, B = K / 32 blocks of a row, G = 32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels import _e8m0
from qkernels._e4m3 import E4M3_LIMIT, E4M3_MAX, encode, sign_bits
from qkernels._scales import Layout, finite_amax
from qkernels.codec import Codec, Shapes

GROUP = 32


class _Mxfp8(Codec):
    """scale = the smallest 2^e >= 2^-127 with amax <= 448 * 2^e; codes as in FP8.

    A block of zeros has byte 0, as ModelOpt writes it. Any slice of rows gives the same bytes.
    """

    name = "MXFP8"
    multiple_of_k = GROUP
    layout = Layout(codes="e4m3", scales="e8m0", scale_cols=GROUP)
    limits = (-E4M3_LIMIT, E4M3_LIMIT)

    def shapes(self, n: int, k: int) -> Shapes:
        """weight [N, K], weight_scale [N, B]."""
        return {
            "weight": (torch.float8_e4m3fn, (n, k)),
            "weight_scale": (torch.uint8, (n, k // GROUP)),
        }

    def encode(self, w_NK: Tensor, global_scale: Tensor | None) -> tuple[Tensor, ...]:
        """Codes and scales, block by block."""
        n, k = w_NK.shape
        w_NBG = w_NK.float().view(n, k // GROUP, GROUP)
        scale_NB = _e8m0.bytes_from_amax(finite_amax(w_NBG, 2), largest=E4M3_MAX)
        negative = sign_bits(w_NK).view(w_NBG.shape)
        codes = encode(w_NBG, _e8m0.scales(scale_NB)[:, :, None], negative=negative)
        return codes.view(n, k), scale_NB

    def scales(self, tensors: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        """Scales of every element, [n, k]."""
        return _e8m0.scales(tensors["weight_scale"]).repeat_interleave(GROUP, dim=1)

    def launch_quantize(
        self, w_RK: Tensor, outs: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int
    ) -> None:
        """Blocks by blocks."""
        from qkernels import _triton_mx

        codes, scale = outs
        _triton_mx.quantize_fp8(w_RK, codes, scale)

    def launch_dequantize(
        self, ins: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int, out_RK: Tensor
    ) -> None:
        """Blocks by blocks."""
        from qkernels import _triton_mx

        codes, scale = ins
        _triton_mx.dequantize_fp8(codes, scale, out_RK)


CODEC = _Mxfp8()
