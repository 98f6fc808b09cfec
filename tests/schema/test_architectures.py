"""The architecture map on module names of real models: what is Linear, what stays, what fuses."""

from fnmatch import fnmatchcase
from itertools import product

import pytest

from qschema.architectures import (
    KEEP_RULES,
    KNOWN,
    fused_siblings,
    has_tied_head,
    keep_reason,
    layer_index,
    matching,
    text_config,
)

ATTENTION = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
ROOTS = ["model.embed_tokens", "lm_head", "model.norm", "model.layers.0.input_layernorm"]
MLA = [
    f"model.layers.3.self_attn.{name}"
    for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
]
DEEPSEEK = [f"model.layers.3.mlp.{name}.up_proj" for name in ("experts.0", "shared_experts")]
NEXT_TOKENS = ["model.layers.61.eh_proj", "model.layers.61.self_attn.o_proj"]
# model type -> (quantized, kept); these types need no note about an unknown architecture
TYPES: dict[str, tuple[list[str], list[str]]] = {
    "llama": (ATTENTION + MLP, ROOTS),
    "mistral": (ATTENTION + MLP, ROOTS),
    "qwen2": (ATTENTION + MLP, ROOTS),
    "qwen3": (ATTENTION + MLP, [*ROOTS, "model.layers.0.self_attn.q_norm"]),
    "qwen3_moe": (
        [*ATTENTION, "model.layers.0.mlp.experts.7.gate_proj"],
        [*ROOTS, "model.layers.0.mlp.gate"],
    ),
    "mixtral": (
        [*ATTENTION, "model.layers.0.block_sparse_moe.experts.0.w1"],
        [*ROOTS, "model.layers.0.block_sparse_moe.gate"],
    ),
    "deepseek_v3": (
        MLA + DEEPSEEK,
        [
            *ROOTS,
            "model.layers.3.mlp.gate",
            "model.layers.3.self_attn.kv_a_layernorm",
            *NEXT_TOKENS,
        ],
    ),
    "phi3": (["model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"], ROOTS),
    "gemma3_text": (ATTENTION + MLP, [*ROOTS, "model.layers.0.pre_feedforward_layernorm"]),
}


def test_every_known_type_is_in_the_table() -> None:
    assert frozenset(TYPES) == KNOWN


@pytest.mark.parametrize("model_type", list(TYPES))
def test_names_of_known_types(model_type: str) -> None:
    config = {"model_type": model_type, "num_hidden_layers": 61}
    quantized, kept = TYPES[model_type]

    assert [name for name in quantized if keep_reason(name, config=config)] == []
    assert [name for name in kept if not keep_reason(name, config=config)] == []


@pytest.mark.parametrize(
    "module",
    [
        "mlp1.1",
        "vpm.encoder.layers.0.mlp.fc1",
        "resampler.kv_proj",
        "model.vision_backbone.image_vit.transformer.resblocks.0.attention.wq",
        "transformer.vision.linear_proj.gate_proj",
        "vision.blocks.0.attn.qkv",
        "projector.layers.0",
        "model.connector.modality_projection.proj",
        "vision_language_adapter.w_in",
        "qformer.encoder.layer.0.attention.attention.query",
        "language_projection",
        "vit_large_projector",
        "img_projection.0",
        "speech_encoder.encoder.layers.0.ffn1.intermediate_dense",
        "token2wav.code2wav_dit_model.proj_out",
        "talker.codec_head",
        "model.mtp_linear_proj.0",
        "lm_heads.0",
        "score.0",
        "classifier.dense",
        "v_head.summary",
        "model.layers.0.mlp.router",
        "transformer.wte",
        "model.language_model.embed_tokens",
    ],
)
def test_what_stays_in_other_models(module: str) -> None:
    assert keep_reason(module, config={})


@pytest.mark.parametrize(
    "module",
    [
        "embedding_model.layers.0.self_attn.q_proj",
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv",
        "transformer.h.0.mlp.dense_h_to_4h",
        "model.decoder.layers.12.fc1",
        "model.language_model.layers.0.mlp.gate_proj",
        "language_model.model.layers.0.mlp.up_proj",
    ],
)
def test_what_is_quantized_in_other_models(module: str) -> None:
    assert keep_reason(module, config={"num_hidden_layers": 12}) is None


def test_layers_past_the_last_are_multi_token_prediction() -> None:
    config = {"text_config": {"num_hidden_layers": 61}}

    assert keep_reason("model.layers.61.mlp.up_proj", config=config) == "multi-token prediction"
    assert keep_reason("model.layers.60.mlp.up_proj", config=config) is None
    # no number to count with
    assert keep_reason(f"model.layers.{'9' * 5000}.mlp.up_proj", config=config) is None


def test_fused_siblings_come_in_row_order() -> None:
    assert fused_siblings("a.k_proj") == ("a.q_proj", "a.k_proj", "a.v_proj")
    assert fused_siblings("a.o_proj") == ("a.o_proj",)
    assert fused_siblings("w3") == ("w1", "w3")


def test_a_head_counts_as_tied_unless_the_config_says_no() -> None:
    assert has_tied_head({})
    assert has_tied_head({"text_config": {"tie_word_embeddings": True}})
    assert not has_tied_head({"tie_word_embeddings": False})


def test_the_language_part_of_a_config_is_found() -> None:
    inner = {"num_hidden_layers": 2}

    assert text_config({"text_config": inner}) == inner
    assert text_config({"thinker_config": {"text_config": inner}}) == inner
    assert text_config({"llm_config": inner}) == inner
    assert text_config(inner) == inner


def test_a_digit_that_is_no_number_is_no_layer() -> None:
    assert layer_index("layers.\u00b2.x") is None
    assert layer_index("layers.2.x") == 2


ODD_PATTERNS = [
    "",
    "*",
    "**",
    "a",
    "a*",
    "*a",
    "*a*",
    "a*b",
    "*.a",
    "a?",
    "*[0-9]",
    "[!a]*",
    "*[",
    "*[*]*",
]


@pytest.mark.parametrize(
    "pattern", [*ODD_PATTERNS, *(p for rule in KEEP_RULES for p in rule.patterns)]
)
def test_a_pattern_matches_what_fnmatch_says(pattern):
    inner = pattern.strip("*")
    names = ["".join(letters) for n in range(4) for letters in product("ab.0[*\n", repeat=n)]
    names += [f"{head}{inner}{tail}" for head in ("", "x", "\n") for tail in ("", "x", "\n")]

    found = [name for name in names if matching(name, [pattern]) is not None]

    assert found == [name for name in names if fnmatchcase(name, pattern)]
