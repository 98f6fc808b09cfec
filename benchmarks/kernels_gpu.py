"""Time the Triton kernels on a CUDA GPU against the device's own copy bandwidth.

    python benchmarks/kernels_gpu.py [--csv kernels_gpu.csv] [--rounds 30] [--sweep]

First the gate: triton and torch give the same bytes, or nothing is timed. Then rounds of one call
each of a device copy and of every case, so that a slow moment falls on all; the median of the
rounds counts. GB/s counts bytes read and written once. A time is the GPU's (CUDA events, with the
launch already queued); the L2 cache holds unrelated clean data at the start of each call. --sweep
instead tries launch choices and prints them, best first.
"""

import argparse
import datetime
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from rows import append, commit

import qkernels
from qkernels import _triton_fp8
from qkernels._triton_fp8 import Config

SHAPES = [(8192, 28672), (4096, 4096)]
COPY_NBYTES = 4 << 30
FLUSH_NBYTES = 512 << 20
# about 1 ms, in which the host queues what is timed
QUEUE_CYCLES = 2_000_000


@dataclass
class Row:
    """One line of the CSV."""

    date: str
    commit: str
    op: str
    shape: str
    dtype: str
    gpu: str
    torch: str
    triton: str
    us: float
    gb_per_s: float
    share_of_copy: float


@dataclass
class Case:
    """One timed call and the bytes that it reads and writes."""

    op: str
    shape: str
    nbytes: int
    call: Callable[[], object]


