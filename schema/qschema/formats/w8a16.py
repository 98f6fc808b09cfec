"""W8A16: INT8 weights, one f32 scale per row; the input stays.

    weight        I8  [N, K]
    weight_scale  F32 [N]

Source: ModelOpt 0.47.0 quantization/qtensor/int8_tensor.py, export/quant_utils.py:870-918.
"""

from qschema.formats._parts import INT8_CODES, ROW_SCALE, group
from qschema.formats.declare import Format

FORMAT = Format(
    name="W8A16",
    spelling="W8A16",
    aliases=("INT8_WO",),
    title="INT8, one scale per output channel, weights only",
    tensors=(INT8_CODES, ROW_SCALE),
    element="INT8",
    # nothing relative: half a step, 1/254 of the row's largest, whatever the number
    error_bound=1e-6,
    config_group={"weights": group(bits=8, kind="int")},
    formula="weight_scale = max(amax, tiny) / 127, 1.0 for a row of zeros; code = w / weight_scale "
    "rounded to nearest even, clamped to -128..127",
    source="ModelOpt 0.47.0 quantization/qtensor/int8_tensor.py, export/quant_utils.py:870-918",
    readers=("TensorRT-LLM 1.2 (documented)",),
)
