"""The output directory: built as `OUT_DIR.partial`, flushed, then renamed. Nobody sees half of one.

A weight file that does not change is a hard link to the source's: the two directories share its
bytes, so neither may be edited in place. A shard with another header is its bytes, copied behind
that header. Every other file is copied. Nothing that is there is ever overwritten.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from qschema.checkpoint import PICKLES
from qschema.safetensors import Entry, ShardHeader
from qschema.strict import Json
from qvalidate.fix.repair import Repairs

_PARTIAL = ".partial"
_WEIGHTS = (".safetensors", ".gguf", *PICKLES)
_PIECE_NBYTES = 1 << 24
# where a hard link can't be: another device, a file system without, too many, not the owner's
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}
# what copy_file_range answers where it can't
_NO_RANGE_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


class FixError(ValueError):
    """The output can't be made; the message says why and what to do."""


def check_output(source: Path, output: Path) -> None:
    """Raise FixError if `output` is there, or lies in `source`, or has no directory to lie in."""
    target = output.absolute()
    partial = _partial(output)
    if output.exists() or output.is_symlink():
        raise FixError(f"{output}: exists; nothing is overwritten, give another name")
    if partial.exists() or partial.is_symlink():
        raise FixError(
            f"{partial}: is in the way: of a run that is not done, or was killed; then remove it"
        )
    if not target.parent.is_dir():
        raise FixError(f"{output}: the directory {target.parent} does not exist")
    if source.resolve() in target.parent.resolve().parents or (
        source.resolve() == target.parent.resolve()
    ):
        raise FixError(f"{output}: lies inside the checkpoint {source}")


def apply(repairs: Repairs, output: Path) -> list[str]:
    """Make the directory `output` of the repaired checkpoint; return notes for a person.

    Raises FixError if it can't be made, or if a shard is not the one whose header was read; OSError
    from the system. After an error there is no output and no partial one.
    """
    check_output(repairs.context.path, output)
    partial = _partial(output)
    # before the try: what another run makes at the same moment is not ours to remove
    partial.mkdir()
    try:
        notes = _fill(repairs, partial)
        for folder, _, _ in os.walk(partial):
            _flush_directory(Path(folder))
        if output.exists():
            raise FixError(f"{output}: exists by now; nothing is overwritten")
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush_directory(output.absolute().parent)
    return notes


def _partial(output: Path) -> Path:
    target = output.absolute()
    return target.with_name(target.name + _PARTIAL)


def _fill(repairs: Repairs, folder: Path) -> list[str]:
    """Write all files of the checkpoint into `folder`; return what is worth a note."""
    checkpoint, headers = repairs.context.checkpoint, repairs.headers or {}
    documents = repairs.documents or {}
    shards = {shard.file.name: shard for shard in checkpoint.shards}
    index = [checkpoint.index] if checkpoint.index else []
    names = [*shards, *checkpoint.stray_shards, *checkpoint.files, *index]
    unlinked: list[str] = []
    for name in sorted({*names, *documents} - set(repairs.left_out)):
        source, target = checkpoint.path / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in documents:
            _write(target, documents[name])
        elif name in headers:
            _rewrite(shards[name], target, headers[name])
        elif not name.endswith(_WEIGHTS):
            _copy(source, target)
        elif not _link(source, target):
            unlinked.append(name)
            _copy(source, target)
    notes = [f"{name}: was copied, a hard link is not possible there" for name in unlinked]
    return notes + [
        f"{name}: is hidden or a link to a folder, and was left out" for name in checkpoint.skipped
    ]


def _write(path: Path, document: Json) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=4, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _link(source: Path, target: Path) -> bool:
    """Return whether `target` is now a hard link to the file that `source` is or points to."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    return True


def _rewrite(shard: ShardHeader, target: Path, changes: Mapping[str, Entry]) -> None:
    """Write the shard's bytes behind a header in which `changes` hold; the places stay."""
    base = 8 + len(shard.raw)
    document: dict[str, object] = {"__metadata__": shard.metadata} if shard.metadata else {}
    for name, stored in shard.tensors.items():
        entry = changes.get(name, Entry(name, stored.dtype, stored.shape))
        begin = stored.offset - base
        document[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, begin + stored.nbytes],
        }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(shard.file, "rb", buffering=0) as reader, open(target, "xb") as writer:
        size = os.fstat(reader.fileno()).st_size
        if size != shard.file_nbytes or os.pread(reader.fileno(), base, 0)[8:] != shard.raw:
            raise FixError(f"{shard.file}: changed after its header was read; start again")
        writer.write(len(text).to_bytes(8, "little") + text)
        # all of it, or an error: what follows goes past this file's buffer
        writer.flush()
        _copy_range(reader.fileno(), writer.fileno(), base, size)
        os.fsync(writer.fileno())


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb", buffering=0) as reader, open(target, "xb", buffering=0) as writer:
        size = os.fstat(reader.fileno()).st_size
        _copy_range(reader.fileno(), writer.fileno(), 0, size)
        os.fsync(writer.fileno())


def _copy_range(reader: int, writer: int, begin: int, end: int) -> None:
    """Append the bytes [begin, end) of `reader` to `writer`; raises FixError if they end before."""
    in_kernel = True
    while begin < end:
        count = min(end - begin, _PIECE_NBYTES)
        try:
            done = os.copy_file_range(reader, writer, count, begin) if in_kernel else 0
        except OSError as error:
            if error.errno not in _NO_RANGE_COPY:
                raise
            in_kernel, done = False, 0
        if not done:
            piece = os.pread(reader, count, begin)
            if not piece:
                raise FixError("a file of the checkpoint became shorter while it was copied")
            done = os.write(writer, piece)
        begin += done


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
