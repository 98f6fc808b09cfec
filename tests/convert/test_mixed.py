"""Several formats in one checkpoint: who gets which, what is said of it, what may not differ."""

import json
from pathlib import Path

import pytest
import torch

from qconvert.errors import ConvertError
from qconvert.summary import describe

from .conversion import (
    CHECKPOINTS,
    Make,
    Tensors,
    assert_same,
    planned,
    randn,
    recipe,
    run,
    tensors,
)

LAYER = "model.layers.0"
ATTENTION = [f"{LAYER}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
DENSE = [f"{LAYER}.mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
EXPERTS = [
    f"{LAYER}.mlp.experts.{expert}.{leaf}"
    for expert in (0, 1, 2)
    for leaf in ("gate_proj", "up_proj", "down_proj")
]


def weights(modules: list[str]) -> Tensors:
    return {f"{name}.weight": randn(64, 64, seed=place) for place, name in enumerate(modules)}


def test_the_first_rule_that_matches_decides(make: Make) -> None:
    path = make(weights([*ATTENTION, *DENSE]))

    found = planned(
        path,
        ("*.o_proj", "MXFP8"),
        ("*.self_attn.*", "FP8"),
        ("*.down_proj", "W8A16"),
        ("*", "NVFP4"),
        ("*.gate_proj", "FP8_PB_WO"),
    )

    assert found.quantized_layers == {
        **dict.fromkeys(ATTENTION[:3], "FP8"),
        ATTENTION[3]: "MXFP8",
        **dict.fromkeys(DENSE[:2], "NVFP4"),
        DENSE[2]: "W8A16",
    }
    assert {step.source.name.removesuffix(".weight"): step.reason for step in found.steps}[
        DENSE[2]
    ] == "rule '*.down_proj'"


def test_the_documents_of_a_mixed_checkpoint(tmp_path: Path) -> None:
    """In ModelOpt's words: a group of config_groups per format, its targets in order."""
    source = CHECKPOINTS / "mixtral"
    asked = recipe(("*.self_attn.*", "FP8"), ("*.experts.*", "NVFP4"))

    run(source, tmp_path / "out", asked=asked)

    found = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    fp8, nvfp4 = {"quant_algo": "FP8"}, {"quant_algo": "NVFP4", "group_size": 16}
    layers = {}
    for layer in ("model.layers.0", "model.layers.1"):
        layers |= {f"{layer}.self_attn.{leaf}_proj": fp8 for leaf in "qkvo"}
        layers[f"{layer}.block_sparse_moe.experts"] = nvfp4
    assert found == {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "quantized_layers": layers,
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"] == layers
    targets = {group: entry.pop("targets") for group, entry in config["config_groups"].items()}
    assert targets == {
        "group_0": sorted(name for name, layer in layers.items() if layer == fp8),
        "group_1": sorted(name for name, layer in layers.items() if layer == nvfp4),
    }
    eight = {"dynamic": False, "num_bits": 8, "type": "float"}
    four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert config["config_groups"] == {
        "group_0": {"input_activations": eight, "weights": eight},
        "group_1": {"input_activations": four, "weights": four},
    }
    assert config["ignore"] == []


def test_each_tensor_has_the_bytes_of_its_own_format(tmp_path: Path) -> None:
    source = CHECKPOINTS / "llama"
    asked = recipe(("*.self_attn.*", "FP8_PER_CHANNEL_PER_TOKEN"), ("*", "NVFP4"))

    run(source, tmp_path / "mixed", asked=asked)
    run(source, tmp_path / "fp8", algo="FP8_PER_CHANNEL_PER_TOKEN")
    run(source, tmp_path / "nvfp4", algo="NVFP4")

    attention = {n: t for n, t in tensors(tmp_path / "fp8").items() if ".self_attn." in n}
    others = {n: t for n, t in tensors(tmp_path / "nvfp4").items() if ".self_attn." not in n}
    assert_same(tensors(tmp_path / "mixed"), attention | others)


def test_bytes_do_not_depend_on_workers_or_budget(tmp_path: Path) -> None:
    asked = recipe(("*.o_proj", "FP8"), ("*.self_attn.*", "MXFP4"), ("*", "W4A8_NVFP4_FP8"))
    source = CHECKPOINTS / "mixtral"
    run(source, tmp_path / "a", asked=asked, workers=1)
    run(source, tmp_path / "b", asked=asked, workers=4, budget=1 << 20)

    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        (
            [("*.k_proj", "FP8"), ("*", "NVFP4")],
            [f"{ATTENTION[0]} NVFP4", f"{ATTENTION[1]} FP8", f"{ATTENTION[2]} NVFP4"],
        ),
        ([("*.up_proj", "FP8"), ("*", "NVFP4")], [f"{DENSE[0]} NVFP4", f"{DENSE[1]} FP8"]),
        # only some quantized, in a checkpoint of two formats
        (
            [("*.q_proj", "FP8"), ("*.mlp.*", "NVFP4"), ("*.o_proj", "FP8")],
            [f"{ATTENTION[0]} FP8", f"{ATTENTION[1]} kept", f"{ATTENTION[2]} kept"],
        ),
        (
            [("*.experts.1.*", "FP8"), ("*", "NVFP4")],
            [f"6 like {EXPERTS[2]} NVFP4", f"3 like {EXPERTS[5]} FP8"],
        ),
        # the down projections of all experts
        (
            [("*.experts.*.down_proj", "FP8"), ("*", "NVFP4")],
            [f"3 like {EXPERTS[2]} FP8", f"6 like {EXPERTS[0]} NVFP4"],
        ),
    ],
)
def test_what_engines_load_as_one_can_have_one_format_only(
    make: Make, rules: list[tuple[str, str]], named: list[str]
) -> None:
    path = make(weights([*ATTENTION, *DENSE, *EXPERTS]))

    with pytest.raises(ConvertError) as caught:
        planned(path, *rules)

    message = str(caught.value)
    assert message.startswith("the recipe gives several formats to what engines load as one: ")
    assert message.endswith("; let its rules match all of them alike")
    for name in named:
        assert name in message
    # one group is at fault, and no other is named
    assert message.count(";") == 1
    assert ("o_proj" in message) is False


def test_other_modules_may_differ(make: Make) -> None:
    """o_proj beside q/k/v, down beside gate/up, one layer beside the next, shared experts."""
    second = [name.replace("layers.0", "layers.1") for name in ATTENTION]
    shared = [f"{LAYER}.mlp.shared_experts.{leaf}" for leaf in ("gate_proj", "up_proj")]
    path = make(weights([*ATTENTION, *DENSE, *second, *EXPERTS, *shared]))

    found = planned(
        path,
        ("*.o_proj", "W8A16"),
        ("*layers.1.*", "MXFP4"),
        ("*.shared_experts.*", "FP8"),
        ("*.experts.*", "NVFP4"),
        ("*.mlp.down_proj", "MXFP8"),
        ("*", "FP8_PB_WO"),
    )

    layers = found.quantized_layers
    assert layers[f"{LAYER}.mlp.experts"] == "NVFP4"
    assert not [name for name in layers if ".experts." in name]
    assert {layers[name] for name in shared} == {"FP8"}
    assert sorted(set(layers.values())) == [
        "FP8", "FP8_PB_WO", "MXFP4", "MXFP8", "NVFP4", "W8A16",
    ]  # fmt: skip


def test_the_plan_in_words_gives_sizes_and_bits_of_each_format(make: Make) -> None:
    """FP8: 8 bits and two f32 scales; NVFP4: 4.5 bits and two f32 scales, of 64 x 64 each."""
    path = make(weights([ATTENTION[3], *DENSE[:2]]))

    lines = list(describe(planned(path, ("*.self_attn.*", "FP8"), ("*", "NVFP4"))))

    assert "         FP8: 1 tensors, 8.0 KiB -> 4.0 KiB, 8.016 bits per weight" in lines
    assert "         NVFP4: 2 tensors, 16.0 KiB -> 4.5 KiB, 4.516 bits per weight" in lines
    assert "exclude  nothing" in lines


def test_one_format_by_several_rules_is_no_mixture(make: Make) -> None:
    path = make(weights([*ATTENTION, *DENSE]))

    found = planned(path, ("*.self_attn.*", "NVFP4"), ("*", "nvfp4"))

    assert found.algos == ["NVFP4"]
    assert found.quantized_layers == {}


@pytest.mark.parametrize("match", ["*.experts.*", "*.q_proj"], ids=["matches-none", "too-late"])
def test_a_rule_that_never_decides_is_noted(make: Make, match: str) -> None:
    found = planned(make(weights(ATTENTION)), ("*", "FP8"), (match, "NVFP4"))

    assert found.notes == [
        f"rule {match!r} decides nothing: it matches no module that earlier rules leave"
    ]


def test_exclusions_hold_in_a_mixed_checkpoint(tmp_path: Path, make: Make) -> None:
    path = make({**weights([*ATTENTION, *DENSE]), "lm_head.weight": torch.zeros(8, 64)})
    asked = recipe(("*.self_attn.*", "FP8"), ("*", "NVFP4"), exclude=["*.down_proj"])

    run(path, tmp_path / "out", asked=asked)

    config = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert set(config["quantization"]["quantized_layers"]) == {*ATTENTION, *DENSE[:2]}
    after, before = tensors(tmp_path / "out"), tensors(path)
    for name in ("lm_head.weight", f"{DENSE[2]}.weight"):
        assert_same({name: after[name]}, {name: before[name]})
