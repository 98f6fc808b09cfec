"""Time qconvert beside other tools' ways to the same formats, on the same checkpoint and cores.

    python benchmarks/peers.py --work DIR [--llmcompressor-python PATH] [--modelopt-python PATH]

Each round takes every format: `cp -r`, then each tool that can make it, each from the state of
memory that --pages names, as a process from its start to its end with the output on its file
system. A tool whose interpreter is not given is skipped, and the run says so. No tool is told to be
slow: qconvert and ModelOpt run with their defaults, llm-compressor takes as many shards at once as
--llmcompressor-workers says. Appends one row per format and tool to peers.csv.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from processes import (
    HERE,
    PAGES,
    Run,
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

# case -> tool -> what that tool calls the format; fp8-tensor has a static scale of the inputs, for
# which qconvert and llm-compressor want a calibration
CASES = {
    "fp8-block": {
        "qconvert": "FP8_PB_WO",
        "llm-compressor": "FP8_BLOCK",
        "modelopt": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    },
    "fp8-channel": {
        "qconvert": "FP8_PER_CHANNEL_PER_TOKEN",
        "llm-compressor": "FP8_DYNAMIC",
        "modelopt": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    },
    "fp8-tensor": {"modelopt": "FP8_DEFAULT_CFG"},
    "mxfp8": {"qconvert": "MXFP8", "llm-compressor": "MXFP8", "modelopt": "MXFP8_DEFAULT_CFG"},
    "nvfp4-weights": {
        "qconvert": "W4A16_NVFP4",
        "llm-compressor": "NVFP4A16",
        "modelopt": "W4A16_NVFP4_CFG",
    },
    "int4-group128": {
        "qconvert": "W4A16_AWQ",
        "llm-compressor": "W4A16",
        "modelopt": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    },
}


@dataclass
class Row:
    """One line of the CSV; times are medians, memory is the largest of all runs."""

    date: str
    commit: str
    tool: str
    version: str
    case: str
    call: str
    wall_s: float
    work_s: float
    cpu_s: float
    cp_wall_s: float
    ratio: float
    peak_rss_mib: float
    output_gb: float
    cpu: str
    cores: int
    rounds: int


@dataclass
class Samples:
    """What one tool took for one format, a value per run."""

    version: str = ""
    call: str = ""
    output_nbytes: int = 0
    wall_s: list[float] = field(default_factory=list)
    work_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)

    def add(self, done: Run, words: dict[str, object]) -> None:
        """Takes in one run, and what its tool said of itself."""
        self.version, self.call = str(words["version"]), str(words["call"])
        self.output_nbytes = done.output_nbytes
        self.wall_s.append(done.wall_s)
        self.rss_mib.append(done.peak_rss_mib)
        self.cpu_s.append(done.cpu_s)
        self.work_s.append(float(str(words["work_s"])))


class Qconvert:
    """The converter of this checkout, or of --command."""

    def __init__(self, command: list[str], work: Path) -> None:
        self.command = command
        self.timings = work / "timings.json"
        self.version = run([*command, "--version"]).text.split()[-1]

    def argv(self, source: Path, out_dir: Path, name: str) -> list[str]:
        """Returns the command that makes format `name`."""
        paths = [str(source), str(out_dir)]
        return [*self.command, *paths, "--algo", name, "--timings", str(self.timings)]

    def words(self, done: Run, name: str) -> dict[str, object]:
        """Returns version, work_s and call of a finished run."""
        work_s = json.loads(self.timings.read_text())["wall_s"]
        self.timings.unlink()
        return {"version": self.version, "call": name, "work_s": work_s}


class Peer:
    """Another tool: a runner of ours, in the interpreter that has it, with its own last words."""

    def __init__(self, python: str, runner: str, *options: str) -> None:
        self.command = [python, str(HERE / runner)]
        self.options = options

    def argv(self, source: Path, out_dir: Path, name: str) -> list[str]:
        """Returns the command that makes format `name`."""
        return [*self.command, str(source), str(out_dir), name, *self.options]

    def words(self, done: Run, name: str) -> dict[str, object]:
        """Returns version, work_s and call of a finished run."""
        lines = [line for line in done.text.splitlines() if line.startswith('{"version"')]
        found: dict[str, object] = json.loads(lines[-1])
        return found


def measure(
    tools: dict[str, Qconvert | Peer], source: Path, out_dir: Path, *, args: argparse.Namespace
) -> dict[tuple[str, str], Samples]:
    """Returns (case, tool) -> samples; the tool "cp" is the yardstick of its case."""
    found: dict[tuple[str, str], Samples] = {}
    clear(out_dir)
    warm(source)
    for number in range(args.rounds):
        for case in args.cases:
            cp = timed(["cp", "-r", str(source), str(out_dir)], source, out_dir, pages=args.pages)
            found.setdefault((case, "cp"), Samples()).wall_s.append(cp.wall_s)
            for tool, name in CASES[case].items():
                if tool not in tools:
                    continue
                argv = tools[tool].argv(source, out_dir, name)
                done = timed(argv, source, out_dir, pages=args.pages)
                samples = found.setdefault((case, tool), Samples())
                samples.add(done, tools[tool].words(done, name))
                print(f"{case}, {tool}: {done.wall_s:.1f} s", file=sys.stderr, flush=True)
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    return found


def to_rows(found: dict[tuple[str, str], Samples], pages: str) -> list[Row]:
    """Returns one row per case and tool."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    rows = []
    for (case, tool), samples in found.items():
        if tool == "cp":
            continue
        wall_s = statistics.median(samples.wall_s)
        cp_wall_s = statistics.median(found[case, "cp"].wall_s)
        rows.append(
            Row(
                date=today,
                commit=commit(),
                tool=tool,
                version=samples.version,
                case=f"bench-shards {case} {pages}",
                call=samples.call,
                wall_s=round(wall_s, 3),
                work_s=round(statistics.median(samples.work_s), 3),
                cpu_s=round(statistics.median(samples.cpu_s), 3),
                cp_wall_s=round(cp_wall_s, 3),
                ratio=round(wall_s / cp_wall_s, 3),
                peak_rss_mib=round(max(samples.rss_mib), 1),
                output_gb=round(samples.output_nbytes / 1e9, 3),
                cpu=cpu_name(),
                cores=num_cores(),
                rounds=len(samples.wall_s),
            )
        )
    return rows


