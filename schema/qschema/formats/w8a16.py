"""W8A16: INT8 weights, one f32 scale per row; the input stays.

    weight        I8  [N, K]
    weight_scale  F32 [N]

Source: ModelOpt 0.47.0 quantization/qtensor/int8_tensor.py, export/quant_utils.py:870-918.
"""

from qschema.formats._parts import INT8_CODES, INT8_FORMULA, INTEGER_ERROR, ROW_SCALE, group
from qschema.formats.declare import Format

FORMAT = Format(
    name="W8A16",
    spelling="W8A16",
    aliases=("INT8_WO",),
    title="INT8, one scale per output channel, weights only",
    tensors=(INT8_CODES, ROW_SCALE),
    element="INT8",
    error_bound=INTEGER_ERROR,
    config_group={"weights": group(bits=8, kind="int")},
    formula=INT8_FORMULA,
    source="ModelOpt 0.47.0 quantization/qtensor/int8_tensor.py, export/quant_utils.py:870-918",
    readers=("TensorRT-LLM 1.2 (documented)",),
)
