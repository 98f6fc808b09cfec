"""W4A8_NVFP4_FP8: E2M1 weights in blocks of 32 columns, FP8 inputs.

    weight          U8      [N, K/2]   two codes per byte, the even column in the low nibble
    weight_scale    F8_E4M3 [N, K/32]
    weight_scale_2  F32     []         of a whole weight, the largest of fused siblings
    input_scale     F32     []         from calibration

Source: ModelOpt 0.47.0 export/quant_utils.py:281-300, 323-340.
"""

from qschema.formats._parts import E2M1_CODES, group, input_scale, nv_scales
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
    # half a step of one mantissa bit: 1/5 at the ties 1.25, 2.5 and 5
    error_bound=0.2,
    hf_quant_fields={"group_size": 32},
    config_group={"input_activations": group(bits=8), "weights": group(bits=4, size=32)},
    stackable=True,
    formula="weight_scale_2 = max(amax, tiny) / 448, 1.0 for zeros; weight_scale = e4m3(clamp("
    "block amax / (6 * weight_scale_2), 2^-9, 448)), 1.0 for a block of zeros; code = e2m1(w / "
    "(weight_scale * weight_scale_2)), ties to even, the sign bit where w < 0",
    source="ModelOpt 0.47.0 quantization/qtensor/nvfp4_tensor.py:37-46, 167-202, 231-345",
    readers=("TensorRT-LLM 1.2 (documented)",),
    departures=(
        "a weight of zeros gets weight_scale_2 1.0 and zeros; ModelOpt writes 0.0, NaN scales and "
        "codes of 6",
        "an amax below the smallest normal number of the source dtype counts as that number",
        "a negative number whose quotient underflows to zero keeps its sign (code 8)",
    ),
)
