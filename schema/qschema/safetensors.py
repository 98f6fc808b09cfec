"""The header of a safetensors file: read, checked, laid out and written. No tensor is read.

    [u64 little endian: n][n bytes of JSON, padded with spaces to 8][tensor bytes]

Source: safetensors 0.8.0, README "Format" and safetensors/src/tensor.rs: header at most 100 MB,
begins with `{`, no duplicate names, offsets relative to the end of the header, no holes and no
overlap.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, Field, model_validator

from qschema.dtypes import BITS, nbytes
from qschema.strict import DocumentError, Strict, parse_json, violation

MAX_HEADER_NBYTES = 100_000_000
# the library counts elements and bits in 64 bits and rejects what overflows, also before a zero
_MAX_COUNT = 2**64 - 1


class TensorInfo(Strict):
    """One tensor of a header: `data_offsets` are [begin, end) after the header."""

    dtype: str = Field(json_schema_extra={"enum": list(BITS)})
    shape: list[int] = Field(json_schema_extra={"items": {"type": "integer", "minimum": 0}})
    data_offsets: list[int] = Field(
        min_length=2, max_length=2, json_schema_extra={"items": {"type": "integer", "minimum": 0}}
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TensorInfo":
        if self.dtype not in BITS:
            raise violation(
                "safetensors-dtype", f"unknown dtype {self.dtype!r}; known: {', '.join(BITS)}"
            )
        num_bits = _num_bits(self.dtype, self.shape)
        begin, end = self.data_offsets
        if begin < 0:
            raise violation(
                "safetensors-offsets", f"data_offsets [{begin}, {end}] begin before the data"
            )
        if (end - begin) * 8 != num_bits:
            raise violation(
                "safetensors-offsets",
                f"data_offsets [{begin}, {end}] span {end - begin} bytes, "
                f"{self.dtype} {self.shape} takes {num_bits // 8}",
            )
        return self


def _num_bits(dtype: str, shape: list[int]) -> int:
    if any(size < 0 for size in shape):
        raise violation("safetensors-shape", f"shape {shape} has a negative size")
    num_elements = 1
    for size in shape:
        num_elements *= size
        if max(num_elements, size) > _MAX_COUNT:
            raise violation("safetensors-shape", f"shape {shape} has 2**64 elements or more")
    num_bits = num_elements * BITS[dtype]
    if num_bits > _MAX_COUNT:
        raise violation("safetensors-shape", f"{dtype} {shape} takes 2**64 bits or more")
    if num_bits % 8:
        raise violation(
            "safetensors-shape", f"{dtype} {shape} takes {num_bits} bits, expected whole bytes"
        )
    return num_bits


class Header(Strict):
    """A safetensors header as JSON: one entry per tensor, and `__metadata__` with string values."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, TensorInfo]

    metadata: dict[str, str] = Field(default_factory=dict, alias="__metadata__")

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors by name, in the order of the file's JSON."""
        return self.__pydantic_extra__

    @model_validator(mode="after")
    def _contiguous(self) -> "Header":
        position = 0
        for name, info in sorted(self.tensors.items(), key=lambda item: item[1].data_offsets):
            begin, end = info.data_offsets
            if begin != position:
                rule, problem = (
                    ("safetensors-overlap", "overlaps the tensor before it")
                    if begin < position
                    else ("safetensors-hole", "leaves a hole")
                )
                raise violation(
                    rule, f"tensor {name!r} begins at byte {begin}, expected {position}: {problem}"
                )
            position = end
        return self


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies: absolute byte `offset` in `file`."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ShardHeader:
    """What the header of one file says, with absolute offsets; `raw` is the header's JSON bytes."""

    file: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]
    raw: bytes
    file_nbytes: int


def read_header(path: Path) -> ShardHeader:
    """Return the checked header of the safetensors file at `path`, reading nothing else.

    Raises DocumentError for a file that is too short, a header over 100 MB, text that is not JSON,
    a name twice, an unknown dtype, offsets that overlap, leave holes or do not match the shape, and
    a file whose size is not header + tensors (a truncated download, or an LFS pointer).
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if prefix.startswith(b"version"):
            raise DocumentError.of(
                path, "", "safetensors-lfs-pointer", "is a Git LFS pointer; run `git lfs pull`"
            )
        if len(prefix) < 8:
            raise DocumentError.of(
                path,
                "",
                "safetensors-truncated",
                f"has {size} bytes, the header length alone takes 8",
            )
        header_nbytes = int.from_bytes(prefix, "little")
        if header_nbytes > MAX_HEADER_NBYTES:
            raise DocumentError.of(
                path,
                "",
                "safetensors-header-size",
                f"header of {header_nbytes} bytes, at most {MAX_HEADER_NBYTES} are allowed; "
                "not a safetensors file, or damaged",
            )
        raw = file.read(header_nbytes)
    if len(raw) < header_nbytes:
        raise DocumentError.of(
            path,
            "",
            "safetensors-truncated",
            f"has {size} bytes, its header alone needs {8 + header_nbytes}",
        )
    header = parse_header(raw, file=str(path))
    base = 8 + header_nbytes
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    stored = {
        name: Stored(
            file=path,
            name=name,
            # one object for all tensors that have it
            dtype=sys.intern(info.dtype),
            shape=shapes.setdefault(shape := tuple(info.shape), shape),
            offset=base + info.data_offsets[0],
            nbytes=info.data_offsets[1] - info.data_offsets[0],
        )
        for name, info in header.tensors.items()
    }
    expected = max((tensor.offset + tensor.nbytes for tensor in stored.values()), default=base)
    if size != expected:
        rule, problem = (
            ("safetensors-truncated", "truncated?")
            if size < expected
            else ("safetensors-trailing-bytes", "bytes follow the last tensor")
        )
        raise DocumentError.of(
            path, "", rule, f"has {size} bytes, its header describes {expected}: {problem}"
        )
    return ShardHeader(
        file=path, tensors=stored, metadata=header.metadata, raw=raw, file_nbytes=size
    )


def parse_header(raw: bytes, *, file: str) -> Header:
    """Return the model of a header's JSON bytes; raises DocumentError naming `file`."""
    if not raw.startswith(b"{"):
        raise DocumentError.of(
            file, "", "safetensors-header-start", "header does not begin with '{'"
        )
    return Header.parse(parse_json(raw.rstrip(b" "), file=file), file=file)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written: its place in a file follows from `layout`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def layout(
    entries: Sequence[Entry], *, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the bytes that open a file (length and header) and tensors' absolute (offset, nbytes).

    Byte for byte what the safetensors library writes for these tensors: dtypes in falling order of
    its enum (the widest first, so that every tensor starts aligned), then by name. The result does
    not depend on the order of `entries`.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(BITS)}
    ordered = sorted(entries, key=lambda entry: (-ranks[entry.dtype], entry.name))
    document: dict[str, object] = {}
    if metadata:
        document["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    spans: dict[str, tuple[int, int]] = {}
    for entry in ordered:
        end = position + nbytes(entry.dtype, entry.shape)
        document[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        spans[entry.name] = (position, end)
        position = end
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    opening = len(text).to_bytes(8, "little") + text
    base = len(opening)
    return opening, {name: (base + begin, end - begin) for name, (begin, end) in spans.items()}
