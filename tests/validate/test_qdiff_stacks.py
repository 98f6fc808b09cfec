"""qdiff on experts that are stacked in one tensor [E, K, N], and stay so when quantized."""

from pathlib import Path

import pytest
import torch
from catalogue import PB_WO
from checkpoints import Draft, Tensor, draft, f32
from encoded import raw
from qdiff_edits import weights_of

from qkernels import kernels_for
from qschema.formats import find
from qvalidate.diff.comparison import compare


@pytest.mark.parametrize("algo", ["FP8", "NVFP4"])
def test_stacked_experts_are_compared_one_by_one(tmp_path: Path, algo: str) -> None:
    """Experts of Llama 4 stay stacked, [E, K, N]; their scales are transposed with them."""
    source, made = stacked_source(tmp_path / "source"), stacked_draft(algo)
    path = made.write(tmp_path / "out")
    found = {error.name: error for error in weights_of(compare(source, path)).differing}
    stacks = {name: error for name, error in found.items() if name.endswith("experts.down_proj")}

    assert set(stacks) == {
        f"model.layers.{layer}.block_sparse_moe.experts.down_proj" for layer in (0, 1)
    }
    assert all(0 < (error.relative_error or 0) < 0.13 for error in stacks.values())


def stacked_experts(layer: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer)
    return torch.randn((4, 128, 256), generator=generator).to(torch.bfloat16)


def stacked_source(out: Path) -> Path:
    """Write a small Mixtral whose only experts are stacks [E, K, N] of down_proj."""
    made = draft("mixtral", PB_WO)
    made.config.pop("quantization_config")
    made.hf_quant_config = {}
    made.shards, made.index = {"model.safetensors": {}}, None
    for layer in (0, 1):
        data = raw(stacked_experts(layer))
        name = f"model.layers.{layer}.block_sparse_moe.experts.down_proj"
        made.shards["model.safetensors"][name] = ("BF16", (4, 128, 256), data)
    return made.write(out)


def stacked_draft(algo: str) -> Draft:
    """Return the same experts in the format `algo`, with one global scale for all of a layer."""
    codec = kernels_for(find(algo).codec)
    made = draft("mixtral", algo)
    made.shards, made.index = {"model.safetensors": {}}, None
    for layer in (0, 1):
        experts = [expert.T.contiguous() for expert in stacked_experts(layer)]
        largest = max(experts, key=lambda expert: float(codec.amax_torch(expert)))
        assert codec.global_scale is not None
        scale = codec.quantize(largest)[codec.global_scale.suffix]
        parts = [codec.quantize(expert, global_scale=scale) for expert in experts]
        name = f"model.layers.{layer}.block_sparse_moe.experts.down_proj"
        for suffix, (dtype, _) in find(algo).outputs(rows=256, columns=128).items():
            made.shards["model.safetensors"][name if suffix == "weight" else f"{name}_{suffix}"] = (
                _stacked(suffix, dtype, parts)
            )
    return made


def _stacked(suffix: str, dtype: str, parts: list[dict[str, torch.Tensor]]) -> Tensor:
    if suffix not in parts[0]:
        return dtype, (), f32(0.25)
    if not parts[0][suffix].shape:
        return dtype, (), raw(parts[0][suffix])
    turned = torch.stack([part[suffix].view(torch.uint8).T.contiguous() for part in parts])
    return dtype, tuple(turned.shape), raw(turned)
