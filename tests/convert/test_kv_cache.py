"""Scales of the KV cache: names, numbers, which layers, biases, a recipe of nothing else."""

import json
from pathlib import Path

import pytest
import torch

from qconvert.errors import ConvertError
from qconvert.planner import make_plan
from qconvert.statistics import Statistics
from qconvert.summary import describe
from qschema.checkpoint import open_checkpoint
from qschema.plan import Plan
from qschema.recipe import Recipe
from qschema.strict import DocumentError

from .conversion import (
    CHECKPOINTS,
    Make,
    Tensors,
    assert_same,
    digests,
    measured,
    randn,
    recipe,
    run,
    tensors,
)

LAYERS = [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
CACHE = {name: {"k": 3.5 + place, "v": 0.75} for place, name in enumerate(LAYERS)}
KINDS = ("FP8", "NVFP4", "NVFP4_AFFINE")


def attention(*layers: str, leaf: str = "k_proj") -> Tensors:
    found = {f"{layer}.{leaf}.weight": randn(128, 128, seed=2) for layer in layers}
    return found | {f"{layer}.o_proj.weight": randn(128, 128, seed=3) for layer in layers}


def biases(*layers: str) -> Tensors:
    return {
        f"{layer}.{letter}_bias": randn(1, 2, 1, 64, seed=7 + place)
        for layer in layers
        for place, letter in enumerate("kv")
    }


def plan_of(path: Path, statistics: Statistics, kind: str | None) -> Plan:
    asked = recipe(kv_cache=kind)
    return make_plan(open_checkpoint(path), asked, statistics)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leaf", ["k_proj", "qkv_proj", "kv_a_proj_with_mqa", "kv_b_proj"])
def test_every_attention_layer_gets_its_scales(
    tmp_path: Path, make: Make, kind: str, leaf: str
) -> None:
    vectors = biases(*LAYERS) if kind == "NVFP4_AFFINE" else None
    statistics = measured(tmp_path, kv_cache=CACHE, vectors=vectors)
    source = make(attention(*LAYERS, leaf=leaf))

    run(source, tmp_path / "out", asked=recipe(kv_cache=kind), statistics=statistics)
    run(source, tmp_path / "without", asked=recipe())

    added = {}
    for name, amax in CACHE.items():
        for letter, value in amax.items():
            owner = f"{name}.{letter}_proj"
            added[f"{owner}.{letter}_scale"] = torch.tensor(value) / torch.tensor(448.0)
            if vectors:
                added[f"{owner}.{letter}_bias"] = vectors[f"{name}.{letter}_bias"]
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "without") | added)
    quantization = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert quantization["quantization"]["kv_cache_quant_algo"] == kind
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    fp8 = {"dynamic": False, "num_bits": 8, "type": "float"}
    assert scheme["kv_cache_scheme"] == (fp8 if kind == "FP8" else kind)


