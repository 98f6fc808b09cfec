"""Scales that siblings and experts share: who agrees, on which number, in one shard or many."""

import math
from pathlib import Path

import pytest
import torch

from qconvert.errors import ConvertError
from qconvert.groups import input_key, sharing_key

from .conversion import (
    CHECKPOINTS,
    Make,
    Tensors,
    amax_of,
    measured,
    planned,
    randn,
    run,
    tensors,
)

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LATENT = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHARED_EXPERT = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
EXPERTS = tuple(
    f"mlp.experts.{expert}.{leaf}" for expert in (0, 1, 10) for leaf in ("gate_proj", "up_proj")
)
MIXTRAL = tuple(f"block_sparse_moe.experts.{expert}.{leaf}" for expert in (0, 1) for leaf in "13")
LEAVES = (*ATTENTION, *LATENT, *MLP, *SHARED_EXPERT, *EXPERTS)


def weights(leaves: tuple[str, ...] = LEAVES, *, layers: int = 1) -> Tensors:
    """Return weights whose largest magnitudes all differ."""
    found = {}
    for layer in range(layers):
        for place, leaf in enumerate(leaves):
            weight = randn(64, 128, seed=place)
            weight[3, 5] = 8.0 + place + layer / 4
            found[f"model.layers.{layer}.{leaf}.weight"] = weight
    return found


def parted(found: dict[str, float]) -> list[set[str]]:
    """Return the names by equal numbers."""
    values = sorted(set(found.values()))
    return [{name for name, value in found.items() if value == wanted} for wanted in values]


def scales(path: Path, suffix: str) -> dict[str, float]:
    """Return module below its layer -> the number in its tensor `suffix`."""
    return {
        name.removeprefix("model.layers.0.").removesuffix(f".{suffix}"): tensor.item()
        for name, tensor in tensors(path).items()
        if name.endswith(f".{suffix}")
    }


def by_meaning(found: list[set[str]]) -> set[frozenset[str]]:
    return {frozenset(names) for names in found}


FUSED = {
    frozenset(ATTENTION[:3]),
    frozenset({"self_attn.o_proj"}),
    frozenset(LATENT[:2]),
    frozenset({"self_attn.q_b_proj"}),
    frozenset(MLP[:2]),
    frozenset({"mlp.down_proj"}),
    frozenset(SHARED_EXPERT),
}
ONE_EXPERT = {
    frozenset(leaf for leaf in EXPERTS if f"experts.{expert}." in leaf) for expert in (0, 1, 10)
}
# each by itself, but for an expert's gate and up
ALONE = {frozenset({leaf}) for leaf in LEAVES if leaf not in EXPERTS}
ALL_EXPERTS = {frozenset(EXPERTS)}
PER_PROJECTION = {
    frozenset(leaf for leaf in EXPERTS if leaf.endswith(f".{name}"))
    for name in ("gate_proj", "up_proj")
}


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(
    ("algo", "suffix", "wanted"),
    [
        ("NVFP4", "weight_scale_2", FUSED | ONE_EXPERT),
        ("NVFP4_AWQ", "weight_scale_2", FUSED | ONE_EXPERT),
        ("W4A16_NVFP4", "weight_scale_2", FUSED | ONE_EXPERT),
        ("W4A8_NVFP4_FP8", "weight_scale_2", FUSED | ONE_EXPERT),
        ("W4A8_AWQ", "weight_scale_2", FUSED | ONE_EXPERT),
        ("FP8", "weight_scale", ALONE | ONE_EXPERT),
        # gate and up of an expert agree, and all experts of a projection: so all of them
        ("NVFP4", "input_scale", FUSED | ALL_EXPERTS),
        ("W4A8_NVFP4_FP8", "input_scale", FUSED | ALL_EXPERTS),
        ("W4A8_AWQ", "input_scale", FUSED | ALL_EXPERTS),
        ("W8A8_SQ_PER_CHANNEL", "input_scale", FUSED | ALL_EXPERTS),
        ("FP8", "input_scale", ALONE | ALL_EXPERTS),
    ],
)
def test_who_shares_a_scale(
    tmp_path: Path,
    make: Make,
    algo: str,
    suffix: str,
    wanted: set[frozenset[str]],
    num_shards: int,
) -> None:
    """Siblings lie in different shards when there are three: every third tensor goes to each."""
    found = weights()
    shards = {
        f"model-{place}.safetensors": dict(list(found.items())[place::num_shards])
        for place in range(num_shards)
    }
    source = make(shards=shards)

    run(source, tmp_path / "out", algo=algo)

    assert by_meaning(parted(scales(tmp_path / "out", suffix))) == wanted


