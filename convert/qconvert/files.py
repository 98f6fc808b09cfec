"""Positional reads of the source and positional writes of the output, shared by all workers.

An output file is created at its full size; when its last tensor is written it is flushed to disk
and closed. A source file is closed after its last read.
"""

import errno
import os
import threading
from collections import Counter
from pathlib import Path

from qconvert.errors import ConvertError
from qconvert.writeback import start_writeback
from qschema.plan import OutputShard, Plan
from qschema.safetensors import Entry, layout


class Files:
    """The open files of a conversion. Thread safe; no two workers write the same bytes."""

    def __init__(self, plan: Plan, *, source: Path, output: Path) -> None:
        self._source = source
        self._output = output
        self._lock = threading.Lock()
        self._readers: dict[str, int] = {}
        self._writers: dict[str, int] = {}
        self._pending = Counter(step.source.file for step in plan.steps)
        self._shards = {shard.file: shard for shard in plan.shards}
        entries: dict[str, list[Entry]] = {shard.file: [] for shard in plan.shards}
        for span in plan.outputs():
            entries[span.file].append(Entry(span.name, span.dtype, tuple(span.shape)))
        self._openings = {
            file: layout(found, metadata=self._shards[file].metadata)[0]
            for file, found in entries.items()
        }

    def read(self, file: str, buffer: memoryview, *, offset: int) -> None:
        """Fill `buffer` from `offset` of source file `file`.

        Raises ConvertError if the file ends before: it changed after its header was read.
        """
        descriptor = self._reader(file)
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                size = os.fstat(descriptor).st_size
                raise ConvertError(
                    f"{self._source / file}: has {size} bytes, its header described at least "
                    f"{offset + len(buffer)}; it changed while it was read"
                )
            done += count

    def write(self, file: str, buffer: memoryview, *, offset: int) -> None:
        """Write all of `buffer` at `offset` of output file `file`."""
        descriptor = self._writer(file)
        _write_all(descriptor, buffer, offset)
        start_writeback(descriptor, offset=offset, nbytes=len(buffer))

    def tensor_done(self, file: str) -> None:
        """Count a tensor of shard `file` as finished; the last one flushes and closes the files."""
        with self._lock:
            self._pending[file] -= 1
            if self._pending[file]:
                return
            reader = self._readers.pop(file, None)
            writer = self._writers.pop(file, None)
        if reader is not None:
            os.close(reader)
        if writer is None:
            # a shard whose tensors are all empty
            writer = self._create(self._shards[file])
        try:
            os.fsync(writer)
        finally:
            os.close(writer)

    def create_empty(self) -> None:
        """Create the output shards that hold no tensor at all."""
        for file, shard in self._shards.items():
            if not self._pending[file]:
                os.close(self._create(shard))

    def close(self) -> None:
        """Close what an interrupted run left open."""
        with self._lock:
            for descriptor in (*self._readers.values(), *self._writers.values()):
                os.close(descriptor)
            self._readers.clear()
            self._writers.clear()

    def _reader(self, file: str) -> int:
        with self._lock:
            if file not in self._readers:
                self._readers[file] = os.open(self._source / file, os.O_RDONLY)
            return self._readers[file]

    def _writer(self, file: str) -> int:
        with self._lock:
            if file not in self._writers:
                self._writers[file] = self._create(self._shards[file])
            return self._writers[file]

    def _create(self, shard: OutputShard) -> int:
        path = self._output / shard.file
        # 0o666 less the umask, as any program's files
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.ftruncate(descriptor, shard.nbytes)
        _write_all(descriptor, memoryview(self._openings[shard.file]), 0)
        return descriptor


def _write_all(descriptor: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:], offset + done)


def disk_full(error: OSError) -> bool:
    """Return whether `error` says that a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
