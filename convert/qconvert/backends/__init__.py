"""Where tensors are encoded: native CPU kernels, torch on the CPU, or CUDA devices.

Every backend gives the same bytes. A backend belongs to one worker thread; it owns no files.
"""

import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from qconvert.errors import ConvertError, some
from qkernels.native import available, supports
from qschema.formats import Format

# enough for the copy engines; sixteen workers' footprints fit the default budget, also those of
# transposed weights, which have source and outputs twice
GPU_SLICE_NBYTES = 16 << 20
CPU_SLICE_NBYTES = 4 << 20
# more threads than these wait for one interpreter (benchmarks/tried.csv)
_CORES_PER_PROCESS = 4
# a process starts in a third of a second, or in five with torch and a CUDA context
_CPU_PROCESS_NBYTES = 2 << 30
_GPU_PROCESS_NBYTES = 50 << 30
DEVICE_PATTERN = re.compile(r"auto|cpu|cuda|cuda:\d{1,4}(,cuda:\d{1,4})*", re.ASCII)


@dataclass(frozen=True)
class Task:
    """A slice of rows to encode, in memory that the backend allocated. Sizes in bytes match shapes.

    Its parts lie at multiples of 64 bytes and don't overlap; the padding behind a part is nobody's.
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
    """One worker's way to encode. `slice_nbytes` is the source size of a slice that suits it.

    `allocate` is called once, before all else. On a GPU it also takes all the device memory that
    the backend will have: `Device.device_factor` times as much, and `quantize` allocates nothing.
    """

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
    # of the worker with this number; worker s has GPU s modulo their number
    make: Callable[[int], Backend]
    # the source size of a slice that suits it
    slice_nbytes: int = CPU_SLICE_NBYTES
    # what a person should know about it
    remark: str = ""
    # bytes of device memory per byte of a worker's buffer, at most; all workers' are in the budget
    device_factor: float = 0.0
    num_gpus: int = 0
    # what to resolve in each of several processes, where those do better than one, and the bytes of
    # source from which on a process is worth its start
    processes: tuple[str, ...] = ()
    process_nbytes: int = 0


def is_device_name(text: str) -> bool:
    """Return True for what `resolve` takes: auto, cpu, cuda, cuda:N or cuda:N,cuda:M and so on."""
    return DEVICE_PATTERN.fullmatch(text) is not None


def address(view: memoryview) -> int:
    """Return the address of the first byte of writable `view`; 0 for an empty one."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0


def resolve(device: str, *, codecs: list[str]) -> Device:
    """Return the device that `device` names on this machine; "cuda" is every GPU it shows.

    "auto" takes the native CPU kernels where they were built and know every codec of `codecs`:
    reads, digests and writes are the host's work in any case, and the weights need not cross PCIe
    (benchmarks/convert_gpu.csv). Else all GPUs, else torch on the CPU. Raises ConvertError for what
    is not here, and for what is no name of a device.
    """
    wanted = _wanted_gpus(device)
    if not device.startswith("cuda") and available() and all(supports(name) for name in codecs):
        from qconvert.backends.native import NativeBackend

        return Device(
            "cpu (native)",
            _num_cores(),
            NativeBackend,
            processes=_several("cpu", _num_cores() // _CORES_PER_PROCESS),
            process_nbytes=_CPU_PROCESS_NBYTES,
        )
    num_gpus = count_gpus() if device != "cpu" else 0
    if device.startswith("cuda") and max(wanted, default=0) >= num_gpus:
        raise ConvertError(f"--device {device}: this machine shows {num_gpus} CUDA devices")
    _need("torch")
    if num_gpus:
        _need("triton")
        ordinals = wanted or list(range(num_gpus))
        names = tuple(f"cuda:{ordinal}" for ordinal in ordinals)
        return Device(
            ",".join(names),
            # a worker reads, hashes and writes, most of its time; each GPU needs one at least
            max(len(names), min(16 * len(names), _num_cores())),
            _gpus(names),
            slice_nbytes=GPU_SLICE_NBYTES,
            device_factor=1.0,
            num_gpus=len(names),
            processes=names if len(names) > 1 else (),
            process_nbytes=_GPU_PROCESS_NBYTES,
        )
    from qconvert.backends.torch_cpu import TorchBackend

    remark = (
        "no native kernels (was there a C compiler at install?): torch encodes the same bytes, "
        "many times slower"
    )
    return Device("cpu (torch)", _num_cores(), TorchBackend, remark=remark)


def _several(name: str, number: int) -> tuple[str, ...]:
    """Return `name` as often as `number` says, and nothing for less than two."""
    return (name,) * number if number > 1 else ()


def _gpus(names: tuple[str, ...]) -> Callable[[int], Backend]:
    """Return what makes backends on these GPUs in turn; torch is imported with the first one."""
    if len(names) == 1:
        # else the workers would wait for it
        _check_gpus(names)

    def make(slot: int) -> Backend:
        from qconvert.backends.cuda import CudaBackend

        _check_gpus(names)
        return CudaBackend(names[slot % len(names)])

    return make


def _check_gpus(names: tuple[str, ...]) -> None:
    from qconvert.backends.cuda import check_torch

    check_torch(max(int(name.rpartition(":")[2]) for name in names) + 1)


def _wanted_gpus(device: str) -> list[int]:
    """Return the ordinals in `device`, none where it doesn't say which."""
    if not is_device_name(device):
        raise ConvertError(
            f"--device {device}: expected auto, cpu, cuda (every GPU), cuda:N, or a list of GPUs "
            "like cuda:0,cuda:1"
        )
    ordinals = [int(ordinal) for ordinal in re.findall(r"\d+", device)]
    repeated = sorted({ordinal for ordinal in ordinals if ordinals.count(ordinal) > 1})
    if repeated:
        names = some([f"cuda:{ordinal}" for ordinal in repeated])
        raise ConvertError(f"--device {device}: {names} more than once; name each GPU once")
    return ordinals


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