@pytest.mark.parametrize(("algo", "divisor"), [("NVFP4", 2688.0), ("W4A8_AWQ", 448.0)])
def test_a_shared_scale_is_that_of_the_largest(
    tmp_path: Path, make: Make, algo: str, divisor: float
) -> None:
    found = weights()

    run(make(found), tmp_path / "out", algo=algo)

    for name, scale in scales(tmp_path / "out", "weight_scale_2").items():
        (group,) = (names for names in FUSED | ONE_EXPERT if name in names)
        amax = max(found[f"model.layers.0.{leaf}.weight"].abs().max().item() for leaf in group)
        assert scale == (torch.tensor(amax) / torch.tensor(divisor)).item()


def test_an_input_scale_is_that_of_the_largest(tmp_path: Path, make: Make) -> None:
    run(make(weights()), tmp_path / "out", algo="NVFP4")

    for name, scale in scales(tmp_path / "out", "input_scale").items():
        (group,) = (names for names in FUSED | ALL_EXPERTS if name in names)
        amax = max(amax_of(f"model.layers.0.{leaf}") for leaf in group)
        assert scale == (torch.tensor(amax) / torch.tensor(2688.0)).item()


def test_layers_do_not_share(tmp_path: Path, make: Make) -> None:
    run(make(weights(layers=2)), tmp_path / "out", algo="NVFP4")

    after = tensors(tmp_path / "out")
    for leaf in LEAVES:
        for suffix in ("weight_scale_2", "input_scale"):
            first, second = (after[f"model.layers.{n}.{leaf}.{suffix}"].item() for n in (0, 1))
            assert first != second


def test_mixtral_experts_share_w1_and_w3() -> None:
    """Real names, siblings in different shards: llama has them so too."""
    for model, num_units in (("mixtral", 2 * (2 + 4 * 2)), ("llama", 2 * 4)):
        plan = planned(CHECKPOINTS / model, algo="NVFP4")
        found = [[step.source.name for step in unit.steps] for unit in plan.units]
        quantized = [
            names for unit, names in zip(plan.units, found, strict=True) if unit.steps[0].algo
        ]
        assert len(quantized) == num_units
        leaves = {tuple(sorted(name.split(".")[-2] for name in names)) for names in quantized}
        wanted = {("k_proj", "q_proj", "v_proj"), ("o_proj",)}
        wanted |= {("w1", "w3"), ("w2",)} if model == "mixtral" else {("gate_proj", "up_proj")}
        assert wanted <= leaves


@pytest.mark.parametrize("algo", ["FP8", "NVFP4", "W8A8_SQ_PER_CHANNEL"])
def test_an_expert_without_statistics_gets_the_largest_of_the_others(
    tmp_path: Path, make: Make, algo: str
) -> None:
    """An expert that saw no token in calibration; one of a layer at least saw some."""
    source = make(weights(EXPERTS))
    inputs = {
        "model.layers.0.mlp.experts.0.gate_proj": 2.0,
        "model.layers.0.mlp.experts.0.up_proj": 2.0,
        "model.layers.0.mlp.experts.10.gate_proj": 5.0,
        "model.layers.0.mlp.experts.10.up_proj": 5.0,
    }

    run(source, tmp_path / "out", algo=algo, statistics=measured(tmp_path, inputs=inputs))

    divisor = {"FP8": 448.0, "NVFP4": 2688.0, "W8A8_SQ_PER_CHANNEL": 127.0}[algo]
    found = set(scales(tmp_path / "out", "input_scale").values())
    assert found == {(torch.tensor(5.0) / torch.tensor(divisor)).item()}


def test_experts_without_any_statistics_are_named(tmp_path: Path, make: Make) -> None:
    inputs = {f"model.layers.0.{leaf}": 1.0 for leaf in ATTENTION}
    statistics = measured(tmp_path, inputs=inputs)

    with pytest.raises(ConvertError, match=r"no amax for model.layers.0.mlp.experts.0.gate_proj"):
        run(make(weights(ATTENTION + EXPERTS)), tmp_path / "o", algo="FP8", statistics=statistics)


