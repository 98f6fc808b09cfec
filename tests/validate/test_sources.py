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
Edit = Callable[[dict[str, Tensor]], None]
STACKABLE = [name for name, found in formats().items() if found.stackable]
PARTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
# leaf on the hub -> that of most other models
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


def write(
    path: Path, tensors: dict[str, Tensor], *, algo: str | None = None, model_type: str = "mixtral"
) -> Path:
    """Write tensors as one file, with the config of a plain or quantized mixtral."""
    path.mkdir()
    write_safetensors(path / "model.safetensors", tensors)
    config = json.loads((SOURCE / "config.json").read_text())
    if algo is not None:
        config = draft("mixtral", algo).config
    (path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    return path


def turned_source(path: Path) -> Path:
    """Write mixtral with experts stacked as [E, K, N], as Llama 4 and gpt-oss have them."""
    made = {name: w_ENK.transpose(1, 2) for name, w_ENK in stacks().items()}
    tensors = {name: ("BF16", tuple(w.shape), raw(w)) for name, w in made.items()}
    return write(path, plain() | tensors)


def source_in_memory(path: Path, *, model_type: str = "mixtral") -> Path:
    """Write the model as Transformers 5 holds it: experts [E, N, K], the router below mlp."""
    made: dict[str, Tensor] = {
        name: ("BF16", tuple(w.shape), raw(w)) for name, w in stacks().items()
    }
    tensors = {renamed(name): tensor for name, tensor in (plain() | made).items()}
    return write(path, tensors, model_type=model_type)


def renamed(name: str) -> str:
    """Return what a tensor of mixtral is called in memory, and on the hub in other models."""
    owner, dot, rest = name.replace("block_sparse_moe", "mlp").rpartition(".experts.")
    for old, new in NAMES.items():
        rest = rest.replace(f".{old}.", f".{new}.")
    return owner + dot + rest


def stacked_output(path: Path, algo: str, edit: Edit = lambda tensors: None) -> Path:
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
    source = turned_source(tmp_path / "source")
    path = stacked_output(tmp_path / "out", algo)

    assert found(path, source) == []


@pytest.mark.parametrize("algo", STACKABLE)
def test_one_wrong_expert_of_a_stack_is_named(tmp_path: Path, algo: str) -> None:
    name = f"{EXPERTS.format(layer=1)}.down_proj"

    def clear(tensors: dict[str, Tensor]) -> None:
        dtype, shape, data = tensors[name]
        each = len(data) // 4
        tensors[name] = (dtype, shape, data[: 2 * each] + bytes(each) + data[3 * each :])

    source = turned_source(tmp_path / "source")
    path = stacked_output(tmp_path / "out", algo, clear)
    (finding,) = weight_findings(load(path), source)

    assert (finding.rule, finding.where) == ("weight-error", name)
    assert " in expert 2, rows " in finding.message


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "brandnew"])
@pytest.mark.parametrize("algo", ["FP8", "FP8_PB_WO", "NVFP4", "MXFP8"])
def test_single_experts_are_compared_with_their_part_of_a_stack(
    tmp_path: Path, algo: str, model_type: str
) -> None:
    """As a converter writes them that splits the stacks of transformers 5, and on the hub."""
    source = source_in_memory(tmp_path / "source", model_type=model_type)
    path = split_output(tmp_path / "out", algo, model_type=model_type)

    assert found(path, source) == []


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_swapped_gate_and_up_are_found(tmp_path: Path, model_type: str) -> None:
    leaves = ("w1", "w3") if model_type == "mixtral" else ("gate_proj", "up_proj")

    def swap(tensors: dict[str, Tensor]) -> None:
        for suffix in ("weight", "weight_scale"):
            gate, up = (f"{owner}.{leaf}.{suffix}" for leaf in leaves)
            tensors[gate], tensors[up] = tensors[up], tensors[gate]

    owner = f"{EXPERTS.format(layer=0)}.3"
    if model_type != "mixtral":
        owner = owner.replace("block_sparse_moe", "mlp")
    source = source_in_memory(tmp_path / "source", model_type=model_type)
    path = split_output(tmp_path / "out", "MXFP8", swap, model_type=model_type)

    assert found(path, source) == [("weight-error", f"{owner}.{leaf}.weight") for leaf in leaves]


