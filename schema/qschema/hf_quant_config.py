"""`hf_quant_config.json`: the nested form in which ModelOpt says how a checkpoint is quantized.

    {"producer": {"name", "version"},
     "quantization": {"quant_algo", "kv_cache_quant_algo",
                      ["group_size", "has_zero_point", "pre_quant_scale", "lora_rank",]
                      "exclude_modules" | "quantized_layers"}}

Source: ModelOpt 0.47.0, torch/export/quant_utils.py:683-795 and 1597-1750 (the Hugging Face
exporter), unified_export_megatron.py:380-403, unified_export_hf.py:1260-1268 (lora_rank),
model_config.py:30-53 (the names). What older ModelOpt and the engines know is listed apart.
Not here: what each engine makes of a field; that is the validator's.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, JsonValue, model_validator

from qschema.strict import Verbatim, violation

# what ModelOpt 0.47.0 writes, as it writes it: three names fall through in lower case
EmittedAlgo: TypeAlias = Literal[
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8_pb_wo",
    "fp8_pb_real",
    "NVFP4",
    "W4A16_NVFP4",
    "NVFP4_AWQ",
    "NVFP4_SVD",
    "W4A8_NVFP4_FP8",
    "W4A8_MXFP4_FP8",
    "mxfp4",
    "MXFP8",
    "W4A16_AWQ",
    "W4A8_AWQ",
    "W8A16",
    "W8A8_SQ_PER_CHANNEL",
]
# the other case of those three: vLLM 0.32.0 layers/quantization/modelopt.py:125-149 folds case
RecasedAlgo: TypeAlias = Literal["FP8_PB_WO", "FP8_PB_REAL", "MXFP4"]
KnownAlgo: TypeAlias = Literal[
    # vLLM 0.32.0 modelopt.py:125-128: FP8_PB_WO in early composed checkpoints; TensorRT-LLM's name
    "FP8_BLOCK_SCALES",
    # preset names that older ModelOpt and hand-made configs use; vLLM rejects them by name
    "NVFP4_FP8_MHA",
    "INT4_AWQ",
    "INT8_SQ",
    "AUTO",
    # TensorRT-LLM 1.2 quantization/mode.py, enum QuantAlgo
    "W4A16",
    "W4A16_GPTQ",
    "W8A16_GPTQ",
    "W8A8_SQ_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
    "W4A8_QSERVE_PER_GROUP",
    "W4A8_QSERVE_PER_CHANNEL",
    "W4A8_MXFP4_MXFP8",
    "W4A16_MXFP4",
    "NVFP4_ARC",
    "INT8",
    "NO_QUANT",
]
# block codecs that vLLM 0.32.0 takes per layer only: utils/b12x.py:15
BlockCodec: TypeAlias = Literal["iq2_xs", "iq2_xxs", "q8_0"]

LayerAlgo: TypeAlias = Literal[EmittedAlgo, RecasedAlgo, KnownAlgo, BlockCodec]
QuantAlgo: TypeAlias = Literal[EmittedAlgo, RecasedAlgo, KnownAlgo, "MIXED_PRECISION"]
# INT8 is detected by ModelOpt 0.47.0 (quant_utils.py:438-462), but its export refuses it
KvCacheAlgo: TypeAlias = Literal["FP8", "NVFP4", "NVFP4_AFFINE", "INT8"]

# always written with a group_size, and not readable without one: vLLM 0.32.0 modelopt.py (NVFP4),
# SGLang 0.5.23 modelopt_quant.py:1665-1671 (NVFP4), TensorRT-LLM 1.2 (AWQ)
NEEDS_GROUP_SIZE = frozenset(
    {"NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_AWQ", "W4A8_AWQ"}
)

# ModelOpt writes "modelopt", into config.json only; the others are engines' names for its methods
Method: TypeAlias = Literal[
    "modelopt", "modelopt_fp8", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"
]

ModuleName: TypeAlias = Annotated[str, Field(min_length=1)]
GroupSize: TypeAlias = Annotated[int, Field(ge=1)]


class Producer(Verbatim):
    """Who wrote the checkpoint. vLLM knows the file as ModelOpt's by the name "modelopt" only."""

    name: str = Field(min_length=1)
    version: str


