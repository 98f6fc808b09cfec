"""Where tensors are encoded: native CPU kernels, torch on the CPU, or a CUDA device.

Every backend gives the same bytes. A backend belongs to one worker thread; it owns no files.
"""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from qconvert.errors import ConvertError
from qkernels.native import available, supports
from qschema.formats import Format


@dataclass(frozen=True)
class Task:
    """A slice of rows to encode, in memory that the backend allocated. Sizes in bytes match shapes.

    `source` holds [rows, columns] of `dtype`, or [columns, rows] if `transposed`; `outputs` are
    codes and scales in the order of the declaration, transposed as the source is, and then
    `scratch` has room for source and outputs again. `global_scale` is that of the whole weight,
    where the format has one. `err2` and `ref2` receive one f64 per row: sum((w - dequantized)^2)
    and sum(w^2).
    """

    declared: Format
    dtype: str
    rows: int
    columns: int
    source: memoryview
    outputs: tuple[memoryview, ...]
    err2: memoryview
    ref2: memoryview
    global_scale: float = 1.0
    transposed: bool = False
    scratch: tuple[memoryview, ...] = ()


@dataclass(frozen=True)
class Counts:
    """What was found in a slice: NaN and Inf, and elements clipped by more than rounding."""

    num_nonfinite: int
    num_saturated: int


class Backend(Protocol):
    """One worker's way to encode. `slice_nbytes` is the source size of a slice that suits it."""

    slice_nbytes: int

    def allocate(self, nbytes: int) -> memoryview:
        """Return writable bytes for sources and outputs."""

    def quantize(self, task: Task) -> Counts:
        """Encode `task` into its outputs and statistics."""

    def amax(self, source: memoryview, *, dtype: str) -> float:
        """Return the largest finite magnitude in memory of F32, F16 or BF16; 0.0 of nothing."""

    def count_nonfinite(self, source: memoryview, *, dtype: str) -> int:
        """Return how many elements are NaN or Inf, of a dtype that has them (F32, F16, BF16)."""


@dataclass(frozen=True)
class Device:
    """What `--device` resolved to: its name, the workers that suit it, how to make a backend."""

    name: str
    default_workers: int
    make: Callable[[], Backend]
    # what a person should know about it
    remark: str = ""


def address(view: memoryview) -> int:
    """Return the address of the first byte of writable `view`; 0 for an empty one."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0


def resolve(device: str, *, codecs: list[str]) -> Device:
    """Return the device that `device` ("auto", "cpu", "cuda", "cuda:N") names on this machine.

    "auto" takes the native CPU kernels where they were built and know every codec of `codecs`:
    reads, digests and writes are the host's work in any case, and the weights need not cross PCIe
    (benchmarks/convert_gpu.csv). Else a GPU, else torch on the CPU. Raises ConvertError for what is
    not here.
    """
    kind, _, ordinal = device.partition(":")
    if kind != "cuda" and available() and all(supports(name) for name in codecs):
        from qconvert.backends.native import NativeBackend

        return Device("cpu (native)", _num_cores(), NativeBackend)
    num_gpus = count_gpus() if kind != "cpu" else 0
    if kind == "cuda" and int(ordinal or 0) >= num_gpus:
        raise ConvertError(f"--device {device}: this machine shows {num_gpus} CUDA devices")
    _need("torch")
    if num_gpus:
        _need("triton")
        from qconvert.backends.cuda import CudaBackend, check_torch

        check_torch()
        name = f"cuda:{int(ordinal or 0)}"
        return Device(name, min(8, _num_cores()), lambda: CudaBackend(name))
    from qconvert.backends.torch_cpu import TorchBackend

    remark = (
        "no native kernels (was there a C compiler at install?): torch encodes the same bytes, "
        "many times slower"
    )
    return Device("cpu (torch)", _num_cores(), TorchBackend, remark)


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise ConvertError(
            f"{package} is not installed, and there are no native kernels to do without it: "
            "pip install 'qconvert[convert]', or install again with a C compiler at hand"
        )


def count_gpus() -> int:
    """Return how many CUDA devices the driver shows, without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
