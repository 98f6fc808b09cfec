"""The bytes of a conversion on a real GPU: the same directory as on the CPU, report included."""

from pathlib import Path

import pytest
import torch

from qconvert.backends import count_gpus, resolve
from qconvert.convert import convert
from qconvert.planner import make_plan
from qschema.checkpoint import open_checkpoint
from qschema.formats import formats
from qschema.recipe import Recipe, Rule

from .test_pipeline import CHECKPOINTS, MODELS, Make, digests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus() == 0, reason="no CUDA device"),
]


def run(source: Path, out: Path, *, algo: str, device: str, workers: int, budget: int) -> None:
    checkpoint = open_checkpoint(source)
    convert(
        checkpoint,
        make_plan(checkpoint, Recipe(rules=[Rule(match="*", algo=algo)])),
        out,
        device=resolve(device, formats=[algo]),
        workers=workers,
        budget=budget,
        watch=lambda progress: None,
    )


@pytest.mark.parametrize("algo", list(formats()))
@pytest.mark.parametrize("model", MODELS)
def test_cuda_and_cpu_give_the_same_directory(tmp_path: Path, model: str, algo: str) -> None:
    source = CHECKPOINTS / model
    run(source, tmp_path / "cpu", algo=algo, device="cpu", workers=2, budget=64 << 20)
    run(source, tmp_path / "cuda", algo=algo, device="cuda:0", workers=2, budget=64 << 20)

    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("algo", list(formats()))
def test_large_weights_cut_differently_give_the_same_directory(
    tmp_path: Path, make: Make, algo: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(7)
    weights = {
        f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(3000, 2900, generator=generator).to(
            dtype
        )
        for layer in range(4)
    }
    source = make(weights)
    run(source, tmp_path / "cpu", algo=algo, device="cpu", workers=3, budget=16 << 20)
    run(source, tmp_path / "cuda", algo=algo, device="cuda", workers=4, budget=256 << 20)

    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")
