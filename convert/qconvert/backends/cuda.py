"""Encoding on a CUDA device: one stream per worker, Triton kernels, CUDA graphs.

Copies in, kernels and copies out of one worker are in order on its stream and overlap with those of
the other workers, with their reads, digests and writes. Slices of one shape take the same steps at
the same addresses, so the second of them is captured as a graph: one launch then stands for all
calls, which cost more of the host's time, under the GIL, than of the device's.
"""

import mmap
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import torch

from qconvert.backends import address
from qconvert.backends.mirror import MirrorBackend
from qconvert.errors import ConvertError, human

# Launches are Python under the GIL in any case. One at a time, a kernel that is not compiled yet is
# compiled by one worker while the others wait, not by each of them.
_LAUNCHING = threading.Lock()
# the shapes of a model's weights, whole slices and last ones
_MOST_GRAPHS = 32


def check_torch(num_gpus: int) -> None:
    """Raise ConvertError if this torch sees fewer than the `num_gpus` that the machine has."""
    # takes long, and else the first launch would have all workers wait for it
    import_module("triton.language")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < num_gpus:
        raise ConvertError(
            f"torch {torch.__version__} sees {seen} of {num_gpus} CUDA devices: install a CUDA "
            "build of torch that fits the driver, or convert with --device cpu"
        )


class CudaBackend(MirrorBackend):
    """One worker's stream on the device `name` ("cuda:0")."""

    def __init__(self, name: str) -> None:
        super().__init__(torch.device(name))
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # else a core spins for every worker that waits
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        # None: seen once, so all its kernels are compiled and loaded
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph | None] = OrderedDict()

    def _page_locked(self, nbytes: int) -> memoryview:
        """Return anonymous memory that CUDA has locked; torch's pinned memory is a power of two."""
        mapping = mmap.mmap(-1, nbytes)
        # fewer pages to take and to lock; a hint
        with suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(mapping)
        start = address(view)
        with torch.cuda.device(self._device):
            error = int(_runtime().cudaHostRegister(start, nbytes, 0))
        if error != 0:
            raise ConvertError(
                f"{self._device}: CUDA does not lock {human(nbytes)} of host memory (error "
                f"{error}); lower --memory-budget or --workers, or convert with --device cpu"
            )
        # holds the mapping, so that it is unlocked before it is unmapped
        weakref.finalize(self, _unlock, self._stream, start, mapping).atexit = False
        return view

    def _run(self, steps_of: Hashable, steps: Callable[[], None]) -> None:
        if steps_of not in self._graphs:
            super()._run(steps_of, steps)
            self._graphs[steps_of] = None
            if len(self._graphs) > _MOST_GRAPHS:
                self._graphs.popitem(last=False)
            return
        self._graphs.move_to_end(steps_of)
        graph = self._graphs[steps_of] = self._graphs[steps_of] or self._captured(steps)
        with torch.cuda.stream(self._stream):
            graph.replay()

    def _captured(self, steps: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with self._queue():
            # other threads go on with what a capture may not do
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                steps()
            finally:
                graph.capture_end()
        return graph

    @contextmanager
    def _queue(self) -> Iterator[None]:
        with _LAUNCHING, torch.cuda.stream(self._stream):
            yield

    def _wait(self) -> None:
        self._done.record(self._stream)
        self._done.synchronize()


def _unlock(stream: torch.cuda.Stream, start: int, mapping: mmap.mmap) -> None:
    """Unlock memory that nothing on the device reads or writes any more."""
    stream.synchronize()
    with torch.cuda.device(stream.device):
        _runtime().cudaHostUnregister(start)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
