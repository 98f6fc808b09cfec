"""FP8_PB_WO: E4M3 weights, one f32 scale per 128x128 block; engines quantize activations.

    weight        F8_E4M3 [N, K]                            one byte per element, row major
    weight_scale  F32     [ceil(N/128), 1, ceil(K/128), 1]  never squeezed, also for a single block

Source: ModelOpt 0.47.0 export/quant_utils.py:889-892, quantization/qtensor/fp8_tensor.py:57-111;
read by vLLM 0.33.0 model_executor/layers/quantization/modelopt.py:2491-2528.
Not here: DeepSeek's weight_scale_inv.
"""

from qschema.formats._parts import E4M3_CODES, E4M3_ERROR
from qschema.formats.declare import Format, TensorSpec

FORMAT = Format(
    name="FP8_PB_WO",
    # lower case as ModelOpt writes it: vLLM folds case, TensorRT-LLM knows this spelling only
    spelling="fp8_pb_wo",
    title="FP8 E4M3, 128x128 blocks",
    tensors=(
        E4M3_CODES,
        TensorSpec(
            suffix="weight_scale",
            dtype="F32",
            shape=("ceil(N/128)", "1", "ceil(K/128)", "1"),
            role="scale",
            meaning="scale of each 128x128 block; edge blocks are ragged",
        ),
    ),
    element="E4M3",
    block_rows=128,
    error_bound=E4M3_ERROR,
    config_group={"quant_algo": "fp8_pb_wo"},
    formula="scale = max(amax, tiny) / 448, 1.0 for an all-zero block; code = e4m3(w / scale)",
    source="ModelOpt 0.47.0 export/quant_utils.py:889-892, qtensor/fp8_tensor.py:57-111",
    readers=("vLLM 0.33 (dense layers)", "TensorRT-LLM 1.2 (documented, dense layers)"),
    departures=(
        "a weight of one block keeps its 4-D scale; ModelOpt writes a 0-d scalar",
        "one-block siblings (q/k/v, gate/up) keep a scale each; ModelOpt gives them the largest",
        "Mixtral keeps its hub names; ModelOpt writes those of transformers 5 in memory",
    ),
)
