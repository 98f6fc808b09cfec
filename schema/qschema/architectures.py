"""The architecture map: which weights are Linear, which stay as they are, which ones engines fuse.

Data and name matching only. Names are those of the checkpoint: `model.layers.0.mlp.gate.weight` is
the tensor, `model.layers.0.mlp.gate` the module. Patterns are fnmatch patterns over module names.

Sources: ModelOpt 0.47.0 modelopt_recipes/configs/ptq/units/default_disabled_quantizers.yaml (what
its presets leave alone); vLLM 0.33.0 packed_modules_mapping of its models (what engines fuse).
"""

import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from functools import cache
from itertools import pairwise

from qschema.strict import Json, Strict

_EXPERT = re.compile(r"(?P<parent>(?:.+\.)?experts)\.\d+\.(?P<leaf>.+)")


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


class Stack(Strict):
    """How a model type stores the experts of a layer in one tensor [E, ..., ...].

    `tail` ends the tensor's name. With `parts` the matrices are [rows, columns] of Linears, one
    part below the other; each becomes a tensor of its own, named by the expert's number and the
    part, as on the hub. Without, they are [columns, rows], multiplied from the right, and stay
    stacked as engines read them.
    """

    model_types: frozenset[str]
    tail: str
    parts: tuple[str, ...] = ()


_SPLIT = frozenset(
    {"deepseek_v2", "deepseek_v3", "glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"}
)
_MIXTRAL = frozenset({"mixtral"})
_TRANSPOSED = frozenset({"llama4", "llama4_text", "gpt_oss"})

# Transformers 5.14 models/*/modeling_*.py: Experts modules and conversion_mapping.py
STACKS: tuple[Stack, ...] = (
    Stack(model_types=_SPLIT, tail="experts.gate_up_proj", parts=("gate_proj", "up_proj")),
    Stack(model_types=_SPLIT, tail="experts.down_proj", parts=("down_proj",)),
    Stack(model_types=_MIXTRAL, tail="experts.gate_up_proj", parts=("w1", "w3")),
    Stack(model_types=_MIXTRAL, tail="experts.down_proj", parts=("w2",)),
    Stack(model_types=_TRANSPOSED, tail="experts.gate_up_proj"),
    Stack(model_types=_TRANSPOSED, tail="experts.down_proj"),
)

# model types of which each norm below the layer feeds these modules and nothing else, as w * x
NORM_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
NORM_READERS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
# model types, and leaf names under one parent, whose later linear reads the rows of the earlier
# one, times something: a scale of its columns may go into those rows (ModelOpt 0.47.0
# export/quant_utils.py:1355)
LINEAR_TYPES = frozenset({"llama", "qwen3", "qwen3_moe"})
LINEAR_BEFORE: Mapping[str, str] = {"down_proj": "up_proj", "o_proj": "v_proj"}

# model type -> (a part of names in Transformers 5's memory, the same part on the hub)
HUB_PARTS: Mapping[str, tuple[str, str]] = {"mixtral": ("mlp", "block_sparse_moe")}

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
        seen = ".".join(parts[-rule.tail :]) if rule.tail else module
        if _any_of(rule.patterns).search(seen):
            return rule.reason
    depth = text_config(config).get("num_hidden_layers")
    layer = layer_index(module)
    # an encoder or a decoder may be deeper than the number that the config gives for the other
    if isinstance(depth, int) and layer is not None and not {"encoder", "decoder"} & set(parts):
        return "multi-token prediction" if layer >= depth else None
    return None


def matching(module: str, patterns: Iterable[str]) -> str | None:
    """Return the first of `patterns` that `module` matches, None without one."""
    for pattern in patterns:
        if _any_of((pattern,)).search(module):
            return pattern
    return None


@cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Return one expression whose `search` finds what any of the fnmatch `patterns` matches."""
    return re.compile("|".join(map(_expression, patterns)))


def _expression(pattern: str) -> str:
    inner = pattern.strip("*")
    if set("*?[") & set(inner):
        return r"\A" + translate(pattern)
    # a star at an end is what a search does by itself, and much faster
    opening = "" if pattern.startswith("*") else r"\A"
    closing = "" if pattern.endswith("*") else r"\Z"
    return opening + re.escape(inner) + closing


def fused_siblings(module: str) -> tuple[str, ...]:
    """Return the modules that engines load together with `module`, itself included, in row order.

    A module that engines load by itself is returned alone. The names need not all exist.
    """
    parent, _, leaf = module.rpartition(".")
    for group in FUSED:
        if leaf in group:
            return tuple(f"{parent}.{sibling}" if parent else sibling for sibling in group)
    return (module,)


def find_stack(name: str, *, model_type: str | None) -> Stack | None:
    """Return how the tensor `name` stacks experts, None where the map does not say."""
    return next(
        (
            stack
            for stack in STACKS
            if model_type in stack.model_types
            and (name == stack.tail or name.endswith(f".{stack.tail}"))
        ),
        None,
    )


def hub_name(name: str, *, model_type: str | None) -> str:
    """Return the hub's name of a tensor or module that may have Transformers 5's in-memory name."""
    parts = HUB_PARTS.get(model_type or "")
    if parts is None:
        return name
    found, wanted = parts
    return ".".join(wanted if part == found else part for part in name.split("."))


def experts_of(module: str) -> tuple[str, str] | None:
    """Return (the experts' parent, what comes after the number) of an expert's module.

    `model.layers.0.mlp.experts.3.gate_proj` -> (`model.layers.0.mlp.experts`, `gate_proj`).
    """
    match = _EXPERT.fullmatch(module)
    return (match["parent"], match["leaf"]) if match else None


def model_order(module: str) -> tuple[int, int, int, str]:
    """Return a key that sorts modules as a model runs them: layers, attention first, then the head.

    Names within a layer go by the rows of what engines fuse; other names by the alphabet.
    """
    layer, leaf = layer_index(module), module.rpartition(".")[2]
    flat = [name for group in FUSED for name in group]
    place = 2 * (layer + 1) if layer is not None else (1 << 32) * ("head" in leaf)
    rank = flat.index(leaf) if leaf in flat else len(flat)
    return place + (layer is not None and "attn" not in module), rank, len(leaf), module


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
        if (
            name in ("layers", "layer", "h", "blocks", "block")
            and index.isascii()
            and index.isdecimal()
        ):
            # more digits than any model has layers: not a number to count with
            return int(index) if len(index) <= 6 else None
    return None
