"""How fast this machine can read, write and cross PCIe, with nothing in between.

    python benchmarks/ceilings.py read DIR
    python benchmarks/ceilings.py pcie --gpus 2
    python benchmarks/ceilings.py write DIR --nbytes 20000000000 --files 21

Prints JSON: GB/s of two runs each. The second counts, for its pages are recycled from the first
one's; with --fresh there is one, and it keeps what it wrote, so that nobody gets its pages again.
convert_gpu.py runs it as a process of its own, so that pinned memory and the GPU are free again
before a conversion starts. Buffers are pinned where torch sees a GPU.
"""

import argparse
import json
import mmap
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

PIECE_NBYTES = 8 << 20
# of one copy over PCIe, and how many of them a run has
COPY_NBYTES, NUM_COPIES = 1 << 30, 16


def num_gpus() -> int:
    """Returns how many GPUs torch sees, 0 without torch."""
    if find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count()


def make_buffer(nbytes: int, *, pinned: bool) -> memoryview:
    """Returns memory whose pages are there: every byte is 0x5A."""
    if pinned:
        import torch

        return torch.full((nbytes,), 0x5A, dtype=torch.uint8).pin_memory().numpy().data
    view = memoryview(mmap.mmap(-1, nbytes))
    view[:] = b"\x5a" * nbytes
    return view


def rate(work: Callable[[int], int], num_threads: int) -> float:
    """Returns GB/s of `work(thread)`, which returns the bytes it moved, on all threads at once."""
    barrier = threading.Barrier(num_threads + 1)

    def run(thread: int) -> int:
        barrier.wait()
        return work(thread)

    with ThreadPoolExecutor(num_threads) as pool:
        jobs = [pool.submit(run, thread) for thread in range(num_threads)]
        barrier.wait()
        start = time.perf_counter()
        moved = sum(job.result() for job in jobs)
        return moved / (time.perf_counter() - start) / 1e9


def spans(sizes: list[int], thread: int, num_threads: int) -> Iterator[tuple[int, int, int]]:
    """Yields (file, begin, end): a thread's equal share of all bytes, in order, file by file.

    With more files than threads each is in a file of its own nearly all the time.
    """
    total = sum(sizes)
    first, last = total * thread // num_threads, total * (thread + 1) // num_threads
    at = 0
    for number, size in enumerate(sizes):
        begin, end = max(first - at, 0), min(last - at, size)
        if begin < end:
            yield number, begin, end
        at += size


def read_rate(files: list[Path], buffers: list[memoryview]) -> float:
    """Returns how fast threads read all files, each into a buffer of its own."""
    sizes = [path.stat().st_size for path in files]

    def work(thread: int) -> int:
        moved = 0
        for number, begin, end in spans(sizes, thread, len(buffers)):
            with files[number].open("rb", buffering=0) as file:
                while begin < end:
                    view = buffers[thread][: min(PIECE_NBYTES, end - begin)]
                    got = os.preadv(file.fileno(), [view], begin)
                    begin += got
                    moved += got
        return moved

    return rate(work, len(buffers))


def write_rate(
    directory: Path, sizes: list[int], buffers: list[memoryview], *, keep: bool = False
) -> float:
    """Returns how fast threads write new files of these sizes; removes them unless `keep`."""
    folder = directory / "ceiling"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = [folder / str(number) for number in range(len(sizes))]
    for path, size in zip(files, sizes, strict=True):
        with path.open("wb") as file:
            file.truncate(size)

    def work(thread: int) -> int:
        moved = 0
        for number, begin, end in spans(sizes, thread, len(buffers)):
            with files[number].open("r+b", buffering=0) as file:
                while begin < end:
                    view = buffers[thread][: min(PIECE_NBYTES, end - begin)]
                    written = os.pwrite(file.fileno(), view, begin)
                    begin += written
                    moved += written
        return moved

    try:
        return rate(work, len(buffers))
    finally:
        if not keep:
            shutil.rmtree(folder)


def pcie_rates(gpus: int) -> dict[str, list[float]]:
    """Returns h2d and d2h, two rates each: pinned memory to and from all these GPUs at once."""
    import torch

    host = [torch.empty(COPY_NBYTES, dtype=torch.uint8, pin_memory=True) for _ in range(gpus)]
    there = [torch.empty_like(host[i], device=f"cuda:{i}") for i in range(gpus)]

    def copy(source: list[torch.Tensor], target: list[torch.Tensor]) -> float:
        def work(gpu: int) -> int:
            with torch.cuda.device(gpu):
                for _ in range(NUM_COPIES):
                    target[gpu].copy_(source[gpu], non_blocking=True)
                torch.cuda.synchronize()
            return NUM_COPIES * COPY_NBYTES

        return rate(work, gpus)

    # contexts and clocks
    copy(host, there)
    return {
        "h2d": [copy(host, there) for _ in range(2)],
        "d2h": [copy(there, host) for _ in range(2)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["read", "pcie", "write"])
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--nbytes", type=int, help="write: in all")
    parser.add_argument("--files", type=int, default=1, help="write: how many, of equal size")
    parser.add_argument("--gpus", type=int, default=1, help="pcie: how many at once")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--fresh", action="store_true", help="write: once, keep the files")
    args = parser.parse_args()
    found: dict[str, object] = {}
    if args.what == "pcie":
        found = {"gpus": num_gpus(), "gpu": "", "torch": ""}
        if num_gpus() >= args.gpus:
            import torch

            found |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
            found |= pcie_rates(args.gpus)
    else:
        if args.directory is None or (args.what == "write" and not args.nbytes):
            parser.error("read needs a directory, write a directory and --nbytes")
        pinned = num_gpus() > 0
        buffers = [make_buffer(PIECE_NBYTES, pinned=pinned) for _ in range(args.threads)]
        if args.what == "read":
            files = sorted(args.directory.glob("*.safetensors"))
            found["read"] = [read_rate(files, buffers) for _ in range(2)]
        else:
            sizes = [args.nbytes // args.files] * args.files
            rounds = 1 if args.fresh else 2
            found["write"] = [
                write_rate(args.directory, sizes, buffers, keep=args.fresh) for _ in range(rounds)
            ]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
