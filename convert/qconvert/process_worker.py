"""One process of a conversion: `python -m qconvert.process_worker DESCRIPTOR PARENT`.

Reads an `Assignment` from the socket with that descriptor, and sends back what `processes` says.
Ends with its parent, however that ends.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from qconvert.backends import resolve
from qconvert.errors import ConvertError
from qconvert.journal import Record
from qconvert.memory import peak_rss_nbytes
from qconvert.pipeline import Progress, run
from qconvert.processes import Assignment, Failure
from qconvert.smoothing import Vectors
from qconvert.statistics import Statistics
from qschema.plan import Plan

# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1


class _Sender:
    """The journal and the progress of this process, which are kept elsewhere. Thread safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def append(self, record: Record) -> None:
        """Send a finished unit."""
        self.send(record)

    def watch(self, progress: Progress) -> None:
        """Send the bytes that are done."""
        self.send(sum(progress.done))

    def send(self, message: object) -> None:
        """Send anything."""
        with self._lock:
            self._connection.send(message)


def _end_with(parent: int) -> None:
    """Have the kernel end this process when `parent` is gone."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _do(assignment: Assignment, sender: _Sender) -> None:
    done = run(
        Plan.model_validate_json(assignment.plan),
        source=assignment.source,
        output=assignment.output,
        journal=sender,
        before=assignment.before,
        vectors=Vectors(Statistics(vectors=assignment.vectors)),
        device=resolve(assignment.device, codecs=assignment.codecs),
        workers=assignment.workers,
        budget=assignment.budget,
        watch=sender.watch,
    )
    sender.send((done, peak_rss_nbytes()))


def main() -> None:
    """Do what the parent process says, once."""
    # Ctrl-C reaches all processes of a terminal; the parent ends this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with(int(sys.argv[2]))
    connection = Connection(int(sys.argv[1]))
    sender = _Sender(connection)
    try:
        _do(connection.recv(), sender)
    except ConvertError as error:
        sender.send(Failure(str(error)))
    except OSError as error:
        sender.send(Failure(str(error), error.errno or 5, error.filename))
    except BaseException:
        sender.send(Failure(traceback.format_exc(), is_ours=False))


if __name__ == "__main__":
    main()
