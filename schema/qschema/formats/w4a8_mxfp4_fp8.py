"""W4A8_MXFP4_FP8: the weights of MXFP4, for engines that quantize the input to FP8.

    weight        U8 [N, K/2]   two codes per byte, the even column in the low nibble
    weight_scale  U8 [N, K/32]  E8M0: 2^(byte - 127)

Source: ModelOpt 0.47.0 quantization/qtensor/mxfp4_tensor.py:46-80, which writes no input_scale.
"""

from qschema.formats._parts import E2M1_CODES, E8M0_SCALE, group
from qschema.formats.declare import Format

FORMAT = Format(
    name="W4A8_MXFP4_FP8",
    spelling="W4A8_MXFP4_FP8",
    title="FP4 E2M1, 32-column E8M0 scales, FP8 inputs",
    kernels="MXFP4",
    tensors=(E2M1_CODES, E8M0_SCALE),
    element="E2M1",
    multiple_of_k=32,
    # half a step of one mantissa bit: 1/5 at the ties 1.25, 2.5 and 5
    error_bound=0.2,
    hf_quant_fields={"group_size": 32},
    config_group={"input_activations": group(bits=8), "weights": group(bits=4, size=32)},
    formula="weight_scale = 127 + the smallest e >= -127 with amax <= 6 * 2^e, 0 for a block of "
    "zeros; code = e2m1(w / 2^e), ties to even, the sign bit where w < 0",
    source="ModelOpt 0.47.0 quantization/qtensor/mxfp4_tensor.py:46-80",
    readers=("TensorRT-LLM 1.2 (documented)",),
    departures=(
        "ties go to the even code; ModelOpt's go toward zero",
        "zeros have code 0; ModelOpt writes code 8, -0",
    ),
)
