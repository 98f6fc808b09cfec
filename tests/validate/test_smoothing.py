"""Smoothed weights: compared by what the checkpoint tells of the smoothing, wherever it went."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import FIXTURES, Draft, Tensor, draft
from encoded import Smooth, encode, raw, weight

from qschema.checkpoint import open_checkpoint
from qschema.strict import Finding
from qvalidate.loader import load
from qvalidate.weights import weight_findings

SOURCE = FIXTURES / "llama"
# leaf -> the norm before it
NORMS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm"),
}
LAYERS = ("model.layers.0", "model.layers.1")
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
O_PROJ = "model.layers.0.self_attn.o_proj"
NORM = "model.layers.0.input_layernorm.weight"


def factors(name: str, size: int) -> torch.Tensor:
    """Return a bf16 pre_quant_scale from 1/4 to 4."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.exp2(4 * torch.rand(size, generator=generator) - 2).bfloat16()


def smooth(module: str, w_NK: torch.Tensor, *, in_linear: bool) -> torch.Tensor:
    """Return the weight without its own smoothing, and with that of down_proj in up_proj's rows."""
    parent, _, leaf = module.rpartition(".")
    layer = parent.rpartition(".")[0]
    owner = f"{layer}.{NORMS[leaf]}" if leaf in NORMS else module
    made = (w_NK.float() / factors(owner, w_NK.shape[1]).float()).bfloat16()
    if leaf == "up_proj" and in_linear:
        rows_N1 = factors(f"{parent}.down_proj", len(w_NK)).float()[:, None]
        made = (made.float() * rows_N1).bfloat16()
    return made


def smoothed(algo: str, *, in_linear: bool, edit: Smooth = lambda module, w_NK: w_NK) -> Draft:
    """Return llama after AWQ: in the norms, in up_proj or beside the weights.

    edit: what to make of a source's weight before.
    """

    def quantized(module: str, w_NK: torch.Tensor) -> torch.Tensor:
        return smooth(module, edit(module, w_NK), in_linear=in_linear)

    made = draft("llama", algo, encode=partial(encode, smooth=quantized))
    for layer in LAYERS:
        for norm in set(NORMS.values()):
            name = f"{layer}.{norm}.weight"
            made.put(name, times(made.tensor(name), factors(f"{layer}.{norm}", 256)))
        beside = ["self_attn.o_proj"] if in_linear else ["self_attn.o_proj", "mlp.down_proj"]
        for module in (f"{layer}.{leaf}" for leaf in beside):
            scale = factors(module, 384 if module.endswith("down_proj") else 256)
            made.put(
                f"{module}.pre_quant_scale",
                ("BF16", tuple(scale.shape), raw(scale)),
                beside=f"{module}.weight",
            )
    return made


def times(tensor: Tensor, factor: torch.Tensor) -> Tensor:
    dtype, shape, data = tensor
    values = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).float()
    return dtype, shape, raw((values * factor.float()).bfloat16())


def findings(made: Draft, path: Path) -> list[Finding]:
    return list(weight_findings(load(made.write(path / "made")), SOURCE))


def errors(made: Draft, path: Path) -> list[tuple[str, str]]:
    found = findings(made, path)
    return [(item.rule, item.where) for item in found if item.severity == "error"]


ALGOS = ["NVFP4_AWQ", "W4A16_AWQ", "W4A8_AWQ"]


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("in_linear", [True, False], ids=["in up_proj", "beside down_proj"])
def test_smoothing_is_found_wherever_it_went(tmp_path: Path, algo: str, in_linear: bool) -> None:
    found = findings(smoothed(algo, in_linear=in_linear), tmp_path)

    assert {(item.rule, item.severity) for item in found} == {("smoothing-folded", "note")}
    assert len(found) == 4
    assert found[0].where == NORM
    assert "self_attn.q_proj" in found[0].message


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("module", [UP, DOWN, O_PROJ, "model.layers.0.self_attn.q_proj"])
def test_wrong_scales_are_found_through_the_smoothing(
    tmp_path: Path, algo: str, module: str
) -> None:
    """Also those of down_proj, which is compared by the factors that up_proj has taken in."""
    made = smoothed(algo, in_linear=True)
    name = f"{module}.weight_scale_2" if algo == "NVFP4_AWQ" else f"{module}.weight_scale"
    dtype, shape, data = made.tensor(name)
    values = torch.frombuffer(bytearray(data), dtype=torch.float32) * 8
    made.put(name, (dtype, shape, raw(values)))

    # a factor that is only up_proj's shows in down_proj
    where = DOWN if module == UP else module
    assert errors(made, tmp_path) == [("weight-error", f"{where}.weight")]


def without_some_rows(module: str, w_NK: torch.Tensor) -> torch.Tensor:
    """Return up_proj with a row of zeros, and one that no code is small enough for."""
    found = w_NK.clone()
    if module.endswith("up_proj"):
        found[3] = 0
        found[4] *= 2.0**-22
    return found


