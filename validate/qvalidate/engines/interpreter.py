"""Where an engine's interpreter is, and the environment that it starts with."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping

# nothing may reach for the network, report usage or draw a progress bar
_FORCED = {
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class NoInterpreterError(Exception):
    """There is no interpreter to run the engine with; the text is for the user."""


def find_interpreter(given: str | None, *, module: str, install: str) -> str:
    """Return the interpreter as a path that holds from any folder, its links unresolved.

    `given` is the user's; without it, this one if it can import `module`.

    Raises NoInterpreterError, which says what to do.
    """
    if given is None:
        if importlib.util.find_spec(module) is not None:
            return sys.executable
        raise NoInterpreterError(
            f"{module} is not installed for {sys.executable}: {install}, "
            "or name an interpreter that has it with --python"
        )
    found = shutil.which(given)
    if found is None:
        raise NoInterpreterError(f"--python {given}: no such program")
    return os.path.abspath(found)


def environment(defaults: Mapping[str, str], *, python: str) -> dict[str, str]:
    """Return the variables to start `python` with; the user's own win over `defaults`.

    PYTHONPATH is meant for the interpreter that runs this, and is passed on to no other one.
    """
    variables = {**defaults, **os.environ, **_FORCED}
    if not _is_ours(python):
        variables.pop("PYTHONPATH", None)
    # the runner imports what lies beside it
    variables.pop("PYTHONSAFEPATH", None)
    # the runner starts in a folder of its own: relative entries would point elsewhere
    if entries := variables.get("PYTHONPATH"):
        absolute = [os.path.abspath(entry) for entry in entries.split(os.pathsep) if entry]
        variables["PYTHONPATH"] = os.pathsep.join(absolute)
    return variables


def _is_ours(python: str) -> bool:
    # the links of two environments lead to one program: the folder tells them apart
    return os.path.dirname(python) == os.path.dirname(sys.executable) and os.path.realpath(
        python
    ) == os.path.realpath(sys.executable)
