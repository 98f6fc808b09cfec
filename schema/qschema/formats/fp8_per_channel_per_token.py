"""FP8_PER_CHANNEL_PER_TOKEN: E4M3 weights, one f32 scale per row; engines scale per token.

    weight        F8_E4M3 [N, K]  one byte per element, row major
    weight_scale  F32     [N]     1-D: vLLM asserts on [N, 1]

Source: ModelOpt 0.47.0 export/quant_utils.py:895-918; read by vLLM 0.33.0
model_executor/layers/quantization/modelopt.py. Not here: the compressed-tensors spelling.
"""

from qschema.formats.declare import Format, TensorSpec

FORMAT = Format(
    name="FP8_PER_CHANNEL_PER_TOKEN",
    spelling="FP8_PER_CHANNEL_PER_TOKEN",
    aliases=("FP8_PC_PT",),
    title="FP8 E4M3, one scale per output channel",
    tensors=(
        TensorSpec(
            suffix="weight",
            dtype="F8_E4M3",
            shape=("N", "K"),
            role="codes",
            meaning="E4M3 codes",
        ),
        TensorSpec(
            suffix="weight_scale",
            dtype="F32",
            shape=("N",),
            role="scale",
            meaning="scale of each output channel (row)",
        ),
    ),
    # half a step of three mantissa bits, 2^-4, and a little for subnormal codes
    error_bound=0.0626,
    formula="scale = max(amax, tiny) / 448, 1.0 for an all-zero row; code = e4m3(w / scale)",
    source="ModelOpt 0.47.0 export/quant_utils.py:895-918",
)
