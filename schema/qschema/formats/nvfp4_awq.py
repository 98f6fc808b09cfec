"""NVFP4_AWQ: NVFP4 of weights smoothed by AWQ, with the scales that undo it on the input.

    weight          U8      [N, K/2]   two codes per byte, the even column in the low nibble
    weight_scale    F8_E4M3 [N, K/16]
    weight_scale_2  F32     []         of a whole weight, the largest of fused siblings
    input_scale     F32     []         from calibration, of the smoothed input
    pre_quant_scale BF16    [K]        multiplies the input, where no layer before has taken it in

Source: ModelOpt 0.47.0 export/quant_utils.py:683-795, 1300-1562.
"""

from qschema.formats._parts import E2M1_CODES, PRE_QUANT_SCALE, group, input_scale, nv_scales
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
    # half a step of one mantissa bit: 1/5 at the ties 1.25, 2.5 and 5
    error_bound=0.2,
    hf_quant_fields={"group_size": 16, "has_zero_point": False, "pre_quant_scale": True},
    # ModelOpt's words for it inside a mixed checkpoint, the input's 8 bits included
    config_group={
        "input_activations": group(bits=8, size=16),
        "weights": group(bits=4, size=16),
    },
    folds_into=("norm", "linear"),
    formula="weight_scale_2 = max(amax, tiny) / 2688, 1.0 for zeros; weight_scale = e4m3(clamp("
    "block amax / (6 * weight_scale_2), 2^-9, 448)), 1.0 for a block of zeros; code = e2m1(w / "
    "(weight_scale * weight_scale_2)), ties to even, the sign bit where w < 0",
    source="ModelOpt 0.47.0 quantization/qtensor/nvfp4_tensor.py:37-46, 167-202, 231-345",
    readers=("TensorRT-LLM 1.3 (documented)",),
    departures=(
        "a weight of zeros gets weight_scale_2 1.0 and zeros; ModelOpt writes 0.0, NaN scales and "
        "codes of 6",
        "an amax below the smallest normal number of the source dtype counts as that number",
        "a negative number whose quotient underflows to zero keeps its sign (code 8)",
    ),
)