def test_the_scales_lie_in_the_shard_of_their_layer_and_in_the_index(tmp_path: Path) -> None:
    statistics = measured(tmp_path, kv_cache=CACHE)
    source = CHECKPOINTS / "llama"

    run(source, tmp_path / "out", asked=recipe(kv_cache="FP8"), statistics=statistics)

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name in LAYERS:
        for letter in "kv":
            file = index["weight_map"][f"{name}.{letter}_proj.{letter}_scale"]
            assert file == index["weight_map"][f"{name}.k_proj.weight"]
    assert open_checkpoint(tmp_path / "out").tensors.keys() == index["weight_map"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_without_statistics_there_are_no_scales_and_a_note(make: Make, kind: str) -> None:
    plan = plan_of(make(attention(*LAYERS)), Statistics(), kind)

    assert plan.constants == []
    assert plan.notes == [
        f"KV cache {kind} without statistics: no scales are written, engines use 1.0"
    ]


def test_statistics_of_a_cache_that_is_not_quantized_change_nothing(
    tmp_path: Path, make: Make
) -> None:
    plan = plan_of(make(attention(*LAYERS)), measured(tmp_path, kv_cache=CACHE), None)

    assert plan.constants == []
    assert plan.notes == ["--amax does nothing: no format here has an input scale, and no KV cache"]


@pytest.mark.parametrize(
    "bias",
    [
        torch.zeros(1, 2, 1, 64),
        torch.zeros(2, 64, dtype=torch.bfloat16),
        torch.zeros(2, 1, 1, 64, dtype=torch.bfloat16),
    ],
    ids=["f32", "two-dimensions", "another-order"],
)
def test_a_bias_of_another_form_is_refused(tmp_path: Path, make: Make, bias: torch.Tensor) -> None:
    vectors = {**biases(*LAYERS), f"{LAYERS[1]}.v_bias": bias}
    statistics = measured(tmp_path, kv_cache=CACHE, vectors=vectors)

    with pytest.raises(ConvertError, match=r"1.self_attn.v_bias: expected BF16 \[1, KV heads, 1,"):
        plan_of(make(attention(*LAYERS)), statistics, "NVFP4_AFFINE")


def test_a_bias_of_no_layer_is_noted(tmp_path: Path, make: Make) -> None:
    vectors = biases(*LAYERS, "model.layers.7.self_attn")
    statistics = measured(tmp_path, kv_cache=CACHE, vectors=vectors)

    (note,) = plan_of(make(attention(*LAYERS)), statistics, "NVFP4_AFFINE").notes

    assert "do nothing: model.layers.7.self_attn.k_bias, model.layers.7.self_attn.v_bias" in note


def test_a_cache_alone_needs_no_native_kernels(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Recipe.parse({"rules": [], "kv_cache": "FP8"}, file="test")
    source, statistics = make(attention(*LAYERS)), measured(tmp_path, kv_cache=CACHE)
    run(source, tmp_path / "native", asked=asked, statistics=statistics)
    monkeypatch.setenv("QKERNELS_NATIVE", "0")

    run(source, tmp_path / "torch", asked=asked, statistics=statistics)

    assert digests(tmp_path / "torch") == digests(tmp_path / "native")


def test_the_plan_of_a_cache_alone_excludes_nothing(tmp_path: Path, make: Make) -> None:
    asked = Recipe.parse({"rules": [], "kv_cache": "FP8"}, file="test")
    statistics = measured(tmp_path, kv_cache=CACHE)

    plan = make_plan(open_checkpoint(make(attention(*LAYERS))), asked, statistics)

    assert "exclude  nothing" in list(describe(plan))
    assert "quantized" not in next(line for line in describe(plan) if line.startswith("output"))


def test_a_checkpoint_without_tensors_has_a_cache_too(tmp_path: Path, make: Make) -> None:
    asked = Recipe.parse({"rules": [], "kv_cache": "FP8"}, file="test")

    report = run(make({}), tmp_path / "out", asked=asked, statistics=Statistics())

    assert report.tensors == []


def test_the_order_of_the_statistics_leaves_no_trace(tmp_path: Path, make: Make) -> None:
    source = make(attention(*LAYERS))
    for name, cache in (("a", CACHE), ("b", dict(reversed(CACHE.items())))):
        asked = recipe(algo="MXFP8", kv_cache="FP8")
        run(source, tmp_path / name, asked=asked, statistics=measured(tmp_path, kv_cache=cache))

    assert digests(tmp_path / "a") == digests(tmp_path / "b")


BAD = [
    ({**CACHE, "model.layers.7.self_attn": {"k": 1.0, "v": 1.0}}, "model.layers.7.self_attn: no"),
    ({LAYERS[0]: CACHE[LAYERS[0]]}, f"nothing for {LAYERS[1]}; calibrate this checkpoint"),
    ({**CACHE, LAYERS[1]: {"k": 0.0, "v": 1.0}}, r"self_attn'\].k is 0: no key or value was seen"),
    ({**CACHE, LAYERS[1]: {"k": 1.0, "v": 0.0}}, r"self_attn'\].v is 0: no key or value was seen"),
    # so small that the scale would be 0
    ({**CACHE, LAYERS[1]: {"k": 1.0, "v": 1e-44}}, r"self_attn'\].v is 1e-44: no key or value"),
]


@pytest.mark.parametrize(("cache", "problem"), BAD)
def test_statistics_of_other_layers_are_refused(
    tmp_path: Path, make: Make, cache: dict[str, dict[str, float]], problem: str
) -> None:
    statistics = measured(tmp_path, kv_cache=cache)

    with pytest.raises(ConvertError, match=rf"stats.json: \$.kv_cache.*{problem}"):
        plan_of(make(attention(*LAYERS)), statistics, "FP8")


def test_layers_that_no_calibration_runs_may_be_missing(tmp_path: Path, make: Make) -> None:
    """A vision tower has no KV cache; a multi-token prediction layer is run by nobody."""
    others = ("vision_tower.encoder.layers.0.self_attn", "model.layers.99.self_attn")
    source = make(attention(*LAYERS, *others))

    plan = plan_of(source, measured(tmp_path, kv_cache=CACHE), "FP8")

    assert [constant.output.name for constant in plan.constants] == [
        f"{name}.{letter}_proj.{letter}_scale" for name in LAYERS for letter in "kv"
    ]


@pytest.mark.parametrize(
    ("kind", "found", "problem"),
    [
        ("NVFP4_AFFINE", [], f"no {LAYERS[0]}.k_bias"),
        ("NVFP4_AFFINE", [f"{LAYERS[0]}.k_bias"], f"no {LAYERS[0]}.v_bias"),
        ("FP8", [f"{LAYERS[0]}.k_bias"], f"a {LAYERS[0]}.k_bias"),
        ("NVFP4", [f"{LAYERS[1]}.v_bias"], f"a {LAYERS[1]}.v_bias"),
    ],
)
def test_biases_go_with_the_affine_cache_only(
    tmp_path: Path, make: Make, kind: str, found: list[str], problem: str
) -> None:
    vectors = {name: tensor for name, tensor in biases(*LAYERS).items() if name in found}
    statistics = measured(tmp_path, kv_cache=CACHE, vectors=vectors or None)

    with pytest.raises(ConvertError, match=f"{problem} in its vectors, .*recipe says {kind}$"):
        plan_of(make(attention(*LAYERS)), statistics, kind)


@pytest.mark.parametrize("with_statistics", [True, False])
def test_a_recipe_of_the_cache_alone_keeps_every_weight(
    tmp_path: Path, with_statistics: bool
) -> None:
    source = CHECKPOINTS / "llama"
    statistics = measured(tmp_path, kv_cache=CACHE) if with_statistics else Statistics()

    report = run(
        source, tmp_path / "out", asked=Recipe(rules=[], kv_cache="FP8"), statistics=statistics
    )

    after = tensors(tmp_path / "out")
    scales = {name: tensor for name, tensor in after.items() if name.endswith("_scale")}
    assert len(scales) == (4 if with_statistics else 0)
    assert_same({n: t for n, t in after.items() if n not in scales}, tensors(source))
    assert {entry.action for entry in report.tensors} == {"keep"}
    found = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert (found["quant_algo"], found["kv_cache_quant_algo"]) == (None, "FP8")
    assert report.bits_per_quantized_weight == 0.0


def test_no_rules_and_no_cache_is_nothing_to_do() -> None:
    with pytest.raises(DocumentError, match=r"expected rules, or a kv_cache"):
        Recipe.parse({"rules": []}, file="recipe")
