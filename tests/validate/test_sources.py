"""Experts in other arrangements than the source's, and ModelOpt's own exports."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import FIXTURES, Tensor, draft, write_safetensors
from encoded import encode, raw, weight

from qkernels import kernels_for
from qschema.checkpoint import open_checkpoint
from qschema.formats import formats
from qvalidate.loader import load
from qvalidate.weights import weight_findings

SOURCE = FIXTURES / "mixtral"
EXPERTS = "model.layers.{layer}.block_sparse_moe.experts"
STACKABLE = [name for name, found in formats().items() if found.stackable]
PARTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def plain() -> dict[str, Tensor]:
    """Return mixtral's tensors without its experts."""
    tensors = open_checkpoint(SOURCE).tensors
    return {
        name: (stored.dtype, stored.shape, raw(weight(stored)))
        for name, stored in tensors.items()
        if ".experts." not in name
    }


def stacks() -> dict[str, torch.Tensor]:
    """Return name -> experts of each layer and projection, [E, N, K]."""
    tensors = open_checkpoint(SOURCE).tensors
    found = {}
    for layer in (0, 1):
        for stack, parts in PARTS.items():
            owner = EXPERTS.format(layer=layer)
            found[f"{owner}.{stack}"] = torch.stack(
                [
                    torch.cat(
                        [weight(tensors[f"{owner}.{expert}.{part}.weight"]) for part in parts]
                    )
                    for expert in range(4)
                ]
            )
    return found


def write(path: Path, tensors: dict[str, Tensor], *, algo: str | None = None) -> Path:
    """Write tensors as one file, with the config of a plain or quantized mixtral."""
    path.mkdir()
    write_safetensors(path / "model.safetensors", tensors)
    config = json.loads((SOURCE / "config.json").read_text())
    if algo is not None:
        config = draft("mixtral", algo).config
    (path / "config.json").write_text(json.dumps(config))
    return path


def stacked_source(path: Path, *, turned: bool) -> Path:
    """Write mixtral with stacked experts, [E, N, K] or turned to [E, K, N]."""
    made = {name: w_ENK.transpose(1, 2) if turned else w_ENK for name, w_ENK in stacks().items()}
    tensors = {name: ("BF16", tuple(w.shape), raw(w)) for name, w in made.items()}
    return write(path, plain() | tensors)


