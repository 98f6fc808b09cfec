"""W4A16_AWQ: int4 weights, two rows (output channels) per byte, an f32 scale per 128 columns.

    weight        uint8 [N/2, K], row major      row 2r in the low nibble, row 2r+1 in the high one
    weight_scale  float32 [N, K/128], multiplies on dequantization

Nibbles are two's complement, -8 to 7; there is no zero point.

Source of truth: NVIDIA ModelOpt 0.47.0, modelopt/torch/export/quant_utils.py (pack_int4_in_uint8)
and modelopt/torch/quantization/qtensor/int4_tensor.py, CPU arithmetic.

Not covered: pre_quant_scale, which the caller multiplies into the weight.

Shapes: N rows out, K columns in, B = K / 128 blocks of a row, G = 128.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels import _integer
from qkernels._scales import Layout, finite_amax, scale_from_amax
from qkernels.codec import Codec, Shapes

GROUP = 128


class _Int4Blocks(Codec):
    """scale = amax / 7 of a block; codes = w / scale in f32, nearest even.

    amax is the largest finite magnitude, exact, and counts as the smallest normal number of the
    source dtype at least; a block of zeros gets scale 1.0.
    NaN becomes 0, Inf 7 or -8. Rows sliced at multiples of 2 give the same bytes.
    """

    name = "W4A16_AWQ"
    block_rows = 2
    multiple_of_n = 2
    multiple_of_k = GROUP
    packed_n = 2
    layout = Layout(codes="int4", scales="f32", scale_cols=GROUP)
    limits = (-8.5, 7.5)

    def shapes(self, n: int, k: int) -> Shapes:
        """weight [N/2, K], weight_scale [N, B]."""
        return {
            "weight": (torch.uint8, (n // 2, k)),
            "weight_scale": (torch.float32, (n, k // GROUP)),
        }

    def encode(self, w_NK: Tensor, global_scale: Tensor | None) -> tuple[Tensor, ...]:
        """Codes and scales, block by block."""
        n, k = w_NK.shape
        w_NBG = w_NK.float().view(n, k // GROUP, GROUP)
        scale_NB = scale_from_amax(finite_amax(w_NBG, 2), source=w_NK.dtype, divisor=7.0)
        codes_NK = _integer.encode(w_NBG, scale_NB[:, :, None], low=-8, high=7).view(n, k)
        nibbles_NK = codes_NK.view(torch.uint8) & 15
        return nibbles_NK[0::2] | nibbles_NK[1::2] << 4, scale_NB

    def values(self, codes: Tensor) -> Tensor:
        """Numbers of the codes."""
        nibbles = torch.stack([codes & 15, codes >> 4], dim=1).flatten(0, 1)
        return ((nibbles ^ 8).to(torch.int8) - 8).float()

    def scales(self, tensors: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        """Scales of every element, [n, k]."""
        return tensors["weight_scale"].repeat_interleave(GROUP, dim=1)

    def launch_quantize(
        self, w_RK: Tensor, outs: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int
    ) -> None:
        """Pairs of rows, block by block."""
        from qkernels import _triton_integer

        codes, scale = outs
        _triton_integer.quantize_pairs(w_RK, codes, scale)

    def launch_dequantize(
        self, ins: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int, out_RK: Tensor
    ) -> None:
        """Pairs of rows, block by block."""
        from qkernels import _triton_integer

        codes, scale = ins
        _triton_integer.dequantize_pairs(codes, scale, out_RK)


CODEC = _Int4Blocks()
