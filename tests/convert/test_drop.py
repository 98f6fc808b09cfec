"""`drop`: tensors that are not written at all, each accounted for by the rule that named it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qconvert.planner import make_plan
from qconvert.summary import describe
from qschema.checkpoint import open_checkpoint
from qschema.plan import Plan

from .conversion import (
    CHECKPOINTS,
    MODELS,
    Make,
    Tensors,
    measured,
    planned,
    randn,
    recipe,
    run,
    tensors,
)
from .test_cli import qconvert
from .test_stacks import split_model

LLAMA = CHECKPOINTS / "llama"
LAYER = "model.layers.0"


def dropped(plan: Plan) -> dict[str, str]:
    """Return source tensor -> reason of what is dropped."""
    return {step.source.name: step.reason for step in plan.steps if step.action == "drop"}


def plan_of(source: Path, *rules: tuple[str, str], **fields: object) -> Plan:
    """Return the plan of a recipe, without statistics."""
    return make_plan(open_checkpoint(source), recipe(*rules, **fields))


def projections(*names: str) -> Tensors:
    return {
        f"{LAYER}.{name}.weight": randn(128, 128, seed=place) for place, name in enumerate(names)
    }


@pytest.mark.parametrize("model", MODELS)
def test_every_source_tensor_is_accounted_for_by_bytes(model: str) -> None:
    """Quantized, kept or dropped: each source byte once, whatever the layout."""
    checkpoint = open_checkpoint(CHECKPOINTS / model)

    plan = planned(
        CHECKPOINTS / model, algo="FP8_PB_WO", drop=["*norm.weight"], on_indivisible="keep"
    )

    read = Counter(dict.fromkeys(checkpoint.tensors, 0))
    for step in plan.steps:
        read[step.source.name] += step.source.nbytes
    assert read == {name: tensor.nbytes for name, tensor in checkpoint.tensors.items()}
    assert {step.action for step in plan.steps} == {"quantize", "keep", "drop"}
    assert dropped(plan) == {
        name: "dropped by '*norm.weight'"
        for name in checkpoint.tensors
        if name.endswith("norm.weight")
    }


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (f"{LAYER}.mlp.up_proj.weight", [f"{LAYER}.mlp.up_proj.weight"]),
        (f"{LAYER}.mlp.up_proj", [f"{LAYER}.mlp.up_proj.bias", f"{LAYER}.mlp.up_proj.weight"]),
        ("*.bias", [f"{LAYER}.mlp.up_proj.bias"]),
        ("*.up_proj", [f"{LAYER}.mlp.up_proj.bias", f"{LAYER}.mlp.up_proj.weight"]),
    ],
)
def test_a_pattern_is_for_a_tensor_or_a_module(make: Make, pattern: str, names: list[str]) -> None:
    source = make(
        {
            **projections("mlp.up_proj", "mlp.down_proj"),
            f"{LAYER}.mlp.up_proj.bias": torch.ones(128),
        }
    )

    plan = planned(source, drop=[pattern])

    assert sorted(dropped(plan)) == names


def test_headers_index_and_report_leave_out_what_is_dropped(tmp_path: Path) -> None:
    out = tmp_path / "out"

    report = run(LLAMA, out, drop=["model.layers.1", "model.norm.weight"])

    written = tensors(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    gone = {entry.source for entry in report.tensors if entry.action == "drop"}
    assert sorted(index["weight_map"]) == sorted(written)
    assert "model.norm.weight" in gone
    assert not [name for name in written if name.startswith("model.layers.1.") or name in gone]
    assert all(
        (entry.outputs, entry.num_nonfinite, entry.sqnr) == ([], None, None)
        for entry in report.tensors
        if entry.action == "drop"
    )
    size = sum(tensor.nbytes for tensor in written.values())
    assert index["metadata"]["total_size"] == size


def test_the_rest_has_the_bytes_that_it_has_without(tmp_path: Path) -> None:
    run(LLAMA, tmp_path / "whole")
    run(LLAMA, tmp_path / "part", drop=["model.layers.1"])

    whole, part = tensors(tmp_path / "whole"), tensors(tmp_path / "part")
    assert part.keys() < whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())


def test_a_shard_without_tensors_is_a_valid_file(tmp_path: Path, make: Make) -> None:
    shards = {
        "model-00001-of-00002.safetensors": projections("mlp.up_proj"),
        "model-00002-of-00002.safetensors": {"visual.a.weight": randn(8, 8, seed=1)},
    }
    source = make(shards=shards)

    run(source, tmp_path / "out", drop=["visual"])

    with safe_open(tmp_path / "out" / "model-00002-of-00002.safetensors", "pt") as file:
        assert (list(file.keys()), file.metadata()) == ([], {"format": "pt"})


def test_bits_per_weight_are_those_of_what_is_written(tmp_path: Path, make: Make) -> None:
    source = make({**projections("mlp.up_proj"), "visual.a.weight": randn(4096, 64, seed=1)})

    report = run(source, tmp_path / "out", algo="MXFP8", drop=["visual"])

    assert report.bits_per_weight == 8.25


def test_excluded_modules_are_those_that_are_there(make: Make) -> None:
    """A kept sibling is named, a dropped one and a dropped untied head are not."""
    names = ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")
    tied = {"tie_word_embeddings": True}
    source = make({**projections(*names), "lm_head.weight": randn(8, 8, seed=9)}, config=tied)

    plan = planned(source, drop=["*.up_proj"], exclude=["*.down_proj"])
    headless = planned(source, drop=["lm_head"])

    assert plan.exclude_modules == ["lm_head", f"{LAYER}.mlp.down_proj"]
    # tied: engines take the embedding in its place, which is no quantized layer
    assert headless.exclude_modules == ["lm_head"]


def test_a_torn_group_is_a_note_and_no_error(make: Make) -> None:
    names = [f"self_attn.{letter}_proj" for letter in "qkv"]
    source = make(projections(*names, "mlp.up_proj"))

    torn = [
        plan_of(source, ("*", "MXFP8"), drop=["*.k_proj"]),
        # several formats, where a split by rules is an error
        plan_of(source, ("*.mlp.*", "FP8_PB_WO"), ("*", "MXFP8"), drop=["*.k_proj"]),
    ]
    whole = plan_of(source, ("*", "MXFP8"), drop=["*.self_attn"])

    group = " + ".join(f"{LAYER}.self_attn.{letter}_proj" for letter in "kqv")
    assert [plan.notes for plan in torn] == 2 * [
        [f"dropped, while engines load these as one: {LAYER}.self_attn.k_proj of {group}"]
    ]
    assert whole.notes == []


def test_a_pattern_without_a_tensor_is_a_note() -> None:
    plan = plan_of(LLAMA, drop=["visual"])

    assert plan.notes == ["--drop 'visual' matches no tensor"]
    assert dropped(plan) == {}


def test_the_rest_of_a_group_shares_its_scale(tmp_path: Path, make: Make) -> None:
    """NVFP4's global scale is that of the siblings that are written."""
    small, large = randn(128, 128, seed=1), randn(128, 128, seed=2) * 64
    source = make({f"{LAYER}.mlp.gate_proj.weight": small, f"{LAYER}.mlp.up_proj.weight": large})

    run(source, tmp_path / "both", algo="W4A16_NVFP4")
    run(source, tmp_path / "one", algo="W4A16_NVFP4", drop=["*.up_proj"])

    both, one = (tensors(tmp_path / name) for name in ("both", "one"))
    name = f"{LAYER}.mlp.gate_proj.weight_scale_2"
    assert both[name].item() / one[name].item() > 32


