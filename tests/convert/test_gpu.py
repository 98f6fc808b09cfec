"""The bytes of a conversion on a real GPU: the same directory as on the CPU, report included."""

import gc
from dataclasses import replace
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


def large(make: Make, num_layers: int) -> Path:
    """Return a checkpoint of weights that take several slices each."""
    generator = torch.Generator().manual_seed(8)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(num_layers)]
    return make({name: torch.randn(4096, 4096, generator=generator).bfloat16() for name in names})


@pytest.mark.parametrize("algo", WRITABLE)
def test_slices_of_one_shape_again_and_again(tmp_path: Path, make: Make, algo: str) -> None:
    """The first is run step by step, the second captured as a graph, the others replay it."""
    source = large(make, 3)
    run(source, tmp_path / "cpu", algo=algo, device="cpu", workers=2, budget=64 << 20)
    run(source, tmp_path / "cuda", algo=algo, device="cuda:0", workers=1, budget=16 << 20)

    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")


@pytest.mark.parametrize("algo", ["FP8_PB_WO", "NVFP4"])
def test_device_memory_stays_within_the_budget(tmp_path: Path, make: Make, algo: str) -> None:
    """Weights of 128 MiB in all, a budget of 64 MiB; the allocator rounds to 2 MiB at most."""
    source, budget = large(make, 4), 64 << 20
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(source, tmp_path / "cuda", algo=algo, device="cuda:0", workers=4, budget=budget)

    assert torch.cuda.max_memory_allocated() - before <= budget + 4 * (2 << 20)
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_memory_is_unlocked_when_a_conversion_ends(tmp_path: Path, make: Make) -> None:
    """Else the second one may find its addresses locked already."""
    source = large(make, 2)
    for turn in range(3):
        out = tmp_path / f"cuda{turn}"
        run(source, out, algo="FP8", device="cuda:0", workers=2, budget=64 << 20)


@pytest.mark.skipif(count_gpus() < 2, reason="one CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:0,cuda:1", "cuda:1"])
def test_several_gpus_give_the_same_directory(tmp_path: Path, make: Make, name: str) -> None:
    source = large(make, 4)
    run(source, tmp_path / "cpu", algo="NVFP4", device="cpu", workers=2, budget=64 << 20)
    run(source, tmp_path / "cuda", algo="NVFP4", device=name, workers=4, budget=256 << 20)

    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")
    assert torch.cuda.memory_reserved(1) > 0


@pytest.mark.skipif(count_gpus() < 2, reason="one CUDA device")
@pytest.mark.parametrize("algo", ["FP8_PB_WO", "NVFP4"])
def test_a_process_for_each_gpu_gives_the_same_directory(tmp_path: Path, algo: str) -> None:
    """Shards are divided among them; above there is only one."""
    source = CHECKPOINTS / "mixtral"
    each = replace(resolve("cuda", codecs=[find(algo).codec]), process_nbytes=0)
    run(source, tmp_path / "cpu", algo=algo, device="cpu", workers=2, budget=64 << 20)
    run(source, tmp_path / "cuda", algo=algo, device=each, workers=4, budget=256 << 20)

    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")


@pytest.mark.parametrize("algo", [name for name in WRITABLE if find(name).stackable])
def test_transposed_stacks_give_the_same_directory(tmp_path: Path, make: Make, algo: str) -> None:
    source = make(transposed_stacks(), config={"model_type": "llama4_text", "hidden_size": 128})
    run(source, tmp_path / "cpu", algo=algo, device="cpu", workers=2, budget=64 << 20)
    run(source, tmp_path / "cuda", algo=algo, device="cuda", workers=4, budget=1 << 20)

    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")
