"""The `fp8` dialect with ModelOpt's keys beside it: DeepSeek-V4 with NVFP4 experts.

    {"quant_method": "fp8", "weight_block_size": [128, 128], ..., "moe_quant_algo": "NVFP4",
     "quant_algo": "MIXED_PRECISION", "quantized_layers": {"layers.0.ffn.experts": {...}}, ...}

Source: config.json of nvidia/DeepSeek-V4-Flash-NVFP4 and nvidia/DeepSeek-V4-Pro-NVFP4 (producer
version dsv4-nvfp4-experts); vLLM 0.32.0 models/deepseek_v41/quant_config.py:90-110, which reads
moe_quant_algo.
"""

from pydantic import model_validator

from qschema.hf_quant_config import (
    GroupSize,
    KvCacheAlgo,
    LayerAlgo,
    LayerQuantization,
    ModuleName,
    Producer,
    QuantAlgo,
    forbid_overlap,
    require_group_size,
    require_layers,
)
from qschema.quantization_config.fp8 import Fp8Config
from qschema.quantization_config.modelopt import Group


class Fp8WithExpertsConfig(Fp8Config):
    """FP8 blocks everywhere but in the experts, whose algorithm is `moe_quant_algo`."""

    moe_quant_algo: LayerAlgo
    group_size: GroupSize | None = None
    quant_algo: QuantAlgo | None = None
    quantized_layers: dict[ModuleName, LayerQuantization] | None = None
    config_groups: dict[str, Group] | None = None
    ignore: list[ModuleName] | None = None
    kv_cache_quant_algo: KvCacheAlgo | None = None
    producer: Producer | None = None

    @model_validator(mode="after")
    def _consistent_experts(self) -> "Fp8WithExpertsConfig":
        require_group_size(self.moe_quant_algo, self.group_size)
        require_layers(self.quant_algo, self.quantized_layers)
        forbid_overlap(self.ignore or (), self.quantized_layers or ())
        return self
