"""fp8_pb_real: FP8_PB_WO as ModelOpt's compressed export writes it. Read here, never written.

    weight        F8_E4M3 [N, K]                      one byte per element, row major
    weight_scale  F32     [ceil(N/128), ceil(K/128)]  values rounded to bf16

Source: ModelOpt 0.47.0 quantization/nn/modules/tensor_quantizer.py:826-834.
"""

from qschema.formats._parts import E4M3_CODES
from qschema.formats.declare import Format, TensorSpec

FORMAT = Format(
    name="FP8_PB_REAL",
    spelling="fp8_pb_real",
    title="FP8 E4M3, 128x128 blocks, scales rounded to bf16",
    kernels="FP8_PB_WO",
    tensors=(
        E4M3_CODES,
        TensorSpec(
            suffix="weight_scale",
            dtype="F32",
            shape=("ceil(N/128)", "ceil(K/128)"),
            role="scale",
            meaning="scale of each 128x128 block, a bf16 number; edge blocks are ragged",
        ),
    ),
    element="E4M3",
    block_rows=128,
    # as FP8_PB_WO, and 2^-9 for the scale, 2^-9 for the quotient, that were rounded to bf16
    error_bound=0.067,
    read_only="no engine takes it and its scales are rounded twice; FP8_PB_WO is its better half",
    formula="scale = bf16(amax / 448); code = e4m3(bf16(w / scale))",
    source="ModelOpt 0.47.0 quantization/nn/modules/tensor_quantizer.py:826-834",
)
