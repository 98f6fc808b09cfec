"""W8A8_SQ_PER_CHANNEL: INT8 weights after SmoothQuant, one f32 scale per row, a static input scale.

    weight           I8   [N, K]
    weight_scale     F32  [N]
    input_scale      F32  []   from calibration, of the smoothed input
    pre_quant_scale  BF16 [K]  multiplies the input; absent without smoothing

Source: ModelOpt 0.47.0 quantization/qtensor/int8_tensor.py, export/quant_utils.py:870-918.
"""

from qschema.formats._parts import (
    INT8_CODES,
    INT8_FORMULA,
    INTEGER_ERROR,
    PRE_QUANT_SCALE,
    ROW_SCALE,
    group,
    input_scale,
)
from qschema.formats.declare import Format

FORMAT = Format(
    name="W8A8_SQ_PER_CHANNEL",
    spelling="W8A8_SQ_PER_CHANNEL",
    aliases=("INT8_SQ", "INT8"),
    title="INT8, one scale per output channel, static INT8 input scale",
    kernels="W8A16",
    tensors=(
        INT8_CODES,
        ROW_SCALE,
        input_scale(divisor=127.0, zero=127.0, shared="siblings"),
        PRE_QUANT_SCALE,
    ),
    element="INT8",
    error_bound=INTEGER_ERROR,
    config_group={
        "input_activations": group(bits=8, kind="int"),
        "weights": {**group(bits=8, kind="int"), "strategy": "channel"},
    },
    formula=INT8_FORMULA,
    source="ModelOpt 0.47.0 quantization/qtensor/int8_tensor.py, export/quant_utils.py:870-918",
)
