"""A process that forks conversions which are killed at a chosen system call. Run as a script.

Reads one JSON object per line: source, output, algo, statistics (a file or null), workers, budget,
kill_at (the number of the call before which SIGKILL strikes; 0: never), torn (a write that is
killed has written half of its bytes before), fresh. Answers with one line each: the signal or exit
code of the fork, and how many calls it made if it ended by itself.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qconvert.backends import resolve
from qconvert.convert import convert
from qconvert.planner import make_plan
from qconvert.statistics import Statistics, open_statistics
from qschema.checkpoint import open_checkpoint
from qschema.formats import find
from qschema.recipe import Recipe, Rule

# every call by which a conversion changes what others can see, and its reads
CALLS = (
    "open",
    "preadv",
    "pread",
    "pwrite",
    "write",
    "copy_file_range",
    "ftruncate",
    "fsync",
    "rename",
    "mkdir",
    "rmdir",
    "unlink",
)
WRITES = ("pwrite", "write")


class Killer:
    """Counts calls of all threads; at one of them, the process dies."""

    def __init__(self, kill_at: int, *, torn: bool) -> None:
        self.count = 0
        self._kill_at = kill_at
        self._torn = torn
        self._lock = threading.Lock()

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """Return `real` with the count before it."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.count += 1
                if self.count == self._kill_at:
                    if self._torn and name in WRITES:
                        descriptor, data, *offset = args
                        real(descriptor, bytes(data)[: len(data) // 2], *offset)
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return counted


def conversion(command: dict[str, Any]) -> int:
    """Convert as `command` says and return how many calls it took."""
    statistics = Statistics()
    if command["statistics"]:
        statistics = open_statistics(Path(command["statistics"]))
    checkpoint = open_checkpoint(Path(command["source"]))
    asked = Recipe(rules=[Rule(match="*", algo=command["algo"])])
    plan = make_plan(checkpoint, asked, statistics)
    killer = Killer(command["kill_at"], torn=command["torn"])
    for name in CALLS:
        setattr(os, name, killer.wrap(name, getattr(os, name)))
    convert(
        checkpoint,
        plan,
        Path(command["output"]),
        statistics=statistics,
        device=resolve("cpu", codecs=[find(command["algo"]).codec]),
        workers=command["workers"],
        budget=command["budget"],
        watch=lambda progress: None,
        fresh=command["fresh"],
    )
    return killer.count


def main() -> None:
    """Answer commands until the input ends."""
    for line in sys.stdin:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            write = os.write
            try:
                write(writing, str(conversion(json.loads(line))).encode())
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        os.close(writing)
        count = os.read(reading, 100)
        os.close(reading)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "count": int(count or 0)}), flush=True)


if __name__ == "__main__":
    main()