class Timer:
    """Times single calls on the GPU."""

    def __init__(self) -> None:
        self.flush = torch.zeros(FLUSH_NBYTES // 4, device="cuda")

    def us(self, call: Callable[[], object]) -> float:
        """Microseconds that the GPU spends in one call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # reading evicts the rest and leaves nothing to write back
        self.flush.amax()
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1000


def medians_us(cases: list[Case], rounds: int) -> list[float]:
    """Median time of each case over interleaved rounds, after three untimed ones."""
    timer = Timer()
    for case in cases:
        for _ in range(3):
            case.call()
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for samples, case in zip(times, cases, strict=True):
            samples.append(timer.us(case.call))
    return [statistics.median(samples) for samples in times]


def random_weight(n: int, k: int) -> torch.Tensor:
    """Normal-distributed bf16."""
    return torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02


def nbytes(*tensors: torch.Tensor) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def copy_case() -> Case:
    """The yardstick: torch's copy of a tensor far larger than the cache."""
    source = torch.zeros(COPY_NBYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Case("copy", str(COPY_NBYTES), 2 * COPY_NBYTES, lambda: target.copy_(source))


def kernel_cases() -> Iterator[Case]:
    """Quantize and dequantize of every format at every shape."""
    for name, (n, k) in itertools.product(qkernels.formats(), SHAPES):
        kernels = qkernels.kernels_for(name)
        w = random_weight(n, k)
        tensors = kernels.quantize_triton(w)
        size = nbytes(w, *tensors.values())

        def quantize(kernels: qkernels.Kernels = kernels, w: torch.Tensor = w) -> object:
            return kernels.quantize_triton(w)

        def dequantize(
            kernels: qkernels.Kernels = kernels, tensors: dict[str, torch.Tensor] = tensors
        ) -> object:
            return kernels.dequantize_triton(tensors)

        yield Case(f"{name}.quantize", f"{n}x{k}", size, quantize)
        yield Case(f"{name}.dequantize", f"{n}x{k}", size, dequantize)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True for equal shapes, dtypes and bytes."""
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def gate() -> list[str]:
    """What differs between triton and torch; speed means nothing unless this is empty."""
    failures = []
    for name, (n, k) in itertools.product(qkernels.formats(), SHAPES):
        kernels = qkernels.kernels_for(name)
        w = random_weight(n, k)
        actual, expected = kernels.quantize_triton(w), kernels.quantize_torch(w)
        failures += [
            f"{name} {n}x{k} {suffix}"
            for suffix in expected
            if not same_bytes(actual[suffix], expected[suffix])
        ]
        if not same_bytes(kernels.dequantize_triton(actual), kernels.dequantize_torch(expected)):
            failures.append(f"{name} {n}x{k} dequantize")
    return failures


def launch_choices(kind: str, base: Config) -> Iterator[Config]:
    """Choices for a quantize kernel: the tile kept in registers, or read again by steps."""
    for warps, limit in itertools.product((4, 8, 16, 32), (None, 48, 64, 80, 96)):
        # 65536 registers per multiprocessor
        if limit is None or warps * 32 * limit <= 65536:
            yield replace(base, num_warps=warps, maxnreg=limit, reread=False)
    steps = (8, 16, 32, 64) if kind == "blocks" else (1024, 2048, 4096, 8192)
    for warps, step in itertools.product((4, 8, 16, 32), steps):
        if kind == "blocks" or step <= base.tile_cols:
            yield replace(base, num_warps=warps, step=step, reread=True)


def sweep_cases(n: int, k: int) -> Iterator[tuple[Case, Config]]:
    """Every launch choice worth trying, for the four kernels."""
    w = random_weight(n, k)
    decoded = torch.empty_like(w)
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device="cuda")
    size = nbytes(w, codes)
    scales = {"blocks": -(-n // 128) * -(-k // 128), "rows": n}
    configs = {
        "blocks": _triton_fp8.block_config(w.device),
        "rows": _triton_fp8.row_config(w.device, k),
    }
    tiles = [(128, 128), (64, 128), (32, 128), (1, 8192), (4, 2048), (8, 1024)]
    for kind, base in configs.items():
        scale = torch.ones(scales[kind], device="cuda")
        quantize = getattr(_triton_fp8, f"quantize_{kind}")
        dequantize = getattr(_triton_fp8, f"dequantize_{kind}")
        for choice in launch_choices(kind, base):
            call = _bind(quantize, (w, codes, scale), choice)
            yield Case(f"quantize_{kind}", f"{n}x{k}", size, call), choice
        for (rows, cols), warps in itertools.product(tiles, (4, 8)):
            if kind == "rows" or 128 % rows == 128 % cols == 0:
                config = replace(base, tile_rows=rows, tile_cols=cols, num_warps=warps)
                call = _bind(dequantize, (codes, scale, decoded), config)
                yield Case(f"dequantize_{kind}", f"{n}x{k}", size, call), config


def _bind(
    function: Callable[..., None], args: tuple[torch.Tensor, ...], config: Config
) -> Callable[[], None]:
    return lambda: function(*args, config=config)


def sweep(rounds: int) -> None:
    """Print the launch choices of each kernel, best first."""
    pairs = [pair for shape in SHAPES for pair in sweep_cases(*shape)]
    copy = copy_case()
    copy_us, *times = medians_us([copy, *(case for case, _ in pairs)], rounds)
    copy_rate = copy.nbytes / copy_us
    results = [
        (case.op, case.shape, case.nbytes / us / copy_rate, us, config)
        for us, (case, config) in zip(times, pairs, strict=True)
    ]
    for op, shape, share, us, config in sorted(results, key=lambda r: (r[0], r[1], -r[2])):
        print(
            f"{op:18} {shape:11} {share:6.1%} {us:8.1f} us  tile {config.tile_rows}x"
            f"{config.tile_cols} warps {config.num_warps} maxnreg {config.maxnreg} "
            f"step {config.step} reread {config.reread}"
        )


def measure(rounds: int) -> list[Row]:
    """One row per case, the copy first."""
    cases = [copy_case(), *kernel_cases()]
    times = medians_us(cases, rounds)
    copy_rate = cases[0].nbytes / times[0]
    return [
        Row(
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            commit=commit(),
            op=case.op,
            shape=case.shape,
            dtype="uint8" if case.op == "copy" else "bf16",
            gpu=torch.cuda.get_device_name(),
            torch=torch.__version__,
            triton=triton.__version__,
            us=round(us, 2),
            gb_per_s=round(case.nbytes / us / 1000, 1),
            share_of_copy=round(case.nbytes / us / copy_rate, 4),
        )
        for us, case in zip(times, cases, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("kernels_gpu.csv"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernels_gpu.py: no CUDA GPU")
    failures = gate()
    if failures:
        sys.exit(f"kernels_gpu.py: triton and torch differ: {', '.join(failures)}")
    torch.cuda.empty_cache()
    if options.sweep:
        sweep(options.rounds)
        return
    rows = measure(options.rounds)
    for row in rows:
        print(
            f"{row.op:38} {row.shape:>12} {row.us:9.1f} us {row.gb_per_s:8.1f} GB/s "
            f"{row.share_of_copy:6.1%}"
        )
    append(options.csv, rows)


if __name__ == "__main__":
    main()
