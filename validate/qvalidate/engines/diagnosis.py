"""What an engine's failure means, and the few of its words that tell a person why."""

import re
import signal
from dataclasses import dataclass
from typing import Literal

from qvalidate.engines.outcome import Level
from qvalidate.engines.process import Run, RunnerError, RunnerState

Rule = Literal[
    "engine-refused", "engine-crashed", "engine-timeout", "engine-no-kernel", "engine-missing"
]

_LONGEST = 320
# the stage that a runner reports when it has done what the level asks
_LAST: dict[Level, str] = {"load": "load", "generate": "generate", "compare": "generate"}
# pydantic's frame around a message of the engine
_INNER = re.compile(
    r"(?:Value|Assertion) error, (?P<inner>.+?)(?=\s*\[type=|\s*For further information|\Z)", re.S
)
# an engine's parent process reports only that a child failed
_GENERIC = re.compile(
    r"See root cause above|Engine core initialization failed|EngineDeadError"
    r"|scheduler died during initialization|Initialization failed\. Please see the error"
)
# says something about the machine or the installation, not about the checkpoint: memory, or a
# process of the engine's own that was killed (SGLang)
_MOMENT = re.compile(
    r"out of memory|No available memory|Free memory on device|OutOfMemoryError"
    r"|Not enough memory|[Cc]an(?:not|'t) allocate memory|\(exit code: -\d"
    # no GPU, or none that is free and well
    r"|No CUDA GPUs are available|Found no NVIDIA driver|driver version is insufficient"
    r"|NVIDIA driver on your system is too old|all CUDA-capable devices are busy"
    r"|uncorrectable ECC error|Failed to infer device type"
    # a disk, a port, a part of the engine's installation
    r"|No space left on device|Address already in use|Too many open files"
    r"|ModuleNotFoundError: |cannot open shared object file"
)
_ERROR_LINE = re.compile(r"\b\w*(?:Error|Exception|Fatal|fault)\b: ?\S|^Fatal Python error")
# log prefixes such as "(EngineCore pid=12) ERROR 11-21 11:03:12 [core.py:133] "
_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^]]*\] )?")


@dataclass(frozen=True)
class Diagnosis:
    """The rule that a failed run falls under, and its one line."""

    rule: Rule
    message: str
    # the tensor that was being loaded; empty if unknown
    tensor: str = ""


def diagnose(
    run: Run, *, level: Level, no_kernel: re.Pattern[str], timeout_s: float
) -> Diagnosis | None:
    """Return what went wrong in `run`, None if it reported all that `level` needs.

    An exception while the checkpoint is read is the engine's refusal; one after that, or an end
    without a word, is a crash; neither is meant where the words say that this machine lacks an
    operation. An exit status of 0 says nothing: an interpreter that never answered (/bin/true) has
    no engine.
    """
    state = run.state
    if run.timed_out:
        return Diagnosis("engine-timeout", f"no answer in {timeout_s:g} s; {_stage(state)}")
    if state.error is None:
        if run.returncode == 0 and state.reached == _LAST[level]:
            return None
        if state.reached == "start" and run.returncode >= 0:
            return Diagnosis(
                "engine-missing", f"the interpreter never answered: {_last_words(run)}"
            )
        return Diagnosis("engine-crashed", _last_words(run))
    message = _message(state.error, run.log)
    everything = "\n".join([state.error.text, *state.error.causes, message])
    if state.reached == "start":
        return Diagnosis("engine-missing", message)
    if no_kernel.search(everything):
        return Diagnosis("engine-no-kernel", message)
    if state.reached == "import" and not _MOMENT.search(everything):
        if state.error.tensor:
            message += f"; while loading {state.error.tensor} {state.error.shapes}".rstrip()
        return Diagnosis("engine-refused", message, state.error.tensor)
    return Diagnosis("engine-crashed", f"{message}; {_stage(state)}")


def _stage(state: RunnerState) -> str:
    return {
        "start": "the engine was being imported",
        "import": "the checkpoint was being loaded",
        "load": "the checkpoint was loaded, generation had begun",
        "generate": "generation was done",
    }[state.reached]


def _message(error: RunnerError, log: str) -> str:
    if _GENERIC.search(error.text) or _GENERIC.search(error.type):
        telling = [cause for cause in error.causes if not cause.endswith(": ")]
        found = telling[-1:] or _lines(log)[1]
        return _short(found[-1] if found else f"{error.type}: {error.text}")
    inner = _INNER.search(error.text)
    if inner is not None:
        return _short(inner["inner"])
    if not error.text.strip():
        return _short(f"{error.type} at {error.place}")
    return _short(f"{error.type}: {error.text}")


def _last_words(run: Run) -> str:
    if run.returncode < 0:
        try:
            end = f"killed by {signal.Signals(-run.returncode).name}"
        except ValueError:
            end = f"killed by signal {-run.returncode}"
        if run.returncode == -signal.SIGKILL:
            end += " (the system does that when memory runs out)"
    else:
        end = f"ended with exit status {run.returncode} and no result"
    line = _error_line(run.log)
    return _short(f"{end}; {_stage(run.state)}" + (f"; {line}" if line else ""))


def _error_line(log: str) -> str:
    """Return the last line that names an error, else the last line."""
    lines, errors = _lines(log)
    return (errors or lines or [""])[-1]


def _lines(log: str) -> tuple[list[str], list[str]]:
    """Return the log's lines without their prefixes, and those of them that name an error."""
    lines = [_PREFIX.sub("", line.strip()) for line in log.splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if _ERROR_LINE.search(line) and not _GENERIC.search(line)]
    return lines, errors


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
