"""`--on-indivisible`: weights that their format can't have, and what must stay with them."""

import re
from pathlib import Path

import pytest
import torch

from qconvert.errors import ConvertError
from qconvert.summary import describe
from qschema.formats import find

from .conversion import CHECKPOINTS, WRITABLE, Make, Tensors, planned, randn, run, tensors

LAYER = "model.layers.0"
# format -> (rows, columns) it can't have, and what it says
OBSTACLES = {
    "MXFP4": ((64, 48), "MXFP4 needs columns in multiples of 32, found 48"),
    "MXFP8": ((64, 48), "MXFP8 needs columns in multiples of 32, found 48"),
    "NVFP4": ((64, 24), "NVFP4 needs columns in multiples of 16, found 24"),
    "NVFP4_AWQ": ((64, 24), "NVFP4_AWQ needs columns in multiples of 16, found 24"),
    "W4A16_NVFP4": ((64, 24), "W4A16_NVFP4 needs columns in multiples of 16, found 24"),
    "W4A8_NVFP4_FP8": ((64, 48), "W4A8_NVFP4_FP8 needs columns in multiples of 32, found 48"),
    "W4A8_MXFP4_FP8": ((64, 48), "W4A8_MXFP4_FP8 needs columns in multiples of 32, found 48"),
    "W4A16_AWQ": ((63, 128), "W4A16_AWQ needs rows in multiples of 2, found 63"),
    "W4A8_AWQ": ((64, 192), "W4A8_AWQ needs columns in multiples of 128, found 192"),
}
ANY_SIZE = sorted(set(WRITABLE) - set(OBSTACLES))


def weights(shapes: dict[str, tuple[int, int]]) -> Tensors:
    return {
        f"{LAYER}.{name}.weight": randn(*shape, seed=place)
        for place, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("algo", list(OBSTACLES))
def test_a_size_that_a_format_cannot_have_is_refused_by_default(make: Make, algo: str) -> None:
    shape, problem = OBSTACLES[algo]
    path = make(weights({"mlp.down_proj": shape, "self_attn.o_proj": (128, 128)}))

    with pytest.raises(ConvertError) as caught:
        planned(path, algo=algo)

    assert str(caught.value) == (
        f"{path / 'model.safetensors'}::{LAYER}.mlp.down_proj.weight: {problem}; keep it with "
        f"--exclude '{LAYER}.mlp.down_proj', or all such with --on-indivisible keep"
    )


@pytest.mark.parametrize("algo", list(OBSTACLES))
def test_it_is_kept_and_listed_with_the_reason_if_asked(make: Make, algo: str) -> None:
    shape, problem = OBSTACLES[algo]
    path = make(weights({"mlp.down_proj": shape, "self_attn.o_proj": (128, 128)}))

    found = planned(path, algo=algo, on_indivisible="keep")

    assert {step.source.name: (step.action, step.reason) for step in found.steps} == {
        f"{LAYER}.mlp.down_proj.weight": ("keep", problem),
        f"{LAYER}.self_attn.o_proj.weight": ("quantize", "rule '*'"),
    }
    assert found.exclude_modules == [f"{LAYER}.mlp*"]
    (line,) = (line for line in describe(found) if "down_proj" in line and "exclude" not in line)
    assert line.endswith(f"BF16 {list(shape)} ({problem})")


@pytest.mark.parametrize("algo", ANY_SIZE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (129, 257), (1, 300), (300, 1)])
def test_other_formats_take_any_size(
    tmp_path: Path, make: Make, algo: str, shape: tuple[int, int]
) -> None:
    """128 x 128 blocks too: they are ragged at the edges."""
    path = make(weights({"mlp.down_proj": shape}))

    report = run(path, tmp_path / "out", algo=algo)

    (entry,) = report.tensors
    assert entry.algo == algo
    scale = tensors(tmp_path / "out")[f"{LAYER}.mlp.down_proj.weight_scale"]
    assert scale.isfinite().all()
    assert (scale > 0).all()
    outputs = find(algo).outputs(rows=shape[0], columns=shape[1])
    assert tuple(scale.shape) == outputs["weight_scale"][1]


def fates(make: Make, shapes: dict[str, tuple[int, int]], *, algo: str) -> dict[str, str]:
    found = planned(make(weights(shapes)), algo=algo, on_indivisible="keep")
    return {
        step.source.name.removeprefix(f"{LAYER}.").removesuffix(".weight"): step.algo or step.reason
        for step in found.steps
    }


def test_fused_siblings_are_kept_together(make: Make) -> None:
    """k has an odd number of rows; q and v could be INT4, and engines would refuse the three."""
    obstacle = "W4A16_AWQ needs rows in multiples of 2, found 33"

    found = fates(
        make,
        {
            "self_attn.q_proj": (64, 128),
            "self_attn.k_proj": (33, 128),
            "self_attn.v_proj": (64, 128),
            "self_attn.o_proj": (64, 128),
            "mlp.gate_proj": (64, 128),
            "mlp.up_proj": (64, 128),
        },
        algo="W4A16_AWQ",
    )

    assert found == {
        "self_attn.q_proj": f"kept with {LAYER}.self_attn.k_proj: {obstacle}",
        "self_attn.k_proj": obstacle,
        "self_attn.v_proj": f"kept with {LAYER}.self_attn.k_proj: {obstacle}",
        "self_attn.o_proj": "W4A16_AWQ",
        "mlp.gate_proj": "W4A16_AWQ",
        "mlp.up_proj": "W4A16_AWQ",
    }