class LayerQuantization(Verbatim):
    """How one module of a mixed checkpoint is quantized."""

    quant_algo: LayerAlgo
    group_size: GroupSize | None = None
    has_zero_point: bool | None = None
    pre_quant_scale: bool | None = None

    @model_validator(mode="after")
    def _grouped(self) -> "LayerQuantization":
        require_group_size(self.quant_algo, self.group_size)
        return self


class Quantization(Verbatim):
    """The algorithm, its parameters, and which modules it leaves alone."""

    quant_algo: QuantAlgo | None
    kv_cache_quant_algo: KvCacheAlgo | None = None
    group_size: GroupSize | None = None
    has_zero_point: bool | None = None
    pre_quant_scale: bool | None = None
    # rank of the SVDQuant residual, written for diffusers models
    lora_rank: int | None = Field(default=None, ge=1)
    exclude_modules: list[ModuleName] | None = None
    quantized_layers: dict[ModuleName, LayerQuantization] | None = None
    # legacy marker that vLLM looks for, whatever it holds: model_arch_config_convertor.py:275
    modelopt_quant_config: JsonValue = None
    # not ModelOpt's; in nvidia/MiniMax-M3-NVFP4, here and beside `quantization`
    quant_method: Method | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Quantization":
        if self.quant_algo is not None:
            require_group_size(self.quant_algo, self.group_size)
        require_layers(self.quant_algo, self.quantized_layers)
        forbid_overlap(self.exclude_modules or (), self.quantized_layers or ())
        if self.lora_rank is not None and self.quant_algo != "NVFP4_SVD":
            raise violation(
                "lora-rank-without-svd", f"lora_rank is for NVFP4_SVD, found {self.quant_algo}"
            )
        if not (self.quant_algo or self.kv_cache_quant_algo or self.quantized_layers):
            raise violation(
                "nothing-quantized",
                "quant_algo, kv_cache_quant_algo and quantized_layers are all empty; "
                "a checkpoint that is not quantized has no such file",
            )
        return self


class HfQuantConfig(Verbatim):
    """The whole of hf_quant_config.json; engines also take it in config.json, as it is."""

    producer: Producer
    quantization: Quantization
    quant_method: Method | None = None


def require_group_size(algo: str, group_size: int | None) -> None:
    """Return if `algo` has the group_size it needs; raises the violation group-size-missing."""
    if algo in NEEDS_GROUP_SIZE and group_size is None:
        raise violation("group-size-missing", f"quant_algo {algo} needs a group_size")


def require_layers(algo: str | None, layers: dict[str, LayerQuantization] | None) -> None:
    """Return if `layers` is there for a mixed checkpoint and only then.

    Raises the violation quantized-layers-missing or quantized-layers-unused.
    """
    if algo == "MIXED_PRECISION" and not layers:
        raise violation(
            "quantized-layers-missing",
            "quant_algo MIXED_PRECISION needs a quantized_layers that is not empty",
        )
    if layers and algo not in ("MIXED_PRECISION", None):
        raise violation(
            "quantized-layers-unused",
            f"quantized_layers is read for MIXED_PRECISION, found quant_algo {algo} "
            f"and {len(layers)} layers",
        )


def forbid_overlap(excluded: Sequence[str], quantized: Iterable[str]) -> None:
    """Return if no module of `quantized` matches a pattern of `excluded` (shell wildcards).

    Raises the violation excluded-and-quantized with the first 5 modules and their count.
    """
    if not excluded:
        return
    matches = re.compile("|".join(translate(pattern) for pattern in excluded)).match
    both = [name for name in quantized if matches(name)]
    if both:
        shown = ", ".join(both[:5]) + (", ..." if len(both) > 5 else "")
        raise violation(
            "excluded-and-quantized", f"{len(both)} modules are excluded and quantized: {shown}"
        )
