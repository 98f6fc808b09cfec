"""What vLLM 0.32 and 0.33 take of ModelOpt checkpoints, as data.

Sources: vLLM 0.33.0 model_executor/layers/quantization/modelopt.py (here: modelopt.py), the models'
packed_modules_mapping, and runs of its own loader; 0.32.0 is the same in everything below.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from qvalidate.context import Module

VERSIONS = ">=0.32,<0.34"


@dataclass(frozen=True)
class Support:
    """How vLLM takes one algorithm; a reason is why it refuses, None if it does not.

    `experts` is about routed experts. `multiple_of_k` and `fused_rows` are what the columns of
    every layer, and the rows of every fused part but the last, must be divisible by. `is_nested`
    says whether the nested config may name it beside producer "modelopt", and `nested_keys` what
    that config must hold then. `dtypes` are the model's. `is_scale_checked` says whether vLLM stops
    at a NaN in a dense layer's weight_scale, which is all NaN until it is loaded. `dropped` are the
    tensors that it loads and has no use for. `oldest_gpu` is the compute capability times ten that
    it needs, `native_gpu` that from which on it has more than Marlin's weight-only kernels.
    """

    method: str
    experts: str | None = None
    lm_head: str | None = None
    multiple_of_k: int = 1
    fused_rows: int = 1
    is_nested: bool = True
    nested_keys: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    is_scale_checked: bool = False
    dropped: tuple[str, ...] = ()
    oldest_gpu: int = 80
    native_gpu: int = 0
    evidence: str = ""


_NO_EXPERTS = (
    "vLLM has no ModelOpt method for experts in this format: it takes its per-tensor FP8 method, "
    "which stops with \"shape '[]' is invalid for input of size N\"; in a mixed checkpoint with "
    "\"has no parameter 'w2_weight_scale'\""
)

_NVFP4_KEYS = ("group_size", "kv_cache_quant_algo", "exclude_modules")

# quant_algo in upper case -> support; vLLM folds the case itself (modelopt.py:366)
SUPPORT: Mapping[str, Support] = {
    "FP8": Support(method="modelopt", native_gpu=89, evidence="modelopt.py:143-160"),
    "FP8_PER_CHANNEL_PER_TOKEN": Support(
        method="modelopt",
        experts=_NO_EXPERTS,
        native_gpu=89,
        evidence="modelopt.py:143-160, :256; fused_moe/routed_experts.py:335",
    ),
    "FP8_PB_WO": Support(
        method="modelopt",
        experts=_NO_EXPERTS,
        native_gpu=90,
        lm_head="vLLM stops with an AssertionError in vocab_parallel_embedding.py:515",
        multiple_of_k=128,
        fused_rows=128,
        evidence="modelopt.py:143-160, :256, :2491-2528; fused_moe/routed_experts.py:335",
    ),
    "NVFP4": Support(
        method="modelopt_fp4",
        oldest_gpu=75,
        native_gpu=100,
        multiple_of_k=16,
        nested_keys=_NVFP4_KEYS,
        is_scale_checked=True,
        evidence="modelopt.py:143-160, :817-829, :2077",
    ),
    "W4A16_NVFP4": Support(
        method="modelopt_fp4",
        oldest_gpu=75,
        multiple_of_k=16,
        is_nested=False,
        nested_keys=_NVFP4_KEYS,
        is_scale_checked=True,
        dropped=("input_scale",),
        evidence="modelopt.py:143-160, :817-829, :2077, :2532-2555; "
        "model_arch_config_convertor.py:255-270",
    ),
    "MXFP8": Support(
        method="modelopt_mxfp8",
        native_gpu=100,
        multiple_of_k=32,
        is_nested=False,
        nested_keys=("kv_cache_quant_algo", "exclude_modules"),
        dtypes=("bfloat16",),
        evidence="modelopt.py:143-160, :1273-1283; model_arch_config_convertor.py:255-270",
    ),
    "MIXED_PRECISION": Support(
        method="modelopt_mixed", oldest_gpu=75, evidence="modelopt.py:1748-1825"
    ),
}

# leaf names that vLLM loads as one layer -> that layer's name (packed_modules_mapping)
FUSED_NAMES: Mapping[tuple[str, ...], str] = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj",
}

# model types with a loader for experts stacked in one tensor, and for their scales
# (models/mllama4.py:_rename_weight_for_modelopt_checkpoint)
STACKED_EXPERTS = frozenset({"llama4"})
# model types whose loader takes such stacks, but not all that is beside quantized ones -> what not
# (models/llama4.py load_moe_expert_weights; models/gpt_oss.py _load_weights_other)
STACKS_WITHOUT: Mapping[str, str] = {"gpt_oss": "the biases", "llama4_text": "the scales"}

# prefixes that are never quantized, whatever the list says (modelopt.py:243-248)
NEVER_QUANTIZED = ("vision_tower", "vision_model", "vit_large_projector")

# model types whose router is built without a quantization config (vLLM 0.32.0
# models/mixtral.py:111, models/deepseek_v2.py:321)
PLAIN_ROUTERS = frozenset({"deepseek_v3", "mixtral"})


def support_of(module: Module) -> Support | None:
    """Return what vLLM says of the module's format, None if it refuses it or none is known."""
    return SUPPORT.get(module.declared.name) if module.declared else None
