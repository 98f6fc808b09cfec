"""The architecture map: which weights are Linear, which stay as they are, which ones engines fuse.

Data and name matching only. Names are those of the checkpoint: `model.layers.0.mlp.gate.weight` is
the tensor, `model.layers.0.mlp.gate` the module. Patterns are fnmatch patterns over module names.

Sources: ModelOpt 0.47.0 modelopt_recipes/configs/ptq/units/default_disabled_quantizers.yaml (what
its presets leave alone); vLLM 0.33.0 packed_modules_mapping of its models (what engines fuse).
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import pairwise

from qschema.strict import Json, Strict


class KeepRule(Strict):
    """Modules that no recipe rule touches unless the recipe includes them by name."""

    name: str
    patterns: tuple[str, ...]
    reason: str


KEEP_RULES: tuple[KeepRule, ...] = (
    KeepRule(
        name="vision-audio",
        patterns=(
            "*vision_tower*",
            "*vision_model*",
            "*visual*",
            "*vision_encoder*",
            "*embed_vision*",
            "*embed_audio*",
            "*audio_tower*",
            "*audio_encoder*",
            "*audio_model*",
            "*multi_modal_projector*",
            "*mm_projector*",
        ),
        reason="vision or audio tower",
    ),
    KeepRule(
        name="mtp",
        patterns=("mtp.*", "*.mtp.*", "*mtp_layers*", "*mtp_block*"),
        reason="multi-token prediction",
    ),
    KeepRule(
        name="embedding",
        patterns=("*embed*", "*.wte", "wte", "*.wpe", "wpe", "shared", "*relative_attention_bias"),
        reason="embedding",
    ),
    KeepRule(
        name="lm-head",
        patterns=(
            "lm_head",
            "*.lm_head",
            "output",
            "output.*",
            "*output_layer",
            "proj_out",
            "*.proj_out.*",
            "score",
            "classifier",
        ),
        reason="output head",
    ),
    KeepRule(
        name="router",
        patterns=("*.gate", "*.gate.*", "*router*", "*.shared_expert_gate"),
        reason="router of a mixture of experts",
    ),
    KeepRule(
        name="norm",
        patterns=("*norm", "*norm.*", "*layernorm*", "*.ln_*"),
        reason="norm",
    ),
    KeepRule(
        name="state-space",
        patterns=(
            "*linear_attn.conv1d*",
            "*linear_attn.in_proj_a*",
            "*linear_attn.in_proj_b*",
            "*self_attention.conv1d*",
            "*mixer.conv1d*",
        ),
        reason="small projection of a linear-attention or state-space layer",
    ),
)

# leaf names under one parent that engines load as one matrix, in the order of its rows
FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)

# model types whose tensors follow the generic rules above, checked by a fixture or a golden
KNOWN = frozenset(
    {
        "deepseek_v3",
        "gemma3_text",
        "llama",
        "mistral",
        "mixtral",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
    }
)

# model types that can't be converted, each with the reason
REFUSED: Mapping[str, str] = dict.fromkeys(
    ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "ctrl"),
    "stores its linear weights transposed (Conv1D, [in, out]); engines have no quantized layer "
    "for it",
)


def keep_reason(module: str, *, config: Mapping[str, Json]) -> str | None:
    """Return why `module` stays in its source precision by default, None if nothing says so.

    `config` is config.json: decoder layers past num_hidden_layers (of the config itself or its
    text_config) are multi-token prediction layers (DeepSeek-V3, GLM-4).
    """
    for rule in KEEP_RULES:
        if matching(module, rule.patterns):
            return rule.reason
    depth = text_config(config).get("num_hidden_layers")
    layer = layer_index(module)
    if isinstance(depth, int) and layer is not None and layer >= depth:
        return "multi-token prediction"
    return None


def matching(module: str, patterns: Iterable[str]) -> str | None:
    """Return the first of `patterns` that `module` matches, None without one."""
    return next((pattern for pattern in patterns if fnmatchcase(module, pattern)), None)


def fused_siblings(module: str) -> tuple[str, ...]:
    """Return the modules that engines load together with `module`, itself included, in row order.

    A module that engines load by itself is returned alone. The names need not all exist.
    """
    parent, _, leaf = module.rpartition(".")
    for group in FUSED:
        if leaf in group:
            return tuple(f"{parent}.{sibling}" if parent else sibling for sibling in group)
    return (module,)


def text_config(config: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return the part of config.json that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def has_tied_head(config: Mapping[str, Json]) -> bool:
    """Return whether config.json ties lm_head to the embedding (false if it does not say)."""
    tied = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    return tied is True


def layer_index(module: str) -> int | None:
    """Return the number after `layers` in a name, None for what is in no layer."""
    parts = module.split(".")
    for name, index in pairwise(parts):
        if name == "layers" and index.isdigit():
            return int(index)
    return None
