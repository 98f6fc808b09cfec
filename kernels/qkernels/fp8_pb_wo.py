"""FP8_PB_WO: e4m3 weights with one f32 scale per block of 128 x 128.

    weight        float8_e4m3fn [N, K], row major      one byte per element:  S EEEE MMM
    weight_scale  float32 [ceil(N/128), 1, ceil(K/128), 1], multiplies on dequantization

Blocks at the right and bottom edge may be ragged: they count as zero padded. The two middle
dimensions of the scale stay, also when there is a single block.

Source of truth: NVIDIA ModelOpt 0.47.0, modelopt/torch/export/quant_utils.py
(to_quantized_weight) and modelopt/torch/quantization/qtensor/fp8_tensor.py (FP8QTensor.quantize),
CPU arithmetic. Departure: a layer of one block keeps a 4-D scale here, where ModelOpt collapses
it to 0-D.

Not covered: other block sizes, activation scales.

Shapes: N rows out, K columns in, R = ceil(N / 128), C = ceil(K / 128).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels._e4m3 import E4M3_LIMIT, E4M3_MAX, encode, sign_bits
from qkernels._scales import Layout, scale_from_amax
from qkernels.codec import Codec, Shapes

BLOCK = 128


class _Fp8Blocks(Codec):
    """scale = amax / 448 of a block; codes as in FP8.

    amax is the largest finite magnitude, exact, and counts as the smallest normal number of the
    source dtype at least; a block of zeros gets scale 1.0. Rows sliced at multiples of 128 give the
    same bytes.
    """

    name = "FP8_PB_WO"
    block_rows = BLOCK
    layout = Layout(codes="e4m3", scales="f32", scale_rows=BLOCK, scale_cols=BLOCK)
    limits = (-E4M3_LIMIT, E4M3_LIMIT)

    def shapes(self, n: int, k: int) -> Shapes:
        """weight [N, K], weight_scale [R, 1, C, 1]."""
        scale_shape = (_num_blocks(n), 1, _num_blocks(k), 1)
        return {
            "weight": (torch.float8_e4m3fn, (n, k)),
            "weight_scale": (torch.float32, scale_shape),
        }

    def encode(self, w_NK: Tensor, global_scale: Tensor | None) -> tuple[Tensor, ...]:
        """Codes and scales, block by block, of the weight padded with zeros."""
        n, k = w_NK.shape
        rows, cols = _num_blocks(n), _num_blocks(k)
        padding = (0, cols * BLOCK - k, 0, rows * BLOCK - n)
        blocks = torch.nn.functional.pad(w_NK.float(), padding).view(rows, BLOCK, cols, BLOCK)
        negative = torch.nn.functional.pad(sign_bits(w_NK), padding).view(rows, BLOCK, cols, BLOCK)
        amax_R1C1 = blocks.abs().where(blocks.isfinite(), 0.0).amax(dim=(1, 3), keepdim=True)
        scale_R1C1 = scale_from_amax(amax_R1C1, source=w_NK.dtype, divisor=E4M3_MAX)
        codes = encode(blocks, scale_R1C1, negative=negative)
        padded_codes = codes.view(rows * BLOCK, cols * BLOCK)
        # not .contiguous(), which leaves the strides of a single row or column alone
        codes_NK = padded_codes[:n, :k].clone(memory_format=torch.contiguous_format)
        return codes_NK, scale_R1C1

    def scales(self, tensors: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        """Scales of every element, [n, k]."""
        rows, _, cols, _ = tensors["weight_scale"].shape
        full = tensors["weight_scale"].expand(rows, BLOCK, cols, BLOCK)
        return full.reshape(rows * BLOCK, cols * BLOCK)[:n, :k]

    def launch_quantize(
        self, w_RK: Tensor, outs: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int
    ) -> None:
        """A program per block."""
        from qkernels import _triton_fp8

        codes, scale = outs
        _triton_fp8.quantize_blocks(w_RK, codes, scale)

    def launch_dequantize(
        self, ins: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int, out_RK: Tensor
    ) -> None:
        """Tile by tile."""
        from qkernels import _triton_fp8

        codes, scale = ins
        _triton_fp8.dequantize_blocks(codes, scale, out_RK)


CODEC = _Fp8Blocks()


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK)