def test_a_stack_of_experts_is_dropped_whole(make: Make) -> None:
    source = make(split_model("mixtral")[0], config={"model_type": "mixtral", "hidden_size": 128})
    stack = next(name for name in open_checkpoint(source).tensors if name.endswith("gate_up_proj"))

    plan = planned(source, ("*", "MXFP8"), drop=[stack])

    assert list(dropped(plan)) == [stack]
    assert [note for note in plan.notes if note.startswith("dropped, while engines load")]


def test_statistics_of_dropped_layers_are_no_mistake(tmp_path: Path) -> None:
    """The cache's scales of a dropped layer are not written, its statistics are not missed."""
    inputs = {f"{LAYER}.mlp.down_proj": 3.0}
    both = {f"model.layers.{layer}.self_attn": {"k": 448.0, "v": 224.0} for layer in (0, 1)}
    asked = recipe(algo="MXFP8", kv_cache="FP8", drop=["model.layers.1"])
    checkpoint = open_checkpoint(LLAMA)

    for cache in (both, {name: both[name] for name in list(both)[:1]}):
        statistics = measured(tmp_path, inputs=inputs, kv_cache=cache)
        plan = make_plan(checkpoint, asked, statistics)

        assert {constant.output.name for constant in plan.constants} == {
            f"{LAYER}.self_attn.k_proj.k_scale",
            f"{LAYER}.self_attn.v_proj.v_scale",
        }


