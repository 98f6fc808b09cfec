"""Time the CPU kernels on one core: GB/s of bf16 read, for each format.

    python benchmarks/kernels_cpu.py [--csv kernels_cpu.csv] [--rounds 20] [--shape 4096x8192]

Measures the C kernel with and without statistics, its dequantize, and the torch reference on one
thread. Rounds interleave the cases; the median counts. The gate comes first: native and torch
give the same bytes.
"""

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rows import append, commit

import qkernels
from qkernels import native
from qkernels.codec import Codec


@dataclass
class Row:
    """One line of the CSV."""

    date: str
    commit: str
    op: str
    shape: str
    dtype: str
    cpu: str
    torch: str
    ms: float
    gb_per_s: float


@dataclass
class Case:
    """One timed call."""

    op: str
    call: Callable[[], object]
    rounds: int


def row_tensors(codec: Codec, tensors: dict[str, torch.Tensor]) -> tuple[list[int], float]:
    """Addresses of codes and scales, and the scale of the whole weight."""
    addresses = [tensors[suffix].data_ptr() for suffix in codec.shapes(0, 0)]
    scale = codec.global_scale
    return addresses, 1.0 if scale is None else float(tensors[scale.suffix])


def native_call(
    name: str, w: torch.Tensor, tensors: dict[str, torch.Tensor], sums_2N: torch.Tensor | None
) -> Callable[[], object]:
    """A call that fills tensors and, if given, the sums; it keeps all of them alive."""
    n, k = w.shape
    codec = qkernels.kernels_for(name)

    def call() -> object:
        outs, scale = row_tensors(codec, tensors)
        err2, ref2 = (0, 0) if sums_2N is None else (sums_2N[0].data_ptr(), sums_2N[1].data_ptr())
        return native.quantize(
            name, w.data_ptr(), "BF16", n, k, outs, err2, ref2, global_scale=scale
        )

    return call


def cases_of(name: str, w: torch.Tensor, rounds: int) -> list[Case]:
    """What is measured for one format."""
    kernels = qkernels.kernels_for(name)
    tensors = kernels.quantize_native(w)
    expected = kernels.quantize_torch(w)
    for suffix, tensor in tensors.items():
        if not torch.equal(
            *(each.reshape(-1).view(torch.uint8) for each in (tensor, expected[suffix]))
        ):
            sys.exit(f"kernels_cpu.py: native and torch differ in {name} {suffix}")
    sums_2N = torch.zeros(2, w.shape[0], dtype=torch.float64)
    out_NK = torch.zeros_like(w)
    n, k = w.shape

    def dequantize() -> None:
        ins, scale = row_tensors(kernels, tensors)
        native.dequantize(name, ins, "BF16", n, k, out_NK.data_ptr(), global_scale=scale)

    return [
        Case(f"{name}.quantize_native", native_call(name, w, tensors, None), rounds),
        Case(f"{name}.quantize_native+stats", native_call(name, w, tensors, sums_2N), rounds),
        Case(f"{name}.dequantize_native", dequantize, rounds),
        # some fifty times slower
        Case(f"{name}.quantize_torch", lambda: kernels.quantize_torch(w), min(rounds, 3)),
    ]


def medians_ms(cases: list[Case]) -> list[float]:
    """Median milliseconds of each case over interleaved rounds, after one untimed."""
    times: list[list[float]] = [[] for _ in cases]
    for index in range(-1, max(case.rounds for case in cases)):
        for samples, case in zip(times, cases, strict=True):
            if index < case.rounds:
                start = time.perf_counter()
                case.call()
                samples.append((time.perf_counter() - start) * 1000)
    return [statistics.median(samples[1:]) for samples in times]


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("kernels_cpu.csv"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shape", default="4096x8192")
    options = parser.parse_args()
    if not native.available():
        sys.exit("kernels_cpu.py: libqkernels.so was not built: python hatch_build.py")
    torch.set_num_threads(1)
    n, k = (int(size) for size in options.shape.split("x"))
    w = (torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    rows = []
    amax = Case("amax_native", lambda: native.amax(w.data_ptr(), "BF16", n * k), options.rounds)
    for name in qkernels.codecs():
        cases = [*cases_of(name, w, options.rounds), *([amax] if not rows else [])]
        for case, ms in zip(cases, medians_ms(cases), strict=True):
            rows.append(
                Row(
                    date=datetime.datetime.now(datetime.UTC).date().isoformat(),
                    commit=commit(),
                    op=case.op,
                    shape=options.shape,
                    dtype="bf16",
                    cpu=cpu_name(),
                    torch=torch.__version__,
                    ms=round(ms, 3),
                    gb_per_s=round(n * k * 2 / ms / 1e6, 2),
                )
            )
            print(f"{rows[-1].op:50} {rows[-1].ms:9.2f} ms {rows[-1].gb_per_s:7.2f} GB/s of bf16")
    append(options.csv, rows)


if __name__ == "__main__":
    main()