def stacked_output(path: Path, algo: str, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """Write mixtral's experts as ModelOpt stacks them, one scale of the weight for all of them."""
    codec, declared = kernels_for(formats()[algo].codec), formats()[algo]
    made = plain()
    for name, w_ENK in stacks().items():
        assert codec.global_scale is not None
        scale = codec.quantize(w_ENK.reshape(-1, w_ENK.shape[2]))[codec.global_scale.suffix]
        parts = codec.quantize(w_ENK, global_scale=scale.expand(len(w_ENK)))
        for spec in declared.tensors:
            if spec.role == "input":
                made[f"{name}_{spec.suffix}"] = ("F32", (), raw(torch.tensor(0.25)))
                continue
            tensor = scale if spec.role == "global" else parts[spec.suffix].transpose(1, 2)
            target = name if spec.role == "codes" else f"{name}_{spec.suffix}"
            made[target] = (spec.dtype, tuple(tensor.shape), raw(tensor))
    edit(made)
    return write(path, made, algo=algo)


def found(path: Path, reference: Path) -> list[tuple[str, str]]:
    return [(item.rule, item.where) for item in weight_findings(load(path), reference)]


@pytest.mark.parametrize("algo", STACKABLE)
def test_stack_is_compared_with_a_stack(tmp_path: Path, algo: str) -> None:
    source = stacked_source(tmp_path / "source", turned=True)
    path = stacked_output(tmp_path / "out", algo, lambda tensors: None)

    assert found(path, source) == []


@pytest.mark.parametrize("algo", STACKABLE)
def test_one_wrong_expert_of_a_stack_is_named(tmp_path: Path, algo: str) -> None:
    name = f"{EXPERTS.format(layer=1)}.down_proj"

    def clear(tensors: dict[str, Tensor]) -> None:
        dtype, shape, data = tensors[name]
        each = len(data) // 4
        tensors[name] = (dtype, shape, data[: 2 * each] + bytes(each) + data[3 * each :])

    source = stacked_source(tmp_path / "source", turned=True)
    path = stacked_output(tmp_path / "out", algo, clear)
    (finding,) = weight_findings(load(path), source)

    assert (finding.rule, finding.where) == ("weight-error", name)
    assert " in expert 2, rows " in finding.message


@pytest.mark.parametrize("algo", ["FP8", "FP8_PB_WO", "NVFP4", "MXFP8"])
def test_single_experts_are_compared_with_their_part_of_a_stack(tmp_path: Path, algo: str) -> None:
    """As a converter writes them that splits the stacks of transformers 5."""
    source = stacked_source(tmp_path / "source", turned=False)
    path = split_output(tmp_path / "out", algo, lambda tensors: None)

    assert found(path, source) == []


def test_swapped_gate_and_up_are_found(tmp_path: Path) -> None:
    owner = f"{EXPERTS.format(layer=0)}.3"

    def swap(tensors: dict[str, Tensor]) -> None:
        for suffix in ("weight", "weight_scale"):
            gate, up = (f"{owner}.{leaf}_proj.{suffix}" for leaf in ("gate", "up"))
            tensors[gate], tensors[up] = tensors[up], tensors[gate]

    source = stacked_source(tmp_path / "source", turned=False)
    path = split_output(tmp_path / "out", "MXFP8", swap)

    assert found(path, source) == [
        ("weight-error", f"{owner}.gate_proj.weight"),
        ("weight-error", f"{owner}.up_proj.weight"),
    ]


def test_missing_part_of_a_stack_is_named(tmp_path: Path) -> None:
    name = f"{EXPERTS.format(layer=0)}.3.up_proj"

    def drop(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{name}.")]:
            del tensors[key]

    source = stacked_source(tmp_path / "source", turned=False)
    path = split_output(tmp_path / "out", "MXFP8", drop)

    assert found(path, source) == [("tensor-missing", f"{name}.weight")]


def split_output(path: Path, algo: str, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """Write mixtral quantized expert by expert, under the names of the stacks' parts."""
    made = draft("mixtral", algo, encode=encode)
    tensors = {name: tensor for shard in made.shards.values() for name, tensor in shard.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, dot, rest = name.partition(".experts.")
        if dot:
            expert, leaf, suffix = rest.split(".", 2)
            name = f"{owner}.experts.{expert}.{NAMES[leaf]}.{suffix}"
        elif name.endswith(("_scale", "_scale_2")) or ".self_attn." in name:
            continue
        renamed[name] = tensor
    # only the experts are quantized here
    renamed |= {name: tensor for name, tensor in plain().items() if ".self_attn." in name}
    edit(renamed)
    return write(path, renamed, algo=algo)


# what is wrong with them, by the rules and against their sources; notes aside
TRUE_FINDINGS = {
    # a weight of zeros has scale 0.0 and NaN codes
    "llama_adv-fp8": {"nonpositive-scale", "weight-error"},
    # scales of one block without their dimensions
    "llama_adv-fp8_pb_wo": {"wrong-shape"},
    "llama_s-fp8_pb_wo": {"wrong-shape"},
    # and names that are not the source's
    "mixtral-fp8_pb_wo": {"wrong-shape", "tensor-missing", "weight-not-in-reference"},
    # not declared
    "llama_s-nvfp4_svdquant": {"unknown-algo"},
}


@pytest.mark.skipif("MODELOPT_GOLDENS" not in os.environ, reason="MODELOPT_GOLDENS is not set")
def test_modelopts_own_exports_raise_no_false_alarm() -> None:
    """All 43 with weights: the defects that are known, and nothing else."""
    from qvalidate.rules import run

    folder = Path(os.environ["MODELOPT_GOLDENS"])
    # the folders hold no tokenizer, and what the calibration saw
    ignored = {"tokenizer-missing", "stray-safetensors", "vllm-stray-weights"}
    seen = {}
    for path in sorted(folder.glob("*-*")):
        if not (path / "model.safetensors").is_file():
            continue
        context, source = load(path), folder / "bf16" / path.name.partition("-")[0]
        findings = [*run(context, engine=None), *weight_findings(context, source)]
        rules = {item.rule for item in findings if item.severity != "note"} - ignored
        if rules:
            seen[path.name] = rules

    assert seen == TRUE_FINDINGS
