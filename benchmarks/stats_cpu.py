"""What the error report costs: conversions with and without its sums, alternating.

    python benchmarks/stats_cpu.py --work DIR [--rounds 7] [--wait 5]

Uses the benchmark checkpoint under DIR that convert_cpu.py makes. Each run is a process of its own,
from its start to its end, as a user waits for it. Without sums the native kernels are called as if
nobody had asked (the report then has sums of 0 and is thrown away); all else is the same. --wait
pauses before each run, after which a virtual machine pays for free memory again, as it does for a
command that finds it idle. Appends one row per format to stats_cpu.csv: medians, and their ratio.
"""

import argparse
import ctypes
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rows import append, commit

from qconvert.backends import resolve
from qconvert.convert import convert
from qconvert.planner import make_plan
from qconvert.statistics import Statistics
from qkernels import native
from qschema.checkpoint import open_checkpoint
from qschema.formats import find
from qschema.recipe import Recipe, Rule

ALGOS = ("FP8_PB_WO", "MXFP8", "W4A16_NVFP4", "W4A16_AWQ")


@dataclass
class Row:
    """One line of the CSV; times are medians of the rounds."""

    date: str
    commit: str
    case: str
    with_s: float
    without_s: float
    ratio: float
    rounds: int


@contextmanager
def no_sums() -> Iterator[None]:
    """Native kernels without statistics while this is open."""
    quantize = native.quantize

    def plain(
        name: str,
        source: int,
        dtype: str,
        rows: int,
        columns: int,
        outs: list[int],
        err2: int,
        ref2: int,
        *,
        global_scale: float,
    ) -> native.Counts:
        for sums in (err2, ref2):
            ctypes.memset(sums, 0, 8 * rows)
        return quantize(name, source, dtype, rows, columns, outs, global_scale=global_scale)

    native.quantize = plain
    try:
        yield
    finally:
        native.quantize = quantize


def child(sums: str, source: Path, out_dir: Path, algo: str) -> None:
    """Convert, in this process."""
    checkpoint = open_checkpoint(source)
    device = resolve("cpu", codecs=[find(algo).codec])
    with no_sums() if sums == "without" else nullcontext():
        convert(
            checkpoint,
            make_plan(checkpoint, Recipe(rules=[Rule(match="*", algo=algo)])),
            out_dir,
            statistics=Statistics(),
            device=device,
            workers=device.default_workers,
            budget=1 << 30,
            watch=lambda progress: None,
        )


def seconds(sums: str, source: Path, out_dir: Path, algo: str, *, wait: float) -> float:
    """Wall time of one conversion, the start of Python included."""
    command = [sys.executable, __file__, "--child", sums, str(source), str(out_dir), algo]
    time.sleep(wait)
    start = time.perf_counter()
    subprocess.run(command, check=True)
    elapsed = time.perf_counter() - start
    shutil.rmtree(out_dir)
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--wait", type=float, default=0.0)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("stats_cpu.csv"))
    args = parser.parse_args()
    source, out_dir = args.work / "bench-shards", args.work / "out-stats"
    rows = []
    for algo in ALGOS:
        times: dict[str, list[float]] = {"with": [], "without": []}
        # one untimed
        for place in range(-1, args.rounds):
            for sums, samples in times.items():
                value = seconds(sums, source, out_dir, algo, wait=args.wait)
                samples += [value] if place >= 0 else []
        with_s, without_s = (statistics.median(samples) for samples in times.values())
        rows.append(
            Row(
                date=datetime.now(UTC).date().isoformat(),
                commit=commit(),
                case=f"bench-shards {algo} wait {args.wait:g} s",
                with_s=round(with_s, 3),
                without_s=round(without_s, 3),
                ratio=round(with_s / without_s, 3),
                rounds=args.rounds,
            )
        )
        print(rows[-1], flush=True)
    append(args.csv, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
    else:
        main()