def test_all_experts_of_a_layer_are_kept_together(make: Make) -> None:
    """24 columns in one down projection: engines load all experts of the layer as one tensor."""
    shapes = {
        f"mlp.experts.{expert}.{leaf}": (64, 24 if (expert, leaf) == (1, "down_proj") else 32)
        for expert in (0, 1)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    shared = {f"mlp.shared_experts.{leaf}": (64, 32) for leaf in ("gate_proj", "up_proj")}

    found = fates(make, {**shapes, **shared, "self_attn.o_proj": (64, 64)}, algo="NVFP4")

    obstacle = "NVFP4 needs columns in multiples of 16, found 24"
    for name in shapes:
        kept = f"kept with {LAYER}.mlp.experts.1.down_proj: {obstacle}"
        assert found[name] == (obstacle if name == "mlp.experts.1.down_proj" else kept)
    assert {found[name] for name in (*shared, "self_attn.o_proj")} == {"NVFP4"}


def test_another_layer_is_another_matter(make: Make) -> None:
    other = "model.layers.1.mlp"
    source = weights({"mlp.experts.0.down_proj": (64, 24), "mlp.experts.0.up_proj": (64, 32)})
    source |= {f"{other}.experts.0.{leaf}.weight": randn(64, 32, seed=1) for leaf in ("up_proj",)}

    found = planned(make(source), algo="NVFP4", on_indivisible="keep")

    assert [step.source.name for step in found.steps if step.algo] == [
        f"{other}.experts.0.up_proj.weight"
    ]


def test_a_stack_is_kept_with_the_other_stack_of_its_layer(make: Make) -> None:
    """Experts of 24 columns inward: gate_up could be NVFP4, down can't, so neither is."""
    stem = f"{LAYER}.mlp.experts"
    source = {
        f"{stem}.gate_up_proj": randn(2, 48, 32, seed=0),
        f"{stem}.down_proj": randn(2, 32, 24, seed=1),
        f"{LAYER}.self_attn.o_proj.weight": randn(32, 32, seed=2),
    }
    path = make(source, config={"model_type": "qwen3_moe", "hidden_size": 32})

    with pytest.raises(ConvertError, match=r"down_proj: NVFP4 needs columns in multiples of 16, "):
        planned(path, algo="NVFP4")
    found = planned(path, algo="NVFP4", on_indivisible="keep")

    assert [step.source.name for step in found.steps if step.algo] == [
        f"{LAYER}.self_attn.o_proj.weight"
    ]
    kept = {step.source.name: step for step in found.steps if not step.algo}
    # as they are: under their own names, each once
    assert set(kept) == {f"{stem}.gate_up_proj", f"{stem}.down_proj"}
    for name, step in kept.items():
        assert [(out.name, out.shape) for out in step.outputs] == [(name, step.source.shape)]
        assert re.search("NVFP4 needs columns in multiples of 16, found 24", step.reason)


def test_a_transposed_stack_that_does_not_fit_is_kept_as_it_is(make: Make) -> None:
    stem = f"{LAYER}.feed_forward.experts"
    source = {
        f"{stem}.gate_up_proj": randn(2, 32, 48, seed=0),
        f"{stem}.down_proj": randn(2, 24, 32, seed=1),
        f"{LAYER}.self_attn.o_proj.weight": randn(32, 32, seed=2),
    }
    path = make(source, config={"model_type": "llama4_text", "hidden_size": 32})

    found = planned(path, algo="NVFP4", on_indivisible="keep")

    assert {step.source.name: step.algo for step in found.steps} == {
        f"{stem}.gate_up_proj": None,
        f"{stem}.down_proj": None,
        f"{LAYER}.self_attn.o_proj.weight": "NVFP4",
    }
    assert found.exclude_modules == [f"{LAYER}.feed_forward*"]


def test_when_nothing_can_have_the_format_there_is_nothing_to_do(make: Make) -> None:
    path = make(weights({"mlp.down_proj": (64, 24)}))

    with pytest.raises(ConvertError, match="the recipe quantizes none of the weights"):
        planned(path, algo="NVFP4", on_indivisible="keep")


def test_kept_weights_keep_their_bytes(tmp_path: Path) -> None:
    """llama_odd's down projection has 208 columns: no multiple of 32."""
    source = CHECKPOINTS / "llama_odd"

    report = run(source, tmp_path / "out", algo="MXFP4", on_indivisible="keep")

    kept = [entry.source for entry in report.tensors if "multiples of 32" in entry.reason]
    assert kept == ["model.layers.0.mlp.down_proj.weight"]
    before, after = tensors(source), tensors(tmp_path / "out")
    assert torch.equal(before[kept[0]], after[kept[0]])
