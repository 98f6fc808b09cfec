"""What a device is called, and how a backend with a mirror of its buffer works, without a GPU.

The stand-in's device memory is the CPU's, its kernels run in Triton's interpreter.
"""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from qconvert import backends
from qconvert.backends import Backend, Device, is_device_name, resolve
from qconvert.backends.mirror import MirrorBackend, joined
from qconvert.errors import ConvertError
from qconvert.slices import Cut, Layout, aligned
from qschema.formats import find

from .conversion import CHECKPOINTS, WRITABLE, Make, digests, randn, run
from .test_stacks import transposed_stacks

if not torch.cuda.is_available():
    # read when triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

_INTERPRETER = threading.Lock()


class StandIn(MirrorBackend):
    """A mirror in the memory of the CPU; counts what it allocates."""

    allocated: list[int]

    def __init__(self, slot: int = 0) -> None:
        super().__init__(torch.device("cpu"))
        self.allocated = []

    def _page_locked(self, nbytes: int) -> memoryview:
        self.allocated.append(nbytes)
        return memoryview(mmap.mmap(-1, nbytes))

    @contextmanager
    def _queue(self) -> Iterator[None]:
        # numpy, of Triton's interpreter, warns of overflow
        with _INTERPRETER, np.errstate(all="ignore"):
            yield

    def _wait(self) -> None:
        pass


def stand_in(slots: list[int] | None = None) -> Device:
    """Return a device of stand-ins, which lists the slots that it was asked for."""

    def make(slot: int) -> Backend:
        if slots is not None:
            slots.append(slot)
        return StandIn(slot)

    return Device("stand-in", 2, make, device_factor=StandIn.device_factor)


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU")


@interpreted
@pytest.mark.parametrize("algo", WRITABLE)
def test_a_mirror_gives_the_same_directory(tmp_path: Path, algo: str) -> None:
    """Several slices of a weight, each in the same mirror."""
    source = CHECKPOINTS / "llama"
    run(source, tmp_path / "cpu", algo=algo)
    run(source, tmp_path / "mirror", algo=algo, device=stand_in(), budget=1 << 20)

    assert digests(tmp_path / "mirror") == digests(tmp_path / "cpu")


@interpreted
@pytest.mark.parametrize("algo", [name for name in WRITABLE if find(name).stackable])
def test_transposed_stacks_are_turned_in_the_mirror(tmp_path: Path, make: Make, algo: str) -> None:
    source = make(transposed_stacks(), config={"model_type": "llama4_text", "hidden_size": 128})
    run(source, tmp_path / "cpu", algo=algo)
    run(source, tmp_path / "mirror", algo=algo, device=stand_in(), budget=1 << 20)

    assert digests(tmp_path / "mirror") == digests(tmp_path / "cpu")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["f16", "f32"])
@pytest.mark.parametrize("algo", ["FP8", "NVFP4", "W4A16_AWQ"])
def test_damage_is_counted_alike(tmp_path: Path, make: Make, algo: str, dtype: torch.dtype) -> None:
    weight = randn(256, 256, seed=1, dtype=dtype)
    weight[7, 30:33] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    source = make({"model.layers.0.mlp.down_proj.weight": weight})
    run(source, tmp_path / "cpu", algo=algo, allow_nonfinite=True)
    run(source, tmp_path / "mirror", algo=algo, device=stand_in(), allow_nonfinite=True)

    assert digests(tmp_path / "mirror") == digests(tmp_path / "cpu")


@interpreted
def test_the_largest_magnitude_without_native_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVFP4 takes it in a first pass, which then is the device's."""
    source = CHECKPOINTS / "llama"
    run(source, tmp_path / "cpu", algo="W4A16_NVFP4")
    monkeypatch.setenv("QKERNELS_NATIVE", "0")
    run(source, tmp_path / "mirror", algo="W4A16_NVFP4", device=stand_in(), budget=1 << 20)

    assert digests(tmp_path / "mirror") == digests(tmp_path / "cpu")


def test_the_mirror_is_as_large_as_the_buffer() -> None:
    """But for what lies behind it, and for padding."""
    backend = StandIn()

    buffer = backend.allocate(100_001)

    assert len(buffer) == 100_001
    assert backend.allocated == [aligned(100_001) + 64]
    assert backend._mirror.numel() == aligned(100_001) + 64


