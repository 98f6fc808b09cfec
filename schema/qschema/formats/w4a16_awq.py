"""W4A16_AWQ: INT4 weights, two rows per byte, an f32 scale per 128 columns; the input stays.

    weight           U8   [N/2, K]    row 2r in the low nibble, row 2r+1 in the high one
    weight_scale     F32  [N, K/128]
    pre_quant_scale  BF16 [K]         multiplies the input, where no layer before has taken it in

Without smoothing (no pre_quant_scale) it is ModelOpt's INT4 weight-only, under the same name.

Source: ModelOpt 0.47.0 quantization/qtensor/int4_tensor.py, export/quant_utils.py:805-846. Not
here: AutoAWQ's and GPTQ's packing of columns.
"""

from qschema.formats._parts import (
    INT4_CODES,
    INT4_FORMULA,
    INT4_SCALE,
    INTEGER_ERROR,
    PRE_QUANT_SCALE,
    group,
)
from qschema.formats.declare import Format

FORMAT = Format(
    name="W4A16_AWQ",
    spelling="W4A16_AWQ",
    aliases=("INT4_AWQ", "INT4_WO"),
    title="INT4, 128-column scales, weights only",
    tensors=(INT4_CODES, INT4_SCALE, PRE_QUANT_SCALE),
    element="INT4",
    block_rows=2,
    multiple_of_n=2,
    multiple_of_k=128,
    error_bound=INTEGER_ERROR,
    hf_quant_fields={"group_size": 128, "has_zero_point": False, "pre_quant_scale": True},
    config_group={"weights": group(bits=4, kind="int", size=128)},
    folds_into=("norm",),
    formula=INT4_FORMULA,
    source="ModelOpt 0.47.0 quantization/qtensor/int4_tensor.py, export/quant_utils.py:805-846",
    readers=("TensorRT-LLM 1.2 (documented, dense layers with AWQ)",),
)
