"""What every decoder layer and the root of a known model type own, as data.

Only what is certain for the type whatever its config says: no biases, no optional parts. Source:
Transformers 5.14 models/{llama,mistral,mixtral,qwen2,qwen3,qwen3_moe,phi3,gemma3,deepseek_v3}/
modeling_*.py; the names are those of the checkpoint below "layers.N.", with `*` for an expert.
"""

from collections.abc import Mapping
from typing import TypeAlias

# the ways to store one part of a layer, each with the modules that it takes, or with the parameters
# that stack all experts
Part: TypeAlias = tuple[tuple[str, ...], ...]

_QKV: Part = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.qkv_proj",),
)
_LATENT_QUERY: Part = (
    ("self_attn.q_a_proj", "self_attn.q_a_layernorm", "self_attn.q_b_proj"),
    ("self_attn.q_proj",),
)
_MLP: Part = (
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ("mlp.gate_up_proj", "mlp.down_proj"),
)
_EXPERTS: Part = tuple(
    (f"{parent}.gate", *(f"{parent}.experts.{name}" for name in names))
    for parent in ("mlp", "block_sparse_moe")
    for names in (
        ("*.gate_proj", "*.up_proj", "*.down_proj"),
        ("*.w1", "*.w3", "*.w2"),
        ("*.gate_up_proj", "*.down_proj"),
        ("gate_up_proj", "down_proj"),
    )
)


def _each(*names: str) -> tuple[Part, ...]:
    return tuple(((name,),) for name in names)


_NORMS = _each("input_layernorm", "post_attention_layernorm")
_O_PROJ = _each("self_attn.o_proj")
_HEAD_NORMS = _each("self_attn.q_norm", "self_attn.k_norm")
_DENSE = (_QKV, *_O_PROJ, _MLP, *_NORMS)

# model type -> the parts of each of its layers
LAYER_PARTS: Mapping[str, tuple[Part, ...]] = {
    "deepseek_v3": (
        _LATENT_QUERY,
        *_each(
            "self_attn.kv_a_proj_with_mqa",
            "self_attn.kv_a_layernorm",
            "self_attn.kv_b_proj",
        ),
        *_O_PROJ,
        (*_MLP, *_EXPERTS),
        *_NORMS,
    ),
    "gemma3_text": (
        *_DENSE,
        *_HEAD_NORMS,
        *_each("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "llama": _DENSE,
    "mistral": _DENSE,
    "mixtral": (_QKV, *_O_PROJ, _EXPERTS, *_NORMS),
    "phi3": _DENSE,
    "qwen2": _DENSE,
    "qwen3": (*_DENSE, *_HEAD_NORMS),
    "qwen3_moe": (_QKV, *_O_PROJ, (*_MLP, *_EXPERTS), *_NORMS, *_HEAD_NORMS),
}

# beside the layers, under the same parent as "layers"
ROOTS = ("embed_tokens", "norm")
# model types whose head is tied where config.json does not say (configuration_*.py)
TIED_BY_DEFAULT = frozenset({"gemma3_text"})


def tensor(name: str) -> str:
    """Return the tensor of the module or stacked parameter `name` of a part."""
    is_stack = ".experts." in name and ".*." not in name
    return name if is_stack else f"{name}.weight"
