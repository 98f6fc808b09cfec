"""ModelOpt's exports follow from the sources, what calibration recorded, and modelopt_rules.py.

Every tensor of every golden under fixtures/oracle/ is made again from the bf16 source, and the
tensors for which our numeric contract gives other bytes are listed here with the reason.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from . import calib
from .calib import ORACLE, Golden, in_memory_name, module_of
from .modelopt_rules import (
    CONTRACT,
    E2M1_VALUES,
    MODELOPT,
    Encoded,
    Weight,
    amax_of,
    e8m0_values,
    input_scale,
    mean,
    scale_columns,
    scale_rows,
    spread,
)

# SVDQuant subtracts a low-rank part first, which calibration did not record
NOT_REPRODUCED = ["llama_s-nvfp4_svdquant"]
GOLDENS = sorted(
    path.parent.name
    for path in ORACLE.glob("*/tensors.json")
    if path.parent.name not in NOT_REPRODUCED
)
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int8: "I8",
}
# the norm that feeds a group, by the group's first member
NORMS = {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm"}

Rules = Mapping[str, Callable[[Weight], Encoded]]

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MLP = tuple(f"mlp.{name}" for name in PROJECTIONS)
EXPERTS = tuple(f"block_sparse_moe.experts.{e}.w{i}" for e in range(4) for i in (1, 2, 3))


def weights(*modules: str, layers: tuple[int, ...] = (0,), suffix: str = "weight") -> set[str]:
    return {f"model.layers.{i}.{module}.{suffix}" for i in layers for module in modules}


def scales(*modules: str) -> set[str]:
    return weights(*modules, suffix="weight_scale")


TWICE = "FP8 quotients of a matrix are rounded twice, to bf16 and to e4m3"
NAN = "an FP8 weight of zeros gets scale 0.0 and NaN"
ONE_BLOCK = "an fp8_pb_wo weight of one block has a scale without dimensions"
ONE_BLOCK_SHARED = "the scale of one block is that of the largest fused sibling"
REAL = "fp8_pb_real rounds scales to bf16, and quotients twice"
MXFP4 = "MXFP4 ties go toward zero, and zeros have code 8"
CLIPPED = "a clipped amax of AWQ survives where no later step touched the weight"

# golden -> reason -> the tensors of which our contract gives other bytes; all others are equal.
# FP8 weights that are missing here have no quotient that the first rounding moves over a bound.
DEPARTURES: dict[str, dict[str, set[str]]] = {
    "llama4-fp8": {
        TWICE: weights(*ATTENTION, layers=(0, 1))
        | weights(*(f"feed_forward.{name}" for name in PROJECTIONS))
        | weights(*(f"feed_forward.shared_expert.{name}" for name in PROJECTIONS), layers=(1,))
    },
    "llama_adv-fp8": {
        TWICE: weights("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"),
        NAN: weights("mlp.gate_proj") | scales("mlp.gate_proj"),
    },
    "llama_adv-fp8_pb_wo": {
        ONE_BLOCK: scales("self_attn.k_proj", "self_attn.o_proj"),
        ONE_BLOCK_SHARED: scales("self_attn.q_proj", "self_attn.v_proj")
        | weights("self_attn.q_proj", "self_attn.v_proj"),
    },
    "llama_adv-mxfp4": {MXFP4: weights(*ATTENTION, *MLP)},
    "llama_odd-fp8_pb_real": {REAL: weights(*ATTENTION, *MLP) | scales(*ATTENTION, *MLP)},
    "llama_s-fp8": {TWICE: weights(*ATTENTION, *MLP)},
    "llama_s-fp8+kv_fp8": {TWICE: weights(*ATTENTION, *MLP)},
    "llama_s-fp8_pb_real": {REAL: weights(*ATTENTION, *MLP) | scales(*ATTENTION, *MLP)},
    "llama_s-fp8_pb_wo": {ONE_BLOCK: scales("self_attn.k_proj", "self_attn.v_proj")},
    "llama_s-mxfp4": {MXFP4: weights(*ATTENTION, *MLP)},
    "llama_s-nvfp4_awq_full": {
        CLIPPED: weights("mlp.down_proj")
        | scales("mlp.down_proj")
        | weights("mlp.down_proj", suffix="weight_scale_2")
    },
    "mixtral-fp8": {
        TWICE: weights(*ATTENTION, *EXPERTS) - weights("block_sparse_moe.experts.1.w2")
    },
    "mixtral-fp8_pb_wo": {
        ONE_BLOCK: scales("self_attn.q_proj", "self_attn.o_proj", *EXPERTS[1::3]),
        ONE_BLOCK_SHARED: scales("self_attn.k_proj", "self_attn.v_proj")
        | weights("self_attn.k_proj", "self_attn.v_proj"),
    },
    "mixtral-mixed_fp8attn_nvfp4mlp": {TWICE: weights(*ATTENTION)},
    "qwen3-fp8": {TWICE: weights(*ATTENTION, *MLP, layers=(0, 1))},
    "qwen3-mixed_fp8attn_nvfp4mlp": {TWICE: weights(*ATTENTION, layers=(0, 1))},
}
# of 1418 tensors
COUNTS = {TWICE: 72, NAN: 2, ONE_BLOCK: 10, ONE_BLOCK_SHARED: 8, REAL: 28, MXFP4: 14, CLIPPED: 3}


class Smoothed:
    """The weights after AWQ or SmoothQuant, the norms, and the pre_quant_scale that stay."""

    def __init__(self, golden: Golden) -> None:
        self.tensors = dict(golden.sources)
        self.pre_quant_scale: dict[str, Tensor] = {}
        self.changed: set[str] = set()
        for name in golden.linears:
            scale = golden.vectors.get(f"{module_of(name)}.pre_quant_scale")
            if scale is not None:
                self.tensors[name] = scale_columns(self.tensors[name], 1.0 / scale)
                self.pre_quant_scale[module_of(name)] = scale.bfloat16()
        if golden.quantization["quant_algo"] == "NVFP4_AWQ":
            self.fold_into_rows("down_proj", "up_proj")
            self.fold_into_rows("o_proj", "v_proj")
        for name, algo in golden.linears.items():
            group = golden.group(name)
            if name == group[0] and len(group) > 1 and module_of(name) in self.pre_quant_scale:
                self.average(group, fold=algo.endswith("_AWQ"))

    def fold_into_rows(self, later: str, earlier: str) -> None:
        """Scale the rows of `earlier` by what `later` multiplies its input with, of equal size."""
        for module in [name for name in self.pre_quant_scale if name.endswith(f".{later}")]:
            target = f"{module.removesuffix(later)}{earlier}.weight"
            if len(self.tensors[target]) == len(self.pre_quant_scale[module]):
                scale = self.pre_quant_scale.pop(module)
                self.tensors[target] = scale_rows(self.tensors[target], scale)
                self.changed.add(target)

    def average(self, group: list[str], *, fold: bool) -> None:
        """Give fused siblings the mean of their pre_quant_scale, and fold it into their norm."""
        scales = {name: self.pre_quant_scale[module_of(name)] for name in group}
        average = mean(list(scales.values()))
        for name, scale in scales.items():
            if not torch.equal(scale, average):
                self.tensors[name] = scale_columns(self.tensors[name], scale, average)
                self.changed.add(name)
            self.pre_quant_scale[module_of(name)] = average
        if fold:
            stem, _, first = module_of(group[0]).rpartition(".")
            norm = f"{stem.rpartition('.')[0]}.{NORMS[first]}.weight"
            self.tensors[norm] = scale_columns(self.tensors[norm], average)
            for name in group:
                del self.pre_quant_scale[module_of(name)]


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(
        tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def clipped(golden: Golden, name: str) -> Tensor | None:
    """Return the amax that AWQ's clipping chose for a whole weight, f32 []."""
    entry = golden.quantizers.get(f"{module_of(name)}.weight_quantizer._amax", {})
    return torch.tensor(float.fromhex(entry["hex"])) if "hex" in entry else None