@pytest.mark.parametrize("algo", ["NVFP4", "FP8", "W4A8_AWQ", "W4A8_NVFP4_FP8"])
@pytest.mark.parametrize("zeros", [("gate_proj",), ("gate_proj", "up_proj")])
def test_weights_of_zeros_and_their_siblings(
    tmp_path: Path, make: Make, algo: str, zeros: tuple[str, ...]
) -> None:
    """Zeros next to numbers take their scale; zeros alone get 1.0. Codes are 0, scales no NaN."""
    stem = "model.layers.0.mlp.experts.0."
    source = {f"{stem}{leaf}.weight": randn(64, 128, seed=1) for leaf in ("gate_proj", "up_proj")}
    for leaf in zeros:
        source[f"{stem}{leaf}.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)

    report = run(make(source), tmp_path / "out", algo=algo)

    suffix, divisor = {
        "FP8": ("weight_scale", 448.0),
        "NVFP4": ("weight_scale_2", 2688.0),
        "W4A8_AWQ": ("weight_scale_2", 448.0),
        "W4A8_NVFP4_FP8": ("weight_scale_2", 448.0),
    }[algo]
    after = tensors(tmp_path / "out")
    amax = max(weight.abs().max().float() for weight in source.values())
    wanted = amax / torch.tensor(divisor) if amax else torch.tensor(1.0)
    for leaf in ("gate_proj", "up_proj"):
        assert after[f"{stem}{leaf}.{suffix}"].item() == wanted.item()
        if leaf in zeros:
            assert not after[f"{stem}{leaf}.weight"].view(torch.uint8).any()
            (entry,) = (e for e in report.tensors if e.source == f"{stem}{leaf}.weight")
            assert (entry.relative_error, entry.sqnr, entry.num_nonfinite) == (0.0, None, 0)
    assert all(tensor.float().isfinite().all() for tensor in after.values())


@pytest.mark.parametrize("algo", ["NVFP4", "FP8"])
def test_nan_in_one_sibling_is_reported_for_that_one(tmp_path: Path, make: Make, algo: str) -> None:
    """Both passes meet them; they count once, and do not touch the shared scale."""
    stem = "model.layers.0.mlp.experts.0."
    source = {
        f"{stem}{leaf}.weight": randn(256, 256, seed=place)
        for place, leaf in enumerate(("gate_proj", "up_proj"))
    }
    amax = max(weight.abs().max().float() for weight in source.values())
    source[f"{stem}up_proj.weight"][1, 2:5] = torch.tensor([math.nan, math.inf, -math.inf])
    path = make(source)

    with pytest.raises(
        ConvertError, match=r"up_proj.weight: 3 of 65536 elements are NaN or Inf; .*--allow-nonfin"
    ):
        run(path, tmp_path / "out", algo=algo, workers=1, budget=70 << 10)
    assert not list(tmp_path.glob("out*"))

    report = run(path, tmp_path / "out", algo=algo, allow_nonfinite=True)

    assert {entry.source.split(".")[-2]: entry.num_nonfinite for entry in report.tensors} == {
        "gate_proj": 0,
        "up_proj": 3,
    }
    suffix, divisor = ("weight_scale", 448.0) if algo == "FP8" else ("weight_scale_2", 2688.0)
    (scale,) = {
        tensor.item()
        for name, tensor in tensors(tmp_path / "out").items()
        if name.endswith(f".{suffix}")
    }
    assert scale == (amax / torch.tensor(divisor)).item()


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]
)
def test_siblings_of_two_dtypes_share_a_scale_too(
    tmp_path: Path, make: Make, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """The largest counts as the smallest normal number at least, which in f16 is 2^-14."""
    source = {
        f"model.layers.0.mlp.{leaf}.weight": torch.full((16, 16), 2.0**-20, dtype=dtype)
        for leaf, dtype in zip(("gate_proj", "up_proj"), dtypes, strict=True)
    }

    run(make(source), tmp_path / "out", algo="W4A16_NVFP4")

    found = set(scales(tmp_path / "out", "weight_scale_2").values())
    assert found == {(torch.tensor(2.0**-14) / torch.tensor(2688.0)).item()}


@pytest.mark.parametrize(
    ("module", "siblings", "experts"),
    [
        ("a.q_proj", 3, 1),
        ("a.o_proj", 1, 1),
        ("m.experts.4.up_proj", 2, 2),
        ("m.experts.4.down_proj", 1, 1),
        ("m.shared_expert.up_proj", 2, 1),
    ],
)
def test_keys_of_what_is_shared(module: str, siblings: int, experts: int) -> None:
    """Siblings: all that engines fuse. Experts: only within one. Own: nobody."""
    assert len(sharing_key(module, "siblings")) == siblings
    assert len(sharing_key(module, "experts")) == experts
    assert sharing_key(module, "own") == (module,)
    other = module.replace("experts.4.", "experts.5.")
    assert input_key(module, "own") == input_key(other, "own")
