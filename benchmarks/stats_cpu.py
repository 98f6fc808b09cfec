"""What the error report costs: conversions with and without its sums, alternating, in one process.

    python benchmarks/stats_cpu.py --work DIR [--rounds 7]

Uses the benchmark checkpoint under DIR that convert_cpu.py makes. Without sums the native kernels
are called as if nobody had asked (the report then has sums of 0 and is thrown away); all else is
the same. Appends one row per format to stats_cpu.csv: medians, and their ratio.
"""

import argparse
import ctypes
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    workers: int
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


def seconds(source: Path, out_dir: Path, algo: str, workers: int) -> float:
    """Wall time of one conversion, from the plan to the rename."""
    checkpoint = open_checkpoint(source)
    start = time.perf_counter()
    convert(
        checkpoint,
        make_plan(checkpoint, Recipe(rules=[Rule(match="*", algo=algo)])),
        out_dir,
        statistics=Statistics(),
        device=resolve("cpu", codecs=[find(algo).codec]),
        workers=workers,
        budget=1 << 30,
        watch=lambda progress: None,
    )
    elapsed = time.perf_counter() - start
    shutil.rmtree(out_dir)
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("stats_cpu.csv"))
    args = parser.parse_args()
    source, out_dir = args.work / "bench-shards", args.work / "out-stats"
    workers = resolve("cpu", codecs=[]).default_workers
    rows = []
    for algo in ALGOS:
        times: tuple[list[float], list[float]] = ([], [])
        # one untimed
        for place in range(-1, args.rounds):
            found = [seconds(source, out_dir, algo, workers)]
            with no_sums():
                found.append(seconds(source, out_dir, algo, workers))
            for samples, value in zip(times, found, strict=True):
                samples += [value] if place >= 0 else []
        with_s, without_s = (statistics.median(samples) for samples in times)
        rows.append(
            Row(
                date=datetime.now(UTC).date().isoformat(),
                commit=commit(),
                case=f"bench-shards {algo}",
                with_s=round(with_s, 3),
                without_s=round(without_s, 3),
                ratio=round(with_s / without_s, 3),
                workers=workers,
                rounds=args.rounds,
            )
        )
        print(rows[-1], flush=True)
    append(args.csv, rows)


if __name__ == "__main__":
    main()
