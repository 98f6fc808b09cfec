"""Time what a slice costs on a CUDA GPU, step by step: what bounds a conversion there.

    python benchmarks/profile_gpu.py [--mib 16] [--columns 4096] [--threads 16] [CODEC ...]

Per codec, for a slice of bf16 in page-locked memory: microseconds of the GPU for the copy in, the
quantize kernel, the row statistics and the copy back (CUDA events, medians of 20), and of the host
for queueing all of it; then how long a whole call of the backend takes, alone and on all threads at
once, as GB/s of source. No file is read, nothing is hashed or written.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from qconvert.backends import Task
from qconvert.backends.cuda import CudaBackend
from qconvert.slices import Cut, Layout, aligned
from qkernels import kernels_for
from qschema.formats import Format, formats

ROUNDS = 20
CODECS = ["FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MXFP8", "W4A16_AWQ"]
COLUMNS = (
    *("codec", "in us", "quantize us", "stats us", "back us", "GPU us", "launch us"),
    *("call us", "1 thread GB/s", "all GB/s"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("codec", nargs="*", help=f"default: {' '.join(CODECS)}")
    parser.add_argument("--mib", type=int, default=CudaBackend.slice_nbytes >> 20)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=16)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("profile_gpu.py: no CUDA GPU")
    print(f"{torch.cuda.get_device_name()}, {args.mib} MiB in rows of {args.columns}")
    print("  ".join(f"{name:>13}" for name in COLUMNS))
    for name in args.codec or CODECS:
        rows = (args.mib << 20) // (2 * args.columns)
        cut = Cut(Layout(declared(name), "BF16", rows, args.columns), 0, rows)
        numbers = (*steps(cut), *calls(cut, args.threads))
        print(f"{name:>13.13}  " + "  ".join(f"{number:13.1f}" for number in numbers), flush=True)
    return 0


def declared(codec: str) -> Format:
    """A format that the codec encodes."""
    return next(found for found in formats().values() if found.codec == kernels_for(codec).name)


def prepared(cut: Cut) -> tuple[CudaBackend, Task]:
    """A backend and a slice in its buffer, normal numbers."""
    backend = CudaBackend("cuda:0")
    buffer, views, position = backend.allocate(cut.footprint()), [], 0
    for size in cut.sizes():
        views.append(buffer[position : position + size])
        position += aligned(size)
    weight = torch.frombuffer(views[0], dtype=torch.bfloat16)
    weight.copy_(torch.randn(len(weight)) * 0.02)
    source, *outputs, err2, ref2 = views
    declared, dtype = cut.layout.declared, cut.layout.dtype
    task = Task(
        declared, dtype, cut.rows, cut.columns, source, tuple(outputs), err2, ref2, 0.1 / 448
    )
    return backend, task


def steps(cut: Cut) -> tuple[float, ...]:
    """Microseconds of the GPU: copy in, quantize, statistics, copy back, and all of them."""
    host = torch.empty(cut.source_span()[1], dtype=torch.uint8, pin_memory=True)
    weight = (torch.randn(cut.rows, cut.columns, device="cuda") * 0.02).bfloat16()
    codec = kernels_for(cut.layout.declared.codec)
    tensors = codec.quantize_triton(weight)
    stats = codec.row_stats_triton(weight, tensors)
    out = torch.empty(sum(size for _, size in cut.output_spans()), dtype=torch.uint8, device="cuda")
    back = torch.empty(len(out), dtype=torch.uint8, pin_memory=True)
    source = weight.view(-1).view(torch.uint8)
    host.copy_(source)
    found = [
        gpu_us(lambda: source.copy_(host, non_blocking=True)),
        gpu_us(lambda: codec.quantize_into_triton(weight, tensors)),
        gpu_us(lambda: codec.row_stats_into_triton(weight, tensors, stats)),
        gpu_us(lambda: back.copy_(out, non_blocking=True)),
    ]
    return (*found, sum(found))


def gpu_us(call: Callable[[], object]) -> float:
    """Median microseconds of the GPU for a call that is queued already."""
    samples = []
    for _ in range(ROUNDS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        samples.append(1000 * float(start.elapsed_time(end)))
    return statistics.median(samples[3:])


def calls(cut: Cut, threads: int) -> tuple[float, ...]:
    """Host us to queue a slice and to wait for it too; GB/s by one thread and by all of them."""
    workers = [prepared(cut) for _ in range(threads)]
    backend, task = workers[0]
    launch, whole = [], []
    for _ in range(ROUNDS + 3):
        start = time.perf_counter()
        with backend._queue():
            backend._encode(task)
        launch.append(1e6 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        start = time.perf_counter()
        backend.quantize(task)
        whole.append(1e6 * (time.perf_counter() - start))
    launch_us, whole_us = statistics.median(launch[3:]), statistics.median(whole[3:])
    nbytes = len(task.source)

    def work(worker: tuple[CudaBackend, Task]) -> None:
        for _ in range(ROUNDS):
            worker[0].quantize(worker[1])

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(work, workers))
        seconds = time.perf_counter() - start
    return launch_us, whole_us, nbytes / whole_us / 1e3, threads * ROUNDS * nbytes / seconds / 1e9


if __name__ == "__main__":
    sys.exit(main())
