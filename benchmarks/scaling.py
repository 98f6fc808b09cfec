"""Wall time and peak RSS of conversions as the checkpoint grows, and a plot of them.

    python benchmarks/scaling.py --work DIR [--rounds 3] [--plot docs/scaling.svg]
    python benchmarks/scaling.py --plot docs/scaling.svg     # draws the rows there are

The benchmark checkpoint with about half, all and twice its weights, in both layouts and with the
default budget; then one tensor of 8 GB with a budget of 256 MiB. That file is a header and a hole:
its zeros need no disk, while the output is written in full. Appends one CSV row per case.
"""

import argparse
import csv
import datetime
import itertools
import json
import shutil
import statistics
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from line_chart import INK, Panel, Series, draw
from processes import (
    HERE,
    PAGES,
    Run,
    clear,
    cpu_name,
    default_command,
    find_command,
    make_source,
    nbytes,
    num_cores,
    timed,
    warm,
)
from rows import append, commit

# 0.79, 1.50 and 2.99 GB: what is not in layers is 0.26 GB
LAYERS = (6, 14, 31)
LAYOUTS = ("shards", "single")
ALGOS = ("FP8_PB_WO", "W4A16_NVFP4")
# 8.05 GB of bf16
HUGE_SHAPE = (65536, 61440)
HUGE_BUDGET = "256MiB"
COLORS = ("#2f81f7", "#d9730d", "#2da44e", "#bf5fd4", "#e5534b")


@dataclass
class Row:
    """One line of the CSV; times are medians, memory is the largest of all runs."""

    date: str
    commit: str
    source: str
    layout: str
    algo: str
    budget: str
    source_gb: float
    output_gb: float
    wall_s: float
    cp_wall_s: float | str
    peak_rss_mib: float
    cpu: str
    cores: int
    rounds: int


def make_huge(path: Path) -> Path:
    """Returns `path`, a checkpoint of one weight whose bytes are a hole."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    rows, columns = HUGE_SHAPE
    length = 2 * rows * columns
    entry = {"dtype": "BF16", "shape": HUGE_SHAPE, "data_offsets": [0, length]}
    header = json.dumps({"model.layers.0.mlp.down_proj.weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + length)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": rows}
    (path / "config.json").write_text(json.dumps(config) + "\n")
    return path


def to_row(
    source: Path, name: str, layout: str, algo: str, budget: str, runs: list[Run], cps: list[Run]
) -> Row:
    """Returns the row of one case."""
    return Row(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=commit(),
        source=name,
        layout=layout,
        algo=algo,
        budget=budget,
        source_gb=round(nbytes(source) / 1e9, 3),
        output_gb=round(runs[0].output_nbytes / 1e9, 3),
        wall_s=round(statistics.median(run.wall_s for run in runs), 3),
        cp_wall_s=round(statistics.median(run.wall_s for run in cps), 3) if cps else "",
        peak_rss_mib=round(max(run.peak_rss_mib for run in runs), 1),
        cpu=cpu_name(),
        cores=num_cores(),
        rounds=len(runs),
    )


def measure(command: list[str], args: argparse.Namespace) -> list[Row]:
    """Returns the rows of the growing checkpoint: `cp -r` and every format in each round."""
    rows = []
    out_dir = args.work / "out"
    for num_layers, layout in itertools.product(LAYERS, LAYOUTS):
        options = ["--shape", "bench", "--layers", str(num_layers), "--layout", layout]
        source = make_source(args.work / f"bench-{num_layers}-{layout}", *options)
        warm(source)
        cps: list[Run] = []
        runs: dict[str, list[Run]] = {algo: [] for algo in args.algos}
        paths = [str(source), str(out_dir)]
        for _ in range(args.rounds):
            cps.append(timed(["cp", "-r", *paths], source, out_dir, pages=args.pages))
            for algo in args.algos:
                argv = [*command, *paths, "--algo", algo]
                runs[algo].append(timed(argv, source, out_dir, pages=args.pages))
        name = f"bench, {num_layers} layers"
        for algo in args.algos:
            rows.append(to_row(source, name, layout, algo, "default", runs[algo], cps))
            print(rows[-1], file=sys.stderr, flush=True)
        # the page cache is for the next one
        shutil.rmtree(source)
    return rows


def measure_huge(command: list[str], args: argparse.Namespace) -> list[Row]:
    """Returns the rows of the one huge tensor, each format once."""
    source, out_dir = make_huge(args.work / "huge"), args.work / "out"
    rows = []
    for algo in args.algos:
        argv = [*command, str(source), str(out_dir), "--algo", algo, "--memory-budget", HUGE_BUDGET]
        # `recycled` would copy the hole as 8 GB
        done = timed(argv, source, out_dir, pages="fresh")
        rows.append(to_row(source, "one tensor of zeros", "single", algo, HUGE_BUDGET, [done], []))
        print(rows[-1], file=sys.stderr, flush=True)
    shutil.rmtree(source)
    return rows


def plot(path: Path) -> str:
    """Returns the SVG of the CSV at `path`; the last row of a case counts."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = {(row["algo"], row["layout"], row["budget"], row["source"]): row for row in rows}
    algos = list(dict.fromkeys(row["algo"] for row in rows))
    panels = []
    for title, column in (("Wall time, s", "wall_s"), ("Peak RSS, MiB", "peak_rss_mib")):
        lines: dict[tuple[str, str, str], Series] = {}
        copies = Series("cp -r, shards", INK, "circle", "2 4", [])
        # a column of the legend per format
        for key in sorted(cases, key=lambda key: algos.index(key[0])):
            (algo, layout, budget, _), row = key, cases[key]
            color = COLORS[algos.index(algo) % len(COLORS)]
            series = Series(f"{algo}, {layout}", color, "circle", "none", [])
            if budget != "default":
                series = Series(f"{algo}, one tensor, {budget}", color, "ring", None, [])
            elif layout == "single":
                series = Series(f"{algo}, single file", color, "square", "6 4", [])
            series = lines.setdefault((algo, layout, budget), series)
            # of the one tensor, the memory is what counts: its time is that of pages made of a hole
            if budget == "default" or column != "wall_s":
                series.points.append((float(row["source_gb"]), float(row[column])))
            if layout == "shards" and algo == algos[0]:
                copies.points.append((float(row["source_gb"]), float(row["cp_wall_s"])))
        copied = [copies] if column == "wall_s" else []
        panels.append(Panel(title, [*lines.values(), *copied]))
    return draw(panels, x_label="source, GB of bf16", title="Conversions as the source grows")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="measure, in a folder with 10 GB free")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--algos", nargs="+", default=ALGOS)
    parser.add_argument("--pages", choices=PAGES, default="fresh")
    parser.add_argument(
        "--command",
        default=default_command(),
        help="called as qconvert; default: the one beside this Python",
    )
    parser.add_argument("--csv", type=Path, default=HERE / "scaling.csv")
    parser.add_argument("--plot", type=Path, help="draw the CSV as SVG into this file")
    args = parser.parse_args()
    if args.work is None and args.plot is None:
        parser.error("give --work to measure, --plot to draw, or both")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.work is not None:
        command = find_command(args.command)
        args.work.mkdir(parents=True, exist_ok=True)
        clear(args.work / "out")
        append(args.csv, [*measure(command, args), *measure_huge(command, args)])
    if args.plot is not None:
        args.plot.write_text(plot(args.csv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
