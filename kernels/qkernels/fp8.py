"""FP8: e4m3 weights with one f32 scale for the whole weight.

    weight        float8_e4m3fn [N, K], row major      one byte per element:  S EEEE MMM
    weight_scale  float32 [], multiplies on dequantization

Source of truth: NVIDIA ModelOpt 0.47.0, modelopt/torch/export/unified_export_hf.py (the FP8 branch
of export_quantized_weight), CPU arithmetic. Departures: one rounding, where ModelOpt rounds the
quotient to the source dtype first; a weight of zeros gets scale 1.0 and zeros, where ModelOpt
writes scale 0.0 and NaN; amax counts as the smallest normal number of the source dtype at least.

Not covered: input_scale, which follows from activations.

Shapes: N rows out, K columns in.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels._e4m3 import E4M3_LIMIT, E4M3_MAX, encode, sign_bits
from qkernels._scales import GlobalScale, Layout
from qkernels.codec import Codec, Shapes


class _Fp8(Codec):
    """scale = amax / 448 of all elements; codes = w / scale in f32, clamped, nearest even.

    -0.0 and negative numbers that underflow give 0x80; NaN gives 0x7F with its sign; Inf gives
    +-448. Any slice of rows gives the same bytes under the same scale.
    """

    name = "FP8"
    global_scale = GlobalScale(suffix="weight_scale", divisor=E4M3_MAX)
    layout = Layout(codes="e4m3", scales="whole")
    limits = (-E4M3_LIMIT, E4M3_LIMIT)

    def shapes(self, n: int, k: int) -> Shapes:
        """weight [N, K]."""
        return {"weight": (torch.float8_e4m3fn, (n, k))}

    def encode(self, w_NK: Tensor, global_scale: Tensor | None) -> tuple[Tensor, ...]:
        """Codes under the given scale."""
        assert global_scale is not None
        return (encode(w_NK.float(), global_scale, negative=sign_bits(w_NK)),)

    def scales(self, tensors: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        """The one scale."""
        return tensors["weight_scale"]

    def launch_quantize(
        self, w_RK: Tensor, outs: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int
    ) -> None:
        """Elementwise, one scale per matrix."""
        from qkernels import _triton_fp8

        assert global_scale_E is not None
        _triton_fp8.quantize_matrices(w_RK, outs[0], global_scale_E, n)

    def launch_dequantize(
        self, ins: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int, out_RK: Tensor
    ) -> None:
        """Elementwise, one scale per matrix."""
        from qkernels import _triton_fp8

        assert global_scale_E is not None
        _triton_fp8.dequantize_matrices(ins[0], global_scale_E, n, out_RK)


CODEC = _Fp8()
