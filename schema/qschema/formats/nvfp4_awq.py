"""NVFP4_AWQ: NVFP4 of weights smoothed by AWQ, with the scales that undo it on the input.

    weight          U8      [N, K/2]   two codes per byte, the even column in the low nibble
    weight_scale    F8_E4M3 [N, K/16]
    weight_scale_2  F32     []         of a whole weight, the largest of fused siblings
    input_scale     F32     []         from calibration, of the smoothed input
    pre_quant_scale BF16    [K]        multiplies the input, where no layer before has taken it in

Source: ModelOpt 0.47.0 export/quant_utils.py:683-795, 1300-1562.
"""

from qschema.formats._parts import (
    E2M1_CODES,
    E2M1_ERROR,
    NV_DEPARTURES,
    PRE_QUANT_SCALE,
    group,
    input_scale,
    nv_formula,
    nv_scales,
)
from qschema.formats.declare import Format

FORMAT = Format(
    name="NVFP4_AWQ",
    spelling="NVFP4_AWQ",
    title="NVFP4 after AWQ smoothing",
    kernels="NVFP4",
    tensors=(
        E2M1_CODES,
        *nv_scales(group=16, divisor=2688.0),
        input_scale(divisor=2688.0, zero=6.0, shared="siblings"),
        PRE_QUANT_SCALE,
    ),
    element="E2M1",
    multiple_of_k=16,
    error_bound=E2M1_ERROR,
    hf_quant_fields={"group_size": 16, "has_zero_point": False, "pre_quant_scale": True},
    # ModelOpt's words for it inside a mixed checkpoint, the input's 8 bits included
    config_group={
        "input_activations": group(bits=8, size=16),
        "weights": group(bits=4, size=16),
    },
    folds_into=("norm", "linear"),
    formula=nv_formula(divisor=2688.0),
    source="ModelOpt 0.47.0 quantization/qtensor/nvfp4_tensor.py:37-46, 167-202, 231-345",
    readers=("TensorRT-LLM 1.3 (documented)", "SGLang 0.5.23 (documented, Blackwell)"),
    departures=NV_DEPARTURES,
)
