"""The output directory: built as `out_dir.partial`, flushed, then renamed. Nobody sees half of one.

    out_dir.partial/
        model-*.safetensors      at their places and full sizes from the start
        .qconvert/lock           held while a run writes here
        .qconvert/journal        which units are done (qconvert.journal)
        .qconvert/old/N/journal  of a run by another plan, its shards in files/

What an interrupted run left is recognised by `.qconvert` without its lock held, and gone on from.
Anything else of that name is not ours, nor is a file there that no plan names: both are refused,
not removed. `.qconvert` goes last, after the rename: at whatever instant a run ends, the next one
knows what it finds.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from qconvert.errors import ConvertError, human, some
from qconvert.files import difference, named
from qconvert.journal import Header, Journal, Record, read_journal

_BOOKS = ".qconvert"
_LOCK = "lock"
_JOURNAL = "journal"
_OLD = "old"
_FILES = "files"
_PARTIAL = ".partial"


def check_paths(source: Path, output: Path, *, known: str = "") -> None:
    """Refuse an output that is not empty, or that contains the source or lies in it.

    One that holds the file `known` passes: it may be what an earlier run finished. Raises
    ConvertError; writes nothing.
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
    if inside == partial_path(output):
        raise ConvertError(f"{source}: is where {output} is built; give the output another name")
    if outside.name.endswith(_PARTIAL) and (output / _BOOKS).exists():
        raise ConvertError(
            f"{output}: is what an interrupted conversion left; to go on, give the output's own "
            f"name: {outside.name.removesuffix(_PARTIAL)}"
        )
    if os.path.ismount(output):
        raise ConvertError(
            f"{output}: is a mount point, which can't be renamed to; add a folder name"
        )
    if not (known and (output / known).is_file()):
        check_empty(output)
    parent = outside.parent
    if not parent.is_dir():
        raise ConvertError(f"{output}: the directory {parent} does not exist")


def check_empty(output: Path) -> None:
    """Raise ConvertError if the directory `output` is there and holds anything."""
    if output.is_dir() and any(output.iterdir()):
        raise ConvertError(f"{output}: exists and is not empty; nothing is overwritten")


def check_space(output: Path, nbytes: int) -> None:
    """Refuse what can't fit: raises ConvertError if the disk has less than `nbytes` free."""
    stats = os.statvfs(output.resolve().parent)
    free = stats.f_bavail * stats.f_frsize
    if free < nbytes:
        raise ConvertError(
            f"{output}: the result takes {human(nbytes)}, the disk has {human(free)} free"
        )