def amax(golden: Golden, smoothed: Smoothed, name: str, *, clip: bool) -> Tensor:
    """Return the amax that the scale of a whole weight comes from."""
    algo, group = golden.linears[name], golden.group(name)
    is_expert = name.endswith((".w1.weight", ".w3.weight"))
    if algo == "fp8_pb_wo":
        # one block has a scale without dimensions, which passes for one of the whole weight; a
        # group is judged by its first member
        is_shared = not is_expert and max(golden.sources[group[0]].shape) <= 128
    else:
        is_shared = is_expert or algo not in ("FP8", "fp8_pb_real")
    found = []
    for member in group if is_shared else [name]:
        recorded = clipped(golden, member)
        if clip and recorded is not None and member not in smoothed.changed:
            found.append(recorded)
        else:
            found.append(amax_of(smoothed.tensors[member]))
    return torch.stack(found).amax()


def convert(golden: Golden, rules: Rules) -> dict[str, Tensor]:
    """Return every tensor of the export, by ModelOpt's names."""
    smoothed = Smoothed(golden)
    is_modelopt = rules is MODELOPT
    tensors = {name: t for name, t in smoothed.tensors.items() if name not in golden.linears}
    for name, algo in golden.linears.items():
        module = module_of(name)
        w = smoothed.tensors[name]
        block_amax = golden.arrays.get(f"{module}.weight_quantizer._amax")
        if block_amax is not None:
            block_amax = block_amax.view(len(w), -1)
        weight = Weight(
            w,
            amax(golden, smoothed, name, clip=is_modelopt),
            block_amax,
            256.0 if golden.cfg == "nvfp4_46" else 448.0,
        )
        encoded = rules[algo](weight)
        if is_modelopt and golden.cfg == "fp8_pb_wo" and re.search(r"\.w[13]\.weight$", name):
            # experts are quantized as a stack, and their scales are rows of the stack's
            encoded["weight_scale"] = encoded["weight_scale"].view(1, 1, 1, 1)
        if module in golden.inputs:
            members = [name] if algo == "FP8" else golden.group(name)
            largest = max(golden.inputs[module_of(member)] for member in members)
            encoded["input_scale"] = input_scale(largest, algo)
        if module in smoothed.pre_quant_scale:
            encoded["pre_quant_scale"] = smoothed.pre_quant_scale[module]
        for suffix, tensor in encoded.items():
            # stacked experts have no module of their own
            joint = "." if name.endswith(".weight") else "_"
            tensors[name if suffix == "weight" else f"{module}{joint}{suffix}"] = tensor
    for attention, sides in calib.kv_cache(golden.path).items():
        for side, value in sides.items():
            scale = torch.tensor(value, dtype=torch.float32) / 448
            tensors[f"{attention}.{side}_proj.{side}_scale"] = scale
            if f"{attention}.{side}_bias" in golden.vectors:
                bias = golden.vectors[f"{attention}.{side}_bias"]
                tensors[f"{attention}.{side}_proj.{side}_bias"] = bias
    return tensors


