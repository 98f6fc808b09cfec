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
    # how many of the last parts of the name the patterns see; 0 is the whole name
    tail: int = 0


KEEP_RULES: tuple[KeepRule, ...] = (
    KeepRule(
        name="vision-audio",
        patterns=(
            "*vision*",
            "*visual*",
            "*audio*",
            "*speech*",
            "*projector*",
            "*connector*",
            "*resampler*",
            "*qformer*",
            "*perceiver*",
            "*language_projection*",
            "*img_projection*",
            "*img_processor*",
            "*token2wav*",
            "*code2wav*",
            "talker.*",
            # MiniCPM, InternVL, Step-3
            "vpm.*",
            "apm.*",
            "mlp1.*",
            "vit_*",
            "*.vit_*",
        ),
        reason="vision or audio part",
    ),
    KeepRule(name="mtp", patterns=("*mtp*",), reason="multi-token prediction"),
    KeepRule(
        name="embedding",
        patterns=("*embed*", "*wte", "*wpe", "shared", "*relative_attention_bias"),
        reason="embedding",
        tail=2,
    ),
    KeepRule(
        name="lm-head",
        patterns=(
            "*lm_head*",
            "*codec_head*",
            "output",
            "output.*",
            "*output_layer",
            "proj_out",
            "*.proj_out",
            "score",
            "score.*",
            "classifier",
            "classifier.*",
            "qa_outputs",
            "v_head*",
        ),
        reason="output head",
    ),
    KeepRule(
        name="router",
        patterns=("*.gate", "*.gate.wg", "*router*", "*.shared_expert_gate"),
        reason="router of a mixture of experts",
    ),
    KeepRule(name="norm", patterns=("*norm", "*norm[0-9]", "ln_*", "ln"), reason="norm", tail=1),
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

# model types whose names the rules above were tried on (tests/schema/test_architectures.py)
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
    parts = module.split(".")
    for rule in KEEP_RULES:
        if matching(".".join(parts[-rule.tail :]), rule.patterns):
            return rule.reason
    depth = text_config(config).get("num_hidden_layers")
    layer = layer_index(module)
    # an encoder or a decoder may be deeper than the number that the config gives for the other
    if isinstance(depth, int) and layer is not None and not {"encoder", "decoder"} & set(parts):
        return "multi-token prediction" if layer >= depth else None
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
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        nested = config.get(key)
        if isinstance(nested, dict):
            return text_config(nested)
    return config


def has_tied_head(config: Mapping[str, Json]) -> bool:
    """Return whether a model without lm_head.weight uses its embedding as the head.

    True unless config.json says otherwise: classes whose default is a tied head (Gemma) leave it
    out.
    """
    tied = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    return tied is not False


def layer_index(module: str) -> int | None:
    """Return the number of the layer that a name is in, None for what is in no layer."""
    for name, index in pairwise(module.split(".")):
        if name in ("layers", "layer", "h", "blocks", "block") and index.isdigit():
            # more digits than any model has layers: not a number to count with
            return int(index) if len(index) <= 6 else None
    return None
