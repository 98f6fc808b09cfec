"""Whole commands, measured: wall time and peak RSS, from one state of the machine's free memory.

A virtual machine may hand free memory back to its host within seconds, and then pays for every page
that it writes next: the same `cp` took 0.4 s right after another and 2 s after a pause. So a timed
run starts from one state: `fresh` waits first, `recycled` copies untimed first.

Standard library only, on purpose: a child's peak RSS as Linux reports it begins at its parent's.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGES = ["fresh", "recycled"]
FRESH_WAIT_S = 5.0


@dataclass(frozen=True)
class Run:
    """What one command took and made; `text` is what it printed, both streams.

    `cpu_s` is user and system time of the process and the children it waited for.
    """

    wall_s: float
    cpu_s: float
    peak_rss_mib: float
    output_nbytes: int
    text: str


def run(argv: list[str], out_dir: Path | None = None, *, env: dict[str, str] | None = None) -> Run:
    """Returns what one command took; removes the `out_dir` that it makes.

    Peak RSS is the largest of the process and the children it waited for, not their sum.
    """
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=env)
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - start
        log.seek(0)
        text = log.read().decode(errors="replace")
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0 or not (out_dir is None or out_dir.is_dir()):
        raise SystemExit(f"exit {child.returncode} from {shlex.join(argv)}\n{text[-2000:]}")
    output_nbytes = 0
    if out_dir is not None:
        output_nbytes = nbytes(out_dir)
        shutil.rmtree(out_dir)
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(wall_s, cpu_s, usage.ru_maxrss / 1024, output_nbytes, text)


def timed(argv: list[str], source: Path, out_dir: Path, *, pages: str) -> Run:
    """Returns what `run` returns, from the state of free memory that `pages` names."""
    # else the kernel writes back older files during this run
    os.sync()
    if pages == "fresh":
        time.sleep(FRESH_WAIT_S)
    else:
        run(["cp", "-r", str(source), str(out_dir)], out_dir)
    return run(argv, out_dir)


def clear(out_dir: Path) -> None:
    """Removes an output, and what an interrupted conversion left for the next one to go on from."""
    for path in (out_dir, out_dir.with_name(f"{out_dir.name}.partial")):
        shutil.rmtree(path, ignore_errors=True)


def nbytes(directory: Path) -> int:
    """Returns the bytes of all files under `directory`."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def make_source(path: Path, *options: str) -> Path:
    """Returns `path`, with the checkpoint that make_checkpoint.py makes by `options` in it."""
    # config.json is written last
    if not (path / "config.json").exists():
        shutil.rmtree(path, ignore_errors=True)
        script = [sys.executable, str(HERE / "make_checkpoint.py"), str(path)]
        subprocess.run([*script, *options], check=True)
    return path


def warm(source: Path) -> None:
    """Reads every file once, so that no run pays for the disk."""
    buffer = bytearray(1 << 22)
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cpu_name() -> str:
    """Returns the processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return os.uname().machine


def num_cores() -> int:
    """Returns the cores that this process, and what it starts, may use."""
    return len(os.sched_getaffinity(0))


def default_command() -> str:
    """Returns the qconvert that is installed beside this Python, as a shell would be given it."""
    return shlex.quote(str(Path(sys.executable).parent / "qconvert"))


def find_command(text: str) -> list[str]:
    """Returns the words of a command that exists. Raises SystemExit."""
    command = shlex.split(text)
    if not command or shutil.which(command[0]) is None:
        raise SystemExit(f"no such command: {text!r}; is qconvert installed beside this Python?")
    return command