def describe(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    return {
        name: {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "sha256": sha256(t)}
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("name", GOLDENS)
def test_every_tensor_follows_from_the_source_by_modelopts_rules(name: str) -> None:
    golden = Golden(name)
    found = describe(convert(golden, MODELOPT))
    if name == "mixtral-fp8_pb_wo":
        found = {in_memory_name(key): value for key, value in found.items()}

    assert sorted(found) == sorted(golden.expected)
    assert [key for key in found if found[key] != golden.expected[key]] == []


@pytest.mark.parametrize("name", GOLDENS)
def test_our_contract_departs_only_where_listed(name: str) -> None:
    golden = Golden(name)
    ours, theirs = (describe(convert(golden, rules)) for rules in (CONTRACT, MODELOPT))
    listed = DEPARTURES.get(name, {})

    assert ours.keys() == theirs.keys()
    assert {key for key in ours if ours[key] != theirs[key]} == set().union(*listed.values())
    assert sum(map(len, listed.values())) == len(set().union(*listed.values()))


def dequantized(tensors: Mapping[str, Tensor], name: str, algo: str) -> Tensor:
    """Return [N, K], f64, of an FP8 or MXFP4 weight."""
    codes, scale = tensors[name], tensors[f"{name}_scale"]
    if algo == "mxfp4":
        values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)]).double()
        nibbles = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).int()
        return values[nibbles] * e8m0_values(scale).double().repeat_interleave(32, 1)
    if scale.dim() == 4:
        scale = scale[:, 0, :, 0]
    return codes.double() * (spread(scale, codes) if scale.dim() else scale)


@pytest.mark.parametrize(
    ("name", "reason", "key"),
    [
        (name, reason, key)
        for name, listed in DEPARTURES.items()
        for reason, keys in listed.items()
        for key in sorted(keys)
        if key.endswith(".weight") and reason != CLIPPED
    ],
)
def test_our_numbers_are_no_farther_from_the_source(name: str, reason: str, key: str) -> None:
    """Element by element under the same scale; as a whole where ModelOpt has another scale.

    There a code may fall on the better side by chance. The one scale of siblings can even be the
    luckier one as a whole, by 2 percent here, but it costs llama_adv's q_proj four fifths.
    """
    golden = Golden(name)
    source = golden.sources[key].double()
    ours, theirs = (
        (dequantized(convert(golden, rules), key, golden.linears[key]) - source).abs()
        for rules in (CONTRACT, MODELOPT)
    )

    if reason == NAN:
        assert ours.max() == 0
        assert theirs.isnan().all()
    elif reason == TWICE:
        assert (ours <= theirs).all()
        assert ours.norm() < theirs.norm()
    elif reason == MXFP4:
        # a tie is as far from either side, and -0 is 0
        assert torch.equal(ours, theirs)
    elif reason == REAL:
        assert ours.norm() < theirs.norm()
    else:
        assert ours.norm() < theirs.norm() * (1.02 if name.startswith("mixtral") else 0.19)


