"""What TensorRT-LLM makes of a list of exclusions or of quantized layers: the known traps."""

import pytest

from qvalidate.rules.trtllm_matching import excluded_by, layer_name, layers, listed_entry


@pytest.mark.parametrize(
    ("layer", "patterns", "old", "new"),
    [
        ("lm_head", ["lm_head"], True, True),
        ("model.layers.3.mlp.down_proj", ["model.layers.3"], False, True),
        ("model.layers.3.mlp.down_proj", ["model.layers.3*"], True, True),
        ("model.layers.30.mlp.down_proj", ["model.layers.3*"], True, True),
        ("model.layers.30.mlp.down_proj", ["model.layers.3"], False, False),
        ("model.layers.3", ["model.layers.3.*"], False, True),
        ("model.layers.3.mlp.down_proj", ["*.down_proj"], True, True),
        ("model.layers.3.mlp.down_proj", ["down_proj"], False, False),
        ("model.layers.3.mlp.down_proj", [r"re:.*\.down_proj"], False, True),
        ("model.layers.3.mlp.down_proj", [r"re:.*\.mlp"], False, True),
        ("model.layers.3.mlp.down_proj", ["re:(("], False, False),
        ("a.qkv_proj", ["a.k_proj"], True, True),
        ("a.qkv_proj", ["*q_proj"], True, True),
        ("a.qkv_proj", ["a.qkv_proj"], True, True),
        ("a.qkv_proj", ["a.o_proj"], False, False),
        ("a.gate_up_proj", ["a.gate"], False, False),
        ("a.gate_up_proj", ["*.up_proj"], True, True),
        ("a.experts", ["a.experts.0.w1"], False, False),
        ("a.experts", ["a.experts*"], True, True),
        ("a.experts", ["a"], False, True),
        ("A.x", ["a.x"], False, False),
        ("a.x", [], False, False),
    ],
)
def test_matching(layer: str, patterns: list[str], old: bool, new: bool) -> None:
    assert (excluded_by(layer, patterns, walks=False) is not None) == old
    assert (excluded_by(layer, patterns, walks=True) is not None) == new


def test_match_names_the_pattern_and_the_part() -> None:
    found = excluded_by("a.qkv_proj", ["b", "a.k_proj"], walks=True)

    assert found == ("a.k_proj", "a.k_proj")


def test_modules_are_grouped_as_they_are_loaded() -> None:
    found = layers(["a.q_proj", "a.k_proj", "a.o_proj", "b.experts.1.w1", "b.up_proj", "lm_head"])

    assert [(layer.name, layer.kind) for layer in found.values()] == [
        ("a.qkv_proj", "qkv"),
        ("a.o_proj", "linear"),
        ("b.experts", "experts"),
        ("b.gate_up_proj", "gate_up"),
        ("lm_head", "linear"),
    ]
    assert found["a.qkv_proj"].parts == ("a.q_proj", "a.k_proj")
    assert layer_name("b.experts.gate_up_proj") == "b.experts"
    assert layer_name("b.shared_experts.gate_proj") == "b.shared_experts.gate_up_proj"


@pytest.mark.parametrize(
    ("layer", "names", "expected"),
    [
        ("a.qkv_proj", ["a.k_proj", "a.q_proj"], "a.q_proj"),
        ("a.qkv_proj", ["a.k_proj", "a.v_proj"], None),
        ("a.gate_up_proj", ["a.up_proj"], None),
        ("a.gate_up_proj", ["a.up_proj", "a.gate_proj"], "a.gate_proj"),
        ("a.gate_up_proj", ["a.gate_up_proj"], "a.gate_up_proj"),
        ("a.experts", ["a.experts.7.w2", "a.experts"], "a.experts.7.w2"),
        ("a.o_proj", ["b.a.o_proj"], None),
        ("a.o_proj", ["a.o_proj"], "a.o_proj"),
    ],
)
def test_entry_that_decides(layer: str, names: list[str], expected: str | None) -> None:
    # any module of the layer has the layer's name
    part = {"a.qkv_proj": "a.q_proj", "a.gate_up_proj": "a.up_proj"}.get(layer, layer)
    (found,) = layers([part if layer != "a.experts" else "a.experts.0.w1"]).values()

    assert (found.name, listed_entry(found, names)) == (layer, expected)