@pytest.mark.parametrize("is_wrong", [False, True])
def test_rows_that_do_not_tell_their_smoothing_leave_it_to_the_columns(
    tmp_path: Path, is_wrong: bool
) -> None:
    """Dead neurons: the columns of down_proj are smoothed all the same, and still compared."""
    made = smoothed("NVFP4_AWQ", in_linear=True, edit=without_some_rows)
    source = Path(shutil.copytree(SOURCE, tmp_path / "source"))
    for stored in open_checkpoint(source).tensors.values():
        changed = raw(without_some_rows(stored.name.removesuffix(".weight"), weight(stored)))
        with open(stored.file, "r+b") as file:
            file.seek(stored.offset)
            file.write(changed)
    if is_wrong:
        dtype, shape, data = made.tensor(f"{DOWN}.weight")
        made.put(f"{DOWN}.weight", (dtype, shape, data[len(data) // 2 :] * 2))
    found = weight_findings(load(made.write(tmp_path / "made")), source)

    errors = [(item.rule, item.where) for item in found if item.severity == "error"]
    assert errors == [("weight-error", f"{DOWN}.weight")] * is_wrong


def test_signs_are_no_smoothing(tmp_path: Path) -> None:
    """Rows of up_proj may have a factor, but none below zero."""
    made = smoothed("NVFP4_AWQ", in_linear=True)
    dtype, shape, data = made.tensor(f"{UP}.weight")
    made.put(f"{UP}.weight", (dtype, shape, bytes(code ^ 0x88 for code in data)))

    assert ("weight-error", f"{UP}.weight") in errors(made, tmp_path)


def test_norm_of_zeros_does_not_tell_its_smoothing(tmp_path: Path) -> None:
    made = smoothed("NVFP4_AWQ", in_linear=False)
    dtype, shape, data = made.tensor(NORM)
    made.put(NORM, (dtype, shape, bytes(2) + data[2:]))
    found = findings(made, tmp_path)

    assert {item.where for item in found if item.rule == "weight-not-compared"} == {
        f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qkv"
    }


def test_norm_that_is_not_the_smoothing_is_found(tmp_path: Path) -> None:
    """Its own difference is taken for smoothing, and then no weight after it agrees."""
    made = smoothed("W4A16_AWQ", in_linear=False)
    made.put(NORM, times(made.tensor(NORM), factors("another", 256)))

    attention = [f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "kqv"]
    assert errors(made, tmp_path) == [("weight-error", name) for name in attention]


def test_norm_before_plain_weights_is_kept(tmp_path: Path) -> None:
    made = smoothed("W4A16_AWQ", in_linear=False)
    made.put("model.norm.weight", times(made.tensor("model.norm.weight"), factors("x", 256)))

    assert errors(made, tmp_path) == [("kept-tensor-differs", "model.norm.weight")]


def test_norm_in_a_format_without_smoothing_is_kept(tmp_path: Path) -> None:
    made = draft("llama", "NVFP4", encode=encode)
    made.put(NORM, times(made.tensor(NORM), factors("x", 256)))

    assert errors(made, tmp_path) == [("kept-tensor-differs", NORM)]


def test_wrong_pre_quant_scale_is_found(tmp_path: Path) -> None:
    made = smoothed("NVFP4_AWQ", in_linear=False)
    name = f"{O_PROJ}.pre_quant_scale"
    made.put(name, times(made.tensor(name), torch.full((256,), 2.0)))

    assert errors(made, tmp_path) == [("weight-error", f"{O_PROJ}.weight")]


def test_smoothing_that_can_not_be_undone_is_a_note(tmp_path: Path) -> None:
    made = smoothed("NVFP4_AWQ", in_linear=False)
    name = f"{O_PROJ}.pre_quant_scale"
    made.put(name, ("BF16", (256,), bytes(512)))
    found = [item for item in findings(made, tmp_path) if item.rule != "smoothing-folded"]

    assert [(item.rule, item.severity) for item in found] == [("weight-not-compared", "note")]
    assert found[0].message == (f"what {name} tells of the smoothing is not positive everywhere")


def test_smoothquant_stands_beside_every_weight(tmp_path: Path) -> None:
    algo = "W8A8_SQ_PER_CHANNEL"

    def own(module: str, w_NK: torch.Tensor) -> torch.Tensor:
        return (w_NK.float() / factors("all", w_NK.shape[1]).float()).bfloat16()

    made = draft("llama", algo, encode=partial(encode, smooth=own))
    for tensors in made.shards.values():
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            module = name.removesuffix(".weight_scale")
            scale = factors("all", tensors[f"{module}.weight"][1][1])
            tensors[f"{module}.pre_quant_scale"] = ("BF16", tuple(scale.shape), raw(scale))

    assert findings(made, tmp_path) == []
