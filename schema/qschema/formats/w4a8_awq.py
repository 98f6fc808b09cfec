"""W4A8_AWQ: the weights of W4A16_AWQ, with the scales that FP8 inputs need.

    weight           U8   [N/2, K]    row 2r in the low nibble, row 2r+1 in the high one
    weight_scale     F32  [N, K/128]
    weight_scale_2   F32  []          largest |w| of fused siblings / 448
    input_scale      F32  []          from calibration
    pre_quant_scale  BF16 [K]         multiplies the input, where no layer before has taken it in

The codes do not depend on weight_scale_2. Source: ModelOpt 0.47.0 export/quant_utils.py:281-340.
"""

from qschema.formats._parts import (
    INT4_CODES,
    INT4_FORMULA,
    INT4_SCALE,
    INTEGER_ERROR,
    PRE_QUANT_SCALE,
    group,
    input_scale,
)
from qschema.formats.declare import Format, TensorSpec

FORMAT = Format(
    name="W4A8_AWQ",
    spelling="W4A8_AWQ",
    title="INT4, 128-column scales, static FP8 input scale",
    kernels="W4A16_AWQ",
    tensors=(
        INT4_CODES,
        INT4_SCALE,
        TensorSpec(
            suffix="weight_scale_2",
            dtype="F32",
            shape=(),
            role="global",
            meaning="amax / 448, the largest of fused siblings; no part of the codes",
            divisor=448.0,
            shared="siblings",
            scales_codes=False,
        ),
        input_scale(divisor=448.0, zero=448.0, shared="siblings"),
        PRE_QUANT_SCALE,
    ),
    element="INT4",
    block_rows=2,
    multiple_of_n=2,
    multiple_of_k=128,
    error_bound=INTEGER_ERROR,
    hf_quant_fields={"group_size": 128, "has_zero_point": False, "pre_quant_scale": True},
    # ModelOpt's words for it inside a mixed checkpoint, float weights included
    config_group={
        "input_activations": group(bits=8, size=128),
        "weights": group(bits=4, size=128),
    },
    folds_into=("norm",),
    formula=INT4_FORMULA,
    source="ModelOpt 0.47.0 quantization/qtensor/int4_tensor.py, "
    "export/quant_utils.py:281-340, 805-846",
    readers=("TensorRT-LLM 1.2 (documented)",),
)
