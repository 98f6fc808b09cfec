"""FP8: E4M3 weights, one f32 scale per weight, one static f32 scale for its input.

    weight        F8_E4M3 [N, K]  one byte per element, row major
    weight_scale  F32     []
    input_scale   F32     []      from calibration

Source: ModelOpt 0.47.0 export/unified_export_hf.py:631-662; read by vLLM 0.33.0
model_executor/layers/quantization/modelopt.py. Engines that fuse q/k/v or gate/up take the largest
scale of the parts and encode the others anew, so siblings need not agree; ModelOpt lets the gate
and up of an expert agree, and so do we.
"""

from qschema.formats._parts import E4M3_CODES, E4M3_ERROR, TINY_DEPARTURE, group, input_scale
from qschema.formats.declare import Format, TensorSpec

FORMAT = Format(
    name="FP8",
    spelling="FP8",
    title="FP8 E4M3, one scale per weight, static input scale",
    tensors=(
        E4M3_CODES,
        TensorSpec(
            suffix="weight_scale",
            dtype="F32",
            shape=(),
            role="global",
            meaning="amax / 448",
            divisor=448.0,
            shared="experts",
        ),
        input_scale(divisor=448.0, zero=448.0, shared="experts"),
    ),
    element="E4M3",
    error_bound=E4M3_ERROR,
    config_group={"input_activations": group(bits=8), "weights": group(bits=8)},
    has_config_group=True,
    stackable=True,
    formula="scale = max(amax, tiny) / 448, 1.0 for zeros; code = e4m3(w / scale)",
    source="ModelOpt 0.47.0 export/unified_export_hf.py:631-662",
    readers=("vLLM 0.33", "SGLang 0.5.17", "TensorRT-LLM 1.2 (documented)"),
    departures=(
        "the quotient is rounded once; ModelOpt rounds it to the source dtype first, which changes "
        "about 3 % of the codes (not those of stacked experts)",
        "a weight of zeros gets scale 1.0 and zeros; ModelOpt writes scale 0.0 and NaN",
        TINY_DEPARTURE,
    ),
)
