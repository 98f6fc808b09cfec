"""MXFP8: E4M3 weights, a power of two per 32 columns; engines quantize the input the same way.

    weight        F8_E4M3 [N, K]     one byte per element, row major
    weight_scale  U8      [N, K/32]  E8M0: 2^(byte - 127)

Source: ModelOpt 0.47.0 quantization/qtensor/mxfp8_tensor.py:48-72, 160-190; OCP Microscaling
Formats 1.0; read by vLLM 0.33.0 model_executor/layers/quantization/modelopt.py:1273-1329.
"""

from qschema.formats._parts import E4M3_CODES, E4M3_ERROR, E8M0_SCALE, LOGARITHM_DEPARTURE, group
from qschema.formats.declare import Format

FORMAT = Format(
    name="MXFP8",
    spelling="MXFP8",
    title="FP8 E4M3, 32-column E8M0 scales",
    tensors=(E4M3_CODES, E8M0_SCALE),
    element="E4M3",
    multiple_of_k=32,
    error_bound=E4M3_ERROR,
    hf_quant_fields={"group_size": 32},
    config_group={
        "input_activations": group(bits=8, size=32),
        "weights": group(bits=8, size=32),
    },
    formula="weight_scale = 127 + the smallest e >= -127 with amax <= 448 * 2^e, 0 for a block of "
    "zeros; code = e4m3(w / 2^e)",
    source="ModelOpt 0.47.0 quantization/qtensor/mxfp8_tensor.py:48-72, 160-190",
    readers=(
        "vLLM 0.33",
        "TensorRT-LLM 1.3 (documented)",
        "SGLang 0.5.23 (documented, Blackwell)",
    ),
    departures=(LOGARITHM_DEPARTURE,),
)
