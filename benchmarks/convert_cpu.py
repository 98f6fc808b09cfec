"""Time qconvert against `cp -r` on this machine's CPUs, and measure its peak memory.

    python benchmarks/convert_cpu.py --work DIR [--rounds 7]

Makes the two layouts of the benchmark checkpoint under DIR when they are missing (3 GB, and 1.5 GB
for each output, which is removed at once). A round runs every case, `cp -r` and then qconvert each
time, so that a slow minute of the machine falls on both; then `--dry-run`, which ends where a
conversion begins to read weights. Appends one CSV row per case, and prints it beside its goals.
"""

import argparse
import datetime
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from processes import (
    HERE,
    PAGES,
    clear,
    cpu_name,
    default_command,
    find_command,
    make_source,
    num_cores,
    run,
    timed,
    warm,
)
from rows import append, commit

LAYOUTS = ["shards", "single"]
# format -> wall time over that of `cp -r`, at most, on fresh pages
GOALS = {
    "FP8_PB_WO": 1.0,
    "FP8_PER_CHANNEL_PER_TOKEN": 1.0,
    "MXFP8": 1.1,
    "W4A16_NVFP4": 1.2,
    "W4A16_AWQ": 1.2,
}
GOAL_START_S = 1.5
GOAL_RSS_MIB = 1024
SMALL_BUDGET = ["--memory-budget", "256MiB"]


@dataclass
class Row:
    """One line of the CSV; times are medians, memory is the largest of all runs."""

    date: str
    commit: str
    case: str
    wall_s: float
    cp_wall_s: float
    ratio: float
    start_s: float
    peak_rss_mib: float
    cpu: str
    cores: int
    rounds: int


@dataclass
class Samples:
    """What one case measured, a value per run."""

    wall_s: list[float] = field(default_factory=list)
    cp_wall_s: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)


def measure(command: list[str], work: Path, *, num_rounds: int, pages: str) -> dict[str, Samples]:
    """Returns case -> samples; the small-budget cases run once, after the alternating rounds."""
    sources = {
        layout: make_source(work / f"bench-{layout}", "--shape", "bench", "--layout", layout)
        for layout in LAYOUTS
    }
    cases = [(layout, algo) for layout in LAYOUTS for algo in GOALS]
    found: dict[str, Samples] = {}
    out_dir = work / "out"
    clear(out_dir)
    for source in sources.values():
        warm(source)
    for number in range(num_rounds):
        for layout, algo in cases:
            source = sources[layout]
            samples = found.setdefault(f"bench-{layout} {algo} {pages}", Samples())
            paths = [str(source), str(out_dir)]
            cp = timed(["cp", "-r", *paths], source, out_dir, pages=pages)
            argv = [*command, *paths, "--algo", algo]
            done = timed(argv, source, out_dir, pages=pages)
            samples.cp_wall_s.append(cp.wall_s)
            samples.wall_s.append(done.wall_s)
            samples.rss_mib.append(done.peak_rss_mib)
            samples.start_s.append(run([*argv, "--dry-run"]).wall_s)
        print(f"round {number + 1} of {num_rounds} done", file=sys.stderr, flush=True)
    for layout, algo in cases:
        source = sources[layout]
        argv = [*command, str(source), str(out_dir), "--algo", algo, *SMALL_BUDGET]
        done = timed(argv, source, out_dir, pages=pages)
        case = f"bench-{layout} {algo} {pages}"
        known = found[case]
        found[f"{case} budget=256MiB"] = Samples(
            [done.wall_s], known.cp_wall_s, known.start_s, [done.peak_rss_mib]
        )
    return found


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
                start_s=round(statistics.median(samples.start_s), 3),
                peak_rss_mib=round(max(samples.rss_mib), 1),
                cpu=cpu_name(),
                cores=num_cores(),
                rounds=len(samples.wall_s),
            )
        )
    return rows


def missed(row: Row) -> str:
    """Returns the goals that a row misses, in words; the ratio's holds for fresh pages."""
    _, algo, pages, *budget = row.case.split()
    found = []
    if pages == "fresh" and not budget and row.ratio > GOALS[algo]:
        found.append(f"ratio above {GOALS[algo]}")
    if row.start_s > GOAL_START_S:
        found.append(f"start above {GOAL_START_S} s")
    if budget and row.peak_rss_mib > GOAL_RSS_MIB:
        found.append(f"peak above {GOAL_RSS_MIB} MiB")
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with 6 GB free")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pages", choices=PAGES, default="fresh")
    parser.add_argument(
        "--command",
        default=default_command(),
        help="called as qconvert; default: the one beside this Python",
    )
    parser.add_argument("--csv", type=Path, default=HERE / "convert_cpu.csv")
    args = parser.parse_args()
    command = find_command(args.command)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    args.work.mkdir(parents=True, exist_ok=True)
    found = measure(command, args.work, num_rounds=args.rounds, pages=args.pages)
    rows = to_rows(found)
    append(args.csv, rows)
    print(f"{'case':<62} {'wall s':>7} {'cp s':>7} {'ratio':>6} {'start':>6} {'RSS MiB':>8}")
    for row in rows:
        times = f"{row.wall_s:>7.2f} {row.cp_wall_s:>7.2f} {row.ratio:>6.2f} {row.start_s:>6.2f}"
        print(f"{row.case:<62} {times} {row.peak_rss_mib:>8.0f}  {missed(row)}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