def test_the_summary_counts_each_action() -> None:
    lines = list(describe(planned(LLAMA, drop=["model.layers.1", "model.norm.weight"])))

    assert [line for line in lines if line.startswith(("quantize", "keep", "drop", "fold"))] == [
        "quantize 7 tensors, 960.0 KiB -> 480.1 KiB",
        "keep     4 tensors, 513.0 KiB",
        "drop     10 tensors, 961.5 KiB",
    ]
    assert "  model.norm.weight: BF16 [256] (dropped by 'model.norm.weight')" in lines


def test_dropping_all_that_is_quantized_is_refused(make: Make) -> None:
    source = make({**projections("mlp.up_proj"), "lm_head.weight": randn(8, 8, seed=1)})

    with pytest.raises(ValueError, match="the recipe quantizes none of the weights"):
        make_plan(open_checkpoint(source), recipe(drop=["*.up_proj"]))


@pytest.mark.parametrize("fields", [{"algo": "MXFP8"}, {"kv_cache": "FP8"}])
def test_dropping_everything_is_refused(make: Make, fields: dict[str, str]) -> None:
    source = make(projections("mlp.up_proj"))
    asked = recipe(drop=["*"], **fields)

    with pytest.raises(ValueError, match=r"the recipe (drops every tensor|quantizes none)"):
        make_plan(open_checkpoint(source), asked)


def test_a_cache_of_nothing_is_refused(tmp_path: Path) -> None:
    done = qconvert(LLAMA, tmp_path / "out", "--kv-cache", "FP8", "--drop", "*")

    assert done.returncode == 1
    assert done.stderr == f"qconvert: {LLAMA}: the recipe drops every tensor; nothing is left\n"


@pytest.mark.parametrize("letter", ["k", "v"])
def test_a_scale_goes_with_the_projection_that_it_is_of(tmp_path: Path, letter: str) -> None:
    cache = {f"model.layers.{layer}.self_attn": {"k": 448.0, "v": 224.0} for layer in (0, 1)}
    statistics = measured(tmp_path, inputs={f"{LAYER}.mlp.down_proj": 3.0}, kv_cache=cache)
    asked = recipe(algo="MXFP8", kv_cache="FP8", drop=[f"model.layers.1.*.{letter}_proj*"])

    plan = make_plan(open_checkpoint(LLAMA), asked, statistics)

    other = "v" if letter == "k" else "k"
    assert {constant.output.name for constant in plan.constants} == {
        f"{LAYER}.self_attn.k_proj.k_scale",
        f"{LAYER}.self_attn.v_proj.v_scale",
        f"model.layers.1.self_attn.{other}_proj.{other}_scale",
    }


def test_recipe_and_option_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("rules: [{match: '*', algo: FP8_PB_WO}]\ndrop: [model.layers.1]\n")

    by_file = qconvert("plan", LLAMA, "--recipe", file)
    by_option = qconvert("plan", LLAMA, "--algo", "FP8_PB_WO", "--drop", "model.layers.1")

    assert (by_file.returncode, by_file.stderr) == (0, "")
    assert by_file.stdout == by_option.stdout
