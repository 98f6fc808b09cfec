"""W4A8_MXFP4_FP8: the weights of MXFP4, for engines that quantize the input to FP8.

    weight        U8 [N, K/2]   two codes per byte, the even column in the low nibble
    weight_scale  U8 [N, K/32]  E8M0: 2^(byte - 127)

Source: ModelOpt 0.47.0 quantization/qtensor/mxfp4_tensor.py:46-80, which writes no input_scale.
"""

from qschema.formats._parts import (
    E2M1_CODES,
    E2M1_ERROR,
    E8M0_SCALE,
    MXFP4_DEPARTURES,
    MXFP4_FORMULA,
    group,
)
from qschema.formats.declare import Format

FORMAT = Format(
    name="W4A8_MXFP4_FP8",
    spelling="W4A8_MXFP4_FP8",
    title="FP4 E2M1, 32-column E8M0 scales, FP8 inputs",
    kernels="MXFP4",
    tensors=(E2M1_CODES, E8M0_SCALE),
    element="E2M1",
    multiple_of_k=32,
    error_bound=E2M1_ERROR,
    hf_quant_fields={"group_size": 32},
    config_group={"input_activations": group(bits=8), "weights": group(bits=4, size=32)},
    formula=MXFP4_FORMULA,
    source="ModelOpt 0.47.0 quantization/qtensor/mxfp4_tensor.py:46-80",
    readers=("TensorRT-LLM 1.2 (documented)",),
    departures=MXFP4_DEPARTURES,
)