def test_the_default_budget_holds_the_slices_of_sixteen_workers() -> None:
    """Host memory, and as much of the device's; also of transposed weights."""
    for algo in WRITABLE:
        for dtype in ("BF16", "F32"):
            for transposed in {False, find(algo).stackable}:
                width = 4096 * (4 if dtype == "F32" else 2)
                layout = Layout(find(algo), dtype, 1 << 20, 4096, transposed)
                cut = Cut(layout, 0, StandIn.slice_nbytes // width)

                assert 16 * cut.footprint() * max(1.0, StandIn.device_factor) <= 1 << 30


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(0, 64)], [(0, 64)]),
        ([(0, 60), (64, 100)], [(0, 100)]),
        ([(128, 200), (0, 64)], [(0, 64), (128, 200)]),
        ([(256, 300), (64, 120), (320, 328), (128, 192)], [(64, 192), (256, 328)]),
    ],
)
def test_neighbours_are_copied_at_once(
    parts: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    assert joined([slice(*part) for part in parts]) == [slice(*part) for part in expected]


@interpreted
def test_every_worker_has_a_slot_of_its_own(tmp_path: Path) -> None:
    slots: list[int] = []
    run(CHECKPOINTS / "llama", tmp_path / "out", device=stand_in(slots), workers=3)

    assert {0, 1, 2} <= set(slots)


@pytest.mark.parametrize(
    "name", ["auto", "cpu", "cuda", "cuda:0", "cuda:7", "cuda:0,cuda:1", "cuda:1,cuda:0,cuda:12"]
)
def test_names_of_devices(name: str) -> None:
    assert is_device_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "gpu",
            "tpu",
            "CUDA",
            "cpu:0",
            "cuda:",
            "cuda:x",
            "cuda:-1",
            "cuda:\u0663",
            "cuda:0\n",
        ),
        *("cuda:0,", ",cuda:0", "cuda:0,1", "cuda:0, cuda:1", "cpu,cuda:0", "cuda,cuda:0"),
    ],
)
def test_what_is_no_name_of_a_device(name: str) -> None:
    assert not is_device_name(name)
    with pytest.raises(ConvertError, match="expected auto, cpu, cuda"):
        resolve(name, codecs=["FP8"])


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine that shows two GPUs; returns which of them backends were made for."""
    from qconvert.backends import cuda

    made: list[str] = []
    monkeypatch.setattr(backends, "count_gpus", lambda: 2)
    monkeypatch.setattr(cuda, "check_torch", lambda num_gpus: None)
    monkeypatch.setattr(cuda.CudaBackend, "__init__", lambda self, name: made.append(name))
    return made


@pytest.mark.parametrize(
    ("name", "expected", "made"),
    [
        ("cuda", "cuda:0,cuda:1", ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
        ("cuda:0", "cuda:0", ["cuda:0"] * 4),
        ("cuda:1", "cuda:1", ["cuda:1"] * 4),
        ("cuda:1,cuda:0", "cuda:1,cuda:0", ["cuda:1", "cuda:0", "cuda:1", "cuda:0"]),
        ("cuda:00,cuda:01", "cuda:0,cuda:1", ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
    ],
)
def test_workers_take_the_gpus_in_turn(
    two_gpus: list[str], name: str, expected: str, made: list[str]
) -> None:
    device = resolve(name, codecs=["FP8"])
    for slot in range(4):
        device.make(slot)

    assert device.name == expected
    assert device.num_gpus == len(expected.split(","))
    assert device.device_factor == 1.0
    assert two_gpus == made


def test_a_worker_at_least_for_every_gpu(
    two_gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cores, expected in ((1, 2), (2, 2), (12, 12), (64, 32)):
        monkeypatch.setattr(backends, "_num_cores", lambda cores=cores: cores)
        assert resolve("cuda", codecs=["FP8"]).default_workers == expected


@pytest.mark.parametrize("name", ["cuda:2", "cuda:0,cuda:2", "cuda:9999"])
def test_gpus_that_are_not_there(two_gpus: list[str], name: str) -> None:
    with pytest.raises(ConvertError, match=f"--device {name}: this machine shows 2 CUDA devices"):
        resolve(name, codecs=["FP8"])


@pytest.mark.parametrize("name", ["cuda:1,cuda:1", "cuda:0,cuda:1,cuda:01"])
def test_a_gpu_named_twice(two_gpus: list[str], name: str) -> None:
    with pytest.raises(ConvertError, match="cuda:1 more than once; name each GPU once"):
        resolve(name, codecs=["FP8"])


@pytest.mark.usefixtures("two_gpus")
def test_auto_takes_gpus_only_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("auto", codecs=["FP8"]).name == "cpu (native)"
    monkeypatch.setenv("QKERNELS_NATIVE", "0")

    assert resolve("auto", codecs=["FP8"]).name == "cuda:0,cuda:1"
    assert resolve("cpu", codecs=["FP8"]).name == "cpu (torch)"


def test_no_gpu_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "count_gpus", lambda: 0)

    with pytest.raises(ConvertError, match="--device cuda: this machine shows 0 CUDA devices"):
        resolve("cuda", codecs=["FP8"])


def test_a_torch_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "count_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ConvertError, match="sees 0 of 1 CUDA devices"):
        resolve("cuda:0", codecs=["FP8"])
    # several GPUs: torch is imported where it is used
    with pytest.raises(ConvertError, match="sees 0 of 2 CUDA devices"):
        resolve("cuda", codecs=["FP8"]).make(0)
