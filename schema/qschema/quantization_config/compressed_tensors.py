"""The compressed-tensors dialect of llm-compressor: groups of modules with their quantization.

    {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": {...}, ...}}, ...}

Source: compressed-tensors 0.20.0, quantization/quant_args.py (QuantizationArgs and its rules),
quant_scheme.py, quant_config.py, config/base.py (formats), config/expert_sparsity.py; and 0.17.0
for what older files hold: actorder "group", run_compressed, transform/ (rotations), and
RegistryMixin's registry_requires_subclass in sparsity_config.
"""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, JsonValue, Tag, model_validator

from qschema.hf_quant_config import ModuleName
from qschema.quantization_config.shape import ARRAY, BY_JSON_TYPE, OBJECT, SCALAR
from qschema.strict import Verbatim, violation

CompressionFormat: TypeAlias = Literal[
    "dense",
    "sparse-bitmask",
    "sparse-24-bitmask",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "marlin-24",
    "mixed-precision",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
]
Strategy: TypeAlias = Literal[
    "tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"
]
Status: TypeAlias = Literal["initialized", "calibration", "frozen", "compressed", "decompressed"]
BlockSide: TypeAlias = Annotated[int, Field(ge=1)]
BlockStructure: TypeAlias = Annotated[
    Annotated[list[BlockSide], Field(min_length=2, max_length=2), Tag(ARRAY)]
    | Annotated[str, Field(pattern=r"^[1-9][0-9]*x[1-9][0-9]*$"), Tag(SCALAR)],
    BY_JSON_TYPE,
]


class QuantizationArgs(Verbatim):
    """How one kind of tensor (weights, inputs, outputs, KV cache) is quantized."""

    num_bits: int = Field(default=8, ge=1, le=16)
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    # -1: one group per channel
    group_size: int | None = Field(default=None, ge=-1)
    strategy: Strategy | None = None
    block_structure: BlockStructure | None = None
    dynamic: Literal[True, False, "local"] = False
    actorder: Literal[True, False, "weight", "static", "group", "dynamic"] | None = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None
    observer: str | None = None
    observer_kwargs: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "QuantizationArgs":
        grouped = self.strategy in ("group", "tensor_group")
        has_groups = self.group_size is not None and self.group_size > 0
        if grouped and not has_groups:
            raise violation(
                "ct-group-size",
                f'strategy "{self.strategy}" needs a positive group_size, found {self.group_size}',
            )
        if has_groups and self.strategy is not None and not grouped:
            raise violation(
                "ct-group-size",
                f'group_size {self.group_size} needs strategy "group" or "tensor_group", '
                f'found "{self.strategy}"',
            )
        if (self.strategy == "block") != (self.block_structure is not None):
            raise violation(
                "ct-block-structure",
                'strategy "block" and block_structure need each other, found '
                f"{self.strategy} and {self.block_structure}",
            )
        if self.strategy == "token" and self.dynamic is False:
            raise violation("ct-static-token", 'strategy "token" needs dynamic true, found false')
        if self.dynamic == "local" and self.strategy != "tensor_group":
            raise violation(
                "ct-dynamic-local",
                f'dynamic "local" needs strategy "tensor_group", found {self.strategy}',
            )
        return self


class QuantizationScheme(Verbatim):
    """The modules in `targets` (names, classes or "re:" patterns) and how they are quantized."""

    targets: list[ModuleName]
    weights: QuantizationArgs | None = None
    input_activations: QuantizationArgs | None = None
    output_activations: QuantizationArgs | None = None
    format: CompressionFormat | None = None


class SparsityConfig(Verbatim):
    """How weights are sparse; `{}` if they are not."""

    format: CompressionFormat | None = None
    targets: list[ModuleName] | None = None
    ignore: list[ModuleName] | None = None
    global_sparsity: float | None = None
    sparsity_structure: str | None = None
    registry_requires_subclass: bool | None = None


class ExpertSparsityConfig(Verbatim):
    """How many experts each layer kept; null for a dense layer."""

    method: Literal["prune", "novice"]
    num_experts: list[int | None]


class TransformArgs(Verbatim):
    """Where a rotation is applied."""

    targets: list[ModuleName]
    location: Literal["input", "weight_input", "weight_output", "output", "k_cache", "q_attn"]
    inverse: bool | None = None
    ignore: list[ModuleName] | None = None


class TransformScheme(Verbatim):
    """One kind of rotation and the places that it is applied to."""

    type: str
    apply: list[TransformArgs] | None = None
    randomize: bool | None = None
    requires_grad: bool | None = None
    head_dim: int | None = Field(default=None, ge=1)
    precision: str | None = None


class TransformConfig(Verbatim):
    """Rotations such as QuIP and SpinQuant; `{}` if there are none."""

    config_groups: dict[str, TransformScheme] | None = None


class CompressedTensorsConfig(Verbatim):
    """`quantization_config` as compressed-tensors writes it. A group may be a preset's targets."""

    quant_method: Literal["compressed-tensors", "compressed_tensors"]
    config_groups: dict[
        str,
        Annotated[
            Annotated[QuantizationScheme, Tag(OBJECT)] | Annotated[list[ModuleName], Tag(ARRAY)],
            BY_JSON_TYPE,
        ],
    ]
    format: Literal[CompressionFormat, "fakequant"] | None = None
    ignore: list[ModuleName] | None = None
    kv_cache_scheme: QuantizationArgs | None = None
    quantization_status: Status | None = None
    global_compression_ratio: float | None = None
    version: str | None = None
    sparsity_config: SparsityConfig | None = None
    transform_config: TransformConfig | None = None
    moe_sparsity_config: ExpertSparsityConfig | None = None
    run_compressed: bool | None = None
    dequantize: bool | None = None

    @model_validator(mode="after")
    def _something(self) -> "CompressedTensorsConfig":
        if not self.config_groups and self.kv_cache_scheme is None:
            raise violation(
                "nothing-quantized", "neither config_groups nor a kv_cache_scheme is given"
            )
        return self
