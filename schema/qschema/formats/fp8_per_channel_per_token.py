"""FP8_PER_CHANNEL_PER_TOKEN: E4M3 weights, one f32 scale per row; engines scale per token.

    weight        F8_E4M3 [N, K]  one byte per element, row major
    weight_scale  F32     [N]     1-D: vLLM asserts on [N, 1]

Source: ModelOpt 0.47.0 export/quant_utils.py:895-918; read by vLLM 0.33.0
model_executor/layers/quantization/modelopt.py. Not here: the compressed-tensors spelling.
"""

from qschema.formats._parts import E4M3_CODES, E4M3_ERROR, ROW_SCALE, group
from qschema.formats.declare import Format

FORMAT = Format(
    name="FP8_PER_CHANNEL_PER_TOKEN",
    spelling="FP8_PER_CHANNEL_PER_TOKEN",
    aliases=("FP8_PC_PT",),
    title="FP8 E4M3, one scale per output channel",
    tensors=(E4M3_CODES, ROW_SCALE),
    element="E4M3",
    error_bound=E4M3_ERROR,
    config_group={
        "input_activations": group(bits=8),
        "weights": {**group(bits=8), "strategy": "channel"},
    },
    formula="scale = max(amax, tiny) / 448, 1.0 for an all-zero row; code = e4m3(w / scale)",
    source="ModelOpt 0.47.0 export/quant_utils.py:895-918",
    readers=("vLLM 0.33 (dense layers)", "TensorRT-LLM 1.2 (documented, dense layers)"),
)
