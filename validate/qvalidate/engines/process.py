"""One run of an engine's runner file: a job in, its state and the end of its log out, nothing left.

The runner and its helpers are copied to a folder of their own and started there, so that neither
the checkout nor the modules beside them (`vllm.py`) are on the engine's path. The runner reads the
job as one JSON line from stdin, keeps its state in a JSON file that is always whole, and ends its
process group when stdin ends: an engine does not outlive us, however we go.
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
from typing import Literal, TypeVar

from pydantic import Field

from qschema.strict import DocumentError, Json, Strict, load_json

# of the log, from its end
_TAIL_NBYTES = 64 * 1024
# between the request to end and the kill
_GRACE_S = 3.0
_STATE = "state.json"
# runner_base.py has the same name
_CHILD_ERROR = "child_error.json"

_Model = TypeVar("_Model", bound=Strict)


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
    # operations that a stand-in carried out in the engine's place
    kernels: list[str] = Field(default_factory=list)
    error: RunnerError | None = None


@dataclass(frozen=True)
class Command:
    """What is started: a runner file, with the files that it imports beside it."""

    python: str
    runner: Path
    environment: Mapping[str, str]
    helpers: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Run:
    """How a runner's process ended. `returncode` is negative for a signal."""

    state: RunnerState
    returncode: int
    timed_out: bool
    log: str
    wall_s: float


class RunnerProcess:
    """A runner's process, while it lives and after."""

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path, log: "_Tail") -> None:
        self._process = process
        self._folder = folder
        self._log = log
        self._started = time.monotonic()

    def has_ended(self, *, within_s: float) -> bool:
        """Return whether the process has ended, after waiting `within_s` seconds at most."""
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def outcome(self, *, timed_out: bool) -> Run:
        """Return how it went; to be asked once the process was ended."""
        return Run(
            state=_state(self._folder, is_clean=self._process.returncode == 0),
            returncode=self._process.returncode,
            timed_out=timed_out,
            log=self._log.text(),
            wall_s=time.monotonic() - self._started,
        )


@contextlib.contextmanager
def started(command: Command, job: Mapping[str, Json], *, folder: Path) -> Iterator[RunnerProcess]:
    """Give the runner, at work on `job`; nothing of its process group is left afterwards.

    `folder` is made, for its files. Raises OSError if the interpreter can't be started.
    """
    folder.mkdir(parents=True)
    copy = folder / "runner.py"
    shutil.copyfile(command.runner, copy)
    for helper in command.helpers:
        shutil.copyfile(helper, folder / helper.name)
    job_line = json.dumps({**job, "state": str(folder / _STATE)}) + "\n"
    log = _Tail()
    with log.writing() as end:
        process = subprocess.Popen(
            [command.python, str(copy)],
            stdin=subprocess.PIPE,
            stdout=end,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=dict(command.environment),
            start_new_session=True,
        )
    try:
        if process.stdin is not None:
            # a runner that is gone already shows in its return code
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(job_line.encode())
                process.stdin.flush()
        yield RunnerProcess(process, folder, log)
    finally:
        end_group(process)


def run(
    python: str,
    runner: Path,
    job: Mapping[str, Json],
    *,
    folder: Path,
    environment: Mapping[str, str],
    timeout_s: float,
    helpers: tuple[Path, ...] = (),
) -> Run:
    """Return how `runner` went under the interpreter `python`; `folder` is made, for its files.

    `helpers` are files that the runner imports. Raises OSError if the interpreter can't be started.
    """
    command = Command(python=python, runner=runner, environment=environment, helpers=helpers)
    with started(command, job, folder=folder) as process:
        timed_out = not process.has_ended(within_s=timeout_s)
    return process.outcome(timed_out=timed_out)


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


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End everything in the group that `process` leads: asked first, then killed."""
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


def _state(folder: Path, *, is_clean: bool) -> RunnerState:
    """Return the runner's report, with the exception of a process of the engine's own.

    Such a process also fails where it outlives a runner that is done: that is no news.
    """
    try:
        state = _document(folder / _STATE, RunnerState) or RunnerState()
        if is_clean or state.error is not None:
            return state
        child = _document(folder / _CHILD_ERROR, RunnerError)
        return state.model_copy(update={"error": child})
    except DocumentError as error:
        broken = RunnerError(type="RunnerState", text=str(error), place="")
        return RunnerState(error=broken)


def _document(file: Path, model: type[_Model]) -> _Model | None:
    return model.parse(load_json(file), file=file.name) if file.is_file() else None
