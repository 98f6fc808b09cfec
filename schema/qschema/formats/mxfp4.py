"""MXFP4: E2M1 weights, a power of two per 32 columns.

    weight        U8 [N, K/2]   two codes per byte, the even column in the low nibble
    weight_scale  U8 [N, K/32]  E8M0: 2^(byte - 127)

Source: ModelOpt 0.47.0 quantization/qtensor/mxfp4_tensor.py:46-80; OCP Microscaling Formats 1.0.
Not here: gpt-oss's own names and order of the same numbers (`_blocks`, `_scales`).
"""

from qschema.formats._parts import (
    E2M1_CODES,
    E2M1_ERROR,
    E8M0_SCALE,
    MXFP4_DEPARTURES,
    MXFP4_FORMULA,
)
from qschema.formats.declare import Format

FORMAT = Format(
    name="MXFP4",
    # lower case as ModelOpt writes it
    spelling="mxfp4",
    title="FP4 E2M1, 32-column E8M0 scales",
    tensors=(E2M1_CODES, E8M0_SCALE),
    element="E2M1",
    multiple_of_k=32,
    error_bound=E2M1_ERROR,
    config_group={"quant_algo": "mxfp4"},
    formula=MXFP4_FORMULA,
    source="ModelOpt 0.47.0 quantization/qtensor/mxfp4_tensor.py:46-80",
    departures=MXFP4_DEPARTURES,
)
