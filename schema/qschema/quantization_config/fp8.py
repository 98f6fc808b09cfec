"""The `fp8` dialect: E4M3 weights with `weight_scale_inv` blocks, as DeepSeek-V3 introduced it.

    {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], ...}

Source: DeepSeek-V3 and MiniMax-M2.5 config.json (fmt), DeepSeek-V3.1 config.json (scale_fmt);
transformers 5.23.0 utils/quantization_config.py:1682-1746 (FineGrainedFP8Config);
vLLM 0.32.0 layers/quantization/fp8.py:95-175 (Fp8Config: ignored_layers, store_dtype);
Qwen3.5-35B-A3B-FP8 config.json (weight_per_tensor, act_per_tensor); Hy3-FP8 config.json
(kv_cache_scheme).
"""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from qschema.hf_quant_config import ModuleName
from qschema.strict import Verbatim, violation

BlockSide: TypeAlias = Annotated[int, Field(ge=1)]


class Fp8Config(Verbatim):
    """`quantization_config` of an FP8 checkpoint: per-tensor without a block size, else blocks."""

    quant_method: Literal["fp8"]
    activation_scheme: Literal["dynamic", "static"]
    # [rows, columns] of a weight block; null means one scale per tensor
    weight_block_size: list[BlockSide] | None = Field(default=None, min_length=2, max_length=2)
    fmt: Literal["e4m3", "float8_e4m3fn"] | None = None
    # how the scales are stored: f32, or one-byte powers of two
    scale_fmt: Literal["float", "ue8m0"] | None = None
    expert_dtype: Literal["fp8", "fp4"] | None = None
    store_dtype: Literal["mxfp4"] | None = None
    modules_to_not_convert: list[ModuleName] | None = None
    modules_to_convert: list[ModuleName] | None = None
    # the same as modules_to_not_convert, in vLLM's words
    ignored_layers: list[ModuleName] | None = None
    dequantize: bool | None = None
    # for information: no reader above takes it
    weight_per_tensor: bool | None = None
    act_per_tensor: bool | None = None
    kv_cache_scheme: Literal["static", "dynamic"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Fp8Config":
        if self.weight_block_size and self.activation_scheme != "dynamic":
            raise violation(
                "fp8-static-blocks",
                f"weight_block_size {self.weight_block_size} needs activation_scheme "
                f'"dynamic", found "{self.activation_scheme}"',
            )
        skipped, ignored = self.modules_to_not_convert, self.ignored_layers
        if skipped and ignored and set(skipped) != set(ignored):
            raise violation(
                "fp8-two-skip-lists",
                f"modules_to_not_convert ({len(skipped)}) and ignored_layers ({len(ignored)}) "
                "differ; transformers reads the one, vLLM the other",
            )
        return self
