"""MXFP4: E2M1 weights, a power of two per 32 columns.

    weight        U8 [N, K/2]   two codes per byte, the even column in the low nibble
    weight_scale  U8 [N, K/32]  E8M0: 2^(byte - 127)

Source: ModelOpt 0.47.0 quantization/qtensor/mxfp4_tensor.py:46-80; OCP Microscaling Formats 1.0.
Not here: gpt-oss's own names and order of the same numbers (`_blocks`, `_scales`).
"""

from qschema.formats._parts import E2M1_CODES, E8M0_SCALE
from qschema.formats.declare import Format

FORMAT = Format(
    name="MXFP4",
    # lower case as ModelOpt writes it
    spelling="mxfp4",
    title="FP4 E2M1, 32-column E8M0 scales",
    tensors=(E2M1_CODES, E8M0_SCALE),
    element="E2M1",
    multiple_of_k=32,
    # half a step of one mantissa bit: 1/5 at the ties 1.25, 2.5 and 5
    error_bound=0.2,
    config_group={"quant_algo": "mxfp4"},
    formula="weight_scale = 127 + the smallest e >= -127 with amax <= 6 * 2^e, 0 for a block of "
    "zeros; code = e2m1(w / 2^e), ties to even, the sign bit where w < 0",
    source="ModelOpt 0.47.0 quantization/qtensor/mxfp4_tensor.py:46-80",
    departures=(
        "ties go to the even code; ModelOpt's go toward zero",
        "zeros have code 0; ModelOpt writes code 8, -0",
    ),
)
