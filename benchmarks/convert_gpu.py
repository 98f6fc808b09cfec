"""Time conversions of a large checkpoint on a GPU machine against the machine's own ceilings.

    python benchmarks/convert_gpu.py --work /dev/shm/bench [--devices cpu cuda:0 cuda]

Source and output lie in --work, a tmpfs by choice: the source is layers of a Llama of 70B, as many
as --gb holds. The ceilings are measured in the same run (ceilings.py): reads and writes by 16
threads, PCIe each way on as many GPUs as the device names. The ceiling of a conversion is the
slowest of them for the bytes it moves; `host_s` is what the same threads need to read and then to
write, which no conversion by them can be faster than. Appends one CSV row per case.

--pages recycled: each case first runs once untimed, so that Triton compiles and memory comes from
the host. --pages fresh: one run each, and every output stays until the end of its format, so that
conversions and the write ceiling all pay for pages that nobody had before; Triton compiles on a
small checkpoint. It needs memory for the source and, per format, one output more than devices.

Standard library only, on purpose: a child's peak RSS as Linux reports it begins at its parent's.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from processes import (
    HERE,
    PAGES,
    Run,
    clear,
    cpu_name,
    find_command,
    make_source,
    nbytes,
    num_cores,
    run,
)
from rows import append, commit

# GB of bf16: what is not in layers, and a layer
OUTSIDE_GB, LAYER_GB = 4.203, 1.7113
# the same of the small benchmark checkpoint, for machines that hold no two layers
SMALL_OUTSIDE_GB, SMALL_LAYER_GB = 0.2622, 0.0881
# what the models of these names have in bf16
GB_70B, GB_671B = 141.1, 1342.0


@dataclass
class Row:
    """One line of the CSV; rates in GB/s, times are medians in seconds."""

    date: str
    commit: str
    case: str
    device: str
    gpus: int
    gpu: str
    source_gb: float
    output_gb: float
    shards: int
    wall_s: float
    stream_s: float
    read_gbs: float
    h2d_gbs: float | str
    d2h_gbs: float | str
    write_gbs: float
    ceiling_s: float
    bound: str
    share_of_ceiling: float
    host_s: float
    share_of_host: float
    source_gb_per_s: float
    projected_70b_s: float
    projected_671b_s: float
    peak_rss_mib: float
    gpu_peak_mib: float | str
    workers: int
    cpu: str
    cores: int
    rounds: int


@dataclass(frozen=True)
class Timings:
    """What qconvert said of its own time: from the opened checkpoint to the rename, per stage."""

    wall_s: float
    workers: int
    stages: dict[str, float]


@dataclass
class Case:
    """A format on a device, and a value per timed run."""

    algo: str
    device: str
    runs: list[Run] = field(default_factory=list)
    timings: list[Timings] = field(default_factory=list)
    gpu_peak_mib: int | None = None


def free_gb(work: Path) -> float:
    """Returns what `work` can hold, in GB: its disk, and memory too, for it may be a tmpfs."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable"))
    free = min(shutil.disk_usage(work).free, int(available.split()[1]) * 1024)
    # a source of an earlier run is used again
    return (free + nbytes(work)) / 1e9


def choose_source(work: Path, gb: float | None) -> Path:
    """Returns a checkpoint of at most `gb`; None: of 40, or what leaves room for an output."""
    if gb is None:
        gb = min(40.0, 0.55 * free_gb(work))
    shape, num_layers = "llama70b", int((gb - OUTSIDE_GB) / LAYER_GB)
    if num_layers < 2:
        shape, num_layers = "bench", max(1, int((gb - SMALL_OUTSIDE_GB) / SMALL_LAYER_GB))
    return make_source(
        work / f"{shape}-{num_layers}", "--shape", shape, "--layers", str(num_layers)
    )


def ceilings(*words: str) -> dict[str, str]:
    """Returns what ceilings.py prints, of two rates the second; empty for what it can't measure."""
    text = run([sys.executable, str(HERE / "ceilings.py"), *words]).text
    # torch may have warned before
    found = json.loads(text.splitlines()[-1])
    print("ceilings", *words, found, flush=True)
    return {name: str(v[-1] if isinstance(v, list) else v) for name, v in found.items()}


