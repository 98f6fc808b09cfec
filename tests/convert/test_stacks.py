"""Experts that are stacked in one tensor: split into hub names, or kept stacked and transposed."""

import json
import tracemalloc
from pathlib import Path

import pytest
import torch

from qconvert.backends import Device
from qconvert.backends.torch_cpu import TorchBackend
from qconvert.errors import ConvertError
from qconvert.statistics import Statistics
from qconvert.summary import describe
from qkernels import kernels_for
from qschema.formats import find

from .conversion import (
    WRITABLE,
    Make,
    Tensors,
    amax_of,
    assert_same,
    digests,
    measured,
    planned,
    randn,
    recipe,
    run,
    tensors,
)

LAYER = "model.layers.0"
H, WIDE, E = 128, 256, 3
STACKABLE = [name for name in WRITABLE if find(name).stackable]
# model type -> (parent in memory, parent on the hub, gate, up, down)
SPLIT = {
    "qwen3_moe": ("mlp", "mlp", "gate_proj", "up_proj", "down_proj"),
    "deepseek_v3": ("mlp", "mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("mlp", "block_sparse_moe", "w1", "w3", "w2"),
}


def split_model(model_type: str) -> tuple[Tensors, Tensors]:
    """Return one model as Transformers 5 holds it in memory, and as it is on the hub."""
    memory, hub, gate, up, down = SPLIT[model_type]
    gates, ups = randn(E, WIDE, H, seed=1), randn(E, WIDE, H, seed=2) * 1.5
    downs, router = randn(E, H, WIDE, seed=3), randn(E, H, seed=4)
    rest = {
        f"{LAYER}.self_attn.q_proj.weight": randn(H, H, seed=5),
        f"{LAYER}.self_attn.k_proj.weight": randn(H, H, seed=6) * 2,
    }
    stacked = {
        f"{LAYER}.{memory}.experts.gate_up_proj": torch.cat([gates, ups], dim=1),
        f"{LAYER}.{memory}.experts.down_proj": downs,
        f"{LAYER}.{memory}.gate.weight": router,
    }
    single = {f"{LAYER}.{hub}.gate.weight": router}
    for expert in range(E):
        for leaf, stack in ((gate, gates), (up, ups), (down, downs)):
            single[f"{LAYER}.{hub}.experts.{expert}.{leaf}.weight"] = stack[expert].clone()
    return stacked | rest, single | rest


def stats_of(folder: Path, single: Tensors, algo: str) -> Statistics:
    """Return statistics under the hub's names, with smoothing where the format has it."""
    modules = [name.removesuffix(".weight") for name in single if not name.endswith(".gate.weight")]
    vectors = None
    if find(algo).specs("smoothing"):
        vectors = {
            f"{module}.pre_quant_scale": randn(
                single[f"{module}.weight"].shape[1], seed=place, dtype=torch.float32
            ).abs()
            + 0.25
            for place, module in enumerate(modules)
        }
    inputs = {module: amax_of(module) for module in modules}
    return measured(folder, inputs=inputs, vectors=vectors)


@pytest.mark.parametrize("model_type", list(SPLIT))
@pytest.mark.parametrize("algo", WRITABLE)
def test_a_split_stack_equals_the_model_with_one_tensor_per_expert(
    tmp_path: Path, make: Make, model_type: str, algo: str
) -> None:
    stacked, single = split_model(model_type)
    config = {"model_type": model_type, "hidden_size": H}
    statistics = stats_of(tmp_path, single, algo)

    for name, source, budget in (("stacked", stacked, 256 << 10), ("single", single, 64 << 20)):
        path = make(source, config=config, name=f"{name}-in")
        run(path, tmp_path / name, algo=algo, statistics=statistics, budget=budget)

    assert_same(tensors(tmp_path / "stacked"), tensors(tmp_path / "single"))
    for file in ("hf_quant_config.json", "config.json"):
        assert (tmp_path / "stacked" / file).read_text() == (tmp_path / "single" / file).read_text()


@pytest.mark.parametrize("algo", ["FP8", "NVFP4"])
def test_statistics_of_experts_may_stand_under_the_name_of_their_stack(
    tmp_path: Path, make: Make, algo: str
) -> None:
    stacked, _ = split_model("qwen3_moe")
    experts = f"{LAYER}.mlp.experts"
    inputs = {f"{experts}.gate_up_proj": 2.0, f"{experts}.down_proj": 3.0}
    inputs |= {f"{LAYER}.self_attn.{leaf}_proj": 4.0 for leaf in "qk"}
    path = make(stacked, config={"model_type": "qwen3_moe", "hidden_size": H})

    run(path, tmp_path / "out", algo=algo, statistics=measured(tmp_path, inputs=inputs))

    divisor = torch.tensor(448.0 if algo == "FP8" else 2688.0)
    for name, tensor in tensors(tmp_path / "out").items():
        if name.endswith("input_scale"):
            amax = 4.0 if "self_attn" in name else 3.0 if "down_proj" in name else 2.0
            assert tensor.item() == (torch.tensor(amax) / divisor).item()


def test_parts_of_a_stack_are_told_apart_in_plan_and_report(tmp_path: Path, make: Make) -> None:
    stacked, _ = split_model("mixtral")
    path = make(stacked, config={"model_type": "mixtral", "hidden_size": H})

    report = run(path, tmp_path / "out", algo="MXFP8")

    found = {
        (entry.source, entry.part): entry.outputs[0].name
        for entry in report.tensors
        if ".experts." in entry.source
    }
    experts, hub = f"{LAYER}.mlp.experts", f"{LAYER}.block_sparse_moe.experts"
    expected = {}
    for expert in range(E):
        expected[f"{experts}.gate_up_proj", f"[{expert}, 0:{WIDE}]"] = f"{hub}.{expert}.w1.weight"
        expected[f"{experts}.gate_up_proj", f"[{expert}, {WIDE}:{2 * WIDE}]"] = (
            f"{hub}.{expert}.w3.weight"
        )
        expected[f"{experts}.down_proj", f"[{expert}, 0:{H}]"] = f"{hub}.{expert}.w2.weight"
    assert found == expected
    (line,) = (line for line in describe(planned(path, algo="MXFP8")) if "gate.weight" in line)
    assert "router" in line


def test_nan_in_an_expert_is_told_with_its_place(tmp_path: Path, make: Make) -> None:
    stacked, _ = split_model("qwen3_moe")
    stacked[f"{LAYER}.mlp.experts.gate_up_proj"][1, WIDE + 3, 4] = torch.nan
    path = make(stacked, config={"model_type": "qwen3_moe", "hidden_size": H})

    with pytest.raises(
        ConvertError,
        match=rf"gate_up_proj\[1, {WIDE}:{2 * WIDE}\]: 1 of {WIDE * H} elements are NaN",
    ):
        run(path, tmp_path / "out", algo="NVFP4")


# stacks that stay


def transposed_stacks(*, scale: float = 1.0) -> Tensors:
    """Return the experts of Llama 4 or gpt-oss: [E, columns, rows], multiplied from the right."""
    stem = f"{LAYER}.feed_forward.experts"
    return {
        f"{stem}.gate_up_proj": randn(E, H, 2 * WIDE, seed=1) * scale,
        f"{stem}.gate_up_proj_bias": randn(E, 2 * WIDE, seed=2),
        f"{stem}.down_proj": randn(E, WIDE, H, seed=3) * scale,
        f"{LAYER}.self_attn.q_proj.weight": randn(H, H, seed=4),
    }


def transposed(name: str, stack: torch.Tensor, algo: str) -> Tensors:
    """Return what a stack becomes: each expert as a Linear, the other way around, one scale."""
    declared = find(algo)
    kernels = kernels_for(declared.codec)
    (spec,) = declared.specs("global")
    scale = stack.abs().max().float() / torch.tensor(spec.divisor)
    parts = [kernels.quantize_torch(matrix.T, global_scale=scale) for matrix in stack]
    codes, *others = (spec.suffix for spec in declared.specs("codes", "scale"))
    found = {name: torch.stack([part[codes].T for part in parts])}
    for suffix in others:
        found[f"{name}_{suffix}"] = torch.stack([part[suffix].T for part in parts])
    found[f"{name}_{spec.suffix}"] = scale
    for spec in declared.specs("input"):
        found[f"{name}_{spec.suffix}"] = torch.tensor(amax_of(name)) / torch.tensor(spec.divisor)
    return found


@pytest.mark.parametrize("model_type", ["llama4", "llama4_text", "gpt_oss"])
@pytest.mark.parametrize("algo", STACKABLE)
def test_a_transposed_stack_equals_each_expert_by_the_reference(
    tmp_path: Path, make: Make, algo: str, model_type: str
) -> None:
    source = transposed_stacks()
    text = {"model_type": model_type, "hidden_size": H}
    config = {"model_type": "llama4", "text_config": text} if model_type == "llama4_text" else text

    report = run(make(source, config=config), tmp_path / "out", algo=algo)

    expected = {f"{LAYER}.feed_forward.experts.gate_up_proj_bias": source.pop(
        f"{LAYER}.feed_forward.experts.gate_up_proj_bias"
    )}  # fmt: skip
    linear = source.pop(f"{LAYER}.self_attn.q_proj.weight")
    for name, stack in source.items():
        expected |= transposed(name, stack, algo)
        (entry,) = (entry for entry in report.tensors if entry.source == name)
        assert (entry.part, entry.shape) == (None, list(stack.shape))
        assert entry.relative_error is not None
        assert 0.02 < entry.relative_error < 0.13
        assert entry.num_saturated == 0
    found = tensors(tmp_path / "out")
    assert_same({name: found[name] for name in found if ".self_attn." not in name}, expected)
    # a row-major linear beside them is not transposed
    codes = found[f"{LAYER}.self_attn.q_proj.weight"]
    assert codes.shape[0] == linear.shape[0]


@pytest.mark.parametrize("algo", STACKABLE)
def test_slices_of_a_transposed_stack_give_the_same_bytes(
    tmp_path: Path, make: Make, algo: str
) -> None:
    """A slice may end within an expert, between blocks of columns, and hold several experts."""
    path = make(transposed_stacks(), config={"model_type": "llama4_text", "hidden_size": H})
    run(path, tmp_path / "a", algo=algo, workers=1)
    for name, budget in (("b", 100 << 10), ("c", 170 << 10), ("d", 1 << 20)):
        run(path, tmp_path / name, algo=algo, workers=1, budget=budget)
        assert digests(tmp_path / name) == digests(tmp_path / "a")
    torch_only = Device("cpu (torch)", 1, lambda slot: TorchBackend())
    run(path, tmp_path / "t", algo=algo, workers=2, budget=400 << 10, device=torch_only)

    assert digests(tmp_path / "t") == digests(tmp_path / "a")


def test_memory_does_not_grow_with_the_slices_of_a_stack(tmp_path: Path, make: Make) -> None:
    """Each slice has sums of all rows: 12 MB of them here, were they kept until the end."""
    stack = torch.ones(4, 512, 1536, dtype=torch.bfloat16)
    config = {"model_type": "llama4_text", "hidden_size": 512}
    path = make({f"{LAYER}.feed_forward.experts.gate_up_proj": stack}, config=config)
    tracemalloc.start()

    run(path, tmp_path / "out", algo="NVFP4", workers=1, budget=160 << 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 4 << 20


@pytest.mark.parametrize("algo", sorted(set(WRITABLE) - set(STACKABLE)))
def test_a_format_without_a_stacked_layout_is_refused(make: Make, algo: str) -> None:
    path = make(transposed_stacks(), config={"model_type": "gpt_oss", "hidden_size": H})

    with pytest.raises(ConvertError) as caught:
        planned(path, algo=algo)

    assert str(caught.value) == (
        f"{path / 'model.safetensors'}::{LAYER}.feed_forward.experts.down_proj: {algo} has no "
        "layout for experts that stay stacked in one tensor; choose another format, or keep it "
        f"with --exclude '{LAYER}.feed_forward.experts.down_proj'"
    )


@pytest.mark.parametrize(
    ("model_type", "pattern"),
    [
        (model_type, pattern)
        for model_type in ("llama4_text", "qwen3_moe")
        for pattern in ("*.experts", "*.experts.*", "*.experts.*_proj", "*.layers.0.[fm]*")
    ]
    + [("qwen3_moe", "*.experts.[0-2].*")],
)
def test_an_excluded_stack_stays_as_it_is(
    tmp_path: Path, make: Make, model_type: str, pattern: str
) -> None:
    """By its own name, that of what holds it, or the names of its experts on the hub."""
    source = transposed_stacks() if model_type == "llama4_text" else split_model(model_type)[0]
    path = make(source, config={"model_type": model_type, "hidden_size": H})

    run(path, tmp_path / "out", algo="NVFP4", exclude=[pattern])

    after = tensors(tmp_path / "out")
    assert_same(
        {name: tensor for name, tensor in after.items() if ".self_attn." not in name},
        {name: tensor for name, tensor in source.items() if ".self_attn." not in name},
    )
    config = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    parent = "feed_forward" if model_type == "llama4_text" else "mlp"
    assert config["quantization"]["exclude_modules"] == [f"{LAYER}.{parent}*"]


def test_experts_that_stay_stacked_are_noted(make: Make) -> None:
    path = make(split_model("mixtral")[0], config={"model_type": "mixtral", "hidden_size": H})

    (note,) = planned(path, algo="NVFP4", exclude=["*.experts"]).notes

    stacks = ", ".join(f"{LAYER}.mlp.experts.{leaf}_proj" for leaf in ("down", "gate_up"))
    assert stacks in note
    assert "not split into the hub's tensors" in note


def test_the_hint_to_exclude_a_stack_works(make: Make) -> None:
    """The name of a single expert would not do: it can't be kept alone."""
    stack, linear = randn(E, H, 40, seed=1), randn(40, H, seed=2)
    path = make(
        {f"{LAYER}.mlp.experts.down_proj": stack, f"{LAYER}.self_attn.o_proj.weight": linear},
        config={"model_type": "mixtral", "hidden_size": H},
    )

    with pytest.raises(ConvertError, match="found 40; keep it with --exclude") as caught:
        planned(path, algo="MXFP8")
    hint = str(caught.value).split("--exclude '")[1].split("'")[0]

    steps = planned(path, algo="MXFP8", exclude=[hint]).steps
    assert {step.algo for step in steps} == {None, "MXFP8"}


@pytest.mark.parametrize(
    ("model_type", "stack", "shape", "problem"),
    [
        ("qwen3_moe", "gate_up_proj", (E, 2 * WIDE, H + 1), "hidden_size 128 as dimension 2"),
        ("qwen3_moe", "gate_up_proj", (E, H, 2 * WIDE), "hidden_size 128 as dimension 2"),
        ("qwen3_moe", "down_proj", (E, WIDE, H), "hidden_size 128 as dimension 1"),
        ("qwen3_moe", "gate_up_proj", (E, 2 * WIDE + 1, H), "hidden_size 128 as dimension 2"),
        ("qwen3_moe", "gate_up_proj", (0, 2 * WIDE, H), "hidden_size 128 as dimension 2"),
        ("llama4_text", "gate_up_proj", (E, 2 * WIDE, H), "hidden_size 128 as dimension 1"),
        ("llama4_text", "down_proj", (E, H, WIDE), "hidden_size 128 as dimension 2"),
        ("brandnew", "gate_up_proj", (E, 2 * WIDE, H), "a layout that the architecture map"),
        ("qwen3_moe", "w13", (E, 2 * WIDE, H), "a layout that the architecture map"),
        ("llama", "gate_up_proj", (E, 2 * WIDE, H), "a layout that the architecture map"),
    ],
)
def test_a_stack_of_another_shape_is_refused(
    make: Make, model_type: str, stack: str, shape: tuple[int, ...], problem: str
) -> None:
    name = f"{LAYER}.mlp.experts.{stack}"
    path = make(
        {name: torch.zeros(shape, dtype=torch.bfloat16)},
        config={"model_type": model_type, "hidden_size": H},
    )

    with pytest.raises(ConvertError) as caught:
        planned(path, algo="FP8")

    message = str(caught.value)
    assert message.startswith(f"{path / 'model.safetensors'}::{name}: BF16 {list(shape)}")
    assert problem in message
    assert "--exclude" in message


@pytest.mark.parametrize(
    ("rules", "fields"),
    [
        ([("*", "NVFP4")], {"exclude": ["*.experts.1"]}),
        ([("*", "NVFP4")], {"exclude": ["*.up_proj"]}),
        ([("*.experts.0.*", "FP8"), ("*", "NVFP4")], {}),
        ([("*.gate_proj", "FP8"), ("*", "NVFP4")], {}),
        ([("*.experts.0.*", "FP8")], {}),
    ],
)
def test_a_recipe_that_splits_a_stack_is_refused(
    make: Make, rules: list[tuple[str, str]], fields: dict[str, object]
) -> None:
    path = make(split_model("qwen3_moe")[0], config={"model_type": "qwen3_moe", "hidden_size": H})

    with pytest.raises(
        ConvertError,
        match=r"_proj: the recipe treats the experts in it differently; they are stored as one",
    ):
        planned(path, *rules, **fields)


@pytest.mark.parametrize("model_type", ["llama4_text", "qwen3_moe"])
def test_the_stacks_of_a_layer_have_one_format(make: Make, model_type: str) -> None:
    """gate_up of one and down of another: engines give all experts of a layer one method."""
    source = transposed_stacks() if model_type == "llama4_text" else split_model(model_type)[0]
    path = make(source, config={"model_type": model_type, "hidden_size": H})

    with pytest.raises(ConvertError, match=r"gives several formats to what engines load as one"):
        planned(path, ("*down_proj*", "FP8"), ("*", "NVFP4"))
    note = planned(path, algo="FP8", exclude=["*down_proj"]).notes[-1]

    assert "refuse them when only some are quantized" in note
    assert "down_proj kept" in note


def test_a_mixed_checkpoint_names_the_parent_of_its_stacks(tmp_path: Path, make: Make) -> None:
    path = make(transposed_stacks(), config={"model_type": "llama4_text", "hidden_size": H})

    run(path, tmp_path / "out", asked=recipe(("*.experts.*", "NVFP4"), ("*", "FP8")))

    found = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert found["quantized_layers"] == {
        f"{LAYER}.self_attn.q_proj": {"quant_algo": "FP8"},
        f"{LAYER}.feed_forward.experts": {"quant_algo": "NVFP4", "group_size": 16},
    }
