"""W8A16: int8 weights with one f32 scale per row (output channel).

    weight        int8 [N, K], row major
    weight_scale  float32 [N], multiplies on dequantization

Source of truth: NVIDIA ModelOpt 0.47.0, modelopt/torch/quantization/qtensor/int8_tensor.py and
modelopt/torch/export/quant_utils.py, CPU arithmetic.

Shapes: N rows out, K columns in.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels import _integer
from qkernels._scales import Layout, finite_amax, scale_from_amax
from qkernels.codec import Codec, Shapes


class _Int8Rows(Codec):
    """scale = amax / 127 of a row; codes = w / scale in f32, nearest even.

    amax is the largest finite magnitude, exact, and counts as the smallest normal number of the
    source dtype at least; a row of zeros gets scale 1.0.
    NaN becomes 0, Inf 127 or -128. Any slice of rows gives the same bytes.
    """

    name = "W8A16"
    layout = Layout(codes="int8", scales="f32")
    limits = (-128.5, 127.5)

    def shapes(self, n: int, k: int) -> Shapes:
        """weight [N, K], weight_scale [N]."""
        return {"weight": (torch.int8, (n, k)), "weight_scale": (torch.float32, (n,))}

    def encode(self, w_NK: Tensor, global_scale: Tensor | None) -> tuple[Tensor, ...]:
        """Codes and scales, row by row."""
        w_f32_NK = w_NK.float()
        scale_N = scale_from_amax(finite_amax(w_f32_NK, 1), source=w_NK.dtype, divisor=127.0)
        return _integer.encode(w_f32_NK, scale_N[:, None], low=-128, high=127), scale_N

    def scales(self, tensors: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        """A scale per row."""
        return tensors["weight_scale"][:, None]

    def launch_quantize(
        self, w_RK: Tensor, outs: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int
    ) -> None:
        """A program per row or rows."""
        from qkernels import _triton_integer

        codes, scale = outs
        _triton_integer.quantize_rows(w_RK, codes, scale)

    def launch_dequantize(
        self, ins: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int, out_RK: Tensor
    ) -> None:
        """Tile by tile."""
        from qkernels import _triton_integer

        codes, scale = ins
        _triton_integer.dequantize_rows(codes, scale, out_RK)


CODEC = _Int8Rows()
