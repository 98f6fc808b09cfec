"""Time qconvert against `cp -r` on this machine's CPUs, and measure its peak memory.

    python benchmarks/convert_cpu.py --work DIR [--rounds 7]

Makes the two layouts of the benchmark checkpoint under DIR when they are missing (3 GB, and 1.5 GB
for each output, which is removed at once). A round runs every case, `cp -r` and then qconvert each
time, so that a slow minute of the machine falls on both. Appends one CSV row per case.

A virtual machine may hand free memory back to its host within seconds, and then pays for every page
that it writes next: the same `cp` took 0.4 s right after another and 2 s after a pause. So each
timed run starts from one state, by --pages: `fresh` waits first, `recycled` copies untimed first.

Standard library only, on purpose: a child's peak RSS as Linux reports it begins at its parent's.
"""

import argparse
import datetime
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rows import append, commit

HERE = Path(__file__).resolve().parent
LAYOUTS = ["shards", "single"]
ALGOS = ["FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "W4A16_NVFP4", "W4A16_AWQ"]
SMALL_BUDGET = ["--memory-budget", "256MiB"]
FRESH_WAIT_S = 5.0


@dataclass
class Row:
    """One line of the CSV; times are medians, memory is the largest of all runs."""

    date: str
    commit: str
    case: str
    wall_s: float
    cp_wall_s: float
    ratio: float
    peak_rss_mib: float
    cpu: str
    cores: int
    rounds: int


@dataclass
class Samples:
    """What one case measured, a value per run."""

    wall_s: list[float] = field(default_factory=list)
    cp_wall_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)


def run(argv: list[str], out_dir: Path) -> tuple[float, float]:
    """Returns (wall seconds, peak RSS in MiB) of one command; removes the `out_dir` that it makes.

    Peak RSS is the largest of the process and the children it waited for, not their sum.
    """
    with (out_dir.parent / "last_output.txt").open("wb") as log:
        start = time.perf_counter()
        child = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0 or not out_dir.is_dir():
        output = (out_dir.parent / "last_output.txt").read_text(errors="replace")[-2000:]
        raise SystemExit(f"exit {child.returncode} from {shlex.join(argv)}\n{output}")
    shutil.rmtree(out_dir)
    return wall_s, usage.ru_maxrss / 1024


def timed(argv: list[str], source: Path, out_dir: Path, *, pages: str) -> tuple[float, float]:
    """Returns what `run` returns, from the state of free memory that `pages` names."""
    # else the kernel writes back older files during this run
    os.sync()
    if pages == "fresh":
        time.sleep(FRESH_WAIT_S)
    else:
        run(["cp", "-r", str(source), str(out_dir)], out_dir)
    return run(argv, out_dir)


def make_sources(work: Path) -> dict[str, Path]:
    """Returns layout -> checkpoint; makes those that are missing."""
    sources = {layout: work / f"bench-{layout}" for layout in LAYOUTS}
    for layout, path in sources.items():
        # config.json is written last
        if not (path / "config.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            script = [sys.executable, str(HERE / "make_checkpoint.py"), str(path)]
            subprocess.run([*script, "--shape", "bench", "--layout", layout], check=True)
    return sources


def warm(source: Path) -> None:
    """Reads every file once, so that no run pays for the disk."""
    buffer = bytearray(1 << 22)
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def measure(command: list[str], work: Path, *, num_rounds: int, pages: str) -> dict[str, Samples]:
    """Returns case -> samples; the small-budget cases run once, after the alternating rounds."""
    sources = make_sources(work)
    cases = [(layout, algo) for layout in LAYOUTS for algo in ALGOS]
    found: dict[str, Samples] = {}
    out_dir = work / "out"
    shutil.rmtree(out_dir, ignore_errors=True)
    for source in sources.values():
        warm(source)
    for number in range(num_rounds):
        for layout, algo in cases:
            source = sources[layout]
            samples = found.setdefault(f"bench-{layout} {algo} {pages}", Samples())
            paths = [str(source), str(out_dir)]
            cp_wall_s, _ = timed(["cp", "-r", *paths], source, out_dir, pages=pages)
            argv = [*command, *paths, "--algo", algo]
            wall_s, rss_mib = timed(argv, source, out_dir, pages=pages)
            samples.cp_wall_s.append(cp_wall_s)
            samples.wall_s.append(wall_s)
            samples.rss_mib.append(rss_mib)
        print(f"round {number + 1} of {num_rounds} done", file=sys.stderr, flush=True)
    for layout, algo in cases:
        source = sources[layout]
        argv = [*command, str(source), str(out_dir), "--algo", algo, *SMALL_BUDGET]
        wall_s, rss_mib = timed(argv, source, out_dir, pages=pages)
        case = f"bench-{layout} {algo} {pages}"
        found[f"{case} budget=256MiB"] = Samples([wall_s], found[case].cp_wall_s, [rss_mib])
    return found


def cpu_name() -> str:
    """Returns the processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return os.uname().machine


def to_rows(found: dict[str, Samples]) -> list[Row]:
    """Returns one row per case."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    rows = []
    for case, samples in found.items():
        wall_s = statistics.median(samples.wall_s)
        cp_wall_s = statistics.median(samples.cp_wall_s)
        rows.append(
            Row(
                date=today,
                commit=commit(),
                case=case,
                wall_s=round(wall_s, 3),
                cp_wall_s=round(cp_wall_s, 3),
                ratio=round(wall_s / cp_wall_s, 3),
                peak_rss_mib=round(max(samples.rss_mib), 1),
                cpu=cpu_name(),
                cores=len(os.sched_getaffinity(0)),
                rounds=len(samples.wall_s),
            )
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = shlex.quote(str(Path(sys.executable).parent / "qconvert"))
    parser.add_argument("--work", type=Path, required=True, help="a folder with 6 GB free")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pages", choices=["fresh", "recycled"], default="fresh")
    parser.add_argument(
        "--command", default=default, help=f"called as qconvert; default: {default}"
    )
    parser.add_argument("--csv", type=Path, default=HERE / "convert_cpu.csv")
    args = parser.parse_args()
    command = shlex.split(args.command)
    if not command or shutil.which(command[0]) is None:
        parser.error(
            f"no such command: {args.command!r}; is qconvert installed beside this Python?"
        )
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    args.work.mkdir(parents=True, exist_ok=True)
    found = measure(command, args.work, num_rounds=args.rounds, pages=args.pages)
    rows = to_rows(found)
    append(args.csv, rows)
    print(f"{'case':<62} {'wall s':>7} {'cp s':>7} {'ratio':>6} {'RSS MiB':>8}")
    for row in rows:
        times = f"{row.wall_s:>7.2f} {row.cp_wall_s:>7.2f} {row.ratio:>6.2f}"
        print(f"{row.case:<62} {times} {row.peak_rss_mib:>8.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
