"""W4A8_NVFP4_FP8: E2M1 weights in blocks of 32 columns, FP8 inputs.

    weight          U8      [N, K/2]   two codes per byte, the even column in the low nibble
    weight_scale    F8_E4M3 [N, K/32]
    weight_scale_2  F32     []         of a whole weight, the largest of fused siblings
    input_scale     F32     []         from calibration

Source: ModelOpt 0.47.0 export/quant_utils.py:281-300, 323-340.
"""

from qschema.formats._parts import (
    E2M1_CODES,
    E2M1_ERROR,
    NV_DEPARTURES,
    group,
    input_scale,
    nv_formula,
    nv_scales,
)
from qschema.formats.declare import Format

FORMAT = Format(
    name="W4A8_NVFP4_FP8",
    spelling="W4A8_NVFP4_FP8",
    title="FP4 E2M1, 32-column E4M3 scales, static FP8 input scale",
    tensors=(
        E2M1_CODES,
        *nv_scales(group=32, divisor=448.0),
        input_scale(divisor=448.0, zero=448.0, shared="siblings"),
    ),
    element="E2M1",
    multiple_of_k=32,
    error_bound=E2M1_ERROR,
    hf_quant_fields={"group_size": 32},
    config_group={"input_activations": group(bits=8), "weights": group(bits=4, size=32)},
    formula=nv_formula(divisor=448.0),
    source="ModelOpt 0.47.0 export/quant_utils.py:281-300, 323-340, "
    "quantization/qtensor/nvfp4_tensor.py:37-46, 167-202, 231-345",
    readers=("TensorRT-LLM 1.2 (documented)",),
    departures=NV_DEPARTURES,
)