def test_a_lone_nvfp4_weight_of_zeros_is_poison_in_modelopt_and_zeros_here() -> None:
    """No golden has one: the fused sibling of llama_adv's gate_proj is not zero."""
    weight = Weight(torch.zeros(2, 32).bfloat16(), torch.tensor(0.0))
    ours, theirs = CONTRACT["NVFP4"](weight), MODELOPT["NVFP4"](weight)

    assert (ours["weight"] == 0).all()
    assert (ours["weight_scale"].float() == 1).all()
    assert ours["weight_scale_2"] == 1
    assert (theirs["weight"] == 0x77).all()
    assert (theirs["weight_scale"].view(torch.uint8) == 0xFF).all()
    assert theirs["weight_scale_2"] == 0


@pytest.mark.parametrize("name", GOLDENS)
def test_the_document_has_what_the_export_needs(tmp_path: Path, name: str) -> None:
    golden = Golden(name)
    document = json.loads(calib.write(golden.path, tmp_path).read_text())
    expected = golden.expected.keys()

    # stacked experts have no module of their own
    modules = {re.sub("[._]input_scale$", "", key) for key in expected if "input_scale" in key}
    assert document["inputs"].keys() == modules
    kept = [key for key in expected if key.endswith((".k_scale", ".v_scale"))]
    assert {f"{a}.{s}_proj.{s}_scale" for a in document["kv_cache"] for s in "kv"} == set(kept)
    assert ("vectors" in document) == (tmp_path / calib.VECTORS).exists() == bool(golden.vectors)
    for key, vector in golden.vectors.items():
        module, _, field = key.rpartition(".")
        if field == "pre_quant_scale":
            assert vector.dtype == torch.float32
            assert vector.shape == golden.sources[f"{module}.weight"].shape[1:]
        else:
            assert vector.dtype == torch.bfloat16


@pytest.mark.parametrize("cfg", ["int8_sq", "w4a8_awq", "nvfp4_awq_lite"])
def test_the_recorded_input_is_the_smoothed_one(cfg: str) -> None:
    golden = Golden(f"llama_s-{cfg}")

    for module, largest in golden.inputs.items():
        amax_K = golden.arrays[f"{module}.input_quantizer._amax_for_smoothing"].flatten()
        smoothed_K = amax_K.bfloat16().float() * golden.vectors[f"{module}.pre_quant_scale"]
        assert smoothed_K.amax().bfloat16().item() == largest


def test_vectors_are_those_of_modelopt_once_rounded() -> None:
    golden = Golden("llama_s-int4_awq")

    assert len(golden.vectors) == len(golden.linears) == 7
    for key, vector in golden.vectors.items():
        module = key.removesuffix(".pre_quant_scale")
        recorded = golden.arrays[f"{module}.input_quantizer._pre_quant_scale"]
        assert torch.equal(vector.bfloat16(), recorded)


@pytest.mark.parametrize("name", NOT_REPRODUCED)
def test_svdquant_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="only after rounding"):
        calib.write(ORACLE / name, tmp_path)


def test_the_oracle_is_whole() -> None:
    """Every export names a source that is here; `configs_only` has documents without tensors."""
    models = {path.name for path in (ORACLE / "bf16").iterdir()}
    configs = list((ORACLE / "configs_only").iterdir())

    assert models == {"llama4", "llama_adv", "llama_odd", "llama_s", "mixtral", "qwen3"}
    assert {name.partition("-")[0] for name in GOLDENS} == models
    assert len(GOLDENS) + len(NOT_REPRODUCED) == 45
    assert len(configs) == 84
    assert all((path / "hf_quant_config.json").exists() for path in configs)
    assert all(path.stat().st_size < 1 << 20 for path in ORACLE.rglob("*"))


def test_departures_are_counted() -> None:
    counts = dict.fromkeys(COUNTS, 0)
    for listed in DEPARTURES.values():
        for reason, keys in listed.items():
            counts[reason] += len(keys)

    assert counts == COUNTS
    assert DEPARTURES.keys() <= set(GOLDENS)
    assert sum(len(Golden(name).expected) for name in GOLDENS) == 1418