@contextmanager
def gpu_memory(case: Case) -> Iterator[None]:
    """Notes in `case` the MiB in use on the fullest GPU, at the most while this is open."""
    if case.device == "cpu" or shutil.which("nvidia-smi") is None:
        yield
        return
    argv = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
    with tempfile.TemporaryFile() as log:
        watcher = subprocess.Popen(argv, stdout=log, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            watcher.terminate()
            watcher.wait()
            log.seek(0)
            case.gpu_peak_mib = max(map(int, re.findall(rb"\d+", log.read())), default=None)


def run_case(case: Case, source: Path, args: argparse.Namespace, *, keep: str = "") -> Run:
    """Returns one run of the command, which is added to `case`; the output stays under `keep`."""
    out_dir, file = args.work / (keep or "out"), args.work / "timings.json"
    argv = [*args.command, str(source), str(out_dir), "--algo", case.algo, "--device", case.device]
    argv += ["--memory-budget", args.memory_budget, "--timings", str(file), "-q"]
    # else the kernel writes back older files during this run
    os.sync()
    done = run(argv, None if keep else out_dir)
    if keep:
        done = replace(done, output_nbytes=nbytes(out_dir))
    said = json.loads(file.read_text())
    file.unlink()
    stages = {stage["stage"]: round(stage["seconds"], 2) for stage in said["stages"]}
    case.runs.append(done)
    case.timings.append(Timings(said["wall_s"], said["workers"], stages))
    words = (
        f"{case.algo} {case.device}: {done.wall_s:.2f} s, of it {said['wall_s']:.2f} s streaming"
    )
    print(f"{words}; busy seconds of {said['workers']} workers: {stages}", flush=True)
    return done


def measure_fresh(
    algo: str, devices: list[str], source: Path, args: argparse.Namespace
) -> tuple[list[Case], float]:
    """Returns the cases of a format and GB/s of plain writes, on pages that nobody had before."""
    small = make_source(args.work / "small", "--shape", "bench", "--layers", "1")
    cases = [Case(algo, device) for device in devices]
    for case in cases:
        run_case(case, small, args)
        case.runs.clear()
        case.timings.clear()
    kept = [f"{algo}-{number}" for number in range(len(cases))]
    for case, name in zip(cases, kept, strict=True):
        with gpu_memory(case):
            run_case(case, source, args, keep=name)
    sizes = ["--nbytes", str(cases[0].runs[0].output_nbytes), "--files", str(num_shards(source))]
    work = args.work / f"{algo}-plain"
    write = ceilings("write", str(work), *sizes, "--threads", str(args.threads), "--fresh")["write"]
    for path in (work, *(args.work / name for name in kept)):
        shutil.rmtree(path)
    return cases, float(write)


def measure(
    algo: str, devices: list[str], source: Path, args: argparse.Namespace
) -> tuple[list[Case], float]:
    """Returns the cases of a format, and GB/s of plain writes of as many bytes and files."""
    if args.pages == "fresh":
        return measure_fresh(algo, devices, source, args)
    clear(args.work / "out")
    cases = [Case(algo, device) for device in devices]
    output_nbytes = 0
    for case in cases:
        with gpu_memory(case):
            output_nbytes = run_case(case, source, args).output_nbytes
        # this one was untimed
        case.runs.clear()
        case.timings.clear()
    sizes = ["--nbytes", str(output_nbytes), "--files", str(num_shards(source))]
    write = ceilings("write", str(args.work), *sizes, "--threads", str(args.threads))["write"]
    for _ in range(args.rounds):
        for case in cases:
            run_case(case, source, args)
    return cases, float(write)


def num_shards(source: Path) -> int:
    """Returns how many weight files a checkpoint has."""
    return len(list(source.glob("*.safetensors")))


def to_row(
    case: Case,
    source: Path,
    read: float,
    write: float,
    pcie: dict[str, str],
    args: argparse.Namespace,
) -> Row:
    """Returns the row of a case; `pcie` is empty for the CPU."""
    wall_s = statistics.median(done.wall_s for done in case.runs)
    stream_s = statistics.median(said.wall_s for said in case.timings)
    source_gb, output_gb = nbytes(source) / 1e9, case.runs[0].output_nbytes / 1e9
    floors = {"read": source_gb / read, "write": output_gb / write}
    if pcie:
        floors |= {"h2d": source_gb / float(pcie["h2d"]), "d2h": output_gb / float(pcie["d2h"])}
    bound = max(floors, key=lambda name: floors[name])
    host_s = floors["read"] + floors["write"]
    per_s = source_gb / stream_s
    return Row(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=commit(),
        case=f"{source.name} {case.algo} {args.pages} budget={args.memory_budget}",
        device=case.device,
        gpus=int(pcie.get("used", 0)),
        gpu=pcie.get("gpu", ""),
        source_gb=round(source_gb, 2),
        output_gb=round(output_gb, 2),
        shards=num_shards(source),
        wall_s=round(wall_s, 3),
        stream_s=round(stream_s, 3),
        read_gbs=round(read, 1),
        h2d_gbs=round(float(pcie["h2d"]), 1) if pcie else "",
        d2h_gbs=round(float(pcie["d2h"]), 1) if pcie else "",
        write_gbs=round(write, 1),
        ceiling_s=round(floors[bound], 3),
        bound=bound,
        share_of_ceiling=round(floors[bound] / stream_s, 3),
        host_s=round(host_s, 3),
        share_of_host=round(host_s / stream_s, 3),
        source_gb_per_s=round(per_s, 2),
        projected_70b_s=round(wall_s - stream_s + GB_70B / per_s, 1),
        projected_671b_s=round(wall_s - stream_s + GB_671B / per_s, 1),
        peak_rss_mib=round(max(done.peak_rss_mib for done in case.runs), 1),
        gpu_peak_mib=case.gpu_peak_mib if case.gpu_peak_mib is not None else "",
        workers=case.timings[0].workers,
        cpu=cpu_name(),
        cores=num_cores(),
        rounds=len(case.runs),
    )


def find_devices(wanted: list[str]) -> dict[str, dict[str, str]]:
    """Returns device -> its PCIe ceilings, none for the CPU; says what of `wanted` is not here."""
    found: dict[str, dict[str, str]] = {}
    first = ceilings("pcie", "--gpus", "1") if wanted != ["cpu"] else {"gpus": "0"}
    present = int(first["gpus"])
    for device in wanted:
        used = 0 if device == "cpu" else present if device == "cuda" else device.count(",") + 1
        if device == "cpu":
            found[device] = {}
        elif used == 0 or used > present:
            print(f"{device} is skipped: torch sees {present} GPUs here", file=sys.stderr)
        elif device == "cuda" and present == 1 and "cuda:0" in found:
            print("cuda is skipped: it is cuda:0 here", file=sys.stderr)
        else:
            rates = first if used == 1 else ceilings("pcie", "--gpus", str(used))
            found[device] = {**rates, "used": str(used)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gb", type=float, help="of the source; default: 40, or what fits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", nargs="+", default=["cpu", "cuda:0", "cuda"])
    parser.add_argument("--algos", nargs="+", default=["FP8_PB_WO", "W4A16_NVFP4"])
    parser.add_argument("--memory-budget", default="4GiB")
    parser.add_argument("--pages", choices=PAGES, default="recycled")
    parser.add_argument("--threads", type=int, default=16, help="of the ceilings; default: 16")
    parser.add_argument(
        "--command",
        type=find_command,
        default=[sys.executable, "-m", "qconvert"],
        help="called as qconvert; default: the module, as this Python finds it",
    )
    parser.add_argument("--csv", type=Path, default=HERE / "convert_gpu.csv")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    args.work.mkdir(parents=True, exist_ok=True)
    source = choose_source(args.work, args.gb)
    devices = find_devices(args.devices)
    read = float(ceilings("read", str(source), "--threads", str(args.threads))["read"])
    rows = []
    for algo in args.algos:
        cases, write = measure(algo, list(devices), source, args)
        rows += [to_row(case, source, read, write, devices[case.device], args) for case in cases]
        # kept if a later format fails
        append(args.csv, rows[-len(cases) :])
    print(f"{'case':<52} {'device':<8} {'wall s':>7} {'stream':>7} {'GB/s':>6} {'share':>6} bound")
    for row in rows:
        times = f"{row.wall_s:>7.2f} {row.stream_s:>7.2f} {row.source_gb_per_s:>6.2f}"
        share = f"{row.share_of_ceiling:>6.2f} {row.bound}"
        print(f"{row.case:<52} {row.device:<8} {times} {share}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
