"""W4A16_NVFP4: the weights of NVFP4 without a scale for the input, which stays as it is.

    weight          U8      [N, K/2]   two codes per byte, the even column in the low nibble
    weight_scale    F8_E4M3 [N, K/16]
    weight_scale_2  F32     []         of a whole weight, the largest of fused siblings

Source: ModelOpt 0.47.0 quantization/qtensor/nvfp4_tensor.py; read by vLLM 0.33.0
model_executor/layers/quantization/modelopt.py:2532-2555.
"""

from qschema.formats._parts import (
    E2M1_CODES,
    E2M1_ERROR,
    NV_DEPARTURES,
    group,
    nv_formula,
    nv_scales,
)
from qschema.formats.declare import Format

FORMAT = Format(
    name="W4A16_NVFP4",
    spelling="W4A16_NVFP4",
    title="FP4 E2M1, 16-column E4M3 scales, weights only",
    kernels="NVFP4",
    tensors=(E2M1_CODES, *nv_scales(group=16, divisor=2688.0)),
    element="E2M1",
    multiple_of_k=16,
    error_bound=E2M1_ERROR,
    hf_quant_fields={"group_size": 16},
    config_group={"weights": group(bits=4, size=16)},
    has_config_group=True,
    stackable=True,
    formula=nv_formula(divisor=2688.0),
    source="ModelOpt 0.47.0 quantization/qtensor/nvfp4_tensor.py:37-46, 167-202, 231-345",
    readers=("vLLM 0.33", "TensorRT-LLM 1.3 (documented)", "SGLang 0.5.23 (documented)"),
    departures=NV_DEPARTURES,
)