def find_tools(args: argparse.Namespace) -> dict[str, Qconvert | Peer]:
    """Returns the tools that are here; says which are not."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    tools: dict[str, Qconvert | Peer] = {
        "qconvert": Qconvert(find_command(args.command), args.work)
    }
    if args.llmcompressor_python:
        workers = ["--workers", str(args.llmcompressor_workers)]
        tools["llm-compressor"] = Peer(
            args.llmcompressor_python, "peers_llmcompressor.py", *workers
        )
    if args.modelopt_python:
        tools["modelopt"] = Peer(args.modelopt_python, "peers_modelopt.py")
    for tool in ("llm-compressor", "modelopt"):
        if tool not in tools:
            option = f"--{tool.replace('-', '')}-python"
            print(f"{tool} is skipped: no {option}", file=sys.stderr)
    return tools


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with 6 GB free")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--pages", choices=PAGES, default="fresh")
    parser.add_argument(
        "--command",
        default=default_command(),
        help="called as qconvert; default: the one beside this Python",
    )
    parser.add_argument("--llmcompressor-python", help="an interpreter that has llm-compressor")
    parser.add_argument("--llmcompressor-workers", type=int, default=num_cores())
    parser.add_argument("--modelopt-python", help="one that has ModelOpt and transformers")
    parser.add_argument("--csv", type=Path, default=HERE / "peers.csv")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    args.work.mkdir(parents=True, exist_ok=True)
    tools = find_tools(args)
    source = make_source(args.work / "bench-shards", "--shape", "bench", "--layout", "shards")
    rows = to_rows(measure(tools, source, args.work / "out", args=args), args.pages)
    append(args.csv, rows)
    print(
        f"{'case':<32} {'tool':<15} {'wall s':>7} {'work s':>7} {'CPU s':>7} {'/ cp':>6} {'MiB':>5}"
    )
    for row in rows:
        times = f"{row.wall_s:>7.2f} {row.work_s:>7.2f} {row.cpu_s:>7.2f} {row.ratio:>6.2f}"
        print(f"{row.case:<32} {row.tool:<15} {times} {row.peak_rss_mib:>5.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
