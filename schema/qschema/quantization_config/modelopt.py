"""ModelOpt's flat form, which it writes into config.json; the nested form is hf_quant_config.py.

Source of the flat form: ModelOpt 0.47.0 torch/export/convert_hf_config.py:24-282. Of what readers
take beside it: vLLM 0.32.0 layers/quantization/modelopt.py:343-362 and SGLang 0.5.23
layers/quantization/modelopt_quant.py:466-522 (group_size, kv_cache_quant_algo, exclude_modules).
"""

from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from qschema.hf_quant_config import (
    GroupSize,
    KvCacheAlgo,
    LayerAlgo,
    LayerQuantization,
    Method,
    ModuleName,
    Producer,
    QuantAlgo,
    forbid_overlap,
    require_layers,
)
from qschema.quantization_config.shape import BY_JSON_TYPE, OBJECT, SCALAR
from qschema.strict import Verbatim, violation


class GroupArgs(Verbatim):
    """How the weights or the inputs of a group are quantized, in compressed-tensors' words."""

    dynamic: bool
    num_bits: int = Field(ge=1, le=16)
    type: Literal["int", "float"]
    group_size: GroupSize | None = None
    strategy: Literal["channel"] | None = None


class Group(Verbatim):
    """Modules that are quantized alike. For information: no engine takes the algorithm from it."""

    input_activations: GroupArgs | None = None
    weights: GroupArgs | None = None
    has_zero_point: bool | None = None
    pre_quant_scale: bool | None = None
    lora_rank: int | None = Field(default=None, ge=1)
    # instead of weights, for algorithms that the exporter has no group for
    quant_algo: LayerAlgo | None = None
    targets: list[ModuleName]


class KvCacheScheme(Verbatim):
    """An FP8 KV cache; every other kind is written as its bare name."""

    dynamic: bool
    num_bits: int = Field(ge=1, le=16)
    type: Literal["int", "float"]


class FlatModelOptConfig(Verbatim):
    """`quantization_config` as ModelOpt writes it into config.json."""

    config_groups: dict[str, Group] | None = None
    quantized_layers: dict[ModuleName, LayerQuantization] | None = None
    ignore: list[ModuleName] | None = None
    exclude_modules: list[ModuleName] | None = None
    quant_algo: QuantAlgo | None = None
    group_size: GroupSize | None = None
    kv_cache_quant_algo: KvCacheAlgo | None = None
    kv_cache_scheme: (
        Annotated[
            Annotated[KvCacheScheme, Tag(OBJECT)] | Annotated[KvCacheAlgo, Tag(SCALAR)],
            BY_JSON_TYPE,
        ]
        | None
    ) = None
    producer: Producer | None = None
    quant_method: Method

    @model_validator(mode="after")
    def _consistent(self) -> "FlatModelOptConfig":
        require_layers(self.quant_algo, self.quantized_layers)
        forbid_overlap(self.ignore or self.exclude_modules or (), self.quantized_layers or ())
        if not (
            self.quant_algo
            or self.kv_cache_scheme
            or self.kv_cache_quant_algo
            or self.quantized_layers
        ):
            raise violation(
                "nothing-quantized", "neither a quant_algo nor a KV cache scheme is given"
            )
        return self
