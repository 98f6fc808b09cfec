"""Positional reads of the source and positional writes of the output, shared by all workers.

A source file is the one whose header was read, or the run ends: `SourceFiles` compares at the start
and at the end. An output file is created at its full size; when its last tensor is written it is
flushed to disk and closed. Errors of the system carry the file's name.
"""

import errno
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from qconvert.errors import ConvertError
from qconvert.journal import SourceFile
from qconvert.statistics import Statistics
from qconvert.writeback import start_writeback
from qschema.checkpoint import Checkpoint
from qschema.plan import Plan, Step
from qschema.safetensors import Entry, layout

# what copy_file_range answers where it can't: other file systems, old kernels, special files
_NO_RANGE_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


class _Open:
    """Descriptors by file name, opened once, closed when the last use is over. Thread safe."""

    def __init__(self, folder: Path, uses: Counter[str]) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self._uses = uses
        self._descriptors: dict[str, int] = {}

    def get(self, file: str) -> int:
        """Return the descriptor of `file`."""
        with self.lock:
            if file not in self._descriptors:
                self._descriptors[file] = self.open(file)
            return self._descriptors[file]

    def open(self, file: str) -> int:
        """Return a new descriptor."""
        return os.open(self.folder / file, os.O_RDONLY)

    def release(self, file: str) -> tuple[bool, int | None]:
        """Count down the uses of `file`; return whether it was the last, and what is to close."""
        with self.lock:
            self._uses[file] -= 1
            if self._uses[file]:
                return False, None
            return True, self._descriptors.pop(file, None)

    def remaining(self) -> list[tuple[str, int]]:
        """Return what is still open, and forget it."""
        with self.lock:
            found = list(self._descriptors.items())
            self._descriptors.clear()
        return found


class Reader(_Open):
    """Files that are read by position."""

    def read(self, file: str, buffer: memoryview, *, offset: int) -> None:
        """Fill `buffer` from `offset` of `file`.

        Raises ConvertError if the file ends before: it changed after its header was read.
        """
        descriptor = self.get(file)
        done = 0
        with named(self.folder / file):
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    size = os.fstat(descriptor).st_size
                    raise ConvertError(
                        f"{self.folder / file}: has {size} bytes, its header described at least "
                        f"{offset + len(buffer)}; it changed while it was read"
                    )
                done += count

    def done(self, file: str) -> None:
        """Count one use of `file` as over."""
        _, descriptor = self.release(file)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Close what is still open."""
        for _, descriptor in self.remaining():
            os.close(descriptor)


class Writer(_Open):
    """The output shards, in `folder`: whole in size from the start, and on disk when finished."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        uses = Counter(file for unit in plan.units for file in output_files(unit.steps))
        super().__init__(folder, uses)
        self._shards = {shard.file: shard for shard in plan.shards}
        entries: dict[str, list[Entry]] = {shard.file: [] for shard in plan.shards}
        for span in plan.outputs():
            entries[span.file].append(Entry(span.name, span.dtype, tuple(span.shape)))
        self._openings = {
            file: layout(found, metadata=self._shards[file].metadata)[0]
            for file, found in entries.items()
        }

    def open(self, file: str) -> int:
        """Return a descriptor of the shard, at its full size and with its header in place.

        What an interrupted run left of the shard stays.
        """
        path = self.folder / file
        with named(path):
            # 0o666 less the umask, as any program's files
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                os.ftruncate(descriptor, self._shards[file].nbytes)
                _write_all(descriptor, memoryview(self._openings[file]), 0)
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    def write(self, file: str, buffer: memoryview, *, offset: int) -> None:
        """Write all of `buffer` at `offset` of `file`."""
        descriptor = self.get(file)
        with named(self.folder / file):
            _write_all(descriptor, buffer, offset)
        start_writeback(descriptor, offset=offset, nbytes=len(buffer))

    def copy(self, file: str, source: int, nbytes: int, *, offset: int, to: int) -> bool:
        """Copy bytes from `offset` of the descriptor `source` to `to` of `file`, in the kernel.

        Returns whether it could; if not, nothing that matters was written.
        """
        descriptor = self.get(file)
        with named(self.folder / file):
            if not _copy_range(source, descriptor, nbytes, offset, to):
                return False
        start_writeback(descriptor, offset=to, nbytes=nbytes)
        return True

    def done(self, files: Iterable[str]) -> None:
        """Count one unit of each of `files` as written; the last one flushes and closes it."""
        for file in files:
            is_last, descriptor = self.release(file)
            if is_last:
                # not open where all tensors are empty
                self._finish(file, self.open(file) if descriptor is None else descriptor)

    def finish(self) -> None:
        """Flush and close what no unit finished: shards with no tensor, or with constants only."""
        found = dict(self.remaining())
        for file in self._shards:
            if file not in self._uses:
                self._finish(file, found[file] if file in found else self.open(file))

    def close(self) -> None:
        """Close what an interrupted run left open."""
        for _, descriptor in self.remaining():
            os.close(descriptor)

    def _finish(self, file: str, descriptor: int) -> None:
        path = self.folder / file
        try:
            with named(path):
                os.fsync(descriptor)
        except OSError:
            # what is in the page cache may never reach the disk: nobody shall take it over
            with suppress(OSError):
                path.unlink()
            raise
        finally:
            os.close(descriptor)


