"""The `mxfp4` dialect of gpt-oss: experts as `*_blocks` and `*_scales`, the rest in bf16.

    {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", ...]}

Source: transformers 5.23.0 utils/quantization_config.py:1791-1822 (Mxfp4Config); the same keys in
ModelOpt 0.47.0 torch/puzzletron/anymodel/models/gpt_oss/gpt_oss_pruned_to_mxfp4.py:391-399.
"""

from typing import Literal

from qschema.hf_quant_config import ModuleName
from qschema.strict import Verbatim


class Mxfp4Config(Verbatim):
    """`quantization_config` of gpt-oss. Block size 32 and E8M0 scales are not spelled out."""

    quant_method: Literal["mxfp4"]
    modules_to_not_convert: list[ModuleName] | None = None
    dequantize: bool | None = None
