"""W4A8_NVFP4_FP8: NVFP4 in blocks of 32 columns, under a global scale of amax / 448.

    weight          uint8 [N, K/2], row major      two codes per byte, the even column low
    weight_scale    float8_e4m3fn [N, K/32]
    weight_scale_2  float32 []

Source of truth: NVIDIA ModelOpt 0.47.0, modelopt/torch/export/quant_utils.py
(get_weight_scaling_factor_2), CPU arithmetic.
"""

from qkernels._e4m3 import E4M3_MAX
from qkernels.nvfp4 import Nvfp4

CODEC = Nvfp4(name="W4A8_NVFP4_FP8", group=32, divisor=E4M3_MAX)