def output_files(steps: Iterable[Step]) -> list[str]:
    """Return the files that steps write to, each once."""
    return list({output.file: None for step in steps for output in step.outputs})


def identify(checkpoint: Checkpoint) -> list[SourceFile]:
    """Return the state of every shard. Raises ConvertError if a header is not as it was read."""
    found = []
    for shard in checkpoint.shards:
        with named(shard.file), open(shard.file, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            head = file.read(8 + len(shard.raw))
        if status.st_size != shard.file_nbytes or head[8:] != shard.raw:
            raise ConvertError(f"{shard.file}: changed after its header was read; start again")
        found.append(_state(shard.file.name, status))
    return found


def check_unchanged(folder: Path, source: Iterable[SourceFile]) -> None:
    """Raise ConvertError if a file in `folder` is not in the state of `source` any more."""
    for known in source:
        path = folder / known.file
        with named(path):
            state = _state(known.file, os.stat(path))
        if state != known:
            raise ConvertError(
                f"{path}: {difference(known, state)} while it was converted: what was made of it "
                "is of no use; start again with --fresh when nobody writes to it"
            )


def vector_files(statistics: Statistics) -> dict[Path, SourceFile]:
    """Return the state of the files that hold the vectors of `statistics`."""
    files = {stored.file for stored in statistics.vectors.values()}
    return {file: _state(file.name, os.stat(file)) for file in files}


def difference(known: SourceFile, state: SourceFile) -> str:
    """Return in words how a source file differs from what it was."""
    if known.nbytes != state.nbytes:
        return f"changed from {known.nbytes} to {state.nbytes} bytes"
    return "was replaced" if known.inode != state.inode else "was modified"


def _state(file: str, status: os.stat_result) -> SourceFile:
    return SourceFile(file, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Give errors of the system the name of the file that they are about."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def copy_file(source: Path, path: Path) -> None:
    """Copy the bytes of a file, not its mode, and flush them to disk; shares blocks if it can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb", buffering=0) as reader, _new(path) as writer:
        with named(source):
            nbytes = os.fstat(reader.fileno()).st_size
        with named(path):
            if not _copy_range(reader.fileno(), writer.fileno(), nbytes, 0, 0):
                position = 0
                while chunk := os.pread(reader.fileno(), 1 << 20, position):
                    _write_all(writer.fileno(), memoryview(chunk), position)
                    position += len(chunk)
            os.fsync(writer.fileno())


def write_file(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file of `pieces` and flush it to disk; parents are made, modes follow the umask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with named(path), _new(path) as file:
        position = 0
        for piece in pieces:
            _write_all(file.fileno(), memoryview(piece), position)
            position += len(piece)
        os.fsync(file.fileno())


def _new(path: Path) -> FileIO:
    """Return a file to write, emptied if it is there; never the one that a link names."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    return FileIO(path, "w", opener=lambda name, _: os.open(name, flags, 0o666))


def _copy_range(source: int, target: int, nbytes: int, offset: int, to: int) -> bool:
    done = 0
    while done < nbytes:
        try:
            count = os.copy_file_range(source, target, nbytes - done, offset + done, to + done)
        except OSError as error:
            if error.errno in _NO_RANGE_COPY:
                return False
            raise
        if count == 0:
            # the source ends early, or the file system only pretends; a read will tell
            return False
        done += count
    return True


def _write_all(descriptor: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:], offset + done)


def disk_full(error: OSError) -> bool:
    """Return whether `error` says that a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
