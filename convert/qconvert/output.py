"""The output directory: built as `out_dir.partial`, flushed, then renamed. Nobody sees half of one.

The partial directory holds a locked marker file while it is being written. What a killed run left
is recognised by the marker without its lock, and removed; anything else of that name is not ours.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qconvert.errors import ConvertError, human

_MARKER = ".qconvert-partial"


def check_paths(source: Path, output: Path) -> None:
    """Refuse an output that is not empty, or that contains the source or lies in it.

    Raises ConvertError; writes nothing.
    """
    inside, outside = source.resolve(), output.resolve()
    if inside == outside:
        raise ConvertError(f"{output}: input and output are the same directory")
    if outside in inside.parents:
        raise ConvertError(f"{output}: the input {source} lies inside the output directory")
    if inside in outside.parents:
        raise ConvertError(f"{output}: lies inside the input directory {source}")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ConvertError(f"{output}: exists and is not a directory; nothing is overwritten")
    if os.path.ismount(output):
        raise ConvertError(
            f"{output}: is a mount point, which can't be renamed to; add a folder name"
        )
    if output.is_dir() and any(output.iterdir()):
        raise ConvertError(f"{output}: exists and is not empty; nothing is overwritten")
    parent = outside.parent
    if not parent.is_dir():
        raise ConvertError(f"{output}: the directory {parent} does not exist")


def check_space(output: Path, nbytes: int) -> None:
    """Refuse what can't fit: raises ConvertError if the disk has less than `nbytes` free."""
    stats = os.statvfs(output.resolve().parent)
    free = stats.f_bavail * stats.f_frsize
    if free < nbytes:
        raise ConvertError(
            f"{output}: the result takes {human(nbytes)}, the disk has {human(free)} free"
        )


@contextmanager
def partial_directory(output: Path) -> Iterator[Path]:
    """Yield a fresh `out_dir.partial`; rename it to `output` on success, remove it on any error.

    Raises ConvertError if another run holds it, or if it is not the work of this tool.
    """
    output = output.resolve()
    partial = output.with_name(f"{output.name}.partial")
    _clear(partial)
    partial.mkdir()
    marker = partial / _MARKER
    lock = os.open(marker, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
        _sync_directories(partial)
        # an empty output directory is replaced, anything else makes this fail
        os.rename(partial, output)
        # last: a run that is killed before leaves a directory that the next one knows for its own
        (output / _MARKER).unlink()
        _sync_directory(output)
        _sync_directory(output.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and flush it to disk; parents are made, the mode follows the umask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, path: Path) -> None:
    """Copy the bytes of a file, not its mode, and flush them to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as reader, open(path, "xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())


def _clear(partial: Path) -> None:
    if not partial.exists():
        return
    marker = partial / _MARKER
    if partial.is_dir() and not any(partial.iterdir()):
        # killed before it had its marker
        partial.rmdir()
        return
    if not marker.is_file():
        raise ConvertError(f"{partial}: is in the way and was not made by qconvert; remove it")
    with open(marker, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConvertError(f"{partial}: another conversion is writing it") from None
        shutil.rmtree(partial)


def _sync_directories(top: Path) -> None:
    for folder, _, _ in os.walk(top):
        _sync_directory(Path(folder))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
