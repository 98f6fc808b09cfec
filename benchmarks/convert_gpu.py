"""Time the conversion of a 16 GB checkpoint on a GPU machine against the machine's own ceilings.

    python benchmarks/convert_gpu.py --work /dev/shm/bench [--rounds 3]

Source and output lie in `--work`, a tmpfs or a file system whose cache holds 30 GB. The ceilings
are measured in the same run, with as many threads as workers: reads into pinned memory, PCIe each
way, writes of new files. The ceiling of a conversion is the slowest of them for the bytes it moves.
Appends one CSV row per case: `wall_s` is the whole process, `stream_s` from open to rename.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rows import append, commit

from qconvert.backends import Device, resolve
from qconvert.convert import convert
from qconvert.planner import make_plan
from qschema.checkpoint import Checkpoint, open_checkpoint
from qschema.formats import find
from qschema.plan import Plan
from qschema.recipe import Recipe, Rule

HERE = Path(__file__).resolve().parent
CHUNK = 32 << 20
GB = 1e9


@dataclass
class Row:
    """One line of the CSV; rates in GB/s, times are medians in seconds."""

    commit: str
    case: str
    gpu: str
    torch: str
    workers: int
    budget: str
    source_gb: float
    output_gb: float
    read_gbs: float
    h2d_gbs: float
    d2h_gbs: float
    write_gbs: float
    ceiling_s: float
    bound: str
    stream_s: float
    share_of_ceiling: float
    wall_s: float
    rounds: int


def rate(work: Callable[[int], int], threads: int, *, repeat: int = 1) -> float:
    """Return GB/s of `work(thread)`, which returns the bytes it moved, on all threads at once."""
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        moved = sum(sum(pool.map(work, range(threads))) for _ in range(repeat))
        return moved / (time.perf_counter() - start) / GB


def read_rate(source: Path, threads: int) -> float:
    """Return how fast `threads` read the shards of `source` into their pinned buffers."""
    buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(threads)]
    files = sorted(source.glob("*.safetensors"))
    spans = [(file, at) for file in files for at in range(0, file.stat().st_size, CHUNK)]

    def work(thread: int) -> int:
        view, moved = memoryview(buffers[thread].numpy()), 0
        for file, at in spans[thread::threads]:
            with open(file, "rb", buffering=0) as opened:
                moved += os.preadv(opened.fileno(), [view], at)
        return moved

    return rate(work, threads)


def write_rate(work_dir: Path, threads: int, nbytes: int) -> float:
    """Return how fast `threads` write new files of `nbytes` in all from pinned memory."""
    buffers = [torch.randn(CHUNK // 4).view(torch.uint8).pin_memory() for _ in range(threads)]
    folder = work_dir / "write-test"
    folder.mkdir()

    def work(thread: int) -> int:
        view, moved = memoryview(buffers[thread].numpy()), 0
        with open(folder / str(thread), "wb", buffering=0) as opened:
            while moved < nbytes // threads:
                moved += os.pwrite(opened.fileno(), view, moved)
        return moved

    try:
        return rate(work, threads)
    finally:
        shutil.rmtree(folder)


def copy_rate(*, to_device: bool) -> float:
    """Return the rate of one large asynchronous copy over PCIe, the best of ten."""
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        if to_device:
            device.copy_(host, non_blocking=True)
        else:
            host.copy_(device, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return host.numel() / min(times) / GB


def stream(
    checkpoint: Checkpoint, plan: Plan, out_dir: Path, device: Device, workers: int, budget: int
) -> float:
    """Return the seconds from the first read to the rename; removes the output."""
    start = time.perf_counter()
    convert(
        checkpoint,
        plan,
        out_dir,
        device=device,
        workers=workers,
        budget=budget,
        watch=lambda progress: None,
    )
    seconds = time.perf_counter() - start
    shutil.rmtree(out_dir)
    return seconds


def process(source: Path, out_dir: Path, algo: str, device: str, budget: str) -> float:
    """Return the wall seconds of the command in a process of its own."""
    code = "from qconvert.cli import main; main()"
    argv = [sys.executable, "-c", code, str(source), str(out_dir), "--algo", algo, "-q"]
    start = time.perf_counter()
    subprocess.run([*argv, "--device", device, "--memory-budget", budget], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(out_dir)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with 30 GB free")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", nargs="+", default=["cuda", "cpu"])
    parser.add_argument("--budget-mib", type=int, default=4096)
    parser.add_argument("--csv", type=Path, default=HERE / "convert_gpu.csv")
    args = parser.parse_args()
    source, out_dir = args.work / "llama8b", args.work / "out"
    budget = f"{args.budget_mib}MiB"
    if not (source / "config.json").exists():
        script = [sys.executable, str(HERE / "make_checkpoint.py"), str(source)]
        subprocess.run([*script, "--shape", "llama8b"], check=True)
    checkpoint = open_checkpoint(source)
    threads = min(16, len(os.sched_getaffinity(0)))
    source_gb = sum(shard.file_nbytes for shard in checkpoint.shards) / GB
    rates = {
        "read": read_rate(source, threads),
        "h2d": copy_rate(to_device=True),
        "d2h": copy_rate(to_device=False),
        "write": write_rate(args.work, threads, 8 << 30),
    }
    print("ceilings, GB/s:", {name: round(value, 1) for name, value in rates.items()}, flush=True)
    rows = []
    for algo in ("FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "W4A16_NVFP4"):
        plan = make_plan(checkpoint, Recipe(rules=[Rule(match="*", algo=algo)]))
        output_gb = plan.output_nbytes() / GB
        floors = {
            "read": source_gb / rates["read"],
            "h2d": source_gb / rates["h2d"],
            "d2h": output_gb / rates["d2h"],
            "write": output_gb / rates["write"],
        }
        for name in args.devices:
            device = resolve(name, codecs=[find(algo).codec])
            used = floors if name != "cpu" else {k: floors[k] for k in ("read", "write")}
            bound = max(used, key=lambda stage: used[stage])
            times = [
                stream(
                    checkpoint, plan, out_dir, device, device.default_workers, args.budget_mib << 20
                )
                for _ in range(args.rounds)
            ]
            stream_s = statistics.median(times)
            rows.append(
                Row(
                    commit=commit(),
                    case=f"llama8b {algo} {device.name}",
                    gpu=torch.cuda.get_device_name(),
                    torch=torch.__version__,
                    workers=device.default_workers,
                    budget=budget,
                    source_gb=round(source_gb, 2),
                    output_gb=round(output_gb, 2),
                    read_gbs=round(rates["read"], 1),
                    h2d_gbs=round(rates["h2d"], 1),
                    d2h_gbs=round(rates["d2h"], 1),
                    write_gbs=round(rates["write"], 1),
                    ceiling_s=round(used[bound], 3),
                    bound=bound,
                    stream_s=round(stream_s, 3),
                    share_of_ceiling=round(used[bound] / stream_s, 3),
                    wall_s=round(process(source, out_dir, algo, name, budget), 2),
                    rounds=args.rounds,
                )
            )
            print(rows[-1], [round(value, 2) for value in times], flush=True)
    append(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