@dataclass
class Partial:
    """An output directory in the making, and what interrupted runs left in it."""

    path: Path
    journal: Journal
    lock: int
    # folders with what was written into them, those to prefer last
    before: list[tuple[Path, Mapping[str, Record]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of disk that the shards here take already."""
        return sum(entry.stat().st_blocks * 512 for entry in self.path.iterdir() if entry.is_file())


def partial_path(output: Path) -> Path:
    """Return where the output is built."""
    output = output.resolve()
    return output.with_name(output.name + _PARTIAL)


@contextmanager
def partial_directory(output: Path, header: Header, *, fresh: bool = False) -> Iterator[Partial]:
    """Yield `out_dir.partial`; rename it to `output` on success.

    On an error it stays for the next run if a unit was finished in it, and goes if not. Raises
    ConvertError if another run holds it, if it or a file in it is not the work of this tool, or if
    it was made from files that have changed since; with `fresh`, all that was there goes first.
    """
    output, path = output.resolve(), partial_path(output)
    lock = _lock(path)
    journal = None
    keep = (path / _BOOKS / _JOURNAL).exists() or (path / _BOOKS / _OLD).exists()
    try:
        # a run that ended meanwhile may have put it there
        check_empty(output)
        if fresh:
            _clear(path)
            keep = False
        before, notes = _look_back(path, header)
        keep = keep and bool(before)
        in_place = before[-1][1] if before and before[-1][0] == path else {}
        journal = Journal(path / _BOOKS / _JOURNAL, header, in_place.values())
        yield Partial(path, journal, lock, before, notes)
        _refuse_foreign(path, header, "")
        shutil.rmtree(path / _BOOKS / _OLD, ignore_errors=True)
        _sync_directories(path)
        with named(output):
            # an empty output directory is replaced, anything else makes this fail
            os.rename(path, output)
        sync_directory(output.parent)
    except BaseException:
        if not keep and (journal is None or not journal.num_records):
            _remove_directory(path)
        raise
    finally:
        if journal is not None:
            journal.close()
        os.close(lock)
    forget(output)


def forget(output: Path) -> None:
    """Remove the books of a run from `output`, which is complete."""
    shutil.rmtree(output / _BOOKS, ignore_errors=True)
    sync_directory(output)


def _lock(path: Path) -> int:
    """Return the descriptor of the lock on `path`, which is made if it is not there."""
    with suppress(FileExistsError):
        path.mkdir()
    books = path / _BOOKS
    others = [entry for entry in path.iterdir() if entry.name != _BOOKS] if path.is_dir() else []
    is_ours = books.is_dir() and not books.is_symlink()
    if not path.is_dir() or path.is_symlink() or (not is_ours and (others or books.exists())):
        raise ConvertError(f"{path}: is in the way and was not made by qconvert; remove it")
    books.mkdir(exist_ok=True)
    with named(books / _LOCK):
        lock = os.open(books / _LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(lock).st_ino == os.stat(books / _LOCK).st_ino
        except (BlockingIOError, FileNotFoundError):
            held = False
    if not held:
        os.close(lock)
        raise ConvertError(f"{path}: another conversion is writing it")
    return lock


def _look_back(
    path: Path, header: Header
) -> tuple[list[tuple[Path, Mapping[str, Record]]], list[str]]:
    """Return what earlier runs finished, by folder, and notes on what can't be used and why."""
    books = path / _BOOKS
    known, records = read_journal(books / _JOURNAL)
    notes = []
    hint = "; --fresh starts over"
    if known is None:
        records = {}
        if any(entry.name != _BOOKS for entry in path.iterdir()):
            notes.append(f"{path}: its journal is missing or damaged; starting over")
            hint = ", and its journal, which would name them, is damaged; --fresh removes all of it"
    elif known.tool != header.tool or known.vectors != header.vectors:
        what = f"qconvert {known.tool}" if known.tool != header.tool else "other statistics"
        notes.append(f"{path}: was begun with {what}; starting over")
        _remove_files(path, (*known.others, *known.shards))
        records = {}
    else:
        _check_source(path, known, header)
        if known.plan != header.plan:
            # first: what names them goes with the shards
            _remove_files(path, known.others)
            if records:
                notes.append(
                    f"{path}: the plan has changed since it was begun; what is the same is taken "
                    "over"
                )
                _set_aside(path, known)
            else:
                _remove_files(path, known.shards)
            records = {}
    _refuse_foreign(path, header, hint)
    before: list[tuple[Path, Mapping[str, Record]]] = []
    for folder in sorted(_generations(path), key=lambda folder: int(folder.name)):
        old, old_records = read_journal(folder / _JOURNAL)
        if old is not None and old.agrees(header):
            before.append((folder / _FILES, old_records))
    if records:
        before.append((path, records))
    return before, notes


def _check_source(path: Path, known: Header, header: Header) -> None:
    now = {state.file: state for state in header.source}
    for state in known.source:
        found = now.get(state.file)
        if found != state:
            problem = difference(state, found) if found else "is not there any more"
            raise ConvertError(
                f"{path}: was begun from other files than these: {state.file} {problem}; "
                "--fresh starts over"
            )
    if len(now) != len(known.source):
        raise ConvertError(f"{path}: was begun from fewer files; --fresh starts over")


def _refuse_foreign(path: Path, header: Header, hint: str) -> None:
    """Raise ConvertError for files that the plan doesn't name: they would be in the output."""
    expected = {*header.shards, *header.others}
    found = []
    for folder, folders, files in os.walk(path):
        if Path(folder) == path and _BOOKS in folders:
            folders.remove(_BOOKS)
        found += [str((Path(folder) / file).relative_to(path)) for file in files]
    foreign = sorted(set(found) - expected)
    if foreign:
        raise ConvertError(
            f"{path}: holds {some(foreign)}, no part of this conversion; move it away{hint}"
        )


def _set_aside(path: Path, known: Header) -> None:
    """Move shards and journal of a run by another plan to where this run can read them."""
    # one that was begun before and has no journal yet is gone on with
    done = [int(folder.name) for folder in _generations(path) if (folder / _JOURNAL).exists()]
    folder = path / _BOOKS / _OLD / str(max(done, default=0) + 1)
    (folder / _FILES).mkdir(parents=True, exist_ok=True)
    for shard in known.shards:
        with suppress(FileNotFoundError):
            os.rename(path / shard, folder / _FILES / shard)
    # last: killed before, the next run goes on with the rest
    os.rename(path / _BOOKS / _JOURNAL, folder / _JOURNAL)


def _generations(path: Path) -> list[Path]:
    old = path / _BOOKS / _OLD
    return [folder for folder in old.iterdir() if folder.name.isdecimal()] if old.is_dir() else []


def _remove_files(path: Path, names: Iterable[str]) -> None:
    """Remove what a run wrote that is not gone on from."""
    for name in names:
        (path / name).unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Remove everything but the lock, which is held."""
    for folder, spared in ((path, _BOOKS), (path / _BOOKS, _LOCK)):
        for entry in folder.iterdir():
            if entry.name == spared:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _remove_directory(path: Path) -> None:
    """Remove `path`, the lock last: after it, another run may be at work here."""
    with suppress(OSError):
        _clear(path)
        (path / _BOOKS / _LOCK).unlink()
        (path / _BOOKS).rmdir()
        path.rmdir()


def _sync_directories(top: Path) -> None:
    for folder, _, _ in os.walk(top):
        sync_directory(Path(folder))


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to disk."""
    with named(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
