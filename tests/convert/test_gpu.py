"""The bytes of a conversion on a real GPU: the same directory as on the CPU, report included."""

from pathlib import Path

import pytest
import torch

from qconvert.backends import count_gpus, resolve
from qschema.formats import find

from .conversion import CHECKPOINTS, WRITABLE, Make, digests
from .conversion import run as convert
from .test_formats import CASES
from .test_stacks import transposed_stacks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus() == 0, reason="no CUDA device"),
]


def run(source: Path, out: Path, *, algo: str, device: str, workers: int, budget: int) -> None:
    found = resolve(device, codecs=[find(algo).codec])
    convert(source, out, algo=algo, device=found, workers=workers, budget=budget)


@pytest.mark.parametrize(("model", "algo"), CASES)
def test_cuda_and_cpu_give_the_same_directory(tmp_path: Path, model: str, algo: str) -> None:
    source = CHECKPOINTS / model
    run(source, tmp_path / "cpu", algo=algo, device="cpu", workers=2, budget=64 << 20)
    run(source, tmp_path / "cuda", algo=algo, device="cuda:0", workers=2, budget=64 << 20)

    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("algo", WRITABLE)
def test_large_weights_cut_differently_give_the_same_directory(
    tmp_path: Path, make: Make, algo: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(7)
    weights = {
        f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(3000, 2944, generator=generator).to(
            dtype
        )
        for layer in range(4)
    }
    source = make(weights)
    run(source, tmp_path / "cpu", algo=algo, device="cpu", workers=3, budget=16 << 20)
    run(source, tmp_path / "cuda", algo=algo, device="cuda", workers=4, budget=256 << 20)

    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")


@pytest.mark.parametrize("algo", [name for name in WRITABLE if find(name).stackable])
def test_transposed_stacks_give_the_same_directory(tmp_path: Path, make: Make, algo: str) -> None:
    source = make(transposed_stacks(), config={"model_type": "llama4_text", "hidden_size": 128})
    run(source, tmp_path / "cpu", algo=algo, device="cpu", workers=2, budget=64 << 20)
    run(source, tmp_path / "cuda", algo=algo, device="cuda", workers=4, budget=1 << 20)

    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")