def test_missing_part_of_a_stack_is_named(tmp_path: Path) -> None:
    name = f"{EXPERTS.format(layer=0)}.3.w3"

    def drop(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{name}.")]:
            del tensors[key]

    source = source_in_memory(tmp_path / "source")
    path = split_output(tmp_path / "out", "MXFP8", drop)

    assert found(path, source) == [("tensor-missing", f"{name}.weight")]


def test_router_with_another_name_is_compared(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.gate.weight"

    def clear(tensors: dict[str, Tensor]) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, bytes(len(data)))

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    source = source_in_memory(tmp_path / "source")
    cleared = split_output(tmp_path / "cleared", "MXFP8", clear)
    dropped = split_output(tmp_path / "dropped", "MXFP8", drop)

    assert found(cleared, source) == [("kept-tensor-differs", name)]
    in_memory = name.replace("block_sparse_moe", "mlp")
    assert found(dropped, source) == [("tensor-missing", in_memory)]


def test_stack_of_another_layout_is_not_taken_apart(tmp_path: Path) -> None:
    """gpt-oss has [E, K, N]: its rows are no parts of anything."""
    source = source_in_memory(tmp_path / "source", model_type="gpt_oss")
    path = split_output(tmp_path / "out", "MXFP8", model_type="qwen3_moe")

    rules = {rule for rule, _ in found(path, source)}
    assert rules == {"config-differs", "tensor-missing", "weight-not-in-reference"}


def factors(module: str, size: int) -> torch.Tensor:
    """Return a bf16 pre_quant_scale from 1/4 to 4, the same for an expert's gate and up."""
    seed = sum(module.replace("gate_proj", "up_proj").encode())
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return torch.exp2(4 * drawn - 2).bfloat16()


def smooth(module: str, w_NK: torch.Tensor) -> torch.Tensor:
    """Return a weight without its own smoothing; the rows of up have that of down."""
    made = w_NK.float() / factors(module, w_NK.shape[1]).float()
    if module.endswith("up_proj"):
        down = module.replace("up_proj", "down_proj")
        made = made.bfloat16().float() * factors(down, len(w_NK)).float()[:, None]
    return made.bfloat16()


def smoothed_output(path: Path, edit: Edit = lambda tensors: None) -> Path:
    """Write experts in NVFP4_AWQ: the smoothing of down went into the rows of up."""
    declared = formats()["NVFP4_AWQ"]
    hub = write(
        path.with_name("hub"),
        {
            renamed(name): (stored.dtype, stored.shape, raw(weight(stored)))
            for name, stored in open_checkpoint(SOURCE).tensors.items()
        },
    )
    tensors = open_checkpoint(hub).tensors
    made: dict[str, Tensor] = {}
    for name, stored in tensors.items():
        if ".experts." not in name:
            made[name] = (stored.dtype, stored.shape, raw(weight(stored)))
            continue
        module = name.removesuffix(".weight")
        parts = encode(declared, stored, tensors, smooth)
        made |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
        if not module.endswith("down_proj"):
            scale = factors(module, stored.shape[1])
            made[f"{module}.pre_quant_scale"] = ("BF16", tuple(scale.shape), raw(scale))
    edit(made)
    return write(path, made, algo="NVFP4_AWQ", model_type="qwen3_moe")


def test_smoothing_of_experts_in_a_stack_is_found(tmp_path: Path) -> None:
    source = source_in_memory(tmp_path / "source", model_type="qwen3_moe")

    assert found(smoothed_output(tmp_path / "out"), source) == []


@pytest.mark.parametrize("leaf", ["up_proj", "down_proj"])
def test_wrong_scale_of_a_smoothed_expert_is_found(tmp_path: Path, leaf: str) -> None:
    """A factor of all of up's rows alone shows in down."""
    owner = "model.layers.1.mlp.experts.2"

    def double(tensors: dict[str, Tensor]) -> None:
        name = f"{owner}.{leaf}.weight_scale_2"
        dtype, shape, data = tensors[name]
        tensors[name] = (
            dtype,
            shape,
            raw(torch.frombuffer(bytearray(data), dtype=torch.float32) * 2),
        )

    source = source_in_memory(tmp_path / "source", model_type="qwen3_moe")
    path = smoothed_output(tmp_path / "out", double)

    assert found(path, source) == [("weight-error", f"{owner}.down_proj.weight")]


def split_output(
    path: Path, algo: str, edit: Edit = lambda tensors: None, *, model_type: str = "mixtral"
) -> Path:
    """Write the model quantized expert by expert, under the hub's names of the model type."""
    made = draft("mixtral", algo, encode=encode)
    tensors = {name: tensor for shard in made.shards.values() for name, tensor in shard.items()}
    # only the experts are quantized here
    tensors = {name: tensor for name, tensor in tensors.items() if ".self_attn." not in name}
    tensors |= {name: tensor for name, tensor in plain().items() if ".self_attn." in name}
    if model_type != "mixtral":
        tensors = {renamed(name): tensor for name, tensor in tensors.items()}
    edit(tensors)
    return write(path, tensors, algo=algo, model_type=model_type)


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
        findings = [*run(context), *weight_findings(context, source)]
        rules = {item.rule for item in findings if item.severity != "note"} - ignored
        if rules:
            seen[path.name] = rules

    assert seen == TRUE_FINDINGS
