"""One run of an engine's runner file: a job in, its state and the end of its log out, nothing left.

The runner is copied to a folder of its own and started there, so that neither the checkout nor the
modules beside the runner (`vllm.py`) are on the engine's path. It reads the job as one JSON line
from stdin, keeps its state in a JSON file that is always whole, and ends its process group when
stdin ends: an engine does not outlive us, however we go.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from pydantic import Field

from qschema.strict import DocumentError, Json, Strict, load_json

# of the log, from its end
_TAIL_NBYTES = 64 * 1024
# between the request to end and the kill
_GRACE_S = 3.0


class RunnerError(Strict):
    """An exception inside the engine, from the outermost to the first cause."""

    type: str
    text: str
    # file:line in function: source line, of the innermost frame
    place: str
    # the tensor that was being loaded and its shape, where the frames told
    tensor: str = ""
    shapes: str = ""
    # "Type: text" of every cause, the root last
    causes: list[str] = Field(default_factory=list)


class RunnerState(Strict):
    """What a runner has reported so far; `reached` is the last stage that it completed."""

    reached: Literal["start", "import", "load", "generate"] = "start"
    version: str | None = None
    torch: str | None = None
    device: str | None = None
    vocab: int | None = None
    prompts: list[list[int]] = Field(default_factory=list)
    tokens: list[list[int]] = Field(default_factory=list)
    texts: list[str] | None = None
    # prompts whose generated tokens have a NaN or Inf log-probability
    num_nonfinite: int = 0
    notes: list[str] = Field(default_factory=list)
    error: RunnerError | None = None


@dataclass(frozen=True)
class Run:
    """How a runner's process ended. `returncode` is negative for a signal."""

    state: RunnerState
    returncode: int
    timed_out: bool
    log: str
    wall_s: float


def run(
    python: str,
    runner: Path,
    job: Mapping[str, Json],
    *,
    folder: Path,
    environment: Mapping[str, str],
    timeout_s: float,
) -> Run:
    """Return how `runner` went under the interpreter `python`; `folder` is made, for its files.

    Raises OSError if the interpreter can't be started.
    """
    folder.mkdir(parents=True)
    copy = folder / "runner.py"
    shutil.copyfile(runner, copy)
    job_line = json.dumps({**job, "state": str(folder / "state.json")}) + "\n"
    started = time.monotonic()
    timed_out = False
    log = _Tail()
    with log.writing() as end:
        process = subprocess.Popen(
            [python, str(copy)],
            stdin=subprocess.PIPE,
            stdout=end,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
        )
    try:
        if process.stdin is not None:
            # a runner that is gone already shows in its return code
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(job_line.encode())
                process.stdin.flush()
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        _end_group(process)
    return Run(
        state=_state(folder / "state.json"),
        returncode=process.returncode,
        timed_out=timed_out,
        log=log.text(),
        wall_s=time.monotonic() - started,
    )


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Make SIGTERM raise SystemExit(143), so that engine and files are cleared away.

    Only in the main thread, and only where SIGTERM would end the process at once.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        # once: the clearing up is not interrupted by the next
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Tail:
    """The last bytes of what is written into a pipe, whatever comes before."""

    def __init__(self) -> None:
        self._kept = b""
        self._reader: threading.Thread | None = None

    @contextlib.contextmanager
    def writing(self) -> Iterator[int]:
        """Give the pipe's end to write to, for as long as it takes to pass it on."""
        read_end, write_end = os.pipe()
        self._reader = threading.Thread(target=self._read, args=(read_end,), daemon=True)
        self._reader.start()
        try:
            yield write_end
        finally:
            os.close(write_end)

    def text(self) -> str:
        """Return the tail, once the writers are gone; one that got away is not waited for."""
        if self._reader is not None:
            self._reader.join(_GRACE_S)
        return self._kept.decode("utf-8", errors="replace")

    def _read(self, read_end: int) -> None:
        with open(read_end, "rb", buffering=0) as pipe:
            while chunk := pipe.read(_TAIL_NBYTES):
                self._kept = (self._kept + chunk)[-_TAIL_NBYTES:]


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End everything in the runner's process group: asked first, then killed."""
    deadline = time.monotonic() + _GRACE_S
    # the group may be empty, or hold only what is not ours any more
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _state(file: Path) -> RunnerState:
    if not file.is_file():
        return RunnerState()
    try:
        return RunnerState.parse(load_json(file), file=file.name)
    except DocumentError as error:
        broken = RunnerError(type="RunnerState", text=str(error), place="")
        return RunnerState(error=broken)
