"""Safetensors headers: what we lay out the library reads, and what it rejects we reject."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save

from qschema.dtypes import BITS
from qschema.safetensors import Entry, layout, read_header
from qschema.strict import DocumentError

EXAMPLES = Path(__file__).resolve().parents[2] / "fixtures" / "documents"
# where we are stricter than the library, on purpose: README "Format" forbids a key twice and a
# header that does not begin with `{`; unknown keys of a tensor hide typing errors
STRICTER = {"duplicate-name", "does-not-start-with-a-brace", "unknown-key"}

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    """Tensors of a whole number of bytes, at most 4 kB each."""
    names = draw(st.lists(NAMES, unique=True, max_size=6))
    shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
    made = []
    for name in names:
        dtype, shape = draw(st.sampled_from(sorted(BITS))), draw(shapes)
        made.append(Entry(name, dtype, (*shape, 8) if BITS[dtype] < 8 else shape))
    return made


def library_reads(path: Path) -> bool:
    """Returns the verdict of the safetensors library."""
    try:
        with safetensors.safe_open(path, "np"):
            return True
    except safetensors.SafetensorError:
        return False


def we_read(path: Path) -> bool:
    """Returns our verdict."""
    try:
        read_header(path)
    except DocumentError:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(entries(), st.dictionaries(NAMES, NAMES, max_size=3))
def test_library_reads_what_we_lay_out(tmp_path_factory, made, metadata):
    path = tmp_path_factory.mktemp("laid") / "model.safetensors"
    opening, spans = layout(made, metadata=metadata)
    path.write_bytes(opening + bytes(sum(nbytes for _, nbytes in spans.values())))

    header = read_header(path)
    with safetensors.safe_open(path, "np") as file:
        theirs = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no __iter__)
        seen = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in theirs.items()}
        assert (file.metadata() or {}) == metadata == header.metadata

    assert seen == {entry.name: (entry.dtype, entry.shape) for entry in made}
    assert seen == {name: (part.dtype, part.shape) for name, part in header.tensors.items()}
    assert {name: (part.offset, part.nbytes) for name, part in header.tensors.items()} == spans


NUMPY = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F8_E4M3": ml_dtypes.float8_e4m3fn}


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(NUMPY)), st.integers(0, 5))))
def test_we_read_and_lay_out_what_the_library_writes(tmp_path_factory, wanted):
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    made = [Entry(name, dtype, (2, size)) for name, (dtype, size) in wanted.items()]
    arrays = {entry.name: np.zeros(entry.shape, NUMPY[entry.dtype]) for entry in made}
    save_file(arrays, path)

    header = read_header(path)
    opening, _ = layout(made, metadata={})

    assert {part.name: part.dtype for part in header.tensors.values()} == {
        entry.name: entry.dtype for entry in made
    }
    assert path.read_bytes().startswith(opening)


SMALL = st.integers(-2, 9)
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F4", "F6_E2M3", "F64", "bf16", "X"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 4, -1, 2**32, 2**63, 2**64]), max_size=3),
        "data_offsets": st.lists(SMALL, min_size=2, max_size=2).map(sorted)
        | st.lists(SMALL, min_size=1, max_size=3),
    }
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), TENSORS, max_size=3), st.integers(0, 12))
def test_random_header_gets_the_verdict_of_the_library(tmp_path_factory, header, body):
    path = tmp_path_factory.mktemp("random") / "model.safetensors"
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(body))

    assert we_read(path) == library_reads(path)


@settings(max_examples=60, deadline=None)
@given(entries(), st.integers(-3, 3), st.data())
def test_damaged_file_gets_the_verdict_of_the_library(tmp_path_factory, made, more, data):
    """One byte of the header replaced, and up to 3 bytes more or fewer at the end."""
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    opening, spans = layout(made, metadata={})
    damaged = bytearray(opening)
    place = data.draw(st.integers(8, len(opening) - 1))
    damaged[place] = data.draw(st.sampled_from(b'0123456789{}[],:"- '))
    body = sum(nbytes for _, nbytes in spans.values()) + more
    path.write_bytes(bytes(damaged) + bytes(max(body, 0)))

    # the library may also read what the format forbids; never the other way round
    assert library_reads(path) or not we_read(path)


@pytest.mark.parametrize(
    "path", sorted((EXAMPLES / "positive" / "safetensors-header").iterdir()), ids=lambda p: p.stem
)
def test_library_reads_the_positive_examples(path):
    assert library_reads(path)


@pytest.mark.parametrize(
    "path",
    sorted((EXAMPLES / "negative" / "safetensors-header").glob("*.safetensors")),
    ids=lambda p: p.stem,
)
def test_library_rejects_the_attacks_too(path):
    assert library_reads(path) == (path.stem in STRICTER)


def test_layout_is_byte_for_byte_the_librarys() -> None:
    tensors = {
        "b.weight": torch.zeros(2, 3, dtype=torch.float8_e4m3fn),
        "a.weight": torch.zeros(3, dtype=torch.bfloat16),
        "c": torch.zeros(1, dtype=torch.float16),
        "z.scale": torch.zeros((), dtype=torch.float32),
        "ids": torch.zeros(2, dtype=torch.int64),
        "flag": torch.zeros(3, dtype=torch.bool),
        "\u00fc": torch.zeros(0, 4),
    }
    names = {
        torch.float8_e4m3fn: "F8_E4M3",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.float32: "F32",
        torch.int64: "I64",
        torch.bool: "BOOL",
    }
    entries = [Entry(name, names[t.dtype], tuple(t.shape)) for name, t in tensors.items()]

    opening, _ = layout(entries, metadata={"format": "pt"})

    assert save(tensors, metadata={"format": "pt"}).startswith(opening)
