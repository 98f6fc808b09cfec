"""ModelOpt's own conversion of the fixtures is the oracle; what departs is listed here by name."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conversion import CHECKPOINTS, MODELS, run, tensors

GOLDENS = CHECKPOINTS.parent / "goldens"
# fixtures/oracle has the other formats: test_oracle.py
ALGOS = ("FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN")
CASES = [(model, algo) for model in MODELS for algo in ALGOS]


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def golden(model: str, algo: str) -> dict[str, tuple[list[int], str]]:
    """Return name -> (shape, sha256) of what ModelOpt wrote."""
    path = GOLDENS / f"{model}-{algo.lower()}"
    if (path / "tensors.json").exists():
        listed = json.loads((path / "tensors.json").read_text())
        return {name: (entry["shape"], entry["sha256"]) for name, entry in listed.items()}
    stored = load_file(path / "quantized.safetensors")
    return {name: (list(tensor.shape), sha256(tensor)) for name, tensor in stored.items()}


def hub_name(name: str) -> str:
    """Return the hub's name of a tensor that ModelOpt left under its in-memory name (Mixtral)."""
    name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
    if ".mlp.experts." not in name:
        return name
    name = name.replace(".mlp.experts.", ".block_sparse_moe.experts.")
    for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


@pytest.mark.parametrize(("model", "algo"), CASES)
def test_every_tensor_equals_modelopts(tmp_path: Path, model: str, algo: str) -> None:
    run(CHECKPOINTS / model, tmp_path / "out", algo=algo)

    ours = {
        name: (list(tensor.shape), sha256(tensor))
        for name, tensor in tensors(tmp_path / "out").items()
    }
    expected = golden(model, algo)
    if model == "mixtral":
        expected = {hub_name(name): value for name, value in expected.items()}
    assert {name: ours.get(name) for name in expected} == expected


def test_one_block_weights_depart_only_where_a_sibling_has_a_larger_scale(tmp_path: Path) -> None:
    """ModelOpt squeezes a one-block scale, so that q/k/v and gate/up share the largest of theirs.

    Where a weight has the largest scale of its group, or no group, the bytes agree all the same.
    Elsewhere these siblings are alike, so the errors are too; an outlier in one would cost the
    others up to all their bits.
    """
    source = tensors(CHECKPOINTS / "llama_block")
    run(CHECKPOINTS / "llama_block", tmp_path / "out", algo="FP8_PB_WO")
    ours = tensors(tmp_path / "out")
    theirs = load_file(GOLDENS / "llama_block-fp8_pb_wo" / "quantized.safetensors")

    for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down",)):
        names = [
            name for name in theirs if name.endswith("weight") and any(g in name for g in group)
        ]
        scales = {name: ours[f"{name}_scale"].item() for name in names}
        for name in names:
            assert list(ours[f"{name}_scale"].shape) == [1, 1, 1, 1]
            assert list(theirs[f"{name}_scale"].shape) == []
            assert theirs[f"{name}_scale"].item() == max(scales.values())
            if scales[name] == max(scales.values()):
                assert sha256(ours[name]) == sha256(theirs[name])
            else:
                errors = [
                    (found[name].double() * found[f"{name}_scale"].item() - source[name]).norm()
                    for found in (ours, theirs)
                ]
                assert errors[0] < 1.01 * errors[1]


@pytest.mark.parametrize(("model", "algo"), CASES)
def test_the_documents_equal_modelopts(tmp_path: Path, model: str, algo: str) -> None:
    run(CHECKPOINTS / model, tmp_path / "out", algo=algo)

    path = GOLDENS / f"{model}-{algo.lower()}"
    ours = (tmp_path / "out" / "hf_quant_config.json").read_text()
    theirs = (path / "hf_quant_config.json").read_text()
    if model == "mixtral" and algo == "FP8_PB_WO":
        # ModelOpt names the router as transformers 5 does in memory, not as the file does
        theirs = theirs.replace(".mlp.gate", ".block_sparse_moe.gate")
    assert json.dumps(json.loads(ours)) == json.dumps(json.loads(theirs))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    expected = json.loads((path / "config.json").read_text())["quantization_config"]
    assert list(config) == list(expected)
    assert config["quant_algo"] == expected["quant_algo"]
    assert config["ignore"] == json.loads(ours)["quantization"]["exclude_modules"]
