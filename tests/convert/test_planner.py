"""The plan: every source tensor accounted for, by the recipe, then the architecture map."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qconvert.errors import ConvertError
from qconvert.planner import make_plan
from qschema.checkpoint import open_checkpoint
from qschema.plan import LOCAL, Plan
from qschema.recipe import Recipe, Rule

Make = Callable[..., Path]
W = torch.zeros(256, 256, dtype=torch.bfloat16)


def recipe(*algos: str, **fields: object) -> Recipe:
    rules = [Rule(match="*", algo=algo) for algo in algos or ("FP8_PB_WO",)]
    return Recipe.model_validate({"rules": rules, **fields})


def plan(path: Path, **fields: object) -> Plan:
    return make_plan(open_checkpoint(path), recipe(**fields))


def fates(found: Plan) -> dict[str, str]:
    return {step.source.name: step.algo or step.reason for step in found.steps}


def test_every_source_tensor_has_exactly_one_step(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)

    found = make_plan(checkpoint, recipe())

    assert sorted(step.source.name for step in found.steps) == sorted(checkpoint.tensors)
    assert {step.algo for step in found.steps} == {None, "FP8_PB_WO"}


def test_output_spans_fill_each_file_from_its_header_to_its_end(llama: Path) -> None:
    found = plan(llama)

    for shard in found.shards:
        spans = sorted(
            (span.offset, span.nbytes)
            for step in found.steps
            for span in step.outputs
            if span.file == shard.file
        )
        ends = [offset + nbytes for offset, nbytes in spans]
        assert [offset for offset, _ in spans[1:]] == ends[:-1]
        assert ends[-1] == shard.nbytes


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "output head"),
        ("model.layers.0.mlp.gate.weight", "router of a mixture of experts"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router of a mixture of experts"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "router of a mixture of experts"),
        ("model.layers.0.feed_forward.router.weight", "router of a mixture of experts"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision or audio part"),
        ("vision_tower.layers.0.fc1.weight", "vision or audio part"),
        ("audio_tower.layers.0.fc1.weight", "vision or audio part"),
        ("multi_modal_projector.linear_1.weight", "vision or audio part"),
        ("mtp.layers.0.mlp.up_proj.weight", "multi-token prediction"),
        ("model.layers.99.mlp.up_proj.weight", "multi-token prediction"),
        ("unheard_of.weight", "has a row per token of the vocabulary"),
    ],
)
def test_default_exclusions(make: Make, name: str, why: str) -> None:
    path = make(
        {name: W, "model.layers.0.mlp.up_proj.weight": W.clone()}, config={"vocab_size": 256}
    )

    found = fates(plan(path))

    assert found == {name: why, "model.layers.0.mlp.up_proj.weight": "FP8_PB_WO"}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
        "model.layers.0.mlp.experts.7.gate_proj.weight",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
        "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.98.mlp.up_proj.weight",
    ],
)
def test_linear_weights_are_quantized_under_their_own_names(make: Make, name: str) -> None:
    found = plan(make({name: W}, config={"vocab_size": 256}))

    (step,) = found.steps
    assert [span.name for span in step.outputs] == [
        name,
        name.removesuffix("weight") + "weight_scale",
    ]


def test_biases_norms_and_integers_stay(make: Make) -> None:
    path = make(
        {
            "model.layers.0.q_proj.weight": W,
            "model.layers.0.q_proj.bias": torch.zeros(256),
            "model.norm.weight": torch.ones(256),
            "model.position_ids": torch.arange(8),
        }
    )

    found = fates(plan(path))

    assert {name for name, fate in found.items() if fate == "FP8_PB_WO"} == {
        "model.layers.0.q_proj.weight"
    }


def test_stacked_experts_are_refused_by_name_unless_excluded(make: Make) -> None:
    experts = "model.layers.1.mlp.experts.gate_up_proj"
    path = make({experts: torch.zeros(2, 8, 8), "model.layers.1.self_attn.q_proj.weight": W})

    with pytest.raises(ConvertError, match=rf"{experts}: F32 \[2, 8, 8\] looks like experts"):
        plan(path)

    found = plan(path, exclude=["*.experts"])
    assert fates(found)[experts] == "excluded by '*.experts'"
    assert found.exclude_modules == ["model.layers.1.mlp*"]


def test_convolutions_stay_and_are_listed(make: Make) -> None:
    path = make(
        {
            "model.layers.0.mixer.conv1d.weight": torch.zeros(8, 1, 4),
            "model.layers.0.conv.weight": torch.zeros(8, 4, 3, 3),
            "model.layers.0.q_proj.weight": W,
        }
    )

    assert plan(path).exclude_modules == ["model.layers.0.conv", "model.layers.0.mixer*"]


def test_an_exclude_pattern_takes_what_lies_below_it(make: Make) -> None:
    path = make({"model.layers.0.a.q_proj.weight": W, "model.layers.1.a.q_proj.weight": W.clone()})

    found = plan(path, exclude=["model.layers.0"])

    assert fates(found)["model.layers.0.a.q_proj.weight"] == "excluded by 'model.layers.0'"
    assert found.exclude_modules == ["model.layers.0*"]


def test_a_pattern_that_matches_nothing_is_noted(llama: Path) -> None:
    assert plan(llama, exclude=["model.layer.0"]).notes == ["'model.layer.0' matches no module"]


def test_include_overrides_a_default_exclusion(make: Make) -> None:
    path = make({"lm_head.weight": W, "model.layers.0.q_proj.weight": W.clone()})

    found = plan(path, include=["lm_head"])

    assert set(fates(found).values()) == {"FP8_PB_WO"}
    assert found.exclude_modules == []


def test_a_split_fused_group_is_noted(llama: Path) -> None:
    (note,) = plan(llama, exclude=["model.layers.0.self_attn.k_proj"]).notes

    assert note == (
        "engines load these as one and refuse them when only some are quantized: "
        "model.layers.0.self_attn.k_proj kept + model.layers.0.self_attn.q_proj FP8_PB_WO + "
        "model.layers.0.self_attn.v_proj FP8_PB_WO"
    )


def test_a_tied_head_is_excluded_although_no_tensor_has_its_name() -> None:
    qwen3 = Path(__file__).parents[2] / "fixtures" / "checkpoints" / "qwen3"

    found = plan(qwen3)

    assert "lm_head.weight" not in fates(found)
    assert found.exclude_modules == ["lm_head", "model.embed_tokens"]


def test_an_unknown_architecture_is_noted(make: Make) -> None:
    path = make({"model.layers.0.q_proj.weight": W}, config={"model_type": "brandnew"})

    found = plan(path)

    assert not found.source.known_architecture
    assert "'brandnew' is not in the architecture map" in found.notes[0]


def test_conv1d_models_are_refused(make: Make) -> None:
    path = make({"h.0.attn.c_attn.weight": W}, config={"model_type": "gpt2"})

    with pytest.raises(
        ConvertError, match=r"model type 'gpt2' stores its linear weights transpose"
    ):
        plan(path)


@pytest.mark.parametrize(
    ("tensors", "config", "found"),
    [
        (
            {"a.q_proj.weight": W},
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config",
        ),
        (
            {"a.q_proj.weight": W},
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            "quantization_config",
        ),
        ({"a.weight": W, "a.weight_scale_inv": W.clone()}, {}, "a.weight_scale_inv"),
        ({"a.weight": W.to(torch.float8_e4m3fn)}, {}, "a.weight"),
    ],
)
def test_a_quantized_source_is_refused(
    make: Make, tensors: dict[str, torch.Tensor], config: dict[str, object], found: str
) -> None:
    with pytest.raises(ConvertError, match=f"is quantized already .*{found}"):
        plan(make(tensors, config=config))


def test_a_source_with_the_quantizers_own_file_is_refused(make: Make) -> None:
    path = make({"a.q_proj.weight": W})
    (path / "hf_quant_config.json").write_text("{}")

    with pytest.raises(ConvertError, match=r"is quantized already \(it holds hf_quant_config.json"):
        plan(path)


def test_a_recipe_that_quantizes_nothing_is_refused(make: Make) -> None:
    with pytest.raises(ConvertError, match="quantizes none of the weights"):
        plan(make({"lm_head.weight": W}))


def test_two_formats_in_one_checkpoint_are_mixed_precision(make: Make) -> None:
    path = make({"a.q_proj.weight": W, "b.q_proj.weight": W.clone()})
    rules = [
        Rule(match="a.*", algo="FP8_PB_WO"),
        Rule(match="*", algo="FP8_PER_CHANNEL_PER_TOKEN"),
    ]

    found = make_plan(open_checkpoint(path), Recipe(rules=rules))

    layers = {"a.q_proj": "FP8_PB_WO", "b.q_proj": "FP8_PER_CHANNEL_PER_TOKEN"}
    assert found.quantized_layers == layers
    assert fates(found) == {f"{module}.weight": algo for module, algo in layers.items()}
    assert found.exclude_modules == []


def test_the_first_matching_rule_decides(make: Make) -> None:
    path = make({"a.q_proj.weight": W, "b.q_proj.weight": W.clone()})
    rules = [Rule(match="a.*", algo="FP8_PB_WO")]

    found = fates(make_plan(open_checkpoint(path), Recipe(rules=rules)))

    assert found == {"a.q_proj.weight": "FP8_PB_WO", "b.q_proj.weight": "no rule matches"}


def test_stray_safetensors_are_refused_or_left_by_name(make: Make) -> None:
    path = make({"a.q_proj.weight": W})
    (path / "mtp.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    (path / "consolidated.00.safetensors").write_bytes(b"")

    with pytest.raises(ConvertError, match=r"mtp.safetensors: no part of the model"):
        plan(path)

    left = {side.file for side in plan(path, leave=["mtp*"]).side_files if side.action == "leave"}
    assert left == {"consolidated.00.safetensors", "mtp.safetensors"}


def test_second_copies_of_the_weights_are_left_and_noted(make: Make) -> None:
    path = make({"a.q_proj.weight": W})
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "m.gguf", ".gitattributes"):
        (path / name).write_bytes(b"x")
    # needed by the model, whatever the suffix makes one think
    (path / "spk_dict.pt").write_bytes(b"x")

    found = plan(path)

    sides = {side.file: side.action for side in found.side_files}
    assert [name for name, action in sides.items() if action == "leave"] == [
        ".gitattributes",
        "m.gguf",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    assert sides["spk_dict.pt"] == "copy"
    assert found.notes == ["left behind: m.gguf, pytorch_model.bin, pytorch_model.bin.index.json"]
    copied = {s.file: s.action for s in plan(path, copy_files=["*.gguf"]).side_files}
    assert copied["m.gguf"] == "copy"


def test_weights_of_a_subfolder_are_copied_with_it(make: Make) -> None:
    """sentence-transformers keeps further modules so; no index can name them."""
    path = make({"a.q_proj.weight": W})
    (path / "2_Dense").mkdir()
    (path / "2_Dense" / "model.safetensors").write_bytes(b"x")

    sides = {side.file: side.action for side in plan(path).side_files}

    assert sides["2_Dense/model.safetensors"] == "copy"


def test_file_patterns_that_do_nothing_are_noted(make: Make) -> None:
    found = plan(make({"a.q_proj.weight": W}), leave=["config.json", "nothing*"])

    assert found.notes == ["--leave 'config.json' does nothing", "--leave 'nothing*' does nothing"]


def test_patterns_that_match_behind_another_are_not_called_unused(make: Make) -> None:
    path = make({"a.q_proj.weight": W, "b.q_proj.weight": W.clone()})

    assert plan(path, exclude=["a.q_proj", "a.q*"], include=["a"]).notes == []


def test_a_64_bit_buffer_is_kept(make: Make) -> None:
    path = make({"a.q_proj.weight": W, "freqs": torch.ones(3, dtype=torch.float64)})

    assert fates(plan(path))["freqs"] == "F64 is not quantized"


def test_names_that_only_look_quantized_are_not_refused(make: Make) -> None:
    path = make(
        {"a.q_proj.weight": W, "a.head_scales": torch.ones(4)}, config={"quantization_config": None}
    )

    assert fates(plan(path))["a.head_scales"] == "not the weight of a linear layer"


def test_experts_side_by_side_in_two_dimensions_are_refused(make: Make) -> None:
    """DBRX: [experts * rows, columns], no `.weight` in the name."""
    path = make({"blocks.0.ffn.experts.mlp.w1": torch.zeros(512, 64), "a.q_proj.weight": W})

    with pytest.raises(ConvertError, match=r"experts.mlp.w1: F32 \[512, 64\] looks like experts"):
        plan(path)

    assert plan(path, exclude=["*.experts.mlp.*"]).exclude_modules == ["blocks*"]


def test_conv1d_weights_are_refused_without_a_model_type_too(make: Make) -> None:
    path = make({"h.0.attn.c_attn.weight": torch.zeros(64, 192)}, config={"model_type": None})

    with pytest.raises(ConvertError, match=r"c_attn.weight: stores its linear weights transposed"):
        plan(path)


def test_a_plan_is_the_same_for_the_same_input(llama: Path) -> None:
    assert plan(llama).sha256() == plan(llama).sha256()
    assert Plan.parse(plan(llama).model_dump(mode="json"), file="plan.json") == plan(llama)


def test_the_digest_is_that_of_the_json_without_what_is_local(llama: Path) -> None:
    found = plan(llama)

    text = found.model_dump_json(exclude=set(LOCAL))

    assert found.sha256() == hashlib.sha256(text.encode()).hexdigest()


def test_chat_templates_that_differ_are_noted(make: Make) -> None:
    path = make({"model.layers.0.q_proj.weight": W})
    (path / "chat_template.jinja").write_text("{{ a }}")
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ a }}"}')
    assert plan(path).notes == []
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ b }}"}')

    (note,) = plan(path).notes

    assert "different chat templates in chat_template.jinja, tokenizer_config.json" in note
