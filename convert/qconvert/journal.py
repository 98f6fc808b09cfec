"""The journal of a conversion: which units are done, with the digest of every byte they wrote.

Lines of `<blake3 of the rest, 16 hex digits> <JSON>`: a header, then one record per finished unit,
appended after its bytes were handed to the kernel. A record promises nothing about the disk: who
goes on from it reads the bytes again and compares (`units.UnitWorker.take_over`), so a torn or
stale journal can cost work but not correctness. A damaged line counts as not written.

A unit is known by `unit_key`: everything that decides its bytes, nothing of where they go, so that
its bytes can be taken over under a changed plan too.
"""

import json
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from qschema.plan import Plan, Step, Unit

_VERSION = 1
_CHECK_DIGITS = 16


@dataclass(frozen=True)
class SourceFile:
    """What tells one state of a source file from another."""

    file: str
    nbytes: int
    mtime_ns: int
    # moves when bytes, links, owner or mode change, and can't be set back
    ctime_ns: int
    inode: int


@dataclass(frozen=True)
class Header:
    """What the records of a journal hold for; other values, other bytes. And what it writes."""

    tool: str
    plan: str
    vectors: str | None
    source: tuple[SourceFile, ...]
    # names of the shards and of the files beside them
    shards: tuple[str, ...]
    others: tuple[str, ...]

    def agrees(self, other: "Header") -> bool:
        """Return whether the same unit has the same bytes under both."""
        mine, theirs = ((header.tool, header.vectors, header.source) for header in (self, other))
        return mine == theirs


@dataclass(frozen=True, slots=True)
class StepDone:
    """What came of one step: a digest per output, and the counts and sums of its report."""

    digests: tuple[str, ...] = ()
    num_nonfinite: int | None = None
    num_saturated: int | None = None
    # sum((w - dequantized)^2), sum(w^2)
    error: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One finished unit: per step what came of it, and where (file, offset) its outputs lie."""

    key: str
    steps: tuple[StepDone, ...]
    places: tuple[tuple[tuple[str, int], ...], ...]


def header_of(plan: Plan, digest: str, source: Iterable[SourceFile]) -> Header:
    """Return the header of a conversion by `plan`, whose digest is given."""
    return Header(
        tool=plan.tool.version,
        plan=digest,
        vectors=plan.vectors,
        source=tuple(source),
        shards=tuple(shard.file for shard in plan.shards),
        others=tuple(side.file for side in plan.side_files if side.action != "leave"),
    )


def unit_key(unit: Unit, *, digest: str) -> str:
    """Return what names the bytes of `unit`, wherever they are written; `digest`: its algorithm."""
    content = [digest, *(_content(step) for step in unit.steps)]
    return blake3(json.dumps(content, separators=(",", ":")).encode()).hexdigest(16)


def _content(step: Step) -> list[Any]:
    source = step.source
    return [
        [source.file, source.dtype, source.shape, source.offset, source.nbytes],
        # what a fold is for is in its scalings; the part decides nothing that the offset does not
        [step.action, step.algo, step.transposed, step.input_amax],
        [scaling.model_dump(mode="json") for scaling in step.scalings],
        step.smoothing and step.smoothing.model_dump(mode="json"),
        # a bias or a mask may hold what a weight may not
        source.name,
        [[output.suffix, output.dtype, output.shape] for output in step.outputs],
    ]


def record_of(unit: Unit, done: Iterable[StepDone], *, digest: str) -> Record:
    """Return the record of a finished unit."""
    places = tuple(
        tuple((output.file, output.offset) for output in step.outputs) for step in unit.steps
    )
    return Record(unit_key(unit, digest=digest), tuple(done), places)


class Journal:
    """A journal that is being written. Thread safe."""

    def __init__(self, path: Path, header: Header, records: Iterable[Record] = ()) -> None:
        """Begin `path` anew with `header` and what is known to be written already."""
        fresh = path.with_name(f"{path.name}.new")
        with open(fresh, "wb") as file:
            file.write(_line({"version": _VERSION, **asdict(header)}))
            for record in records:
                file.write(_line(asdict(record)))
            file.flush()
            os.fsync(file.fileno())
        os.rename(fresh, path)
        self._path = path
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        self.num_records = 0

    def append(self, record: Record) -> None:
        """Add a finished unit. Raises OSError with the file's name."""
        line = _line(asdict(record))
        with self._lock:
            try:
                written = os.write(self._descriptor, line)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from None
            self.num_records += 1
            if written != len(line):
                # the rest of a torn line begins with a line break, so that the next one counts
                os.write(self._descriptor, b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_journal(path: Path) -> tuple[Header | None, dict[str, Record]]:
    """Return the header and key -> record of the journal at `path`; None and {} if it has no head.

    Lines that are torn or damaged are left out.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return None, {}
    head = _parsed(lines[0])
    if head is None or head.pop("version", None) != _VERSION:
        return None, {}
    records = {}
    try:
        source = tuple(SourceFile(**entry) for entry in head.pop("source"))
        shards, others = tuple(head.pop("shards")), tuple(head.pop("others"))
        header = Header(source=source, shards=shards, others=others, **head)
        for line in lines[1:]:
            found = _parsed(line)
            if found is not None:
                record = _record(found)
                records[record.key] = record
    except (KeyError, TypeError, ValueError):
        # whole by its checksum, but not ours: another version's
        return None, {}
    return header, records


def _record(found: dict[str, Any]) -> Record:
    steps = tuple(
        StepDone(
            tuple(step["digests"]),
            step["num_nonfinite"],
            step["num_saturated"],
            None if step["error"] is None else (step["error"][0], step["error"][1]),
        )
        for step in found["steps"]
    )
    places = tuple(tuple((file, offset) for file, offset in step) for step in found["places"])
    return Record(found["key"], steps, places)


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":")).encode()
    return blake3(text).hexdigest()[:_CHECK_DIGITS].encode() + b" " + text + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    check, text = line[:_CHECK_DIGITS], line[_CHECK_DIGITS + 1 :]
    if not text or blake3(text).hexdigest()[:_CHECK_DIGITS].encode() != check:
        return None
    found = json.loads(text)
    return found if isinstance(found, dict) else None
